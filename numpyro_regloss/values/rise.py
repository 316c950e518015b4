# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""By how much the heat lies above the loss, pair after pair: in the memory of three draws, on batches or all rows.

    F^H_tau(x) - loss(x) = E [ loss_B(x + o) / 2 + loss_B(x - o) / 2 - loss_B(x) ],   o ~ N(0, tau I), B a batch

All three losses of a pair are of one batch: what batches differ by cancels, and the mean is unbiased where the
loss is an average over the rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from numpyro_regloss._core.settings import own_settings
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["Pairs", "check_average", "pairs"]

# Batches of an average scatter about it; sums are off by rows / batch_size.
MANY_SIGMAS, LEAST_SHARE = 8.0, 0.25


class Pairs(NamedTuple):
    """Losses of antithetic pairs.

    Attributes:
        base: the loss at the reference's mean on the rows of each pair, `(pair,)`.
        mean: of the two losses of each pair, `(pair,)`.
        largest: the largest size of a loss.
    """

    base: Array
    mean: Array
    largest: Array

    @property
    def rise(self) -> Array:
        """`(pair,)`."""
        return self.mean - self.base


@own_settings
def pairs(rng_key: Key, target: RegularizedLoss, num_pairs: int) -> Pairs:
    """Evaluates pairs around the reference's mean, each on a fresh batch where the loss has a minibatch.

    Args:
        rng_key: a random key.
        target: loss and reference; its temperature does not matter.
        num_pairs: how many.

    Returns:
        Their losses.
    """
    reference = target.reference
    middle = jnp.zeros_like(reference.mean)
    fixed = target.value(reference.mean) if target.loss.minibatch is None else None

    def pair(key: Key) -> tuple[Array, Array, Array]:
        key_batch, key_noise = random.split(key)
        own = target.on_batch(key_batch)
        offset = reference.scaled(random.normal(key_noise, middle.shape, middle.dtype))
        around = [offset, -offset] if fixed is not None else [offset, -offset, middle]
        values = jax.vmap(own.value)(reference.mean + jnp.stack(around))
        base = values[2] if fixed is None else fixed
        return base, jnp.mean(values[:2]), jnp.max(jnp.abs(values))

    base, mean, largest = lax.map(pair, random.split(rng_key, num_pairs))
    return Pairs(base, mean, jnp.max(largest))


def check_average(found: Pairs, plain: Array, what: str) -> None:
    """Refuses losses whose batches do not average to them: of sums they say nothing.

    Args:
        found: concrete, on batches.
        plain: the loss on all rows.
        what: begins the error message.

    Raises:
        ValueError: if the mean over batches is clearly another number.
    """
    base, known = np.asarray(found.base, float), float(plain)
    error = np.std(base) / np.sqrt(base.size)
    gap = abs(np.mean(base) - known)
    if gap > MANY_SIGMAS * error and gap > LEAST_SHARE * max(abs(known), abs(np.mean(base))):
        raise ValueError(
            f"{what}: expected a loss that is an average over the rows, got {known:.4g} of all rows and "
            f"{np.mean(base):.4g} in the mean over batches; divide a sum by the number of its rows (jnp.mean), or "
            "use all rows."
        )
