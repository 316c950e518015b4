# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What do the losses look like along a line, or over a plane?"""

import textwrap
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np

from numpyro_regloss._core.pareto import MAX_KHAT
from numpyro_regloss.gaussians.gaussian import AnyGaussian, check_gaussian
from numpyro_regloss.plots.style import (
    BLACK,
    ENTROPY,
    GRAY,
    GREEN,
    HEAT,
    LOSS,
    ORANGE,
    SKY,
    as_text,
    band,
    centers_of,
    check_axes,
    ellipse,
    finite,
    history_of,
    legend_above,
    mark_path,
)
from numpyro_regloss.values.grid import Landscape

__all__ = ["landscape"]

WHAT = "plots.landscape"
NUM_LEVELS = 15
# Height of the densities of Gaussians, as a share of the axes.
DENSITY_HEIGHT = 0.22
LABEL_WIDTH = 24
UNSURE = "0.85"
NAMES = ("loss", "local entropy", "heat")
STYLES = ((GREEN, "-"), (ORANGE, "--"), (SKY, "-."), (BLACK, ":"))


def landscape(
    report: Landscape,
    result: Any = None,
    gaussians: dict[str, AnyGaussian] | None = None,
    *,
    axes: Any = None,
) -> np.ndarray:
    """What do the losses look like along a line, or over a plane?

    Along a line the figure shows the loss, F_tau and F^H_tau with bands of two standard errors. Over a plane it
    shows contours of the three side by side, at the same levels; the levels follow the values and are not at equal
    distances. The figure is grey, and nothing is drawn, where F_tau is not to be trusted (`report.trusted`), where
    the heat has no error, and where a value is not finite. Centres and Gaussians are projected onto the line or
    plane; along a line centres lie on F_tau, or on the loss where F_tau is not to be trusted. The legend says what
    lies outside of the figure.

    Args:
        report: from `values.landscape`.
        result: of `TwoStep.run`, or its history: the path of its centres is drawn.
        gaussians: by label, in flat (unconstrained) coordinates: along a line as densities at the foot, over a
            plane as ellipses of one and two standard deviations.
        axes: one axes of matplotlib for a line, three for a plane; default: new ones.

    Returns:
        The axes, `(1,)` or `(3,)`.

    Raises:
        TypeError: if the report is of another kind, or the Gaussians are no dict of them.
        ValueError: if a Gaussian or the run has another number of parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_regloss import Loss, values
        >>> loss = Loss.from_function(lambda x: jnp.sum(x**4 - x**2), jnp.zeros(1))
        >>> report = values.landscape(random.key(0), loss, tau=0.1, num_points=11)
        >>> axes = landscape(report)
        >>> [line.get_label() for line in axes[0].lines[:3]]
        ['loss', 'local entropy', 'heat']
    """
    if not isinstance(report, Landscape):
        raise TypeError(
            f"{WHAT}: expected the report of values.landscape, got {type(report).__name__}."
        )
    if not isinstance(gaussians, dict | None):
        raise TypeError(
            f"{WHAT}: expected gaussians as a dict from labels to Gaussians, got {type(gaussians).__name__}."
        )
    dim = report.origin.size
    checked = {
        str(label): check_gaussian(gaussian, dim, f"{WHAT}: {label}")
        for label, gaussian in (gaussians or {}).items()
    }
    path = None
    if result is not None:
        centers = centers_of(result, history_of(result, WHAT), WHAT)
        if centers.shape[1] != dim:
            raise ValueError(
                f"{WHAT}: expected a run with {dim} parameters, got one with {centers.shape[1]}."
            )
        path = report.project(centers)
    if len(report.coordinates) == 1:
        return _line(axes, report, path, checked)
    return _plane(axes, report, path, checked)


def _surfaces(report: Landscape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # Loss, F_tau and heat, with NaN for what is not to be trusted.
    heat = report.heat
    return (
        finite(report.loss),
        np.where(report.trusted, finite(report.local_entropy.value), np.nan),
        np.where(np.isfinite(heat.error), finite(heat.value), np.nan),
    )


def _line(axes: Any, report: Landscape, path: Any, gaussians: dict[str, AnyGaussian]) -> np.ndarray:
    axes = check_axes(axes, (1, 1), (7.5, 4.2), WHAT).ravel()
    (ax,) = axes
    (x,) = (np.asarray(c, float) for c in report.coordinates)
    loss, entropy, heat = _surfaces(report)
    ax.plot(x, loss, **LOSS)
    band(ax, x, entropy, report.local_entropy.error, **ENTROPY)
    band(ax, x, heat, report.heat.error, **HEAT)
    if path is not None:
        curves = (np.interp(path[:, 0], x, y, np.nan, np.nan) for y in (entropy, loss))
        on_entropy, on_loss = curves
        on_curve = np.where(np.isfinite(on_entropy), on_entropy, on_loss)
        mark_path(ax, np.stack([path[:, 0], on_curve], 1))
    for number, place in enumerate(report.others[:, 0]):
        label = None if number else "other parameters"
        ax.axvline(place, color=GRAY, linewidth=0.8, linestyle=":", label=label)
    foot = ax.get_xaxis_transform()
    for (label, gaussian), (color, style) in zip(gaussians.items(), cycle(STYLES), strict=False):
        mean = report.project(gaussian.mean)[0]
        sd = np.sqrt(report.project_covariance(gaussian)[0, 0])
        low, high = max(x[0], mean - 4 * sd), min(x[-1], mean + 4 * sd)
        grid = np.linspace(low, high, 201 if low < high else 0)
        height = DENSITY_HEIGHT * np.exp(-0.5 * ((grid - mean) / sd) ** 2)
        ax.plot(grid, height, transform=foot, color=color, linestyle=style, label=label)
        ax.fill_between(grid, height, transform=foot, color=color, alpha=0.15, linewidth=0)
    edges = np.concatenate([x[:1], (x[1:] + x[:-1]) / 2, x[-1:]])
    for curve in (loss, entropy, heat):
        ends = np.flatnonzero(np.diff(np.isnan(curve), prepend=False, append=False))
        for begin, end in ends.reshape(-1, 2):
            ax.axvspan(*edges[[begin, end]], color=UNSURE, lw=0, zorder=0)
    ax.set_xlim(x[0], x[-1])
    ax.set_xlabel(f"{as_text(report.labels[0])}, in units of the parameters")
    ax.set_ylabel("value (units of the loss)")
    legend_above(ax, title=_remarks(ax, (loss, entropy, heat)))
    return axes


def _remarks(ax: Any, surfaces: Sequence[np.ndarray]) -> str | None:
    """Takes what cannot be seen out of the legend, and says so, and what is grey."""
    missing = [name for name, known in zip(NAMES, surfaces, strict=True) if np.isnan(known).any()]
    unseen = []
    ax.autoscale_view()
    for line in ax.lines:
        path = line.get_transform().transform_path(line.get_path()).cleaned(remove_nans=True)
        points = path.vertices[path.codes != path.STOP]
        seen = any(ax.bbox.contains(*point) for point in points)
        seen = seen or (len(points) > 1 and path.intersects_bbox(ax.bbox, filled=False))
        name = line.get_label()
        if not seen and not name.startswith("_"):
            line.set_label(f"_{name}")
            unseen += [] if name in missing else [name]
    remarks = []
    if missing:
        remarks.append(
            f"Grey: {' and '.join(missing)} not finite, or not to be trusted: k-hat is above {MAX_KHAT},\n"
            "since the draws are too few, or q lies beyond the figure."
        )
    if unseen:
        remarks.append(f"Outside of the figure: {', '.join(unseen)}.")
    return "\n".join(remarks) or None


def _plane(
    axes: Any, report: Landscape, path: Any, gaussians: dict[str, AnyGaussian]
) -> np.ndarray:
    is_new = axes is None
    axes = check_axes(axes, (1, 3), (10.5, 4.0), WHAT, sharex=True, sharey=True).ravel()
    x, y = (np.asarray(c, float) for c in report.coordinates)
    surfaces = _surfaces(report)
    levels = _levels(surfaces)
    drawn = None
    for ax, surface, name in zip(axes, surfaces, NAMES, strict=True):
        ax.set_facecolor(UNSURE)
        if np.isfinite(surface).any():
            drawn = _contours(ax, x, y, surface, levels)
        if path is not None:
            mark_path(ax, path)
        if len(report.others):
            ax.plot(
                *report.others.T,
                "D",
                color="white",
                markeredgecolor=BLACK,
                label="other parameters",
            )
        for (label, gaussian), (color, style) in zip(
            gaussians.items(), cycle(STYLES), strict=False
        ):
            mean, covariance = report.project(gaussian.mean), report.project_covariance(gaussian)
            for sigmas in (1.0, 2.0):
                text = label if sigmas == 1.0 else None
                ellipse(
                    ax,
                    mean,
                    covariance,
                    sigmas=sigmas,
                    color=color,
                    linestyle=style,
                    linewidth=1.6,
                    label=text,
                )
        ax.set(title=name, xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
        ax.set_xlabel(_filled(report.labels[0]))
    axes[0].set_ylabel(_filled(report.labels[1]))
    figure = axes[0].figure
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=list(axes), label="value (units of the loss)", shrink=0.9)
        bar.set_ticks(levels[::2], labels=[f"{level:.10g}" for level in levels[::2]])
    remarks = _remarks(axes[0], surfaces)
    handles, labels = axes[0].get_legend_handles_labels()
    style = {"title": remarks, "alignment": "left", "fontsize": "small", "title_fontsize": "small"}
    if (handles or remarks) and is_new:
        figure.legend(handles, labels, frameon=False, ncols=8, loc="outside lower left", **style)
    elif handles or remarks:
        axes[0].legend(handles, labels, **style)
    return axes


def _contours(
    ax: Any, x: np.ndarray, y: np.ndarray, surface: np.ndarray, levels: np.ndarray
) -> Any:
    from matplotlib import colormaps, colors  # noqa: PLC0415

    norm = colors.BoundaryNorm(levels, colormaps["cividis"].N)
    masked = np.ma.masked_invalid(surface.T)
    drawn = ax.contourf(x, y, masked, levels=levels, cmap="cividis", norm=norm)
    ax.contour(x, y, masked, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
    return drawn


def _levels(surfaces: Sequence[np.ndarray]) -> np.ndarray:
    known = np.concatenate([s[np.isfinite(s)] for s in surfaces])
    if not known.size:
        raise ValueError(
            f"{WHAT}: expected some finite value on the plane, got none; choose another span."
        )
    levels = np.unique(np.quantile(known, np.linspace(0.0, 1.0, NUM_LEVELS)))
    if levels.size < 2:  # a flat loss
        return levels[0] + np.array([-0.5, 0.5])
    gaps = np.diff(levels)
    # As round as the distance to the nearer neighbor allows, and none inwards of the values.
    steps = [
        _round_step(gap)
        for gap in np.minimum(np.append(gaps, gaps[-1]), np.insert(gaps, 0, gaps[0]))
    ]
    rounded = [
        np.floor(levels[0] / steps[0]) * steps[0],
        *(
            round(level / step) * step
            for level, step in zip(levels[1:-1], steps[1:-1], strict=True)
        ),
        np.ceil(levels[-1] / steps[-1]) * steps[-1],
    ]
    return np.unique(rounded) + 0.0  # no zero with a sign


def _round_step(most: float) -> float:
    # The largest of 1, 2 or 5 times a power of ten.
    unit = 10.0 ** np.floor(np.log10(most))
    return unit * max(factor for factor in (1, 2, 5) if factor * unit <= most * (1 + 1e-9))


def _filled(label: str) -> str:
    return as_text(textwrap.fill(label, LABEL_WIDTH))
