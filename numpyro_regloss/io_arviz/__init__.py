# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Runs and Gaussians as ArviZ datasets."""

from numpyro_regloss.io_arviz.convert import gaussian_to_arviz, to_arviz

__all__ = ["gaussian_to_arviz", "to_arviz"]
