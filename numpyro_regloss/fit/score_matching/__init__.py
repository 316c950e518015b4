# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Score matching: the Gaussian of least Fisher divergence."""

from numpyro_regloss.fit.score_matching.engine import ScoreMatching, ScoreMatchingInfo

__all__ = ["ScoreMatching", "ScoreMatchingInfo"]
