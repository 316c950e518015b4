# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Sums of one loss per coordinate."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy import ndarray
from scipy.special import erfcx, log_ndtr, ndtr

from numpyro_regloss.problems.base import (
    Answers,
    At,
    Function,
    Moments,
    Problem,
    Result,
    normal_density,
)
from numpyro_regloss.problems.quadrature import quadrature_answers

__all__ = ["absolute", "double_well", "rastrigin", "relu", "separable"]


def separable(
    name: str,
    one_dimensional_loss: Function,
    dim: int,
    *,
    start: float,
    minimum: float,
    minimizer: float | None = None,
    kinks: tuple[float, ...] = (),
    heat: Callable[[ndarray, ndarray], ndarray] | None = None,
    local_entropy: Callable[[ndarray, ndarray, float], ndarray] | None = None,
) -> Problem:
    """f(x) = Σ_i g(x_i): every answer by quadrature of one coordinate, or by the form given.

    Args:
        name: of the problem.
        one_dimensional_loss: g, elementwise, pure JAX, without captured NumPy arrays.
        dim: number of coordinates.
        start: of every coordinate.
        minimum: infimum of g, or a lower bound: it limits where mass and minimizers can be.
        minimizer: where g attains the minimum, if it does.
        kinks: where g is not smooth; the panels of the quadrature are graded towards them.
        heat: elementwise closed form in (x, tau).
        local_entropy: elementwise closed form in (x, tau, temperature).

    Returns:
        The problem.

    Example:
        >>> problem = separable("quartic", lambda x: x**4, 2, start=1.0, minimum=0.0)
        >>> round(problem.heat([0.0, 1.0], tau=0.5), 6)  # Σ x⁴ + 6 tau x² + 3 tau²
        5.5
    """
    line = quadrature_answers(lambda x: one_dimensional_loss(x[0]), 1, minimum, kinks)

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(one_dimensional_loss(x))

    def each(answer: Callable[[At], Result], at: At) -> list[Result]:
        pieces = (at._replace(x=at.x[i : i + 1], tau=at.tau[i : i + 1]) for i in range(dim))
        return [answer(piece) for piece in pieces]

    def moments(at: At) -> Moments:
        means, variances = zip(*each(line.moments, at), strict=True)
        return np.concatenate(means), np.diag(np.ravel(variances))

    answers = Answers(
        lambda at: np.sum(local_entropy(*at) if local_entropy else each(line.local_entropy, at)),
        lambda at: np.sum(heat(at.x, at.tau) if heat else each(line.heat, at)),
        moments,
        lambda at: np.concatenate(each(line.heat_step, at)),
    )
    best = None if minimizer is None else np.full(dim, float(minimizer))
    return Problem(name, dim, loss, np.full(dim, float(start)), best, dim * float(minimum), answers)


def absolute(dim: int) -> Problem:
    """f(x) = Σ_i |x_i|, both regularized losses in closed form; a kink at the minimum.

    Args:
        dim: number of coordinates.

    Returns:
        The problem.

    Example:
        >>> round(absolute(1).heat([0.0], tau=0.5), 6)  # sqrt(2 tau/π)
        0.56419
    """

    def heat(x: ndarray, tau: ndarray) -> ndarray:
        return _ramp(x, tau) + _ramp(-x, tau)

    def local_entropy(x: ndarray, tau: ndarray, temperature: float) -> ndarray:
        right, left = _log_decay(x, tau, temperature), _log_decay(-x, tau, temperature)
        return -temperature * np.logaddexp(right, left)

    known = {"kinks": (0.0,), "heat": heat, "local_entropy": local_entropy}
    return separable("absolute", jnp.abs, dim, start=2.0, minimum=0.0, minimizer=0.0, **known)


def relu(dim: int) -> Problem:
    """f(x) = Σ_i max(x_i, 0), both regularized losses in closed form; flat on one side.

    Args:
        dim: number of coordinates.

    Returns:
        The problem; its minimizer is the corner of the flat orthant.

    Example:
        >>> round(relu(1).heat([0.0], tau=0.5), 6)  # half of that of the absolute value
        0.282095
    """

    def local_entropy(x: ndarray, tau: ndarray, temperature: float) -> ndarray:
        right, left = _log_decay(x, tau, temperature), log_ndtr(-x / np.sqrt(tau))
        return -temperature * np.logaddexp(right, left)

    known = {"kinks": (0.0,), "heat": _ramp, "local_entropy": local_entropy}
    return separable("relu", jax.nn.relu, dim, start=2.0, minimum=0.0, minimizer=0.0, **known)


def double_well(dim: int) -> Problem:
    """f(x) = Σ_i (x_i² - 1)², with 2^dim equal minima at the corners ±1.

    Args:
        dim: number of coordinates.

    Returns:
        The problem; the minimizer given is the corner of ones.

    Example:
        >>> round(double_well(1).heat([1.0], tau=0.1), 6)  # 4 tau + 3 tau² at a minimum
        0.43
    """

    def heat(x: ndarray, tau: ndarray) -> ndarray:
        return x**4 + 6 * tau * x**2 + 3 * tau**2 - 2 * (x**2 + tau) + 1

    def loss(x: jax.Array) -> jax.Array:
        return (x**2 - 1) ** 2

    return separable("double_well", loss, dim, start=2.0, minimum=0.0, minimizer=1.0, heat=heat)


def rastrigin(dim: int) -> Problem:
    """f(x) = Σ_i x_i² + 10 - 10 cos(2π x_i), a bowl with a local minimum near every integer.

    Args:
        dim: number of coordinates.

    Returns:
        The problem, started in a wrong basin.

    Example:
        >>> round(rastrigin(2).heat([0.0, 0.0], tau=1.0), 6)  # dim (10 + tau), the ripple is gone
        22.0
    """

    def heat(x: ndarray, tau: ndarray) -> ndarray:
        return x**2 + tau + 10 - 10 * np.exp(-2 * np.pi**2 * tau) * np.cos(2 * np.pi * x)

    def loss(x: jax.Array) -> jax.Array:
        return x**2 + 10 - 10 * jnp.cos(2 * jnp.pi * x)

    return separable("rastrigin", loss, dim, start=2.7, minimum=0.0, minimizer=0.0, heat=heat)


def _ramp(x: ndarray, tau: ndarray) -> ndarray:
    """Return E max(x', 0) with x' ~ N(x, tau)."""
    scale = np.sqrt(tau)
    return x * ndtr(x / scale) + scale * normal_density(x / scale)


def _log_decay(x: ndarray, tau: ndarray, temperature: float) -> ndarray:
    """Return log E[exp(-x'/T); x' > 0] with x' ~ N(x, tau)."""
    drop = tau / temperature
    center = (x - drop) / np.sqrt(tau)
    scaled = np.log(erfcx(np.maximum(-center, 0.0) / np.sqrt(2)) / 2) - x**2 / (2 * tau)
    # Left of zero the second form would subtract two numbers of order tau/T².
    return np.where(center < 0, scaled, (drop / 2 - x) / temperature + log_ndtr(center))
