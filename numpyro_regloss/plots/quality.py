# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Was each shift sampled well?"""

from typing import Any, NamedTuple

import numpy as np

from numpyro_regloss._core.pareto import MAX_KHAT
from numpyro_regloss._core.pytree import fields_of
from numpyro_regloss.diagnostics.findings import LEAST_ACCEPTANCE, LEAST_ESS, MAX_RHAT
from numpyro_regloss.plots.style import (
    BLACK,
    VERMILION,
    check_axes,
    finite,
    history_of,
    legend_above,
    mark_infinite,
    mark_rejected,
    marker_of,
    over_steps,
    use_log_scale,
)

__all__ = ["shift_quality"]

WHAT = "plots.shift_quality"


class Panel(NamedTuple):
    """One number of an engine's info: how it is called, and the limit beyond which it is bad news."""

    label: str
    limit: float | None = None
    meaning: str = ""


# In the order of the panels, with the limits of `diagnostics.summary`; what an engine does not report, what never
# changes, and counts of what never came are left out.
PANELS = {
    "ess": Panel("effective\nsample size", LEAST_ESS, "below, too few"),
    "rhat": Panel("split R-hat", MAX_RHAT, "above, chains disagree"),
    "khat": Panel("Pareto k-hat", MAX_KHAT, "above, not to be trusted"),
    "accept_prob": Panel("acceptance", LEAST_ACCEPTANCE, "below, too low"),
    "num_divergent": Panel("divergent\ntransitions", 0.0, "none expected"),
    "stability": Panel("step size\n× curvature", 2.0, "above, unstable"),
    "growth": Panel("growth of\nthe moves", 1.0, "steady"),
    "num_rejected": Panel("rejected\nevaluations", 0.0, "none expected"),
    "num_rounds": Panel("rounds"),
    "num_stages": Panel("rungs of\nthe ladder"),
    "temperature": Panel("temperature\n(units of the loss)"),
}
# Shown although they are the same at all steps.
ALWAYS = ("ess", "rhat", "khat", "accept_prob", "stability")
# Counts of what should not be: none at all has no panel.
COUNTS = ("num_divergent", "num_rejected")


def shift_quality(result: Any, axes: Any = None) -> np.ndarray:
    r"""Was each shift sampled well?

    There is one panel for each diagnostic that the engine reports: effective sample size, R-hat or k-hat,
    acceptance, divergences and others, over steps. Divergent transitions and rejected evaluations have a panel if
    there were some. Dashed lines are the limits of good sampling. Values that are
    infinite are triangles at the edge; crosses mark rejected steps.

    Args:
        result: of `TwoStep.run`, or its history alone.
        axes: axes of matplotlib, as many as there are panels; default: new ones.

    Returns:
        The axes, `(panel,)`.

    Raises:
        ValueError: if the engine made no draws.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_regloss import Loss, TwoStep, fit, shift
        >>> loss = Loss.from_function(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(2))
        >>> optimizer = TwoStep(loss, 0.5, shift=shift.Importance(100), fit=fit.ForwardKL())
        >>> axes = shift_quality(optimizer.run(random.key(0), 5, progress_bar=False))
        >>> [ax.get_ylabel() for ax in axes]
        ['effective\nsample size', 'Pareto k-hat']
    """
    history = history_of(result, WHAT)
    info = history.shift
    found = fields_of(info)
    found |= fields_of(found.get("engine"))  # rounds of another one
    found = {
        name: np.asarray(found[name], float)
        for name in PANELS
        if name in found
        and (name in ALWAYS or np.ptp(found[name]) > 0 or (name in COUNTS and np.any(found[name])))
    }
    # NaN at all steps: `Auto` has fields of two engines, and used one of them.
    found = {name: values for name, values in found.items() if not np.isnan(values).all()}
    if not found:
        raise ValueError(
            f"{WHAT}: expected a run whose shift makes draws, got {type(info).__name__}; the fit has its own "
            "in result.history.fit."
        )
    size = (7.5, 0.6 + 1.7 * len(found))
    axes = check_axes(axes, (len(found), 1), size, WHAT, sharex=True).ravel()
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    steps = np.arange(len(history.ok))
    for ax, (name, values) in zip(axes, found.items(), strict=True):
        panel = PANELS[name]
        ax.plot(steps, finite(values), color=BLACK, marker=marker_of(steps), linewidth=1.0)
        use_log_scale(ax, np.where(values > 0, values, np.nan) if name == "growth" else values)
        if panel.limit is not None:
            ax.axhline(
                panel.limit,
                color=VERMILION,
                linestyle="--",
                linewidth=1.0,
                label=f"{panel.limit:g}: {panel.meaning}",
            )
        if name in COUNTS:
            ax.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        mark_infinite(ax, steps, values, color=BLACK)
        mark_rejected(ax, history, label=ax is axes[0])
        ax.set_ylabel(panel.label)
        legend_above(ax)
    over_steps(axes, steps, "step")
    return axes
