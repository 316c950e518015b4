# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Answers by quadrature in one and two dimensions, in float64 on the host."""

from collections.abc import Callable

import jax
import numpy as np
from numpy import ndarray
from numpy.polynomial import legendre
from scipy.ndimage import minimum_filter
from scipy.optimize import root
from scipy.special import logsumexp, softmax

from numpyro_regloss.problems.base import Answers, At, Function, Moments, refuse

__all__ = ["quadrature_answers", "tilt_nodes", "weighted_moments"]

_ORDER = 16
_NODES, _WEIGHTS = legendre.leggauss(_ORDER)
_PANELS = {1: (256, 256), 2: (12, 40)}  # per axis while the box closes in, and at the end
_GRID = {1: 1001, 2: 25}  # points per axis among which a heat step is sought
_NATS = 60.0  # a density so far below its peak is lost to rounding, moments included
# Around a kink, in units of the range: one side may fall off much faster than the other.
_GRADES = np.r_[0.0, 2.0 ** -np.arange(8, 28), -(2.0 ** -np.arange(8, 28))]


def quadrature_answers(
    loss: Function, dim: int, minimum: float, kinks: tuple[float, ...] = ()
) -> Answers:
    """All answers of a loss of one or two parameters; in more, answers that refuse.

    Args:
        loss: `(dim,) -> ()`, pure JAX, capturing no NumPy arrays.
        dim: number of parameters.
        minimum: a lower bound of the loss.
        kinks: where, along each axis, the loss may not be smooth.

    Returns:
        The answers.
    """
    if dim > 2:
        reason = "quadrature stops at two dimensions"
        return Answers(*(refuse(f"{answer}: {reason}") for answer in Answers._fields))
    compiled = jax.jit(jax.vmap(loss))

    def values(nodes: ndarray) -> ndarray:
        with jax.enable_x64(True):
            return np.asarray(compiled(nodes.reshape(-1, dim))).reshape(nodes.shape[:-1])

    def tilt(at: At) -> tuple[ndarray, ndarray]:
        return tilt_nodes(values, at, minimum, kinks)

    def heat(at: At) -> float:
        nodes, log_weight = tilt(at._replace(temperature=np.inf))
        return float(np.exp(log_weight) @ values(nodes))

    def heat_step(at: At) -> ndarray:
        (x, tau, _), pull = at, at.temperature / at.tau

        def slope(y: ndarray) -> Moments:
            nodes, log_weight = tilt(At(y, tau, np.inf))
            weight = np.exp(log_weight) * values(nodes)
            score = (nodes - y) / tau  # differentiates the Gaussian: the loss may have kinks
            hessian = (score.T * weight) @ score + np.diag(pull - weight.sum() / tau)
            return weight @ score + pull * (y - x), hessian

        # A better point y has pull (y - x)²/2 <= heat(x) - minimum: the grid holds them all.
        radius = np.sqrt(2 * max(heat(at) - minimum, 0.0) / pull) + 1e-3 * np.sqrt(tau)
        grid = x + mesh([np.linspace(-r, r, _GRID[dim]) for r in radius])
        coarse = _coarse_heat(values, grid, tau) + np.sum(pull * (grid - x) ** 2, axis=-1) / 2
        valleys = zip(*np.nonzero(coarse == minimum_filter(coarse, size=3)), strict=True)
        starts = sorted(valleys, key=lambda index: coarse[index])[:3]
        steps = [root(slope, grid[index], jac=True, tol=1e-12).x for index in starts]
        return min(steps, key=lambda y: heat(at._replace(x=y)) + pull @ (y - x) ** 2 / 2)

    return Answers(
        lambda at: -at.temperature * logsumexp(tilt(at)[1]),
        heat,
        lambda at: weighted_moments(*tilt(at)),
        heat_step,
    )


def weighted_moments(nodes: ndarray, log_weight: ndarray) -> Moments:
    """Mean and covariance of weighted nodes `(n, dim)`."""
    weight = softmax(log_weight)
    mean = weight @ nodes
    return mean, ((nodes - mean).T * weight) @ (nodes - mean)


def mesh(axes: list[ndarray]) -> ndarray:
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)


def _coarse_heat(loss: Callable[[ndarray], ndarray], x: ndarray, tau: ndarray) -> ndarray:
    # The trapezoidal rule is spectrally accurate under a Gaussian, up to kinks.
    dim = x.shape[-1]
    offsets = mesh([np.linspace(-8, 8, _GRID[dim])] * dim).reshape(-1, dim)
    weights = softmax(-np.sum(offsets**2, axis=1) / 2)
    return loss(x[..., None, :] + np.sqrt(tau) * offsets) @ weights


def tilt_nodes(
    loss: Callable[[ndarray], ndarray], at: At, minimum: float, kinks: tuple[float, ...] = ()
) -> tuple[ndarray, ndarray]:
    """Return nodes `(n, dim)` and log weights `(n,)` that integrate exp(-loss/T) N(x, tau I).

    An infinite temperature leaves the Gaussian alone. The first box provably holds the mass: at r
    standard deviations there is at most exp(-minimum/T - r²/2) of it and in all, by Jensen, at
    least exp(-heat/T). Then the box closes in on the Gauss-Legendre panels that matter.
    """
    (x, tau, temperature), dim = at, at.x.size
    reach = max((_coarse_heat(loss, x, tau) - minimum) / temperature, 0.0)
    radius = np.sqrt(2.4 * tau * (_NATS + reach))
    low, high, (count, full) = x - radius, x + radius, _PANELS[dim]
    while True:
        width, edges, axes, weights, kept = high - low, [], [], [], []
        for a, b in zip(low, high, strict=True):
            breaks = np.add.outer(kinks, (b - a) * _GRADES).ravel()
            breaks = breaks[(a < breaks) & (breaks < b)]
            edges.append(np.unique(np.r_[np.linspace(a, b, count + 1), breaks]))
            half = np.diff(edges[-1])[:, None] / 2
            axes.append((edges[-1][:-1, None] + half * (1 + _NODES)).ravel())
            weights.append((half * _WEIGHTS).ravel())
        nodes = mesh(axes)
        log_density = -np.sum((nodes - x) ** 2 / tau + np.log(2 * np.pi * tau), axis=-1) / 2
        if np.isfinite(temperature):
            log_density -= loss(nodes) / temperature
        for axis, edge in enumerate(edges):
            ridge = np.moveaxis(log_density, axis, 0).reshape(len(edge) - 1, _ORDER, -1).max(-1)
            peak = ridge.max(axis=1)
            # A panel's own variation bounds what its nodes may have missed of a narrow peak.
            inside = np.flatnonzero(2 * peak - ridge.min(axis=1) > peak.max() - _NATS)
            kept.append((edge[inside[0]], edge[inside[-1] + 1]))
        low, high = np.transpose(kept)
        settled = np.all(high - low > width / 2)
        if settled and count == full:
            return nodes.reshape(-1, dim), (log_density + np.log(mesh(weights)).sum(-1)).ravel()
        count = full if settled else count
