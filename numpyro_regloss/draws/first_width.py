# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""How wide a Gaussian about a loss's start should be, where there is no reference to say so."""

import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base_draws import base_draws
from numpyro_regloss.gaussians.gaussian import Gaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["best_width"]

# Widths of a start that are compared, and draws of each.
WIDTHS, WIDTH_DRAWS = tuple(10.0 ** (k / 2) for k in range(0, -13, -1)), 8


def best_width(rng_key: Key, target: RegularizedLoss) -> tuple[Gaussian, Array]:
    """The isotropic Gaussian about the loss's start that has the least bound, of some widths.

    Where a start is too wide a loss may overflow, where it is too narrow its gradient tells nothing.

    Args:
        rng_key: a random key.
        target: without a reference.

    Returns:
        The Gaussian and the number of loss evaluations.
    """
    key_noise, key_batch = random.split(rng_key)
    x0, batch = target.loss.x0, target.on_batch(key_batch)
    noise = base_draws(key_noise, WIDTH_DRAWS, x0.size)

    def bound(width: Array) -> Array:
        wide = Gaussian(x0, width)
        energy = jnp.mean(jax.vmap(batch.energy)(wide.unwhiten(noise)))
        return jnp.nan_to_num(energy - wide.log_det, nan=jnp.inf, neginf=jnp.inf)

    widths = jnp.asarray(WIDTHS, x0.dtype)
    best = widths[jnp.argmin(lax.map(bound, widths))]
    return Gaussian(x0, best), jnp.asarray(len(WIDTHS) * WIDTH_DRAWS)
