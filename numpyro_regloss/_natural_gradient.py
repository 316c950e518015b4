# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Variational fits by natural gradients: Newton steps for the mean, a moving average for the precision.

    precision ← precision + ρ (A - precision) + ρ²/2 (A - precision) precision⁻¹ (A - precision)
    mean ← mean - ρ A⁻¹ ∇B,      A = E_N Hessian of the energy + precision of the reference

The expected Hessian comes from gradients alone, by Stein's identity E ∇²f = E[ S⁻ᵀ ξ ∇fᵀ ], of which fixed
draws use the lower triangle: then a fixed point is a stationary point of the bound over these draws. The last
term keeps the precision positive definite. A trial that raises the bound, or is not finite, halves ρ.

References: Khan & Lin (2017), "Conjugate-Computation Variational Inference"; Khan et al. (2018), "Fast and
Scalable Bayesian Deep Learning by Weight-Perturbation in Adam"; Lin, Schmidt & Khan (2020), "Handling the
Positive-Definite Constraint in the Bayesian Learning Rule".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_regloss._typing import Array
from numpyro_regloss._variational import (
    Evaluation,
    Solution,
    divergence,
    draw,
)
from numpyro_regloss.gaussian import AnyGaussian, Gaussian

__all__ = ["natural_gradient"]

# Largest entry of the natural gradient of a solution, in standard deviations.
TOLERANCE = 1e-4
# The least decrease of the bound worth a step, in nats, and how many steps in a row may gain less.
GAIN, MAX_IDLE = 5e-7, 2
# Below this step only the rounding of the bound decides.
LEAST_RATE = 1e-3


class _Search(NamedTuple):
    solution: Solution
    value: Array
    slope: Array  # of the bound, whitened by the Gaussian
    curvature: Array  # A, whitened, (dim, dim)
    rate: Array
    num_idle: Array
    done: Array


def natural_gradient(
    evaluate: Callable[[Array], Evaluation],
    start: AnyGaussian,
    covariance: str,
    noise: Array,
    reference: AnyGaussian | None,
    num_steps: int,
) -> Solution:
    """Minimizes the bound over a family on fixed draws.

    Args:
        evaluate: energies and gradients of draws.
        start: of the family.
        covariance: the family, not of low rank.
        noise: from `noise_for`, with the identity as sample covariance.
        reference: the target's.
        num_steps: evaluations of all draws at most.

    Returns:
        The solution; of an evaluation that is not finite if the start's is none.
    """

    def advance(search: _Search) -> _Search:
        now = search.solution
        first = now.num_steps == 0
        trial = _moved(now.gaussian, covariance, search)
        evaluation = evaluate(draw(trial, noise))
        value = jnp.mean(evaluation.energy) + divergence(trial, reference)
        slope, curvature = _local(trial, noise, evaluation, reference)
        finite = jnp.isfinite(value) & jnp.isfinite(slope).all() & jnp.isfinite(curvature).all()
        eps = jnp.finfo(noise.dtype).eps
        rounding = 4 * eps * (jnp.mean(jnp.abs(now.evaluation.energy)) + 1.0)
        taken = finite & (first | (value <= search.value + rounding))
        idle = ~first & (search.value - value < GAIN)
        num_idle = jnp.where(idle, search.num_idle + 1, 0)
        size = jnp.max(jnp.abs(_change(covariance, slope, curvature)))
        tried = now._replace(num_steps=now.num_steps + 1, num_rejected=now.num_rejected + ~finite)
        fresh = _Search(
            tried._replace(gaussian=trial, evaluation=evaluation),
            value,
            slope,
            curvature,
            jnp.where(first, search.rate, jnp.minimum(2 * search.rate, 1.0)),
            num_idle,
            (size <= TOLERANCE) | (num_idle >= MAX_IDLE),
        )
        same = search._replace(
            solution=tried,
            rate=0.5 * search.rate,
            done=first | (0.5 * search.rate < LEAST_RATE),
        )
        return jax.tree.map(lambda a, b: jnp.where(taken, a, b), fresh, same)

    def unfinished(search: _Search) -> Array:
        return ~search.done & (search.solution.num_steps < num_steps)

    zero = jnp.zeros_like(start.mean)
    search = _Search(
        Solution.at(start, evaluate, noise),
        value=zero[0],
        slope=zero,
        curvature=jnp.eye(zero.size, dtype=zero.dtype),
        rate=zero[0] + 1.0,
        num_idle=jnp.asarray(0),
        done=jnp.asarray(False),
    )
    return lax.while_loop(unfinished, advance, search).solution


def _local(
    gaussian: AnyGaussian, noise: Array, evaluation: Evaluation, reference: AnyGaussian | None
) -> tuple[Array, Array]:
    # Gradient and expected Hessian of energy - log reference, in coordinates whitened by the Gaussian.
    gradient = jax.vmap(gaussian.scaled_transpose)(evaluation.gradient)
    slope = jnp.mean(gradient, 0)
    lower = jnp.tril(gradient.T @ noise / len(noise))
    curvature = lower + jnp.tril(lower, -1).T
    if reference is None:
        return slope, curvature
    columns = jax.vmap(gaussian.scaled, in_axes=1, out_axes=1)(
        jnp.eye(len(slope), dtype=slope.dtype)
    )
    standard = reference.whiten_columns(columns)
    pull = standard.T @ reference.whiten(gaussian.mean)
    return slope + pull, curvature + standard.T @ standard


def _average(covariance: str, curvature: Array) -> Array:
    # The part of A that the family can take on.
    if covariance == "isotropic":
        return jnp.mean(jnp.diagonal(curvature))
    return jnp.diagonal(curvature) if covariance == "diagonal" else curvature


def _change(covariance: str, slope: Array, curvature: Array) -> Array:
    if covariance == "reference":
        return slope
    part = _average(covariance, curvature)
    one = jnp.eye(len(slope), dtype=slope.dtype) if part.ndim == 2 else 1.0
    return jnp.concatenate([slope, jnp.ravel(part - one)])


def _moved(gaussian: AnyGaussian, covariance: str, search: _Search) -> AnyGaussian:
    rate, curvature = search.rate, search.curvature
    excess = curvature - jnp.eye(len(search.slope), dtype=curvature.dtype)
    retracted = _retract(rate, excess, excess @ excess)
    # Newton's step where the bound is convex about here; the retraction's matrix is positive definite always.
    factor = jnp.linalg.cholesky(curvature)
    factor = jnp.where(jnp.isfinite(factor).all(), factor, jnp.linalg.cholesky(retracted))
    step = jax.scipy.linalg.cho_solve((factor, True), search.slope)
    mean = gaussian.mean - rate * gaussian.scaled(step)
    if covariance == "reference":
        return gaussian._replace(mean=mean)
    if covariance == "dense":
        # precision = S⁻ᵀ R S⁻¹ with R = U Uᵀ for an upper triangle U, so that S U⁻ᵀ is lower triangular.
        upper = jnp.linalg.cholesky(retracted[::-1, ::-1])[::-1, ::-1]
        scale = jax.scipy.linalg.solve_triangular(upper, gaussian[1].T, lower=False).T
        return Gaussian(mean, jnp.tril(scale))
    part = _average(covariance, excess)
    return Gaussian(mean, gaussian[1] / jnp.sqrt(_retract(rate, part, part**2)))


def _retract(rate: Array, excess: Array, square: Array) -> Array:
    one = jnp.eye(len(excess), dtype=excess.dtype) if excess.ndim == 2 else 1.0
    return one + rate * excess + 0.5 * rate**2 * square
