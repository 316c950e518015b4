# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Figures, one function per question; matplotlib is imported when one is called."""

from typing import Any

import numpy as np

from numpyro_regloss._profile import Profile

__all__ = ["profile"]

# Of the colour-blind safe palette of Okabe and Ito: blue and vermilion.
COLORS = ("#0072B2", "#D55E00")


def profile(report: Profile, ax: Any = None) -> Any:
    """How flat the minimum is: the rise of both regularized losses over the width of the regularizer.

    Bands are two standard errors. Dotted, where a loss falls below the plain one, there is lower ground in reach.

    Args:
        report: from `values.profile`.
        ax: matplotlib axes to draw on; default: new ones.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError: if the report is of another kind.
    """
    if not isinstance(report, Profile):
        raise TypeError(
            f"plots.profile: expected the report of values.profile, got {type(report).__name__}."
        )
    if ax is None:
        ax = _new_axes()
    order = np.argsort(report.tau)
    width = np.sqrt(np.asarray(report.tau))[order]
    curves = (
        ("local entropy", report.local_entropy_rise, report.local_entropy.error),
        ("heat", report.heat_rise, report.heat.error),
    )
    for color, (label, rise, error) in zip(COLORS, curves, strict=True):
        rise, error = np.asarray(rise)[order], np.asarray(error)[order]
        error = np.where(np.isfinite(error), error, np.nan)
        ax.plot(width, rise, color=color, label=label, marker="o", markersize=3)
        ax.fill_between(width, rise - 2 * error, rise + 2 * error, color=color, alpha=0.2, lw=0)
    ax.axhline(0.0, color="0.5", lw=0.8, ls=":")
    ax.set_xscale("log")
    ax.set_xlabel("width of the regularizer, sqrt(tau) (units of the parameters)")
    ax.set_ylabel("regularized loss − loss (units of the loss)")
    ax.legend(frameon=False)
    return ax


def _new_axes() -> Any:
    try:
        from matplotlib import pyplot as plt  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "plots.profile: needs matplotlib; install numpyro_regloss[plots]."
        ) from error
    return plt.subplots(figsize=(5.5, 3.8), layout="constrained")[1]
