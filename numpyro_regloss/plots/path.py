# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Where did the centre go?"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from numpyro_regloss.fit.base import FitInfo
from numpyro_regloss.losses.sites import unconstrained_labels
from numpyro_regloss.plots.style import (
    BLACK,
    BLUE,
    SIGMAS,
    SKY,
    centers_of,
    check_axes,
    ellipse,
    finite,
    history_of,
    legend_above,
    mark_path,
    mark_rejected,
    marker_of,
    over_steps,
    shade,
    wrapped,
)
from numpyro_regloss.two_step.optimizer import TwoStep
from numpyro_regloss.two_step.outer_step import TwoStepInfo
from numpyro_regloss.values.grid import find_parameter, projected_covariance

__all__ = ["trajectory"]

WHAT = "plots.trajectory"
MOST_PANELS = 6
PRINCIPAL = "pca"


class View(NamedTuple):
    """Coordinates of the centres, and how to see anything else in them."""

    labels: tuple[str, ...]
    origin: np.ndarray
    directions: np.ndarray

    def project(self, x: np.ndarray) -> np.ndarray:
        return (x - self.origin) @ self.directions.T

    def spread(self, error: np.ndarray) -> np.ndarray:
        # Of a coordinate its own error; of a mixture that of independent ones.
        return np.sqrt(error**2 @ (self.directions**2).T)


def trajectory(
    result: Any,
    optimizer: Any = None,
    coordinates: Sequence[str | int] | str | None = None,
    *,
    plane: bool | str = False,
    axes: Any = None,
) -> np.ndarray:
    """Where did the centre go?

    Over steps there is one panel per coordinate. It shows the centre, with a dark band of two Monte Carlo standard
    errors of the fitted mean, if the fit reports them, and a light band of one standard deviation of the fitted
    Gaussian. Step 0 is the start. In a plane the figure shows the path in two coordinates, with the fitted
    Gaussian of the last step as an ellipse of one standard deviation. For a history without vectors it shows the
    centres that `Record(centers_every=k)` kept, without bands and ellipse.

    Args:
        result: of `TwoStep.run`, or its history alone, which lacks the last centre.
        optimizer: the `TwoStep`, for the names of the parameters. All values are unconstrained; labels say so
            where those of a model's site are others.
        coordinates: names as in `optimizer.loss.flat_names` or indices of flat (unconstrained) parameters, or
            `"pca"` for the two principal directions of the path. Default: those that moved most, at most six over
            steps and two in a plane.
        plane: draw the path in the plane of two coordinates, not over steps. `plane="pca"` is short for
            `coordinates="pca", plane=True`.
        axes: axes of matplotlib, one per coordinate, or one for a plane; default: new ones.

    Returns:
        The axes, `(coordinate,)`, or `(1,)` for a plane.

    Raises:
        TypeError: if the optimizer or `plane` is something else.
        ValueError: if `plane="pca"` comes with other coordinates, no centres were kept, a coordinate is unknown,
            or there are not two of them for a plane.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_regloss import Loss, TwoStep, fit, shift
        >>> loss = Loss.from_function(lambda p: (p["a"] - 1.0) ** 2 + p["b"] ** 2, {"a": 0.0, "b": 1.0})
        >>> optimizer = TwoStep(loss, 0.5, shift=shift.Importance(100), fit=fit.ForwardKL())
        >>> result = optimizer.run(random.key(0), 5, progress_bar=False)
        >>> axes = trajectory(result, optimizer, ["b"])
        >>> axes[0].get_ylabel()
        'b'
    """
    history = history_of(result, WHAT)
    if isinstance(plane, str) and plane == PRINCIPAL:
        if not (coordinates is None or isinstance(coordinates, str) and coordinates == PRINCIPAL):
            raise ValueError(
                f'{WHAT}: expected no coordinates beside plane="{PRINCIPAL}", which has its own, got '
                f"{coordinates!r}; write plane=True for the plane of these."
            )
        coordinates, plane = PRINCIPAL, True
    if not isinstance(plane, bool | np.bool_):
        raise TypeError(f'{WHAT}: expected plane as True, False or "{PRINCIPAL}", got {plane!r}.')
    if not isinstance(optimizer, TwoStep | None):
        raise TypeError(
            f"{WHAT}: expected the optimizer as a TwoStep or None, got {type(optimizer).__name__}."
        )
    centers = centers_of(result, history, WHAT)
    names, shown = _names(optimizer, centers.shape[1])
    view = _view(centers, names, shown, coordinates, plane=bool(plane))
    if plane:
        return _plane(axes, view, centers, history)
    steps = np.arange(len(centers))
    if history.motion is not None:
        steps = result.center_steps - result.center_steps[0]
    return _over_steps(axes, view, centers, history, steps)


def _names(optimizer: TwoStep | None, dim: int) -> tuple[Sequence[str], Sequence[str]]:
    # As the user writes them, and as they are shown.
    if optimizer is None:
        names = tuple(f"x[{i}]" for i in range(dim))
        return names, names
    if optimizer.loss.dim != dim:
        raise ValueError(
            f"{WHAT}: expected the optimizer of this run, with {dim} parameters, got one with "
            f"{optimizer.loss.dim}."
        )
    return optimizer.loss.flat_names, unconstrained_labels(optimizer.loss)


def _view(
    centers: np.ndarray,
    names: Sequence[str],
    shown: Sequence[str],
    coordinates: Any,
    *,
    plane: bool,
) -> View:
    dim = centers.shape[1]
    if isinstance(coordinates, str) and coordinates == PRINCIPAL and PRINCIPAL not in names:
        return _principal(centers)
    if coordinates is None:
        # In the order of the parameters.
        moved = np.argsort(-np.ptp(centers, axis=0), kind="stable")
        coordinates = sorted(moved[: 2 if plane else MOST_PANELS].tolist())
    if isinstance(coordinates, str | int | np.integer):
        coordinates = [coordinates]
    chosen = [find_parameter(name, names, WHAT) for name in coordinates]
    if not chosen or plane and len(chosen) != 2:
        wanted = "two coordinates for a plane" if plane else "at least one coordinate"
        raise ValueError(f"{WHAT}: expected {wanted}, got {len(chosen)}.")
    directions = np.zeros((len(chosen), dim))
    directions[np.arange(len(chosen)), chosen] = 1.0
    return View(tuple(wrapped(shown[i]) for i in chosen), np.zeros(dim), directions)


def _principal(centers: np.ndarray) -> View:
    origin = centers.mean(0)
    _, size, rows = np.linalg.svd(centers - origin, full_matrices=False)
    if len(rows) < 2 or not size[0] > 0:
        raise ValueError(
            f"{WHAT}: expected a path of at least two centres in two dimensions that moved, for its principal "
            "directions; name coordinates instead."
        )
    # The sign is arbitrary: along it the path goes upwards.
    rows = rows[:2] * np.where(rows[:2] @ (centers[-1] - centers[0]) < 0, -1.0, 1.0)[:, None]
    share = size[:2] ** 2 / np.sum(size**2)
    labels = (f"principal axis {i}\n({s:.1%} of variance)" for i, s in enumerate(share, 1))
    return View(tuple(labels), origin, rows)


def _over_steps(
    axes: Any, view: View, centers: np.ndarray, history: TwoStepInfo, steps: np.ndarray
) -> np.ndarray:
    count = len(view.labels)
    axes = check_axes(axes, (count, 1), (7.5, 0.8 + 1.6 * count), WHAT, sharex=True).ravel()
    places = view.project(centers)
    # What a step fitted is known after it.
    later, sd, error = steps[1:], None, FitInfo.of(history.fit).mean_error
    if history.motion is None:
        sd = view.spread(np.sqrt(np.asarray(history.fitted.variance, float)))[: later.size]
    error = None if error is None else view.spread(finite(error))[: later.size]
    for i, ax in enumerate(axes):
        here = places[1:, i]
        if sd is not None:
            low, high = finite(here - sd[:, i]), finite(here + sd[:, i])
            shade(ax, later, low, high, color=SKY, alpha=0.25, label="± 1 sd of the fit")
        if error is not None:
            low, high = here - SIGMAS * error[:, i], here + SIGMAS * error[:, i]
            label = "± 2 Monte Carlo standard errors"
            shade(ax, later, low, high, color=BLUE, alpha=0.45, label=label)
        marker = marker_of(steps)
        ax.plot(steps, places[:, i], color=BLACK, linewidth=1.2, marker=marker, label="centre")
        mark_rejected(ax, history, offset=1)
        ax.set_ylabel(view.labels[i])
    legend_above(axes[0])
    over_steps(axes, steps, "steps done")
    return axes


def _plane(axes: Any, view: View, centers: np.ndarray, history: TwoStepInfo) -> np.ndarray:
    axes = check_axes(axes, (1, 1), (6.5, 4.8), WHAT).ravel()
    (ax,) = axes
    places = view.project(centers)
    mark_path(ax, places)
    ax.set_xlabel(view.labels[0])
    ax.set_ylabel(view.labels[1])
    if history.motion is not None:
        legend_above(ax)
        return axes
    last = type(history.fitted)(*(np.asarray(part)[-1] for part in history.fitted))
    covariance = projected_covariance(last, view.directions)
    if np.isfinite(covariance).all():
        label = "1 sd of the last fit"
        ellipse(
            ax,
            view.project(np.asarray(last.mean)),
            covariance,
            color=BLUE,
            linewidth=1.2,
            label=label,
        )
    legend_above(ax)
    return axes
