# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Score matching: the Gaussian of least Fisher divergence."""

from numpyro_regloss.fit.score_matching.engine import ScoreMatching, ScoreMatchingInfo
from numpyro_regloss.fit.score_matching.stand_alone import score_matching

__all__ = ["ScoreMatching", "ScoreMatchingInfo", "score_matching"]
