# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Linear algebra that several estimators share."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from numpyro_regloss._core.settings import own_settings

__all__ = [
    "PowerIteration",
    "after",
    "cholesky_with_floor",
    "inverse_of_lower",
    "inverse_root",
    "lower_of_root",
    "power_iteration",
]


def after(first: Float[Array, ""], value: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The value as it is, to be computed once a scalar is known.

    Puts LAPACK calls in an order. Batched by `vmap`, each of JAX's splits its batch over the threads and waits;
    two at once can wait for each other's threads forever where there are two.

    Args:
        first: a result of the call that comes first.
        value: what the next call works on.

    Returns:
        The value.
    """
    never = (first != first) & (jnp.abs(first) == jnp.inf)
    return jnp.where(never, 0, value)


@partial(jax.jit, static_argnames="floor")
@own_settings
def cholesky_with_floor(
    matrix: Float[Array, "dim dim"], floor: float = 1e-6
) -> tuple[Float[Array, "dim dim"], Bool[Array, ""]]:
    """Lower Cholesky factor of a covariance matrix, made positive definite where it is not.

    With `D` the standard deviations and `C = D^-1 A D^-1 = V diag(e) V^T` the correlation form,

        L L^T = D V diag(max(e, floor)) V^T D,

    so that units do not matter. When `C - floor I` has a Cholesky factor, the plain factor of `A`
    is returned and no eigenvalues are computed. Correlations are cut to [-1, 1]. A coordinate with
    a zero, negative or subnormal variance is made uncorrelated, with a variance of `floor` times
    the mean of the others, or `floor` if there are none: the zero matrix gives `sqrt(floor) I`.

    Args:
        matrix: symmetric matrix, shape `(dim, dim)`.
        floor: smallest eigenvalue of the correlation form, without unit; the machine epsilon of the
            dtype if that is larger.

    Returns:
        The lower factor, shape `(dim, dim)`, with a positive diagonal, and whether it is that of
        another matrix than the one given. A matrix that is not finite gives a factor of NaN.
    """
    floor = max(floor, float(jnp.finfo(matrix.dtype).eps))
    finite = jnp.all(jnp.isfinite(matrix))
    identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    matrix = jnp.where(finite, matrix, identity)

    variance = jnp.diagonal(matrix)
    valid = variance >= jnp.finfo(matrix.dtype).tiny
    count = jnp.maximum(jnp.sum(valid), 1)
    mean = jnp.sum(jnp.where(valid, variance, 0) / count)
    scale = jnp.sqrt(jnp.where(valid, variance, jnp.where(mean > 0, mean, 1)))
    correlation = jnp.clip(matrix / scale[:, None] / scale, -1, 1)
    correlation = jnp.where(identity == 1, 1, correlation)
    correlation = jnp.where(valid[:, None] & valid, correlation, 0)

    plain = jnp.linalg.cholesky(matrix)
    shifted = jnp.linalg.cholesky(after(plain[0, 0], correlation - floor * identity))
    enough = jnp.all(jnp.isfinite(plain)) & jnp.all(jnp.isfinite(shifted))

    def raise_eigenvalues() -> Float[Array, "dim dim"]:
        value, vector = jnp.linalg.eigh(jnp.where(enough, identity, correlation))
        # The triangle of QR is that of Cholesky, but rounding cannot take away the floor again,
        # which in float32 it can when the product is formed first.
        root = jnp.sqrt(jnp.maximum(value, floor))[:, None] * vector.T
        return lower_of_root(root) * scale[:, None]

    lower = lax.cond(enough, lambda: plain, raise_eigenvalues)
    return jnp.where(finite, lower, jnp.nan), ~enough


def inverse_root(matrix: Array) -> Array:
    """A lower triangle R with Rᵀ R the inverse of a positive definite matrix.

    Args:
        matrix: `(dim, dim)`.

    Returns:
        `(dim, dim)`; its leading blocks are those of the leading blocks of the matrix.
    """
    return inverse_of_lower(jnp.linalg.cholesky(matrix))


def inverse_of_lower(lower: Array) -> Array:
    """The inverse of a lower triangle, `(dim, dim)` -> `(dim, dim)`."""
    identity = jnp.eye(len(lower), dtype=lower.dtype)
    return lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)


def lower_of_root(root: Array) -> Array:
    """The Cholesky factor of rootᵀ root, without the product, which would square rounding errors.

    Args:
        root: `(row, dim)`, at least as many rows as columns.

    Returns:
        A lower triangle with a positive diagonal, `(dim, dim)`.
    """
    lower = jnp.linalg.qr(root, mode="r").T
    return lower * jnp.where(jnp.diagonal(lower) < 0, -1.0, 1.0)


class PowerIteration(NamedTuple):
    """What a power iteration found of a symmetric matrix.

    Attributes:
        direction: a unit vector near the eigenvector of the eigenvalue of largest size, `(dim,)`.
        quotient: its Rayleigh quotient before the last product, at most the largest eigenvalue up to noise.
        norm: length of the last product, 0 where it is not finite.
    """

    direction: Array
    quotient: Array
    norm: Array


def power_iteration(
    direction: Array, num_iterations: Array | int, multiply: Callable[[Array], Array]
) -> PowerIteration:
    """Power iteration for the eigenvalue of largest size of a symmetric matrix.

    Args:
        direction: a unit vector to start from, `(dim,)`.
        num_iterations: one at least.
        multiply: the product of the matrix with a vector; one that is zero or not finite leaves the direction.

    Returns:
        Direction and eigenvalue.
    """

    def iterate(_: Array, now: PowerIteration) -> PowerIteration:
        product = multiply(now.direction)
        norm = jnp.linalg.norm(product)
        usable = jnp.isfinite(norm) & (norm > 0)
        after = jnp.where(usable, product / jnp.where(usable, norm, 1.0), now.direction)
        quotient = jnp.dot(now.direction, product)
        return PowerIteration(after, quotient, jnp.where(usable, norm, 0.0))

    zero = jnp.zeros((), direction.dtype)
    return lax.fori_loop(0, num_iterations, iterate, PowerIteration(direction, zero, zero))
