# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""From moments to the Gaussian of a family that is nearest in KL(q || Gaussian).

Isotropic, diagonal and dense ones match what they can of the covariance; a dense one is shrunk when draws are
few (Schäfer & Strimmer 2005). A diagonal plus factors is the one of maximum likelihood.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_regloss._core.linalg import cholesky_with_floor
from numpyro_regloss._core.types import Array
from numpyro_regloss.draws.base import Chunk, Draws
from numpyro_regloss.draws.moments import Moments
from numpyro_regloss.fit.forward_kl.factor_analysis import FactorAnalysis, factor_analysis
from numpyro_regloss.gaussians.gaussian import AnyGaussian, Gaussian
from numpyro_regloss.gaussians.low_rank import LowRankGaussian

__all__ = ["Projection", "project", "structure_of"]

# Below this many effective draws per dimension a dense covariance is shrunk.
FEW_DRAWS = 10.0
# Up to this dimension factors are fitted to the covariance matrix, beyond it to the draws.
MATRIX_DIM = 1_000
# Least variance, in units of the largest or of the reference's: draws that are equal have none.
LEAST_VARIANCE = 1e-6


class Projection(NamedTuple):
    """The Gaussian of a family.

    Attributes:
        gaussian: what was fitted.
        error: standard errors of its covariance, or of its variances.
        shrinkage: of the correlations, between 0 and 1.
        floored: whether the covariance was singular and was raised.
        converged: whether factors converged.
    """

    gaussian: AnyGaussian
    error: Array
    shrinkage: Array
    floored: Array
    converged: Array


def structure_of(family: str, dim: int) -> str | None:
    """What of the covariance a family needs: see `draws.moments.of_chains`."""
    if family == "low_rank":
        return "diagonal" if dim > MATRIX_DIM else "dense"
    return None if family == "reference" else family


def project(
    method: Any, moments: Moments, draws: Draws, reference: AnyGaussian | None
) -> Projection:
    """Builds the Gaussian.

    Args:
        method: with `covariance` (not `"reference"`), `rank` and `shrinkage`.
        moments: of the structure that the family needs.
        draws: that the moments are of.
        reference: of the target, whose variance is the unit of what is too small; or None.

    Returns:
        The Gaussian and how it came about.
    """
    mean, covariance, error = moments.mean, moments.covariance, moments.covariance_error
    none, yes = jnp.zeros_like(mean[0]), jnp.asarray(True)
    if method.covariance in ("isotropic", "diagonal"):
        variance, floored = _floored(covariance, reference)
        return Projection(Gaussian(mean, jnp.sqrt(variance)), error, none, floored, yes)
    if covariance.ndim == 1:
        variance, floored = _floored(covariance, reference)
        solution = factor_analysis(_product(draws, mean), mean.size, method.rank, mean.dtype)
        gaussian = _scaled(mean, variance, solution)
        return Projection(gaussian, error, none, floored, solution.converged)
    # Factors are few numbers already, and those of maximum likelihood are of the covariance as it is.
    if method.covariance == "dense" and method.shrinkage == "auto":
        covariance, none = _shrunk(covariance, error)
    lower, floored = cholesky_with_floor(covariance)
    if method.covariance == "dense":
        return Projection(Gaussian(mean, lower), error, none, floored, yes)
    sd = jnp.sqrt(jnp.sum(lower**2, -1))
    lower = lower / sd[:, None]
    solution = factor_analysis(
        lambda columns: lower @ (lower.T @ columns), mean.size, method.rank, mean.dtype
    )
    gaussian = _scaled(mean, sd**2, solution)
    return Projection(gaussian, jnp.diagonal(error), none, floored, solution.converged)


def _shrunk(covariance: Array, error: Array) -> tuple[Array, Array]:
    # Schäfer & Strimmer: Σ Var(r_ij) / Σ r_ij² over i ≠ j, with the variances that the draws themselves show, so
    # that autocorrelation, weights and control variates count.
    sd = jnp.sqrt(jnp.maximum(jnp.diagonal(covariance), jnp.finfo(covariance.dtype).tiny))
    off = 1.0 - jnp.eye(len(sd), dtype=sd.dtype)
    correlation, relative = (matrix / sd[:, None] / sd for matrix in (covariance, error))
    noise, signal = jnp.sum(off * relative**2), jnp.sum(off * correlation**2)
    share = jnp.nan_to_num(noise / jnp.where(signal > 0, signal, 1.0), posinf=1.0)
    # The variance of a normal variance is 2 / n.
    effective = 2.0 / jnp.mean(jnp.diagonal(relative) ** 2)
    few = ~(effective >= FEW_DRAWS * len(sd))
    share = jnp.where(few, jnp.clip(share, 0.0, 1.0), 0.0)
    return covariance * (1.0 - share * off), share


def _floored(variance: Array, reference: AnyGaussian | None) -> tuple[Array, Array]:
    typical = jnp.mean(variance) if reference is None else jnp.mean(reference.variance)
    least = LEAST_VARIANCE * jnp.where(typical > 0, typical, 1.0)
    floored = ~(variance > jnp.finfo(variance.dtype).tiny)
    return jnp.where(floored & jnp.isfinite(variance), least, variance), jnp.any(floored)


def _product(draws: Draws, mean: Array) -> Callable[[Array], Array]:
    # Products of the draws' correlation matrix with a few columns.
    log_total = jax.nn.logsumexp(draws.log_weight)

    def second_moment(chunk: Chunk) -> tuple[Array, Array]:
        return chunk.x - mean, jnp.exp(chunk.log_weight - log_total)

    def add_variance(total: Array, chunk: Chunk) -> Array:
        x, weight = second_moment(chunk)
        # A product, since in a fused sum the weights would be computed anew for every element.
        return total + weight @ x**2

    variance = draws.fold(add_variance, jnp.zeros_like(mean))
    sd = jnp.sqrt(jnp.where(variance > 0, variance, 1.0))[:, None]

    def multiply(columns: Array) -> Array:
        scaled = columns / sd

        def add(total: Array, chunk: Chunk) -> Array:
            x, weight = second_moment(chunk)
            return total + x.T @ (weight[:, None] * (x @ scaled))

        return draws.fold(add, jnp.zeros_like(columns)) / sd

    return multiply


def _scaled(mean: Array, variance: Array, solution: FactorAnalysis) -> LowRankGaussian:
    # Marginal variances are matched exactly at the maximum of the likelihood, so also where the search ends.
    total = solution.uniqueness + jnp.sum(solution.factor**2, -1)
    factor = solution.factor * jnp.sqrt(variance / total)[:, None]
    return LowRankGaussian(mean, solution.uniqueness * variance / total, factor)
