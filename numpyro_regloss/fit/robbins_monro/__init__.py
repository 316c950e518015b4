# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The best Gaussian of fixed covariance, by stochastic approximation."""

from numpyro_regloss.fit.robbins_monro.engine import (
    RobbinsMonro,
    RobbinsMonroInfo,
    RobbinsMonroState,
)

__all__ = ["RobbinsMonro", "RobbinsMonroInfo", "RobbinsMonroState"]
