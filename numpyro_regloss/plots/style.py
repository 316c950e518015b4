# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What all figures share: colors, axes, bands, ellipses, and what becomes of numbers that are not finite."""

from typing import Any

import numpy as np

from numpyro_regloss.losses.sites import UNCONSTRAINED
from numpyro_regloss.two_step.motion import no_vectors
from numpyro_regloss.two_step.outer_step import TwoStepInfo
from numpyro_regloss.two_step.result import TwoStepResult

__all__ = [
    "BLACK",
    "BLUE",
    "ENTROPY",
    "GRAY",
    "GREEN",
    "HEAT",
    "LOSS",
    "ORANGE",
    "SIGMAS",
    "SKY",
    "VERMILION",
    "WIDE",
    "as_text",
    "band",
    "centers_of",
    "check_axes",
    "ellipse",
    "finite",
    "history_of",
    "legend_above",
    "mark_infinite",
    "mark_path",
    "mark_rejected",
    "marker_of",
    "over_steps",
    "shade",
    "use_log_scale",
    "use_signed_log_scale",
    "wrapped",
]

# Of the colour-blind safe palette of Okabe and Ito.
BLACK, GRAY = "#000000", "0.5"
BLUE, VERMILION, GREEN, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9"
LOSS = {"color": BLACK, "linestyle": "-", "linewidth": 1.2, "label": "loss"}
ENTROPY = {"color": BLUE, "linestyle": "-", "linewidth": 1.8, "label": "local entropy"}
HEAT = {"color": VERMILION, "linestyle": "--", "linewidth": 1.8, "label": "heat"}
# Bands are so many standard errors to either side.
SIGMAS = 2.0
# Positive values over so wide a range are shown on a logarithmic axis.
WIDE = 100.0
FEW_STEPS = 60
LONG_NAME, LONG_LINE = 18, 22
MOST_COLUMNS = 6  # of a legend


def check_axes(
    axes: Any,
    shape: tuple[int, int],
    size: tuple[float, float],
    what: str,
    *,
    why: str = "",
    **settings: Any,
) -> np.ndarray:
    """The axes to draw on: those given, or new ones.

    Args:
        axes: one or several axes of matplotlib, or None.
        shape: rows and columns of panels.
        size: of a new figure, in inches.
        what: begins the error message.
        why: names the panels in the error message, where their number depends on what is drawn.
        **settings: of `matplotlib.pyplot.subplots`.

    Returns:
        Axes `(rows, columns)`.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError: if what was given are no axes.
        ValueError: if there are more or fewer axes than panels.
    """
    try:
        from matplotlib import pyplot as plt  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(f"{what}: needs matplotlib; install numpyro_regloss[plots].") from error
    if axes is None:
        settings = {"layout": "constrained", "squeeze": False, **settings}
        return plt.subplots(*shape, figsize=size, **settings)[1]
    given = np.asarray(axes, object).ravel()
    if not all(hasattr(ax, "plot") and hasattr(ax, "figure") for ax in given):
        raise TypeError(
            f"{what}: expected axes of matplotlib, got {type(axes).__name__}; use those of "
            "matplotlib.pyplot.subplots, or none."
        )
    if given.size != shape[0] * shape[1]:
        panels = f" ({why})" if why else ""
        raise ValueError(
            f"{what}: expected {shape[0] * shape[1]} axes, one per panel{panels}, got {given.size}; use "
            f"matplotlib.pyplot.subplots({shape[0]}, {shape[1]})[1], or leave them out."
        )
    return given.reshape(shape)


def history_of(result: Any, what: str) -> TwoStepInfo:
    """The history of a run, given the run or the history itself.

    Args:
        result: a `TwoStepResult` or its history.
        what: begins the error message.

    Returns:
        The history.

    Raises:
        TypeError: if it is neither.
        ValueError: if it has no step, or is that of one step without an axis of steps.
    """
    history = result.history if isinstance(result, TwoStepResult) else result
    if not isinstance(history, TwoStepInfo):
        raise TypeError(
            f"{what}: expected the result of TwoStep.run, or its history, got {type(result).__name__}."
        )
    if np.ndim(history.ok) != 1 or not np.size(history.ok):
        raise ValueError(
            f"{what}: expected a history with an axis of at least one step, got shape {np.shape(history.ok)}; "
            "draw one run at a time."
        )
    return history


def centers_of(result: Any, history: TwoStepInfo, what: str) -> np.ndarray:
    """Centres before the first step, after it, and so on: one more than steps where the last one is known."""
    is_run = isinstance(result, TwoStepResult)
    if history.motion is not None and (not is_run or result.path is None):
        raise ValueError(f"{no_vectors(what)}.")
    return np.asarray(result.centers if is_run else history.reference.mean, float)


def band(ax: Any, x: Any, value: Any, error: Any, **style: Any) -> None:
    """A curve with two standard errors to either side; none where the error is not finite."""
    value, error = finite(value), finite(error)
    ax.plot(x, value, **style)
    shade(ax, x, value - SIGMAS * error, value + SIGMAS * error, color=style["color"], alpha=0.2)


def shade(ax: Any, x: Any, low: np.ndarray, high: np.ndarray, **style: Any) -> None:
    """The area between two curves; of a single point, which has none, a bar."""
    if np.size(x) == 1:
        ax.vlines(x, low, high, linewidth=8.0, **style)
    else:
        ax.fill_between(x, low, high, linewidth=0, **style)


def finite(values: Any) -> np.ndarray:
    """The same with NaN, which matplotlib leaves out, for all that is not finite."""
    values = np.asarray(values, float)
    return np.where(np.isfinite(values), values, np.nan)


def mark_infinite(ax: Any, x: np.ndarray, values: Any, **style: Any) -> None:
    """Triangles at the upper and lower edge for values of plus and minus infinity."""
    for sign, marker, height in ((np.inf, "^", 0.97), (-np.inf, "v", 0.03)):
        at = x[np.asarray(values) == sign]
        if at.size:
            name = "+∞" if sign > 0 else "−∞"
            ax.plot(
                at,
                np.full(at.shape, height),
                transform=ax.get_xaxis_transform(),
                marker=marker,
                linestyle="none",
                markersize=5,
                label=name,
                **style,
            )


def mark_rejected(ax: Any, history: TwoStepInfo, *, offset: int = 0, label: bool = True) -> None:
    """Crosses at the lower edge at the steps that were rejected, or at so many steps later."""
    rejected = np.flatnonzero(~np.asarray(history.ok, bool)) + offset
    if rejected.size:
        ax.plot(
            rejected,
            np.full(rejected.shape, 0.03),
            transform=ax.get_xaxis_transform(),
            color=VERMILION,
            marker="x",
            linestyle="none",
            markersize=5,
            label="rejected step" if label else None,
        )


def mark_path(ax: Any, places: np.ndarray) -> None:
    """A path in a plane, `(step, 2)`: hollow circle where it starts, star where it ends."""
    ax.plot(*places.T, color=BLACK, marker=".", markersize=4, linewidth=1.0, label="centres")
    for at, marker, color, name, size in (
        (places[0], "o", "white", "start", 8),
        (places[-1], "*", ORANGE, "end", 13),
    ):
        ax.plot(
            *at[:, None],
            marker=marker,
            color=color,
            markeredgecolor=BLACK,
            markersize=size,
            linestyle="none",
            label=name,
            zorder=5,
        )


def marker_of(steps: np.ndarray) -> str | None:
    """Dots where there is room for them, so that a single step is seen."""
    return "." if steps.size < FEW_STEPS else None


def over_steps(axes: np.ndarray, steps: np.ndarray, label: str) -> None:
    """The axis of steps that panels above one another share."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    for ax in axes:
        ax.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    axes[-1].set_xlabel(label)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def legend_above(ax: Any, title: str | None = None) -> None:
    """A legend between the axes and their title, in as many rows as it needs; within, where nothing makes room."""
    from matplotlib.transforms import ScaledTranslation  # noqa: PLC0415

    if not ax.get_legend_handles_labels()[1]:
        return
    style = {
        "fontsize": "small",
        "title": title,
        "title_fontsize": "small",
        "alignment": "left",
    }
    if ax.figure.get_layout_engine() is None:
        ax.legend(loc="best", **style)
        return
    width = ax.get_window_extent().width
    height = 0.0
    for columns in range(min(MOST_COLUMNS, len(ax.get_legend_handles_labels()[1])), 0, -1):
        legend = ax.legend(
            frameon=False,
            ncols=columns,
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            borderaxespad=0.1,
            **style,
        )
        extent = legend.get_window_extent()
        height = extent.height / ax.figure.dpi
        if extent.width <= width:
            break
    # A title moves above axes within its own, and above nothing else: these end where the legend does.
    lift = ScaledTranslation(0.0, height, ax.figure.dpi_scale_trans)
    ax.inset_axes((0.0, 0.0, 1.0, 1.0), transform=ax.transAxes + lift).set_visible(False)


def use_log_scale(ax: Any, *values: Any) -> None:
    """A logarithmic axis where all finite values are positive and far apart."""
    known = np.concatenate([np.ravel(finite(v)) for v in values])
    known = known[np.isfinite(known)]
    if known.size and known.min() > 0 and known.max() > WIDE * known.min():
        ax.set_yscale("log")


def use_signed_log_scale(ax: Any, least: float) -> None:
    """A logarithmic axis for both signs, linear below so small a value."""
    # A power of ten, since ticks at smaller ones would lie on that of zero.
    ax.set_yscale("symlog", linthresh=10.0 ** np.floor(np.log10(least)))
    ax.yaxis.get_major_locator().set_params(numticks=7)
    ax.margins(y=0.1)


def ellipse(ax: Any, mean: Any, covariance: Any, *, sigmas: float = 1.0, **style: Any) -> None:
    """The ellipse of a Gaussian of two coordinates at so many standard deviations."""
    value, vector = np.linalg.eigh(np.asarray(covariance, float))
    angle = np.linspace(0.0, 2 * np.pi, 101)
    circle = np.sqrt(np.maximum(value, 0.0))[:, None] * np.stack([np.cos(angle), np.sin(angle)])
    points = np.asarray(mean, float)[:, None] + sigmas * vector @ circle
    ax.plot(*points, **style)


def wrapped(name: str) -> str:
    """A long name, such as a path within a pytree, over several lines."""
    parts = [name]
    if len(name) > LONG_NAME:
        parts = (
            name
            .replace("/", "/\n")
            .replace(UNCONSTRAINED, "\n" + UNCONSTRAINED.strip())
            .split("\n")
        )
    lines = [part[i : i + LONG_LINE] for part in parts for i in range(0, len(part), LONG_LINE)]
    return as_text("\n".join(lines))


def as_text(name: str) -> str:
    """A name as matplotlib shows it letter by letter, where dollars begin mathematics."""
    return name.replace("$", r"\$")
