# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Figures, one function per question, on axes of matplotlib, which is imported when one is called.

Each takes what a run or a report left behind, draws on the axes that it is given or on new ones, and returns them.
Colors are those of Okabe and Ito; markers and line styles tell the same without color.
"""

from numpyro_regloss.plots.flatness import profile
from numpyro_regloss.plots.grid import landscape
from numpyro_regloss.plots.pair import gaussian_pair
from numpyro_regloss.plots.path import trajectory
from numpyro_regloss.plots.progress import optimization
from numpyro_regloss.plots.quality import shift_quality

__all__ = [
    "gaussian_pair",
    "landscape",
    "optimization",
    "profile",
    "shift_quality",
    "trajectory",
]
