# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Step 3: how the fitted Gaussian becomes the next reference."""

from numpyro_regloss.anchor.adapt_tau import AdaptTau, AdaptTauInfo, AdaptTauState
from numpyro_regloss.anchor.anderson import Anderson, AndersonState
from numpyro_regloss.anchor.base import Anchor, AnchorInfo
from numpyro_regloss.anchor.keep_covariance import KeepCovariance, KeepCovarianceInfo
from numpyro_regloss.anchor.newton import Newton, NewtonState
from numpyro_regloss.anchor.optax import Optax, OptaxInfo
from numpyro_regloss.anchor.proximal import Proximal
from numpyro_regloss.anchor.safeguard import AcceleratedInfo

__all__ = [
    "AcceleratedInfo",
    "AdaptTau",
    "AdaptTauInfo",
    "AdaptTauState",
    "Anchor",
    "AnchorInfo",
    "Anderson",
    "AndersonState",
    "KeepCovariance",
    "KeepCovarianceInfo",
    "Newton",
    "NewtonState",
    "Optax",
    "OptaxInfo",
    "Proximal",
]
