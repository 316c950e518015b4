# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Second-order information in the draws: their covariance, or the regression of draws on scores.

In coordinates in which the reference is N(0, I), with ε the draws and g = ∇ log q the scores there,

    -A = -E[ε gᵀ] (E[g gᵀ])⁻¹ = (E[g gᵀ])⁻¹ ⪯ Cov_q(ε),

with equality for a Gaussian q, of which the regression is exact from a few draws more than dimensions.

Reference: Mira, Solgi & Imparato (2013), "Zero Variance Markov Chain Monte Carlo for Bayesian Estimators".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_regloss._core.stats import normalize_log_weight, weight_ess
from numpyro_regloss._core.types import Array
from numpyro_regloss.draws.base import Chunk, Draws
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["Regression", "mean_of", "regress"]

# Of the mean eigenvalue of the scores' second moments: enough for float32, of no effect otherwise.
RIDGE = 1e-6
# Effective draws per coefficient; a regression of fewer is no better than a sample covariance of as many.
LEAST_DRAWS = 1.2
# The fit's control variates, by their indices.
DIAGONAL, FULL = 1, 2


class Regression(NamedTuple):
    """What draws say of the covariance of q, whitened by the reference.

    Attributes:
        covariance: `(dim, dim)`, or its diagonal `(dim,)`; of the scores where they are used.
        coefficient: A of the fit's control variate, to be subtracted from the draws times the scores; like
            `covariance`, or None without scores.
        residual: of the draws, about their mean, `(draw, dim)`; None for a diagonal of draws without scores.
        noise: what chance may add to an eigenvalue of the covariance; zero of a regression.
    """

    covariance: Array
    coefficient: Any
    residual: Any
    noise: Array


def _direct(draws: Draws, reference: AnyGaussian) -> tuple[Array, Array, Any]:
    # Weights, whitened draws and scores, chains flattened; what has no weight may be anything.
    weight = normalize_log_weight(draws.log_weight).reshape(-1)
    used = weight[:, None] > 0
    whitened = reference.whiten(draws.x.reshape(weight.size, -1))
    whitened = jnp.where(used, whitened, 0.0)
    if draws.score is None:
        return weight, whitened, None
    score = reference.scaled_transpose(draws.score.reshape(whitened.shape))
    return weight, whitened, jnp.where(used, score, 0.0)


def regress(
    target: RegularizedLoss, draws: Draws, control: Array, *, compatible: Array, diagonal: bool
) -> Regression:
    """The covariance that draws, or their scores, show.

    Args:
        target: the target of the draws.
        draws: from q, with weights.
        control: the control variate that the fit used: 0 none, 1 diagonal, 2 and more full.
        compatible: whether scores are those of a differentiable density; else they are not used.
        diagonal: variances only.

    Returns:
        The covariance, and what is needed for means of parts of the draws.
    """
    reference = target.reference
    count = weight_ess(draws.log_weight)
    if draws.score is None and diagonal:
        variances = _variances(draws, reference)
        return Regression(variances, None, None, _spread(count, 1.0))
    weight, z, score = _direct(draws, reference)
    z = z - weight @ z
    dim = z.shape[-1]
    if diagonal:
        covariance, chance = weight @ z**2, _spread(count, 1.0)
    else:
        covariance, chance = (weight[:, None] * z).T @ z, _spread(count, float(dim))
    if score is None:
        return Regression(covariance, None, z, chance)
    centered = score - weight @ score
    each = _each(weight, z, centered)
    if diagonal:
        fitted, of_fit = -each, jnp.where(control >= DIAGONAL, each, 0.0)
        residual = z - centered * each
    else:
        full = _full(weight, z, centered)
        fitted = -0.5 * (full + full.T)
        of_fit = jnp.where(control == DIAGONAL, jnp.diag(each), full)
        of_fit = jnp.where(control >= DIAGONAL, of_fit, 0.0)
        residual = z - centered @ full.T
    return Regression(
        jnp.where(compatible, fitted, covariance),
        jnp.where(compatible, of_fit, 0.0),
        jnp.where(compatible, residual, z),
        jnp.where(compatible & (count >= LEAST_DRAWS * (1 if diagonal else dim)), 0.0, chance),
    )


def mean_of(draws: Draws, reference: AnyGaussian, coefficient: Any) -> Array:
    """Mean of the whitened draws, less the control variate's coefficient times the scores.

    Args:
        draws: those without weight do not count.
        reference: to whiten with.
        coefficient: of a `Regression`.

    Returns:
        The mean, `(dim,)`.
    """
    if draws.score is None:
        return _folded(draws, reference.whiten, reference.mean)
    weight, z, score = _direct(draws, reference)
    level = weight @ score
    return weight @ z - (coefficient * level if coefficient.ndim == 1 else coefficient @ level)


def _each(weight: Array, z: Array, score: Array) -> Array:
    second = weight @ score**2
    usable = second > 0
    return jnp.where(usable, (weight @ (z * score)) / jnp.where(usable, second, 1.0), 0.0)


def _full(weight: Array, z: Array, score: Array) -> Array:
    dim = z.shape[-1]
    weighted = weight[:, None] * score
    moments = weighted.T @ score
    ridge = RIDGE * jnp.trace(moments) / dim + jnp.finfo(z.dtype).tiny
    lower = jnp.linalg.cholesky(moments + ridge * jnp.eye(dim, dtype=z.dtype))
    half = lax.linalg.triangular_solve(lower, weighted.T @ z, left_side=True, lower=True)
    return lax.linalg.triangular_solve(lower, half, left_side=True, lower=True, transpose_a=True).T


def _spread(count: Array, dim: float) -> Array:
    # The largest eigenvalue of a sample covariance of the identity (Marchenko & Pastur), or two standard errors.
    ratio = dim / jnp.maximum(count, 1.0)
    return 2.0 * jnp.sqrt(ratio) + ratio if dim > 1 else 2.0 * jnp.sqrt(2.0 * ratio)


def _variances(draws: Draws, reference: AnyGaussian) -> Array:
    mean = _folded(draws, reference.whiten, reference.mean)
    return _folded(draws, lambda x: (reference.whiten(x) - mean) ** 2, reference.mean)


def _folded(draws: Draws, values: Any, like: Array) -> Array:
    log_total = jax.nn.logsumexp(draws.log_weight)
    log_total = jnp.where(jnp.isfinite(log_total), log_total, 0.0)

    def add(total: Array, chunk: Chunk) -> Array:
        return total + jnp.exp(chunk.log_weight - log_total) @ values(chunk.x)

    return draws.fold(add, jnp.zeros_like(like))
