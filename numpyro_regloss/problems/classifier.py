# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The 0-1 loss of a linear classifier: no gradient, and yet an exact heat."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.optimize import root
from scipy.special import ndtr

from numpyro_regloss.problems.base import (
    Answers,
    At,
    Moments,
    Problem,
    cast,
    normal_density,
    refuse,
)

__all__ = ["zero_one"]


def zero_one(
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    start: ArrayLike | None = None,
    minimizer: ArrayLike | None = None,
) -> Problem:
    """f(w) = #{i: label_i inputs_i·w <= 0}, the training errors of a linear classifier.

    An integer and not differentiable, yet F^H(w) = Σ_i Φ(-label_i inputs_i·w/(sqrt(tau)|inputs_i|))
    is exact, and so is its update at temperatures high enough to make it provably unique.

    Args:
        inputs: `(n, dim)`, no row zero; a column of ones is an intercept.
        labels: `(n,)`, -1 or 1.
        start: `(dim,)`; the first unit vector if None.
        minimizer: `(dim,)`, the best classifier where it is known: finding it is NP-hard.

    Returns:
        The problem; its minimum is the loss of the minimizer.

    Raises:
        ValueError: if shapes disagree, a label is not -1 or 1, or a row of the inputs is zero.

    Example:
        >>> problem = zero_one([[1.0, 0.0], [0.0, 2.0]], [1, -1])
        >>> int(problem.loss(jnp.array([1.0, 1.0]))), problem.heat([0.0, 0.0], tau=0.5)
        (1, 1.0)
    """
    rows, signs = np.asarray(inputs, float), np.asarray(labels, float)
    if rows.ndim != 2 or signs.shape != rows.shape[:1]:
        raise ValueError(f"expected (n, dim) and (n,), got {rows.shape} and {signs.shape}")
    if not (np.all(np.abs(signs) == 1) and np.all(np.any(rows, axis=1))):
        raise ValueError("expected labels -1 or 1 and no row of zeros among the inputs")
    signed, dim = signs[:, None] * rows, rows.shape[1]

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.dot(cast(signed, x), x) <= 0)

    def standardized(at: At) -> ndarray:
        return signed / np.sqrt(signed**2 @ at.tau)[:, None]

    def heat_step(at: At) -> ndarray:
        scaled, pull = standardized(at), np.diag(at.temperature / at.tau)
        # Φ'' is at least -φ(1), at 1: a bound on how concave the heat can be.
        if np.linalg.eigvalsh(pull - normal_density(1.0) * scaled.T @ scaled)[0] <= 0:
            raise NotImplementedError("heat_step: at this temperature it may not be unique")

        def slope(y: ndarray) -> Moments:
            margin = scaled @ y
            hessian = (scaled.T * (margin * normal_density(margin))) @ scaled + pull
            return pull @ (y - at.x) - normal_density(margin) @ scaled, hessian

        return root(slope, at.x, jac=True, tol=1e-12).x

    none = refuse("local entropy: it would sum over the cells of a hyperplane arrangement")
    answers = Answers(none, lambda at: np.sum(ndtr(-standardized(at) @ at.x)), none, heat_step)
    begin = np.eye(dim)[0] if start is None else np.asarray(start, float)
    best = None if minimizer is None else np.asarray(minimizer, float)
    minimum = None if best is None else float(np.sum(signed @ best <= 0))
    return Problem("zero_one", dim, loss, begin, best, minimum, answers)
