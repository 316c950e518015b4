# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Did the run get anywhere, and was each step progress?"""

from typing import Any

import numpy as np

from numpyro_regloss.fit.base import FitInfo
from numpyro_regloss.plots.style import (
    BLACK,
    BLUE,
    ENTROPY,
    GRAY,
    GREEN,
    HEAT,
    LOSS,
    SIGMAS,
    VERMILION,
    band,
    centers_of,
    check_axes,
    finite,
    history_of,
    legend_above,
    mark_rejected,
    marker_of,
    over_steps,
    shade,
    use_log_scale,
    use_signed_log_scale,
)
from numpyro_regloss.two_step.outer_step import TwoStepInfo

__all__ = ["optimization"]

WHAT = "plots.optimization"
# Of the largest decrease; below, the axis is linear.
LEAST_SHOWN = 1e-4
# Verdict of a record: how it is drawn.
VERDICTS = {
    1: {"color": GREEN, "marker": "v", "label": "decrease"},
    0: {"color": GRAY, "marker": "o", "markerfacecolor": "white", "label": "not distinguishable"},
    -1: {"color": VERMILION, "marker": "^", "label": "increase"},
}


def optimization(result: Any, axes: Any = None) -> np.ndarray:
    r"""Did the run get anywhere, and was each step progress?

    There are two or three panels over steps. The first has the losses at the centre: the plain loss (of a
    minibatch if there is one), and with a `Record` of values F_tau and F^H_tau, with bands of two standard errors.
    The second has the progress of each step. With a `Record` this is the decrease of the regularized loss and its
    verdict, with bars of two standard errors. Otherwise it is the length of the step and the Monte Carlo error of
    the fitted mean: a step of that length may be noise. The third has the variance of the regularizer; there is
    none if the variance is the same at all steps. Crosses mark rejected steps.

    Args:
        result: of `TwoStep.run`, or its history alone.
        axes: axes of matplotlib, as many as there are panels; default: new ones.

    Returns:
        The axes, `(2,)`, or `(3,)` if tau changes.

    Raises:
        TypeError: if the result is of another kind.
        ValueError: if there are more or fewer axes than panels, or the history has no axis of steps.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_regloss import Loss, TwoStep, fit, shift
        >>> loss = Loss.from_function(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(2))
        >>> optimizer = TwoStep(loss, 0.5, shift=shift.Importance(100), fit=fit.ForwardKL())
        >>> axes = optimization(optimizer.run(random.key(0), 5, progress_bar=False))
        >>> [ax.get_ylabel().split("\n")[0] for ax in axes]
        ['value at the centre', 'length of the step']
    """
    history = history_of(result, WHAT)
    changes = bool(np.any(np.ptp(history.tau, axis=0) != 0))
    why = (
        "values, progress and tau"
        if changes
        else "values and progress; tau, which is constant, has none"
    )
    count = 2 + changes
    size = (7.5, 0.4 + 2.2 * count)
    axes = check_axes(axes, (count, 1), size, WHAT, why=why, sharex=True).ravel()
    steps = np.arange(len(history.ok))
    _losses(axes[0], steps, history)
    if history.record is None or history.record.decrease is None:
        _step_length(axes[1], result, history)
    else:
        _decrease(axes[1], steps, history.record)
    if changes:
        _tau(axes[2], steps, history.tau)
    for ax in axes:
        mark_rejected(ax, history, label=ax is axes[0])
        legend_above(ax)
    over_steps(axes, steps, "step")
    return axes


def _losses(ax: Any, steps: np.ndarray, history: TwoStepInfo) -> None:
    shown = [history.loss]
    ax.plot(steps, finite(history.loss), marker=marker_of(steps), **LOSS)
    if history.record is not None:
        for estimate, style, sign in (
            (history.record.local_entropy, ENTROPY, "o"),
            (history.record.heat, HEAT, "s"),
        ):
            # Values may be known at an interval only.
            known = np.isfinite(estimate.value)
            if known.any():
                value, error = np.asarray(estimate.value)[known], np.asarray(estimate.error)[known]
                band(ax, steps[known], value, error, marker=sign, markersize=3.5, **style)
                shown.append(value)
    use_log_scale(ax, *shown)
    ax.set_ylabel("value at the centre\n(units of the loss)")


def _decrease(ax: Any, steps: np.ndarray, record: Any) -> None:
    value, error = finite(record.decrease), SIGMAS * finite(record.decrease_error)
    ax.errorbar(steps, value, error, fmt="none", ecolor=GRAY, elinewidth=0.8)
    for verdict, style in VERDICTS.items():
        at = (np.asarray(record.verdict) == verdict) & np.isfinite(value)
        if at.any():
            ax.plot(steps[at], value[at], linestyle="none", markersize=5, **style)
    ax.axhline(0.0, color=GRAY, linewidth=0.8, linestyle=":")
    _scale_decreases(ax, value, error)
    ax.set_ylabel("decrease by the step\n(units of the loss)")


def _scale_decreases(ax: Any, value: np.ndarray, error: np.ndarray) -> None:
    # The first steps are often thousands of times the last ones, which may have either sign.
    size = np.abs(value[np.isfinite(value) & (value != 0)])
    if size.size and size.max() > 100 * np.median(size):
        noise = np.median(error[error > 0]) if np.any(error > 0) else 0.0
        use_signed_log_scale(ax, max(noise, LEAST_SHOWN * size.max()))


def _step_length(ax: Any, result: Any, history: TwoStepInfo) -> None:
    motion, error = history.motion, np.empty(0)
    mean_error = FitInfo.of(history.fit).mean_error
    if motion is None:
        moved = np.linalg.norm(np.diff(centers_of(result, history, WHAT), axis=0), axis=1)
        mean_error = None if mean_error is None else np.linalg.norm(finite(mean_error), axis=1)
    else:
        moved, mean_error = finite(motion.step_norm), motion.error_norm
    moved = np.where(moved > 0, moved, np.nan)
    steps = np.arange(len(history.ok))
    marker = marker_of(steps)
    ax.plot(steps[: moved.size], moved, color=BLACK, marker=marker, linewidth=1.0, label="step")
    if mean_error is not None:
        error = finite(mean_error)
        label = "Monte Carlo error of the fitted mean"
        ax.plot(steps, error, color=BLUE, marker=marker, linestyle="--", linewidth=1.2, label=label)
    use_log_scale(ax, moved, error)
    ax.set_ylabel("length of the step\n(units of the parameters)")


def _tau(ax: Any, steps: np.ndarray, tau: Any) -> None:
    tau = finite(tau)
    middle = tau if tau.ndim == 1 else np.median(tau, 1)
    label = None if tau.ndim == 1 else "median over the parameters"
    ax.plot(steps, middle, color=BLACK, linewidth=1.2, marker=marker_of(steps), label=label)
    if tau.ndim > 1:
        shade(ax, steps, tau.min(1), tau.max(1), color=GRAY, alpha=0.3, label="range")
    use_log_scale(ax, tau)
    ax.set_ylabel("tau (squared units\nof the parameters)")
