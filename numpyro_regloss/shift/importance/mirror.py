# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Antithetic pairs about a center that is a mirror: when their exact cancellation hides the way out.

Where loss(mean + o) = loss(mean - o) for all o, both draws of a pair have one weight, and the weighted mean is
the center without any error. At a minimum that is right. At a maximum or a saddle the center is stationary as
well, but nothing that starts there would ever leave it. First draws of pairs alone are independent draws of the
reference: their mean has an error, which leads away.

A center is left where q is wider than the reference along some direction. One half of the pairs says along which,
by a power iteration on the weighted minus the plain second moments; the other half whether it is so, beyond its
error.
"""

import jax.numpy as jnp
from jax import lax

from numpyro_regloss._core.types import Array

__all__ = ["is_mirror", "is_wider"]

# Losses of a pair are equal up to so many units of the last digit, if that does not change their weights.
ROUNDING, SAME_WEIGHT = 64.0, 0.01
# Weight of the pairs that may differ.
TOLERANCE = 0.01
# Squarings of the matrix of a power iteration; and of standard errors, beyond which a direction is wider.
NUM_SQUARINGS, SIGMAS = 3, 1.0
LEAST_PAIRS = 8
# Above so many dimensions the matrix is not formed; and so many numbers, a megabyte, are looked at. That
# leaves pairs out where there are so many dimensions that noise hides a direction from all of them as well.
NARROW, MOST_ELEMENTS = 64, 1 << 18


def is_mirror(loss: Array, log_weight: Array) -> Array:
    """Whether the two losses of nearly all pairs are equal, by weight.

    Args:
        loss: `(pair, 2)`.
        log_weight: `(pair, 2)`; those of draws that do not count are -inf.

    Returns:
        A scalar; False where no draw has weight.
    """
    peak = jnp.max(log_weight)
    weight = jnp.exp(log_weight - jnp.where(jnp.isfinite(peak), peak, 0.0))
    weight = weight / jnp.maximum(jnp.sum(weight), 1.0)
    size = jnp.where(weight > 0, jnp.abs(loss), 0.0)
    larger = jnp.max(size, 1) + jnp.sum(weight * size)
    equal = jnp.abs(loss[:, 0] - loss[:, 1]) <= ROUNDING * jnp.finfo(loss.dtype).eps * larger
    equal &= jnp.abs(log_weight[:, 0] - log_weight[:, 1]) <= SAME_WEIGHT
    return jnp.isfinite(peak) & (jnp.sum(jnp.where(equal, 0.0, jnp.sum(weight, 1))) <= TOLERANCE)


def is_wider(offset: Array, log_weight: Array, unit: Array) -> Array:
    """Whether the weighted draws are wider than all draws along some direction.

    Args:
        offset: of the pairs from their center, `(pair, dim)`; of more than `MOST_ELEMENTS` numbers the first.
        log_weight: of the pairs, `(pair,)`.
        unit: standard deviations to compute in, `(dim,)`.

    Returns:
        A scalar; False for fewer than 16 draws.
    """
    half = min(len(offset), MOST_ELEMENTS // offset.shape[1]) // 2
    if half < LEAST_PAIRS // 2:
        return jnp.asarray(False)
    z = offset[: 2 * half].reshape(2, half, -1) / unit
    log_weight = log_weight[: 2 * half].reshape(2, half)
    peak = jnp.max(log_weight, 1, keepdims=True)
    weight = jnp.exp(log_weight - jnp.where(jnp.isfinite(peak), peak, 0.0))
    weight = weight / jnp.maximum(jnp.sum(weight, 1, keepdims=True), 1.0)
    # Without the other members of the pairs: second moments about the center are the same.
    contrast = weight - 1.0 / half
    heaviest = jnp.argmax(log_weight, 1)
    direction = jnp.take_along_axis(z, heaviest[:, None, None], 1)[:, 0]
    direction = _widest(direction, contrast, z)
    square = jnp.einsum("hij,hj->hi", z, direction[::-1]) ** 2
    excess = jnp.sum(contrast * square, 1)
    plain = jnp.mean(square, 1, keepdims=True)
    influence = weight * (square - plain - excess[:, None]) - (square - plain) / half
    return jnp.sum(excess) > SIGMAS * jnp.sqrt(jnp.sum(influence**2))


def _widest(direction: Array, contrast: Array, z: Array) -> Array:
    # Of two halves at once, of the weighted minus the plain second moments. Plus the identity, which is what the
    # plain ones are but for noise: the largest eigenvalue is then the one of largest size.
    dim = z.shape[-1]
    if dim <= NARROW:
        second = jnp.einsum("hij,hik->hjk", contrast[..., None] * z, z) + jnp.eye(
            dim, dtype=z.dtype
        )
        for _ in range(NUM_SQUARINGS):
            second = jnp.einsum("hij,hjk->hik", second, second)
        return _unit(jnp.einsum("hij,hj->hi", second, direction))

    def iterate(_: Array, direction: Array) -> Array:
        along = jnp.einsum("hij,hj->hi", z, direction)
        return _unit(direction + jnp.einsum("hi,hij->hj", contrast * along, z))

    return lax.fori_loop(0, 2**NUM_SQUARINGS, iterate, direction)


def _unit(direction: Array) -> Array:
    return direction / jnp.linalg.norm(direction, axis=1, keepdims=True)
