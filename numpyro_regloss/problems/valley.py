# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Rosenbrock's curved valley."""

import jax
import numpy as np
from numpy import ndarray
from numpy.polynomial import Polynomial
from scipy.special import logsumexp

from numpyro_regloss.problems.base import Answers, At, Moments, Problem
from numpyro_regloss.problems.quadrature import tilt_nodes, weighted_moments

__all__ = ["rosenbrock"]


def rosenbrock(a: float = 1.0, b: float = 100.0) -> Problem:
    """f(x) = (a - x_0)² + b (x_1 - x_0²)², a narrow curved valley in two dimensions.

    Given x_0 all is Gaussian in x_1, so that quadrature and roots are needed in x_0 alone.

    Args:
        a: position of the minimum, (a, a²).
        b: steepness of the walls, positive.

    Returns:
        The problem.

    Raises:
        ValueError: if b is not positive.

    Example:
        >>> rosenbrock().heat([1.0, 1.0], tau=0.5)  # tau + b (tau + 3 tau² + 4 tau)
        325.5
    """
    if b <= 0:
        raise ValueError(f"expected b > 0, got {b}")

    def loss(x: jax.Array) -> jax.Array:
        return (a - x[0]) ** 2 + b * (x[1] - x[0] ** 2) ** 2

    def tilt(at: At) -> tuple[ndarray, ndarray, float]:
        wall = 1 / (1 / b + 2 * at.tau[1] / at.temperature)  # b, once x_1 is integrated out

        def marginal(u: ndarray) -> ndarray:
            return (a - u[..., 0]) ** 2 + wall * (u[..., 0] ** 2 - at.x[1]) ** 2

        rule = tilt_nodes(marginal, at._replace(x=at.x[:1], tau=at.tau[:1]), 0.0)
        return *rule, 2 * wall * at.tau[1] / at.temperature

    def local_entropy(at: At) -> float:
        _, log_weight, gain = tilt(at)
        return -at.temperature * (logsumexp(log_weight) + np.log1p(-gain) / 2)

    def heat(at: At) -> float:
        (x, y), (s, t) = at.x, at.tau
        return (a - x) ** 2 + s + b * (t + 2 * s**2 + 4 * s * x**2 + (y - x**2 - s) ** 2)

    def moments(at: At) -> Moments:
        u, log_weight, gain = tilt(at)
        nodes = np.hstack([u, at.x[1] + gain * (u**2 - at.x[1])])
        mean, covariance = weighted_moments(nodes, log_weight)
        return mean, covariance + np.diag([0.0, at.tau[1] * (1 - gain)])

    def heat_step(at: At) -> ndarray:
        (x, y), (pull_x, pull_y), u = at.x, at.temperature / at.tau, Polynomial([0.0, 1.0])
        valley, gain = u**2 + at.tau[0], 2 * b / (2 * b + pull_y)
        # The objective minimized over x_1; its critical points are the roots of a cubic.
        profile = (a - u) ** 2 + 4 * b * at.tau[0] * u**2 + pull_x / 2 * (u - x) ** 2
        profile += gain * pull_y / 2 * (valley - y) ** 2
        best = min(profile.deriv().roots().real, key=profile)
        return np.array([best, y + gain * (valley(best) - y)])

    start, best = np.array([-1.2, 1.0]), np.array([a, a**2], float)
    answers = Answers(local_entropy, heat, moments, heat_step)
    return Problem("rosenbrock", 2, loss, start, best, 0.0, answers)
