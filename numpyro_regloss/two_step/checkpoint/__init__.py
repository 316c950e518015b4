# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Runs that survive the end of their process."""

from numpyro_regloss.two_step.checkpoint.settings import Checkpoint

__all__ = ["Checkpoint"]
