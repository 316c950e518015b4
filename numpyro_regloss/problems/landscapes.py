# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Test functions of global optimization: many local minima, one known global minimum.

References: Ackley (1987), "A Connectionist Machine for Genetic Hillclimbing"; Griewank (1981), "Generalized
Descent for Global Optimization"; Levy & Montalvo (1985), "The Tunneling Algorithm for the Global Minimization of
Functions"; Jamil & Yang (2013), "A Literature Survey of Benchmark Functions for Global Optimisation Problems"
(Alpine N1, Drop-Wave).
"""

import jax
import jax.numpy as jnp
import numpy as np
from numpy import ndarray

from numpyro_regloss.problems.base import Answers, At, Problem, cast, refuse

__all__ = ["ackley", "alpine", "drop_wave", "griewank", "levy"]


def ackley(dim: int) -> Problem:
    """f(x) = 20 - 20 exp(-|x| / (5 √dim)) + e - exp(mean cos 2πx), a funnel in a rippled plain.

    Args:
        dim: number of coordinates; `|x_i| <= 32.768` is the usual box.

    Returns:
        The problem; its answers are refused.

    Example:
        >>> round(float(ackley(3).loss(jnp.ones(3))), 4)  # 20 (1 - exp(-0.2))
        3.6254
    """

    def loss(x: jax.Array) -> jax.Array:
        funnel = 20.0 * jnp.exp(-0.2 * jnp.sqrt(jnp.mean(x**2)))
        return 20.0 - funnel + jnp.e - jnp.exp(jnp.mean(jnp.cos(2.0 * jnp.pi * x)))

    return Problem("ackley", dim, loss, np.full(dim, 20.0), np.zeros(dim), 0.0)


def alpine(dim: int) -> Problem:
    """f(x) = Σ_i |x_i sin x_i + 0.1 x_i| (Alpine N1), kinks wherever it is zero.

    Zero is attained wherever all x_i are zero or sin x_i = -0.1: one of the global minimizers is given.

    Args:
        dim: number of coordinates; `|x_i| <= 10` is the usual box.

    Returns:
        The problem; its answers are refused.

    Example:
        >>> round(float(alpine(2).loss(jnp.full(2, jnp.pi))), 4)  # 2 (0.1 π)
        0.6283
    """

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.abs(x * jnp.sin(x) + 0.1 * x))

    return Problem("alpine", dim, loss, np.full(dim, 8.0), np.zeros(dim), 0.0)


def drop_wave(dim: int) -> Problem:
    """f(x) = -(1 + cos 12|x|) / (2 + |x|²/2), rings around a narrow hole.

    Args:
        dim: number of coordinates; `|x_i| <= 5.12` is the usual box.

    Returns:
        The problem; its answers are refused.

    Example:
        >>> round(float(drop_wave(2).loss(jnp.array([jnp.pi / 6, 0.0]))), 4)  # the first ring
        -0.9359
    """

    def loss(x: jax.Array) -> jax.Array:
        square = jnp.sum(x**2)
        return -(1.0 + jnp.cos(12.0 * jnp.sqrt(square))) / (2.0 + 0.5 * square)

    return Problem("drop_wave", dim, loss, np.full(dim, 4.0), np.zeros(dim), -1.0)


def griewank(dim: int) -> Problem:
    """f(x) = 1 + |x|²/4000 - Π_i cos(x_i / √i), i from 1: a wide bowl with a fine ripple.

    The heat is exact, since it is a sum of products; nothing else is.

    Args:
        dim: number of coordinates; `|x_i| <= 600` is the usual box.

    Returns:
        The problem.

    Example:
        >>> problem = griewank(2)
        >>> problem.minimum
        0.0
        >>> round(problem.heat([0.0, 0.0], tau=1.0), 6)  # 1 + 2/4000 - exp(-1/2 - 1/4)
        0.528133
    """
    width = np.sqrt(np.arange(1.0, dim + 1.0))

    def loss(x: jax.Array) -> jax.Array:
        return 1.0 + jnp.sum(x**2) / 4000.0 - jnp.prod(jnp.cos(x / cast(width, x)))

    def heat(at: At) -> float:
        ripple = np.prod(np.cos(at.x / width) * np.exp(-at.tau / (2.0 * width**2)))
        return 1.0 + np.sum(at.x**2 + at.tau) / 4000.0 - ripple

    none = refuse("answer but the heat: the product of cosines does not separate")
    answers = Answers(none, heat, none, none)
    return Problem("griewank", dim, loss, np.full(dim, 400.0), np.zeros(dim), 0.0, answers)


def levy(dim: int) -> Problem:
    """f(x) = sin²πw_1 + Σ_i (w_i-1)²(1 + 10 sin²(πw_i+1)) + (w_dim-1)²(1 + sin²2πw_dim), w = 1 + (x-1)/4.

    The sum is over all coordinates but the last.

    Args:
        dim: number of coordinates; `|x_i| <= 10` is the usual box.

    Returns:
        The problem; its answers are refused.

    Example:
        >>> round(float(levy(1).loss(jnp.array([3.0]))), 4)  # w = 1.5: sin²(1.5 π) + 0.25
        1.25
    """

    def loss(x: jax.Array) -> jax.Array:
        w = 1.0 + (x - 1.0) / 4.0
        middle = (w[:-1] - 1.0) ** 2 * (1.0 + 10.0 * jnp.sin(jnp.pi * w[:-1] + 1.0) ** 2)
        last = (w[-1] - 1.0) ** 2 * (1.0 + jnp.sin(2.0 * jnp.pi * w[-1]) ** 2)
        return jnp.sin(jnp.pi * w[0]) ** 2 + jnp.sum(middle) + last

    best: ndarray = np.ones(dim)
    return Problem("levy", dim, loss, np.full(dim, -8.0), best, 0.0)
