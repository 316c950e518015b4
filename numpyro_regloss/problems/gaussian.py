# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Losses of Gaussian densities: linear, quadratic, mixtures."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from numpyro_regloss.problems.base import Answers, At, Moments, Problem, cast
from numpyro_regloss.problems.quadrature import quadrature_answers, weighted_moments

__all__ = ["gaussian_mixture", "linear", "quadratic"]


def linear(slope: ArrayLike) -> Problem:
    """f(x) = slope·x, with F = f - tau|slope|²/(2T) and both updates x - tau slope/T.

    Args:
        slope: `(dim,)`.

    Returns:
        The problem; it has no minimizer.

    Example:
        >>> linear([1.0, -2.0]).local_entropy([0.0, 0.0], tau=0.5)
        -1.25
    """
    slope = np.atleast_1d(np.asarray(slope, float))
    zero = np.zeros_like(slope)
    answers = _quadratic_answers(np.diag(zero), zero, slope, 0.0)
    return Problem(
        "linear", slope.size, lambda x: jnp.dot(x, cast(slope, x)), zero, answers=answers
    )


def quadratic(hessian: ArrayLike, center: ArrayLike = 0.0, offset: float = 0.0) -> Problem:
    """f(x) = (x - m)ᵀH(x - m)/2 + c, with both updates (I + tau H/T)⁻¹(x + tau H m/T).

    Args:
        hessian: H, symmetric positive semidefinite `(dim, dim)`, or its diagonal `(dim,)`.
        center: m, `(dim,)` or a scalar.
        offset: c.

    Returns:
        The problem, started one unit off the center in every coordinate.

    Raises:
        ValueError: if the Hessian is not a symmetric positive semidefinite matrix.

    Example:
        >>> quadratic([1.0, 3.0]).shift_mean([1.0, 1.0], tau=1.0).tolist()
        [0.5, 0.25]
    """
    given, offset = np.atleast_1d(np.asarray(hessian, float)), float(offset)
    matrix = np.diag(given) if given.ndim == 1 else given
    if matrix.shape != matrix.T.shape or not np.allclose(matrix, matrix.T):
        raise ValueError(f"expected a symmetric Hessian or its diagonal, got {given}")
    eigenvalues = np.linalg.eigvalsh(matrix)
    if eigenvalues[0] < -1e-10 * abs(eigenvalues[-1]):
        raise ValueError(f"expected a positive semidefinite Hessian, got eigenvalues {eigenvalues}")
    middle = np.zeros(len(matrix)) + np.asarray(center, float)
    curve = jnp.multiply if given.ndim == 1 else jnp.dot

    def loss(x: jax.Array) -> jax.Array:
        residual = x - cast(middle, x)
        return jnp.dot(residual, curve(cast(given, x), residual)) / 2 + offset

    answers = _quadratic_answers(matrix, middle, np.zeros_like(middle), offset)
    return Problem("quadratic", middle.size, loss, middle + 1.0, middle, offset, answers)


def gaussian_mixture(weights: ArrayLike, means: ArrayLike, covariances: ArrayLike) -> Problem:
    """f(x) = -log Σ_j w_j N(x; m_j, S_j); at T = 1, F = -log Σ_j w_j N(x; m_j, S_j + tau I).

    Other temperatures and the heat answers are quadratures, of one and two dimensions only. Where
    tau is hundreds of times the smallest variance, f has creases on its scale and the heat in two
    dimensions is good to 1e-5 only, else to 1e-8.

    Args:
        weights: w, `(k,)`, positive; a sum other than one only moves the loss.
        means: m, `(k, dim)`, or `(k,)` in one dimension.
        covariances: S, a variance, one per component `(k,)`, one per component and coordinate
            `(k, dim)`, or matrices `(k, dim, dim)`.

    Returns:
        The problem, started one standard deviation off the mean of the lightest component. Its
        minimizer is numerical (about 1e-8): the best of the descents from every mean.

    Raises:
        ValueError: if shapes disagree, a weight is not positive or a covariance not definite.

    Example:
        >>> problem = gaussian_mixture([0.5, 0.5], [-1.0, 1.0], 0.5)
        >>> round(problem.local_entropy([0.0], tau=0.5), 6)  # -log N(1; 0, 1)
        1.418939
    """
    weight, mean, spread = (np.asarray(given, float) for given in (weights, means, covariances))
    mean = mean[:, None] if mean.ndim == 1 else mean
    count, dim = mean.shape
    if spread.ndim < 3:
        spread = spread[:, None] if spread.ndim == 1 else spread
        spread = np.broadcast_to(spread, mean.shape)[..., None] * np.eye(dim)
    if weight.shape != (count,) or np.any(weight <= 0):
        raise ValueError(f"expected {count} positive weights, got {weights}")
    if spread.shape != (count, dim, dim) or np.linalg.eigvalsh(spread).min() <= 0:
        raise ValueError(f"expected {count} positive definite covariances, got {covariances}")
    whiten = np.linalg.inv(np.linalg.cholesky(spread))
    log_scale = np.log(weight) - np.linalg.slogdet(2 * np.pi * spread)[1] / 2

    def loss(x: jax.Array) -> jax.Array:
        residual = jnp.einsum("kij,kj->ki", cast(whiten, x), x - cast(mean, x))
        return -jax.nn.logsumexp(cast(log_scale, x) - jnp.sum(residual**2, axis=1) / 2)

    def components(x: ndarray, tau: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        total = spread + np.diag(tau)
        pulled = np.linalg.solve(total, (x - mean)[..., None])[..., 0]
        squares = np.sum((x - mean) * pulled, axis=1) + np.linalg.slogdet(2 * np.pi * total)[1]
        return np.log(weight) - squares / 2, pulled, total

    def value_and_grad(x: ndarray) -> tuple[float, ndarray]:
        log_terms, pulled, _ = components(x, np.zeros(dim))
        return -logsumexp(log_terms), softmax(log_terms) @ pulled

    best = min(
        (minimize(value_and_grad, m, jac=True, tol=1e-10) for m in mean), key=lambda r: r.fun
    )
    numerical = quadrature_answers(loss, dim, best.fun)

    def local_entropy(at: At) -> float:
        if at.temperature != 1:
            return numerical.local_entropy(at)
        return -logsumexp(components(at.x, at.tau)[0])

    def moments(at: At) -> Moments:
        if at.temperature != 1:
            return numerical.moments(at)
        log_terms, pulled, total = components(at.x, at.tau)
        center, between = weighted_moments(at.x - at.tau * pulled, log_terms)
        within = spread @ np.linalg.solve(total, np.diag(at.tau))
        return center, between + np.tensordot(softmax(log_terms), within, axes=1)

    lightest = np.argmin(weight)
    start = mean[lightest] + np.sqrt(np.diag(spread[lightest]))
    answers = numerical._replace(local_entropy=local_entropy, moments=moments)
    return Problem("gaussian_mixture", dim, loss, start, best.x, float(best.fun), answers)


def _quadratic_answers(hessian: ndarray, center: ndarray, slope: ndarray, offset: float) -> Answers:
    def value(x: ndarray) -> float:
        return (x - center) @ hessian @ (x - center) / 2 + slope @ x + offset

    def moments(at: At) -> Moments:
        covariance = np.linalg.inv(hessian / at.temperature + np.diag(1 / at.tau))
        gradient = hessian @ (at.x - center) + slope
        return at.x - covariance @ gradient / at.temperature, covariance

    def local_entropy(at: At) -> float:
        mean, covariance = moments(at)
        log_det = np.sum(np.log(at.tau)) - np.linalg.slogdet(covariance)[1]
        return value(mean) + at.temperature * (np.sum((at.x - mean) ** 2 / at.tau) + log_det) / 2

    def heat(at: At) -> float:
        return value(at.x) + at.tau @ np.diag(hessian) / 2

    return Answers(local_entropy, heat, moments, lambda at: moments(at)[0])
