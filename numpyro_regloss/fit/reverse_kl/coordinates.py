# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Families of Gaussians for variational fits: starts, coordinates, draws, and the bound that they minimize.

    B(N) = E_N loss + T KL(N || reference),   or   E_N loss - T entropy(N)   without a reference

All here is in units of T. Coordinates are those of a Gaussian of the family itself, the base: zero is the
base, the mean moves in units of its scale and the scale by a factor, so that at a base near the optimum the
bound has curvatures near one, whatever the units of the parameters.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_regloss._core.mesh import divided
from numpyro_regloss._core.stats import standard_error
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base_draws import base_draws
from numpyro_regloss.gaussians.gaussian import AnyGaussian, Gaussian, kl_divergence
from numpyro_regloss.gaussians.low_rank import LowRankGaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = [
    "Evaluation",
    "Solution",
    "Step",
    "Summary",
    "bound_gradient",
    "divergence",
    "draw",
    "evaluator",
    "coordinates_of",
    "from_relative",
    "move",
    "noise_for",
    "noise_size",
    "summarize",
    "to_relative",
    "zero_step",
]

# Numbers among the draws that are evaluated at once, so that intermediate values of a loss fit into memory.
CHUNK = 2**20
# Smallest share of a variance that is left to the diagonal beside factors. With less, rounding decides the
# determinant in float32, and a minimization would find where it errs most.
LEAST_SHARE = 1e-4


class Step(NamedTuple):
    """Coordinates about a base.

    Attributes:
        mean: `(dim,)`.
        scale: None where the scale is fixed; logarithms of factors, `()` or `(dim,)`; a lower triangle with
            logarithms on its diagonal, `(dim, dim)`; or, of a low rank, the pair of coordinates of the diagonal,
            `(dim,)`, and of the factors, `(dim, rank)`.
    """

    mean: Array
    scale: Any


class Evaluation(NamedTuple):
    """Energies of draws.

    Attributes:
        energy: loss / T, `(draw,)`.
        gradient: `(draw, dim)`.
    """

    energy: Array
    gradient: Array


class Solution(NamedTuple):
    """Where a fit stands.

    Attributes:
        gaussian: of the family.
        evaluation: at its draws; NaN before the first.
        num_steps: steps done.
        num_rejected: those whose loss or gradient was not finite.
    """

    gaussian: AnyGaussian
    evaluation: Evaluation
    num_steps: Array
    num_rejected: Array

    @classmethod
    def at(
        cls, gaussian: AnyGaussian, evaluate: Callable[[Array], Evaluation], noise: Array
    ) -> "Solution":
        """A start, not evaluated."""
        shapes = jax.eval_shape(evaluate, draw(gaussian, noise))
        blank = jax.tree.map(lambda a: jnp.full(a.shape, jnp.nan, a.dtype), shapes)
        return cls(gaussian, blank, jnp.asarray(0), jnp.asarray(0))


class Summary(NamedTuple):
    """What the draws say of a Gaussian, in units of T.

    Attributes:
        bound: its bound.
        bound_error: standard error of the bound.
        residual: norm of the bound's gradient in the coordinates about the Gaussian.
    """

    bound: Array
    bound_error: Array
    residual: Array


def coordinates_of(target: RegularizedLoss) -> AnyGaussian:
    """The reference, or without one the unit Gaussian about the loss's start."""
    if target.reference is not None:
        return target.reference
    x0 = target.loss.x0
    return Gaussian(x0, jnp.ones((), x0.dtype))


def to_relative(gaussian: AnyGaussian, frame: AnyGaussian, unit: AnyGaussian) -> tuple[Array, Any]:
    """Mean and scale in units of a frame: what a warm start keeps.

    Args:
        gaussian: of a family.
        frame: whose mean and scale are zero and one for the mean.
        unit: the frame's projection to the family, whose scale is one for the scale.

    Returns:
        The mean, and the scale in the form of `Step` without logarithms.
    """
    loc = frame.whiten(gaussian.mean)
    if isinstance(gaussian, LowRankGaussian) and isinstance(unit, LowRankGaussian):
        ratio = gaussian.diagonal / unit.diagonal
        return loc, (ratio, gaussian.factor / jnp.sqrt(unit.diagonal)[:, None])
    if gaussian.structure == "dense":
        return loc, unit.whiten_columns(gaussian[1])
    return loc, gaussian[1] / unit[1]


def from_relative(loc: Array, scale: Any, frame: AnyGaussian, unit: AnyGaussian) -> AnyGaussian:
    """The inverse of `to_relative`."""
    mean = frame.unwhiten(loc)
    if scale is None:
        return frame._replace(mean=mean)
    if isinstance(unit, LowRankGaussian):
        diagonal, factor = scale
        return LowRankGaussian(
            mean, diagonal * unit.diagonal, factor * jnp.sqrt(unit.diagonal)[:, None]
        )
    if unit.structure == "dense":
        return Gaussian(mean, jnp.tril(unit.scale @ scale))
    return Gaussian(mean, scale * unit.scale)


def zero_step(base: AnyGaussian, covariance: str) -> Step:
    """The coordinates of the base itself."""
    zero = jnp.zeros_like(base.mean)
    if covariance == "reference":
        return Step(zero, None)
    scale = jax.tree.map(jnp.zeros_like, base[1:])
    return Step(zero, scale if isinstance(base, LowRankGaussian) else scale[0])


def move(base: AnyGaussian, step: Step) -> AnyGaussian:
    """The Gaussian at some coordinates about a base, differentiable in the coordinates.

    Args:
        base: of the family.
        step: the coordinates.

    Returns:
        A Gaussian of the structure of the base.
    """
    mean = base.mean + base.scaled(step.mean)
    if step.scale is None:
        return base._replace(mean=mean)
    if isinstance(base, LowRankGaussian):
        ratio, columns = step.scale
        # In units of the whole deviation, since the diagonal's may vanish where factors explain all.
        factor = base.factor + jnp.sqrt(base.variance)[:, None] * columns
        # A root above the least, which grows like an exponential and falls linearly: a logarithm that has run away
        # to zero has no gradient to come back by.
        least = LEAST_SHARE * base.variance
        # A little above it, since a root of zero has no slope.
        diagonal = jnp.maximum(base.diagonal, 1.01 * least)
        change = jnp.where(ratio > 0, jnp.expm1(jnp.maximum(ratio, 0.0)), ratio)
        root = jnp.sqrt(diagonal - least) + jnp.sqrt(diagonal) * change
        return LowRankGaussian(mean, least + root**2, factor)
    if base.structure == "dense":
        change = jnp.tril(step.scale, -1) + jnp.diag(jnp.exp(jnp.diagonal(step.scale)))
        return Gaussian(mean, base.scale @ change)
    return Gaussian(mean, base.scale * jnp.exp(step.scale))


def noise_size(base: AnyGaussian, covariance: str) -> int:
    """How many standard normals make a draw: dim, of low rank rank + dim."""
    is_low_rank = isinstance(base, LowRankGaussian) and covariance != "reference"
    return base.mean.size + (base.rank if is_low_rank else 0)


def noise_for(rng_key: Key, base: AnyGaussian, covariance: str, num_draws: int) -> Array:
    """Base draws of a family, `(num_draws, dim)`, of low rank `(num_draws, rank + dim)`."""
    # Factors first: with few draws what matters is that they are independent of the rest.
    dim = base.mean.size
    num_factors = noise_size(base, covariance) - dim
    return base_draws(rng_key, num_draws, num_factors, dim)


def draw(gaussian: AnyGaussian, noise: Array) -> Array:
    """Draws `(draw, dim)` of a Gaussian from `noise_for`, differentiable in the Gaussian."""
    if noise.shape[-1] == gaussian.mean.size or not isinstance(gaussian, LowRankGaussian):
        return gaussian.unwhiten(noise)
    # Not the symmetric root, whose eigenvectors have no usable derivative.
    factors, rest = noise[:, : gaussian.rank], noise[:, gaussian.rank :]
    return gaussian.mean + jnp.sqrt(gaussian.diagonal) * rest + factors @ gaussian.factor.T


def divergence(gaussian: AnyGaussian, reference: AnyGaussian | None) -> Array:
    """KL(gaussian || reference), or minus the entropy without a reference, in nats."""
    if reference is not None:
        return kl_divergence(gaussian, reference)
    return -gaussian.log_det - 0.5 * gaussian.dim * (1.0 + math.log(2.0 * math.pi))


def evaluator(rng_key: Key, target: RegularizedLoss) -> Callable[[Array], Evaluation]:
    """A function of draws `(draw, dim)` that evaluates energies and gradients, few enough at once.

    Args:
        rng_key: draws one minibatch per pair of draws, the same at every call.
        target: the target.

    Returns:
        The function.
    """

    def single(key_batch: Key, x: Array) -> tuple[Array, Array]:
        return jax.value_and_grad(target.on_batch(key_batch).energy)(x)

    def evaluate(x: Array) -> Evaluation:
        keys = random.split(rng_key, len(x) // 2)
        keys = jnp.concatenate([keys, keys])
        if x.size <= CHUNK:
            return Evaluation(*divided(single)(keys, x))
        size = max(1, CHUNK // x.shape[-1])
        return Evaluation(*lax.map(lambda row: single(*row), (keys, x), batch_size=size))

    return evaluate


def bound_gradient(
    base: AnyGaussian,
    step: Step,
    noise: Array,
    evaluation: Evaluation,
    reference: AnyGaussian | None,
) -> tuple[Array, Step]:
    """The bound at some coordinates and its gradient in them, from gradients at the draws.

    Args:
        base: of the family.
        step: the coordinates.
        noise: from `noise_for`.
        evaluation: at the draws of `move(base, step)`.
        reference: the target's.

    Returns:
        Value and gradient.
    """
    _, pull_back = jax.vjp(lambda step: draw(move(base, step), noise), step)
    (expected,) = pull_back(evaluation.gradient / len(noise))
    penalty, slope = jax.value_and_grad(lambda step: divergence(move(base, step), reference))(step)
    return jnp.mean(evaluation.energy) + penalty, jax.tree.map(jnp.add, expected, slope)


def summarize(
    gaussian: AnyGaussian,
    covariance: str,
    noise: Array,
    evaluation: Evaluation,
    reference: AnyGaussian | None,
) -> Summary:
    """The bound of a Gaussian, its error, and how far from stationary it is.

    Base draws average quadratics exactly, so the error is that of what a quadratic with the draws' own
    curvature leaves. Pairs count as independent; being spread out evenly, they are better than that.

    Args:
        gaussian: of the family.
        covariance: the family.
        noise: from `noise_for`.
        evaluation: at its draws.
        reference: the target's.

    Returns:
        The summary.
    """
    step = zero_step(gaussian, covariance)
    value, gradient = bound_gradient(gaussian, step, noise, evaluation, reference)
    pairs = len(noise) // 2
    z = noise[:pairs]
    _, pull_back = jax.vjp(lambda noise: draw(gaussian, noise), noise)
    (slopes,) = pull_back(evaluation.gradient)
    odd = 0.5 * (slopes[:pairs] - slopes[pairs:])
    if pairs >= z.shape[-1]:
        # zᵢᵀ G zᵢ with G = Σ_j odd_j z_jᵀ / pairs, without a matrix of dim².
        quadratic = jnp.sum((z @ odd.T) * (z @ z.T), 1) / pairs
    else:
        quadratic = z**2 @ jnp.mean(z * odd, 0)
    left = 0.5 * (evaluation.energy[:pairs] + evaluation.energy[pairs:]) - 0.5 * quadratic
    error = standard_error(left)
    squares = jax.tree.map(lambda g: jnp.sum(g**2), gradient)
    residual = jnp.sqrt(sum(jax.tree.leaves(squares), start=jnp.zeros(())))
    return Summary(value, error, residual)
