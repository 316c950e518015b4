# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Noisy gradients of a smoothed loss and bounds of its curvature, from gradients or from values.

All in coordinates whitened by the reference, with f(u) = loss(mean + scale u) / T:

    ∇E f(u + ξ) = E ∇f(u + ξ) = E[f(u + ξ) ξ].

References: Nesterov & Spokoiny (2017), "Random Gradient-Free Minimization of Convex Functions"; Stein
(1981), "Estimation of the Mean of a Multivariate Normal Distribution".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_regloss._core.linalg import power_iteration
from numpyro_regloss._core.mesh import divided
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = [
    "GRADIENT_LOOK",
    "VALUE_LOOK",
    "Estimator",
    "GradientEstimate",
    "curvature_of_values",
    "reparametrized",
    "score",
    "curvature_of_gradients",
]

# Power iterations at the first step; later steps refine the direction by one each.
FIRST_ITERATIONS = 10
# Second differences of the score form at the first step and at later ones, and how much the latter count.
FIRST_PROBES, PROBES, PROBE_WEIGHT = 16, 4, 0.25
# Estimates of a later look at the curvature of gradients, and loss evaluations of one at that of values.
GRADIENT_LOOK, VALUE_LOOK = 2, 2 * PROBES + 1
# Two values or gradients are equal up to so many units of the last digit.
ROUNDING = 64.0


class GradientEstimate(NamedTuple):
    """What the evaluations of one step say.

    Attributes:
        gradient: of the smoothed loss, `(dim,)`.
        per_pair: what tells of its curvature, `(pair, dim)` or `(pair,)`.
        loss: mean over the points, in the units of the loss.
    """

    gradient: Array
    per_pair: Array
    loss: Array


Estimator = Callable[[Key, Array, Array], GradientEstimate]


def reparametrized(target: RegularizedLoss, *, antithetic: bool) -> Estimator:
    """Mean of ∇f(u + ξ), with u - ξ in it if antithetic.

    Args:
        target: the target.
        antithetic: whether noise comes in pairs.

    Returns:
        `(key_batch, u, noise)` -> estimate, `noise` of shape `(pair, dim)`; what it tells per pair are odd
        parts of the gradient, `(pair, dim)`, or the gradients themselves if there are no pairs.
    """
    reference = target.reference

    def single(key_batch: Key, noise: Array) -> tuple[Array, Array]:
        batch = target.on_batch(key_batch)
        value, gradient = jax.value_and_grad(batch.energy)(reference.unwhiten(noise))
        # Where a loss is a constant NaN its gradient is zero, and nothing else would tell.
        whitened = reference.scaled_transpose(gradient)
        return value, jnp.where(jnp.isfinite(value), whitened, jnp.nan)

    def estimate(key_batch: Key, u: Array, noise: Array) -> GradientEstimate:
        points = jnp.concatenate([u + noise, u - noise]) if antithetic else u + noise
        if len(points) == 1:
            # Without a batch axis, which makes other and often slower products of matrices.
            values, found = jax.tree.map(lambda a: a[None], single(key_batch, points[0]))
        else:
            values, found = divided(single, in_axes=(None, 0))(key_batch, points)
        loss = target.temperature * jnp.mean(values)
        if not antithetic:
            return GradientEstimate(jnp.mean(found, 0), found, loss)
        above, below = jnp.split(found, 2)
        even, odd = 0.5 * (above + below), 0.5 * (above - below)
        # About a mirror gradients of a pair cancel exactly. Where the loss bends down along the noise the point is
        # no minimum, and would never be left: one gradient of the pair has the same mean, and noise.
        hidden = _is_rounding(jnp.linalg.norm(even, axis=1), jnp.linalg.norm(odd, axis=1))
        hidden &= jnp.sum(noise * odd, -1) < 0
        return GradientEstimate(jnp.mean(jnp.where(hidden[:, None], above, even), 0), odd, loss)

    return estimate


def score(target: RegularizedLoss, *, antithetic: bool) -> Estimator:
    """Mean of [f(u + ξ) - f(u - ξ)] ξ / 2, or of [f(u + ξ) - f(u)] ξ: values alone.

    Args:
        target: the target.
        antithetic: whether noise comes in pairs.

    Returns:
        `(key_batch, u, noise)` -> estimate; what it tells per pair are even parts of f, `(pair,)`.
    """

    def estimate(key_batch: Key, u: Array, noise: Array) -> GradientEstimate:
        other = u - noise if antithetic else u[None]
        values = _energies(target, key_batch, jnp.concatenate([u + noise, other]))
        loss = target.temperature * jnp.mean(values)
        above, below = values[: len(noise)], values[len(noise) :]
        if antithetic:
            slope, even = 0.5 * (above - below), 0.5 * (above + below)
        else:
            slope, even = above - below, above - below
        # Pairs of which a loss is NaN are left out, unless there is no other.
        failed = jnp.isnan(above) | jnp.isnan(below)
        kept = ~failed | failed.all()
        share = jnp.mean(kept.astype(slope.dtype))
        even = jnp.where(kept, even, jnp.mean(jnp.where(kept, even, 0.0)) / share)
        terms = jnp.where(kept[:, None], slope[:, None] * noise, 0.0)
        return GradientEstimate(jnp.mean(terms, 0) / share, even, loss)

    return estimate


def curvature_of_gradients(
    rng_key: Key, direction: Array, curvature: Array, estimate: Estimator
) -> tuple[Array, Array, Array, Array]:
    """Steepest direction and its curvature by a power iteration on gradients.

    Args:
        rng_key: a random key.
        direction: a unit vector to start from, `(dim,)`.
        curvature: the curvature so far, negative if there is none.
        estimate: from `reparametrized`.

    Returns:
        The direction, the curvature, where to start (zero, or aside of a mirror) and the number of estimates.
    """
    # The secant over one reference scale, not the Hessian: it sees kinks, and only the curvature that
    # is left after smoothing matters for stability.
    key_batch, key_noise = random.split(rng_key)
    noise = random.normal(key_noise, (1, *direction.shape), direction.dtype)
    base, odd, _ = estimate(key_batch, jnp.zeros_like(direction), noise)
    hidden = _is_rounding(jnp.linalg.norm(base), jnp.linalg.norm(odd)) & (curvature < 0)

    def secant(direction: Array) -> Array:
        return estimate(key_batch, direction, noise).gradient - base

    iterations = jnp.where(curvature < 0, FIRST_ITERATIONS, 1)
    direction, _, curvature = power_iteration(direction, iterations, secant)
    return direction, curvature, _aside(hidden, odd[0], curvature), iterations + 1


def curvature_of_values(
    rng_key: Key, curvature: Array, target: RegularizedLoss
) -> tuple[Array, Array, Array]:
    """Mean of |ξᵀ Hessian ξ|, at least the absolute trace, by second differences of values.

    Args:
        rng_key: a random key.
        curvature: the mean so far, negative if there is none.
        target: the target.

    Returns:
        The mean, where to start (zero, or aside of a mirror) and the number of loss evaluations.
    """
    # A power iteration would drown in the noise of gradients made of values; second differences in
    # random directions do not grow noisier with the dimension.
    key_batch, key_noise = random.split(rng_key)
    zero = jnp.zeros_like(target.reference.mean)
    first = curvature < 0
    center = _energies(target, key_batch, zero[None])[0]

    def body(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        total, _ = carry
        noise = random.normal(random.fold_in(key_noise, j), zero.shape, zero.dtype)
        values = _energies(target, key_batch, jnp.stack([noise, -noise]))
        difference = jnp.sum(values - center)
        hidden = _is_rounding(values[0] - values[1], jnp.sum(jnp.abs(values)))
        hidden &= first | (difference < 0)
        start = _aside(hidden, (values[0] - center) * noise, jnp.abs(difference))
        total = total + jnp.where(jnp.isfinite(difference), jnp.abs(difference), 0.0)
        return total, start

    count = jnp.where(first, FIRST_PROBES, PROBES)
    found, start = lax.fori_loop(0, count, body, (jnp.zeros((), zero.dtype), zero))
    found = found / count
    weight = jnp.where(first, 1.0, PROBE_WEIGHT).astype(found.dtype)
    return (1.0 - weight) * curvature + weight * found, start, 2 * count + 1


def _aside(hidden: Array, gradient: Array, curvature: Array) -> Array:
    # A start on a mirror may be a saddle, which pairs would keep for ever. One step by one gradient instead of a
    # pair's leaves it; to a minimum the next steps return.
    step = gradient / (1.0 + curvature)
    step = step / jnp.maximum(jnp.linalg.norm(step), 1.0)
    return jnp.where(hidden & jnp.isfinite(step).all(), -step, 0.0)


def _is_rounding(difference: Array, size: Array) -> Array:
    return jnp.abs(difference) <= ROUNDING * jnp.finfo(size.dtype).eps * size


def _energies(target: RegularizedLoss, key_batch: Key, points: Array) -> Array:
    batch = target.on_batch(key_batch)
    return divided(lambda u: batch.energy(target.reference.unwhiten(u)))(points)
