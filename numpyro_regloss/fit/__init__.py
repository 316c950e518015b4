# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Step 2: the best Gaussian, in KL by either argument or in Fisher divergence."""

from numpyro_regloss.fit.base import Fit, FitInfo, FitResult
from numpyro_regloss.fit.forward_kl import ForwardKL, ForwardKLInfo
from numpyro_regloss.fit.reverse_kl import ReverseKL, ReverseKLInfo, ReverseKLState
from numpyro_regloss.fit.robbins_monro import RobbinsMonro, RobbinsMonroInfo, RobbinsMonroState
from numpyro_regloss.fit.score_matching import ScoreMatching, ScoreMatchingInfo

__all__ = [
    "Fit",
    "FitInfo",
    "FitResult",
    "ForwardKL",
    "ForwardKLInfo",
    "ReverseKL",
    "ReverseKLInfo",
    "ReverseKLState",
    "RobbinsMonro",
    "RobbinsMonroInfo",
    "RobbinsMonroState",
    "ScoreMatching",
    "ScoreMatchingInfo",
]
