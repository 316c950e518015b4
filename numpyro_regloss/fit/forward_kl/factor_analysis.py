# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Maximum-likelihood factor analysis: the best diagonal plus low-rank covariance for KL(q || Gaussian).

    minimize  log det Σ + tr(Σ⁻¹ S)   over   Σ = diag(d) + F Fᵀ

by EM, extrapolated by SQUAREM and safeguarded by the likelihood. The covariance S is seen only through
products with a few columns, so that dim² numbers are never needed. S has ones on its diagonal.

References: Rubin & Thayer (1982), "EM Algorithms for ML Factor Analysis"; Varadhan & Roland (2008), "Simple and
Globally Convergent Methods for Accelerating the Convergence of Any EM Algorithm".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_regloss._core.types import Array

__all__ = ["FactorAnalysis", "factor_analysis"]

# Three cycles in a row, of three products each, that gain less than this many nats per draw and coordinate are
# the last; in float32 a single one may be rounding.
TOLERANCE = 1e-7
QUIET_CYCLES = 3
MOST_CYCLES = 300
# Smallest share of a variance that factors leave (the likelihood's maximum can be at none: a Heywood case).
LEAST_UNIQUENESS = 1e-3
SUBSPACE_ITERATIONS = 3


class FactorAnalysis(NamedTuple):
    """The solution.

    Attributes:
        uniqueness: the diagonal part, `(dim,)`.
        factor: `(dim, rank)`.
        num_products: products of S with `rank` columns.
        converged: whether the last cycles gained less than the tolerance.
    """

    uniqueness: Array
    factor: Array
    num_products: Array
    converged: Array


class _Point(NamedTuple):
    log_uniqueness: Array
    factor: Array


class _Carry(NamedTuple):
    point: _Point
    likelihood: Array
    quiet: Array
    cycles: Array


def factor_analysis(
    multiply: Callable[[Array], Array], dim: int, rank: int, dtype: jnp.dtype
) -> FactorAnalysis:
    """Fits uniquenesses and factors to a correlation matrix.

    Args:
        multiply: the product of S, with ones on its diagonal, with columns `(dim, rank)`.
        dim: number of coordinates.
        rank: number of factors, below `dim`.
        dtype: of the solution.

    Returns:
        The solution.
    """
    start = _start(multiply, dim, rank, dtype)
    likelihood = jnp.full((), -jnp.inf, dtype)
    carry = _Carry(start, likelihood, jnp.asarray(0), jnp.asarray(0))

    def unfinished(carry: _Carry) -> Array:
        return (carry.quiet < QUIET_CYCLES) & (carry.cycles < MOST_CYCLES)

    def cycle(carry: _Carry) -> _Carry:
        first, _ = _expectation_maximization(multiply, carry.point)
        second, between = _expectation_maximization(multiply, first)
        jump = _extrapolate(carry.point, first, second)
        third, at_jump = _expectation_maximization(multiply, jump)
        better = at_jump >= between
        point = jax.tree.map(lambda a, b: jnp.where(better, a, b), third, second)
        reached = jnp.where(better, at_jump, between)
        # Of S that is not finite nothing is gained, and the search ends.
        quiet = ~(reached - carry.likelihood > TOLERANCE * dim)
        quiet = jnp.where(quiet, carry.quiet + 1, 0)
        return _Carry(point, jnp.maximum(reached, carry.likelihood), quiet, carry.cycles + 1)

    carry = lax.while_loop(unfinished, cycle, carry)
    return FactorAnalysis(
        jnp.exp(carry.point.log_uniqueness),
        carry.point.factor,
        SUBSPACE_ITERATIONS + 1 + 3 * carry.cycles,
        carry.quiet >= QUIET_CYCLES,
    )


def _start(multiply: Callable[[Array], Array], dim: int, rank: int, dtype: jnp.dtype) -> _Point:
    # Probabilistic principal components, along a subspace that is near the leading one.
    basis = jnp.linalg.qr(random.normal(random.key(0), (dim, rank), dtype))[0]
    for _ in range(SUBSPACE_ITERATIONS):
        basis = jnp.linalg.qr(multiply(basis))[0]
    value, vector = jnp.linalg.eigh(basis.T @ multiply(basis))
    rest = jnp.maximum((dim - jnp.sum(value)) / max(dim - rank, 1), LEAST_UNIQUENESS)
    # Of a factor that is zero EM never moves away.
    factor = (basis @ vector) * jnp.sqrt(jnp.maximum(value - rest, 0.01))
    uniqueness = jnp.clip(1.0 - jnp.sum(factor**2, -1), 0.05, 1.0)
    return _Point(jnp.log(uniqueness), factor)


def _expectation_maximization(
    multiply: Callable[[Array], Array], point: _Point
) -> tuple[_Point, Array]:
    # One step, and the mean log likelihood (times two, up to a constant) at the point before it.
    uniqueness, factor = jnp.exp(point.log_uniqueness), point.factor
    scaled = factor / uniqueness[:, None]
    identity = jnp.eye(factor.shape[-1], dtype=factor.dtype)
    precision = identity + factor.T @ scaled
    lower = jnp.linalg.cholesky(precision)
    root = lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
    posterior = root.T @ root
    regression = scaled @ posterior
    product = multiply(regression)
    second = posterior + regression.T @ product
    new = jax.scipy.linalg.solve(second, product.T, assume_a="pos").T
    rest = jnp.maximum(1.0 - jnp.sum(new * product, -1), LEAST_UNIQUENESS)
    explained = jnp.sum(regression * (product @ precision))
    log_det = jnp.sum(point.log_uniqueness) + 2.0 * jnp.sum(jnp.log(jnp.diagonal(lower)))
    return _Point(jnp.log(rest), new), -log_det - jnp.sum(1.0 / uniqueness) + explained


def _extrapolate(start: _Point, first: _Point, second: _Point) -> _Point:
    step = jax.tree.map(jnp.subtract, first, start)
    bend = jax.tree.map(lambda c, b, r: c - b - r, second, first, step)
    norm = lambda tree: jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))  # noqa: E731
    length = norm(step) / jnp.maximum(norm(bend), jnp.finfo(first.factor.dtype).tiny)
    length = jnp.clip(length, 1.0, 100.0)
    log_uniqueness, factor = jax.tree.map(
        lambda a, r, v: a + 2.0 * length * r + length**2 * v, start, step, bend
    )
    return _Point(jnp.clip(log_uniqueness, jnp.log(LEAST_UNIQUENESS), 0.0), factor)
