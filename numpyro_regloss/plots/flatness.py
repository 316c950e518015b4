# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""How flat is the minimum?"""

from typing import Any

import numpy as np

from numpyro_regloss.plots.style import (
    BLACK,
    ENTROPY,
    GRAY,
    HEAT,
    WIDE,
    band,
    check_axes,
    finite,
    use_log_scale,
    use_signed_log_scale,
)
from numpyro_regloss.values.flatness import SCALE_WORDS, Profile, is_known

__all__ = ["profile"]

UNSURE = "not to be trusted"
# Of the largest rise; below, an axis of both signs is linear.
LEAST_SHOWN = 1e-6


def profile(report: Profile, ax: Any = None) -> Any:
    """How flat the minimum is: the rise of both regularized losses over the width of the regularizer.

    Bands are two standard errors. Crosses mark values that are not to be trusted: their k-hat is above 0.7, or
    their error is not known. The vertical axis is logarithmic if the rises are far apart. If some are not
    positive, it is linear near zero, and a dotted line marks zero: where a regularized loss is below the plain
    one, there are lower losses within reach.

    Args:
        report: from `values.profile`.
        ax: matplotlib axes to draw on; default: new ones.

    Returns:
        The axes.

    Raises:
        TypeError: if the report is of another kind.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_regloss import Loss, values
        >>> loss = Loss.from_function(lambda x: 0.5 * jnp.sum(x**2), jnp.zeros(2))
        >>> ax = profile(values.profile(random.key(0), loss, taus=[0.01, 0.1, 1.0]))
        >>> ax.get_xscale()
        'log'
    """
    if not isinstance(report, Profile):
        raise TypeError(
            f"plots.profile: expected the report of values.profile, got {type(report).__name__}."
        )
    ax = check_axes(ax, (1, 1), (6.5, 3.8), "plots.profile")[0, 0]
    order = np.argsort(report.tau)
    width = np.sqrt(np.asarray(report.tau))[order]
    for style, marker, rise, estimate in (
        (ENTROPY, "o", report.local_entropy_rise, report.local_entropy),
        (HEAT, "s", report.heat_rise, report.heat),
    ):
        rise, error = np.asarray(rise)[order], np.asarray(estimate.error)[order]
        band(ax, width, rise, error, marker=marker, markersize=3.5, **style)
        unsure = ~is_known(estimate)[order] & np.isfinite(rise)
        if unsure.any():
            named = UNSURE in ax.get_legend_handles_labels()[1]
            label = None if named else UNSURE
            ax.plot(width[unsure], rise[unsure], "x", color=BLACK, markersize=8, label=label)
    _scale(ax)
    ax.set_xscale("log")
    unit = f"relative to {SCALE_WORDS[report.scale]}" if report.scale else "units of the parameters"
    ax.set_xlabel(f"width of the regularizer, sqrt(tau) ({unit})")
    ax.set_ylabel("regularized loss − loss (units of the loss)")
    ax.legend(frameon=False)
    return ax


def _scale(ax: Any) -> None:
    # Of all curves, those of earlier reports on the same axes among them.
    named = [line for line in ax.lines if not line.get_label().startswith("_")]
    rises = np.concatenate([finite(line.get_ydata()) for line in named])
    rises = rises[np.isfinite(rises)]
    use_log_scale(ax, rises)
    if rises.size and rises.min() > 0:
        return
    ax.axhline(0.0, color=GRAY, lw=0.8, ls=":")
    size = np.abs(rises[rises != 0])
    if size.size and size.max() > WIDE * size.min():
        use_signed_log_scale(ax, max(size.min(), LEAST_SHOWN * size.max()))
