# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Figures, one function per question, on axes of matplotlib, which is imported when one is called.

Each takes what a run or a report left behind, draws on the axes that it is given or on new ones, and returns them.
Colors are those of Okabe and Ito; markers and line styles tell the same without color.
"""

from numpyro_regloss.plots._gaussian_pair import gaussian_pair
from numpyro_regloss.plots._landscape import landscape
from numpyro_regloss.plots._optimization import optimization
from numpyro_regloss.plots._profile import profile
from numpyro_regloss.plots._shift_quality import shift_quality
from numpyro_regloss.plots._trajectory import trajectory

__all__ = [
    "gaussian_pair",
    "landscape",
    "optimization",
    "profile",
    "shift_quality",
    "trajectory",
]
