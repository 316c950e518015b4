# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What does each Gaussian cover of the draws?"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from numpyro.infer import MCMC

from numpyro_regloss.draws.resampling import stratified
from numpyro_regloss.draws.samples import as_draws, target_of
from numpyro_regloss.gaussians.gaussian import AnyGaussian, check_gaussian
from numpyro_regloss.losses.sites import UNCONSTRAINED, unconstrained_labels
from numpyro_regloss.plots.style import (
    BLUE,
    GRAY,
    VERMILION,
    check_axes,
    ellipse,
    legend_above,
    wrapped,
)
from numpyro_regloss.values.grid import find_parameter, projected_covariance

__all__ = ["gaussian_pair"]

WHAT = "plots.gaussian_pair"
MOST_COORDINATES = 4
NUM_POINTS, MOST_BINS = 1_000, 40
FORWARD = {"color": BLUE, "linestyle": "-", "linewidth": 1.8}
REVERSE = {"color": VERMILION, "linestyle": "--", "linewidth": 1.8}


def gaussian_pair(
    draws: Any,
    forward: AnyGaussian | None = None,
    reverse: AnyGaussian | None = None,
    *,
    names: Sequence[str] | None = None,
    params: Sequence[str | int] | None = None,
    log_weight: Any = None,
    axes: Any = None,
) -> np.ndarray:
    """Which draws does each Gaussian cover: the one of KL(q ‖ N), forward, and the one of KL(N ‖ q), reverse?

    The diagonal shows the weighted histogram of every coordinate and the densities of the Gaussians. Below it are
    a thousand draws, resampled by their weights, and ellipses of one and two standard deviations.

    Args:
        draws: of q, as `forward_kl` takes them: `Draws`, arrays `(draw, dim)` or `(chain, draw, dim)`, dicts
            of sites, an `MCMC` that has run. Values of sites are shown as they are; those of `Draws` and of an
            `MCMC` on `regloss.model` are flat and unconstrained, and labels say so where a site has others.
        forward: from `forward_kl`, in the coordinates of the draws.
        reverse: from `reverse_kl`, in the same coordinates.
        names: of all coordinates, such as `loss.flat_names` for `Draws`; default: those of the draws if
            they have any.
        params: names (without "(unconstrained)") or indices of the coordinates to show; default: the first four.
        log_weight: of the draws, if they are not `Draws`.
        axes: `(k, k)` axes of matplotlib for k coordinates; default: new ones.

    Returns:
        The axes, `(k, k)`; those above the diagonal are switched off.

    Raises:
        ValueError: if there is no Gaussian, the names do not fit, or a coordinate is unknown.

    Example:
        >>> from jax import random
        >>> from numpyro_regloss import forward_kl
        >>> samples = random.normal(random.key(0), (500, 2))
        >>> axes = gaussian_pair(samples, forward_kl(samples).gaussian, names=["slope", "intercept"])
        >>> axes[1, 0].get_xlabel(), axes[1, 0].get_ylabel()
        ('slope', 'intercept')
    """
    cloud, known, _ = as_draws(
        draws,
        log_weight=log_weight,
        score=None,
        log_density=None,
        loss=None,
        space="constrained",
        group_by_chain=False,
        what=WHAT,
    )
    x = np.asarray(cloud.x, float)
    x = x.reshape(-1, x.shape[-1])
    weight = np.asarray(jax.nn.softmax(np.asarray(cloud.log_weight).ravel()), float)
    gaussians = _checked(forward, reverse, x.shape[1])
    target = target_of(draws) if isinstance(draws, MCMC) else None
    known = known if target is None else unconstrained_labels(target.loss)
    names = tuple(names or known or (f"x[{i}]" for i in range(x.shape[1])))
    if len(names) != x.shape[1]:
        raise ValueError(
            f"{WHAT}: expected one name for each of {x.shape[1]} coordinates, got {len(names)}."
        )
    params = range(min(len(names), MOST_COORDINATES)) if params is None else params
    bare = tuple(name.removesuffix(UNCONSTRAINED) for name in names)
    chosen = [find_parameter(param, bare, WHAT) for param in params]
    if not chosen:
        raise ValueError(f"{WHAT}: expected at least one coordinate in params, got none.")
    count = len(chosen)
    side = max(2.2 * count, 4.0)
    axes = check_axes(axes, (count, count), (side + 0.5, side), WHAT, sharex="col")
    points = x[stratified(weight, min(NUM_POINTS, weight.size))]
    for row, i in enumerate(chosen):
        for column, j in enumerate(chosen):
            ax = axes[row, column]
            if column > row:
                ax.set_axis_off()
            elif column == row:
                _marginal(ax, x[:, i], weight, i, gaussians)
            else:
                _joint(ax, points, (j, i), gaussians)
                if column == 0:
                    ax.set_ylabel(wrapped(names[i]))
                else:
                    ax.tick_params(labelleft=False)
        axes[-1, row].set_xlabel(wrapped(names[i]))
    if count == 1:
        legend_above(axes[0, 0])
    else:
        axes[0, -1].legend(
            *axes[0, 0].get_legend_handles_labels(), frameon=False, loc="upper right"
        )
    return axes


def _checked(forward: Any, reverse: Any, dim: int) -> list[tuple[str, AnyGaussian, dict[str, Any]]]:
    given = (("forward", forward, FORWARD), ("reverse", reverse, REVERSE))
    found = [
        (label, check_gaussian(gaussian, dim, f"{WHAT}: {label}"), style)
        for label, gaussian, style in given
        if gaussian is not None
    ]
    if not found:
        raise ValueError(
            f"{WHAT}: expected a forward or a reverse Gaussian, got none; see forward_kl and reverse_kl."
        )
    return found


def _marginal(ax: Any, x: np.ndarray, weight: np.ndarray, i: int, gaussians: list) -> None:
    used = weight > 0
    bins = int(np.clip(np.sqrt(1.0 / np.sum(weight**2)), 10, MOST_BINS))
    ax.hist(x[used], bins, weights=weight[used], density=True, color="0.8", label="draws")
    low, high = ax.get_xlim()
    for label, gaussian, style in gaussians:
        mean, sd = float(gaussian.mean[i]), float(np.sqrt(gaussian.variance[i]))
        grid = np.linspace(min(low, mean - 3 * sd), max(high, mean + 3 * sd), 301)
        density = np.exp(-0.5 * ((grid - mean) / sd) ** 2) / (sd * np.sqrt(2 * np.pi))
        ax.plot(grid, density, label=label, **style)
    ax.set_yticks([])
    ax.set_ylim(bottom=0.0)


def _joint(ax: Any, points: np.ndarray, pair: tuple[int, int], gaussians: list) -> None:
    ax.plot(*points[:, pair].T, ".", color=GRAY, markersize=2, alpha=0.6)
    for _, gaussian, style in gaussians:
        mean = np.asarray(gaussian.mean)[list(pair)]
        covariance = projected_covariance(gaussian, np.eye(gaussian.dim)[list(pair)])
        for sigmas in (1.0, 2.0):
            ellipse(ax, mean, covariance, sigmas=sigmas, **style)
