# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Means of batches of consecutive draws, in one passage over draws that are too many for a cache."""

import jax.numpy as jnp
from jax import lax

from numpyro_regloss._core.types import Array

__all__ = ["NUM_BATCHES", "batch_size_of", "in_batches"]

# Batches whose means tell how fast a chain mixes.
NUM_BATCHES = 32


def batch_size_of(num_draws: int) -> int:
    """Draws per batch, of a chain of so many."""
    return -(-num_draws // NUM_BATCHES)


def in_batches(x: Array, log_weight: Array, size: int) -> tuple[Array, Array, Array]:
    """Weighted means of batches, their log weights and the variances within.

    Args:
        x: `(chain, draw, dim)`.
        log_weight: `(chain, draw)`, up to a constant.
        size: draws per batch, of which the last may have fewer.

    Returns:
        `(chain, batch, dim)`, `(chain, batch)` and `(chain, batch, dim)`.
    """
    num_draws = x.shape[1]
    count = -(-num_draws // size)
    peak = jnp.max(log_weight)
    weight = jnp.exp(log_weight - jnp.where(jnp.isfinite(peak), peak, 0.0)).astype(x.dtype)

    def one(_: None, b: Array) -> tuple[None, tuple[Array, Array, Array]]:
        center = lax.dynamic_index_in_dim(x, b * size, 1, keepdims=False)
        of_batch = lax.dynamic_index_in_dim(totals, b, 1, keepdims=True)

        def add(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            row = lax.dynamic_index_in_dim(x, i, 1, keepdims=False)
            share = lax.dynamic_index_in_dim(shares, i, 1, keepdims=True)
            # What has no weight may be anything.
            offset = jnp.where(share > 0, row - center, 0.0)
            return sums[0] + share * offset, sums[1] + share * offset**2

        zero = jnp.zeros_like(center)
        end = jnp.minimum((b + 1) * size, num_draws)
        first, square = lax.fori_loop(b * size, end, add, (zero, zero))
        mean = jnp.where(of_batch > 0, center + first, 0.0)
        return None, (mean, jnp.maximum(square - first**2, 0.0), of_batch[:, 0])

    padded = jnp.pad(weight, ((0, 0), (0, count * size - num_draws)))
    parts = padded.reshape(len(x), count, size)
    totals = jnp.sum(parts, -1)
    shares = parts / jnp.where(totals > 0, totals, 1.0)[..., None]
    shares = shares.reshape(len(x), -1)
    _, (mean, spread, total) = lax.scan(one, None, jnp.arange(count))
    mean, spread = jnp.moveaxis(mean, 0, 1), jnp.moveaxis(spread, 0, 1)
    return mean, jnp.log(total.T), spread
