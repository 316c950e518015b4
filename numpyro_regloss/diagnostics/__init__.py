# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""How good a Gaussian is, and how well a run went."""

from numpyro_regloss.diagnostics.arrival import Finding
from numpyro_regloss.diagnostics.distance import GaussianFit, gaussian_fit
from numpyro_regloss.diagnostics.report import DrawsSummary, RunSummary, summary

__all__ = [
    "DrawsSummary",
    "Finding",
    "GaussianFit",
    "RunSummary",
    "gaussian_fit",
    "summary",
]
