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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_regloss._core.pytree import all_finite
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.fit.reverse_kl.coordinates import (
    Evaluation,
    Solution,
    divergence,
    draw,
    evaluator,
    noise_for,
)
from numpyro_regloss.fit.reverse_kl.improper import (
    Guard,
    endless_rays,
    flat_directions,
    guarded,
    most_growth,
    outgrown,
    ray_points,
    unused_coordinates,
)
from numpyro_regloss.gaussians.families import nearest_in_reverse_kl
from numpyro_regloss.gaussians.gaussian import AnyGaussian, Gaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["first_stage", "natural_gradient", "unused"]

# Largest entry of the natural gradient of a solution, in standard deviations.
TOLERANCE = 1e-4
# The least decrease of the bound worth a step, in nats, and how many steps in a row may gain less.
GAIN, MAX_IDLE = 5e-7, 2
# Below this step only the rounding of the bound decides.
LEAST_RATE = 1e-3
# Without a reference a search may find directions that nothing holds; the next goes on with them held.
MAX_ROUNDS = 4
# Draws whose gradients show which coordinates are not used.
FEW_DRAWS = 16


class _Search(NamedTuple):
    solution: Solution
    value: Array
    slope: Array  # of the bound, whitened by the Gaussian
    curvature: Array  # A, whitened, (dim, dim)
    rate: Array
    num_idle: Array
    done: Array


class _Round(NamedTuple):
    gaussian: AnyGaussian
    gradient: Array
    guard: Guard
    num_steps: Array
    num_rounds: Array
    more: Array


def natural_gradient(
    evaluate: Callable[[Array], Evaluation],
    start: AnyGaussian,
    covariance: str,
    noise: Array,
    reference: AnyGaussian | None,
    num_steps: int,
    limit: Array | None = None,
) -> Solution:
    """Minimizes the bound over a family on fixed draws.

    Args:
        evaluate: energies and gradients of draws.
        start: of the family.
        covariance: the family, not of low rank.
        noise: from `noise_for`, with the identity as sample covariance.
        reference: the target's.
        num_steps: evaluations of all draws at most.
        limit: of a dense Gaussian without a reference, standard deviations from which on a coordinate ends the
            search where nothing bounds it, `(dim,)`.

    Returns:
        The solution; of an evaluation that is not finite if the start's is none.
    """

    def advance(search: _Search) -> _Search:
        now = search.solution
        first = now.num_steps == 0
        trial = _moved(now.gaussian, covariance, search)
        evaluation = evaluate(draw(trial, noise))
        value = jnp.mean(evaluation.energy) + divergence(trial, reference)
        slopes = jax.vmap(trial.scaled_transpose)(evaluation.gradient)
        slope, curvature = _local(trial, noise, slopes, reference)
        finite = jnp.isfinite(value) & jnp.isfinite(slope).all() & jnp.isfinite(curvature).all()
        eps = jnp.finfo(noise.dtype).eps
        rounding = 4 * eps * (jnp.mean(jnp.abs(now.evaluation.energy)) + 1.0)
        taken = finite & (first | (value <= search.value + rounding))
        idle = ~first & (search.value - value < GAIN)
        num_idle = jnp.where(idle, search.num_idle + 1, 0)
        size = jnp.max(jnp.abs(_change(covariance, slope, curvature)))
        lost = jnp.asarray(False)
        if limit is not None:
            lost = outgrown(trial, start, noise, slopes, curvature, limit)
        tried = now._replace(num_steps=now.num_steps + 1, num_rejected=now.num_rejected + ~finite)
        fresh = _Search(
            tried._replace(gaussian=trial, evaluation=evaluation),
            value,
            slope,
            curvature,
            jnp.where(first, search.rate, jnp.minimum(2 * search.rate, 1.0)),
            num_idle,
            (size <= TOLERANCE) | (num_idle >= MAX_IDLE) | lost,
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


def first_stage(
    rng_key: Key,
    target: RegularizedLoss,
    start: AnyGaussian,
    limit: Array,
    num_steps: int,
    num_draws: int,
) -> tuple[AnyGaussian, Guard, Array]:
    """A dense fit by natural gradients, which finds the directions that nothing holds.

    Args:
        rng_key: a random key.
        target: without a reference.
        start: any Gaussian.
        limit: standard deviations from which on a coordinate has grown much, `(dim,)`.
        num_steps: evaluations of all draws at most, in each round.
        num_draws: how many, at least twice the number of parameters.

    Returns:
        The Gaussian, the start where losses are not finite; the guard of what nothing holds; and the number of
        gradients.
    """
    key_noise, key_batch = random.split(rng_key)
    start = nearest_in_reverse_kl(start, "dense")
    evaluate = evaluator(key_batch, target)
    noise = noise_for(key_noise, start, "dense", num_draws)

    def search(now: _Round) -> _Round:
        energies = guarded(evaluate, now.guard)
        found = natural_gradient(energies, now.gaussian, "dense", noise, None, num_steps, limit)
        gradient = found.evaluation.gradient
        guard = flat_directions(found.gaussian, noise, gradient, limit, now.guard)
        more = jnp.any(guard.precision != now.guard.precision)
        return _Round(
            found.gaussian,
            gradient,
            guard,
            now.num_steps + found.num_steps,
            now.num_rounds + 1,
            more & (now.num_rounds + 1 < MAX_ROUNDS),
        )

    count = jnp.asarray(0)
    guard = Guard.none(start.mean, dense=True)
    first = _Round(start, jnp.full_like(noise, jnp.nan), guard, count, count, jnp.asarray(True))
    end = lax.while_loop(lambda now: now.more, search, first)
    far = ray_points(end.gaussian)
    energy = target.on_batch(key_batch).energy
    rows = lax.map(
        energy, far.reshape(-1, far.shape[-1]), batch_size=min(num_draws, 4 * len(limit))
    )
    rays = endless_rays(end.gaussian, rows.reshape(far.shape[:-1]), limit)
    guard = flat_directions(end.gaussian, noise, end.gradient, limit, end.guard, rays)
    ok = all_finite((end.gaussian, end.gradient))
    chosen: Any = jax.tree.map(
        lambda a, b: jnp.where(ok, a, b), (end.gaussian, guard), (start, first.guard)
    )
    return *chosen, end.num_steps * num_draws


def unused(rng_key: Key, target: RegularizedLoss, start: AnyGaussian) -> tuple[Guard, Array]:
    """A guard of the coordinates that the loss does not depend on near the start.

    Args:
        rng_key: a random key.
        target: without a reference.
        start: any Gaussian.

    Returns:
        The guard and the number of gradients.
    """
    key_noise, key_batch = random.split(rng_key)
    noise = noise_for(key_noise, start, "reference", FEW_DRAWS)
    gradient = evaluator(key_batch, target)(draw(start, noise)).gradient
    guard = unused_coordinates(start, gradient, most_growth(start.mean.dtype))
    return guard, jnp.asarray(FEW_DRAWS)


def _local(
    gaussian: AnyGaussian, noise: Array, slopes: Array, reference: AnyGaussian | None
) -> tuple[Array, Array]:
    # Gradient and expected Hessian of energy - log reference, in coordinates whitened by the Gaussian.
    slope = jnp.mean(slopes, 0)
    lower = jnp.tril(slopes.T @ noise / len(noise))
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
