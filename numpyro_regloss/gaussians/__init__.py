# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Gaussians as references and as fits, and the families that they come from."""

from numpyro_regloss.gaussians.gaussian import Gaussian, kl_divergence
from numpyro_regloss.gaussians.low_rank import LowRankGaussian

__all__ = ["Gaussian", "LowRankGaussian", "kl_divergence"]
