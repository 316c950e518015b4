# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Batch and match of a diagonal plus factors, where a matrix does not fit.

In coordinates whitened by the Gaussian before, the regression changes only the span W of a batch of draws and
their scores:

    C ← S (I + W (K - I) Wᵀ) Sᵀ,   K the solution within the span,   S Sᵀ the covariance before.

Then comes the patch: the nearest diagonal plus `rank` factors, by factor analysis of products with C. A step costs
O(dim (batch² + batch rank)), and no matrix of dim² elements is formed.

Reference: Modi, Cai, Margossian, Blei, Gower & Saul (2025), "Batch, Match, and Patch: Low-Rank Approximations for
Score-Based Variational Inference".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_regloss._core.types import Array
from numpyro_regloss.fit.score_matching.regression import Anchored, Standard, solve
from numpyro_regloss.gaussians.factor_analysis import with_factors
from numpyro_regloss.gaussians.gaussian import Gaussian
from numpyro_regloss.gaussians.low_rank import LowRankGaussian

__all__ = ["batch_match_patch", "in_batches"]

# Draws of a batch: their span has twice as many dimensions.
BATCH = 128
# Least share of a variance that rounding may leave.
LEAST_SHARE = 1e-5


class Patched(NamedTuple):
    """One step.

    Attributes:
        gaussian: with factors.
        converged: whether the factors did.
        divergence: the Fisher divergence per dimension of the span, of what the patch was made of.
    """

    gaussian: LowRankGaussian
    converged: Array
    divergence: Array


def batch_match_patch(
    before: Gaussian | LowRankGaussian,
    x: Array,
    score: Array,
    weight: Array,
    strength: Array,
    rank: int,
) -> Patched:
    """One step of batch, match and patch.

    Args:
        before: the Gaussian that is kept where draws say nothing, diagonal or of low rank.
        x: `(draw, dim)`.
        score: like `x`.
        weight: adding to one, `(draw,)`.
        strength: of the Gaussian before, in units of the weight of all draws together.
        rank: number of factors.

    Returns:
        The Gaussian of low rank and how it came about.
    """
    e, a = before.whiten(x), jax.vmap(before.scaled_transpose)(score)
    mean, mean_score = weight @ e, weight @ a
    e, a = e - mean, a - mean_score
    rows = jnp.concatenate([e, mean[None], a, mean_score[None]])
    span = jnp.linalg.qr((rows / _norms(rows)).T)[0]
    data = Standard(weight, e @ span, a @ span, mean_score @ span)
    share = strength / (1.0 + strength)
    identity = jnp.eye(span.shape[1], dtype=span.dtype)
    anchored = Anchored(-mean @ span, identity, strength, share)
    within = solve(data, "dense", jnp.ones(span.shape[1], span.dtype), anchored)
    center = before.unwhiten(span @ (mean @ span + within.offset))
    columns = jax.vmap(before.scaled, 1, 1)(span)
    grown = columns @ within.scale
    old = before.variance
    variance = old + jnp.sum(grown**2, -1) - jnp.sum(columns**2, -1)
    variance = jnp.maximum(variance, LEAST_SHARE * old)
    sd = jnp.sqrt(variance)[:, None]

    def multiply(block: Array) -> Array:
        block = block / sd
        change = grown @ (grown.T @ block) - columns @ (columns.T @ block)
        return (_covariance(before)(block) + change) / sd

    gaussian, converged = with_factors(multiply, center, variance, rank)
    return Patched(gaussian, converged, within.divergence)


def in_batches(
    first: Gaussian, x: Array, score: Array, weight: Array, rank: int
) -> tuple[LowRankGaussian, Array]:
    """The covariance of given draws, batch by batch, with the learning rates of batch and match.

    Args:
        first: diagonal.
        x: `(draw, dim)`.
        score: like `x`.
        weight: adding to one, `(draw,)`.
        rank: number of factors.

    Returns:
        The Gaussian of low rank, and whether the factors of the last batch converged.
    """
    num, dim = x.shape
    count = -(-num // BATCH)
    size = -(-num // count)

    def split(values: Array) -> Array:
        # Every batch has draws from all over a chain.
        values = jnp.pad(values, [(0, count * size - num)] + [(0, 0)] * (values.ndim - 1))
        return jnp.swapaxes(values.reshape(size, count, *values.shape[1:]), 0, 1)

    def step(
        now: LowRankGaussian, batch: tuple[Array, Array, Array, Array]
    ) -> tuple[LowRankGaussian, Array]:
        x, score, weight, t = batch
        total = jnp.sum(weight)
        share = weight / jnp.where(total > 0, total, 1.0)
        rate = size * dim * jnp.maximum(count * total, jnp.finfo(x.dtype).eps) / (t + 1.0)
        after = batch_match_patch(now, x, score, share, 1.0 / rate, rank)
        return after.gaussian, after.converged

    start = LowRankGaussian(first.mean, first.variance, jnp.zeros((dim, rank), x.dtype))
    times = jnp.arange(count, dtype=x.dtype)
    last, converged = lax.scan(step, start, (split(x), split(score), split(weight), times))
    return last, converged[-1]


def _norms(rows: Array) -> Array:
    norm = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return jnp.where(norm > 0, norm, 1.0)


def _covariance(gaussian: Gaussian | LowRankGaussian) -> Callable[[Array], Array]:
    if isinstance(gaussian, LowRankGaussian):
        diagonal, factor = gaussian.diagonal[:, None], gaussian.factor
        return lambda block: diagonal * block + factor @ (factor.T @ block)
    return lambda block: gaussian.variance[:, None] * block
