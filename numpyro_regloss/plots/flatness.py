# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""How flat is the minimum?"""

from typing import Any

import numpy as np

from numpyro_regloss.plots.style import ENTROPY, GRAY, HEAT, band, check_axes
from numpyro_regloss.values.flatness import SCALE_WORDS, Profile

__all__ = ["profile"]


def profile(report: Profile, ax: Any = None) -> Any:
    """How flat the minimum is: the rise of both regularized losses over the width of the regularizer.

    Bands are two standard errors. A line is dotted where a regularized loss is below the plain one: then there are
    lower losses within reach.

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
    for style, marker, rise, error in (
        (ENTROPY, "o", report.local_entropy_rise, report.local_entropy.error),
        (HEAT, "s", report.heat_rise, report.heat.error),
    ):
        rise, error = np.asarray(rise)[order], np.asarray(error)[order]
        band(ax, width, rise, error, marker=marker, markersize=3.5, **style)
    ax.axhline(0.0, color=GRAY, lw=0.8, ls=":")
    ax.set_xscale("log")
    unit = f"relative to {SCALE_WORDS[report.scale]}" if report.scale else "units of the parameters"
    ax.set_xlabel(f"width of the regularizer, sqrt(tau) ({unit})")
    ax.set_ylabel("regularized loss − loss (units of the loss)")
    ax.legend(frameon=False)
    return ax
