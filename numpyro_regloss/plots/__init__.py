# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Figures, one function per question, on axes of matplotlib; a call imports it.

Each takes the result of a run, or a report, draws on the given axes or on new ones, and returns the axes. The
colors are those of Okabe and Ito; markers and line styles make the same distinctions without color.
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
