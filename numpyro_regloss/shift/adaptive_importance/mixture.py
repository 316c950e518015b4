# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What a round draws from: the proposal, the reference, and the proposal about the witness of another mode.

All draws are weighted by the density of the mixture, whichever part they came from.

References: Owen & Zhou (2000), "Safe and Effective Importance Sampling"; Elvira, Martino, Luengo & Bugallo (2019),
"Generalized Multiple Importance Sampling".
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import random

from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.shift.adaptive_importance.normalizer import controls_of
from numpyro_regloss.shift.adaptive_importance.proposal import Proposal

__all__ = ["Drawn", "draw"]


class Drawn(NamedTuple):
    """Antithetic pairs, one after the other, part by part.

    Attributes:
        e: `(draw, dim)`.
        log_density: of the mixture, up to (2 pi)^(-dim / 2), `(draw,)`.
        controls: functions whose means are zero, `(draw, 2)`.
    """

    e: Array
    log_density: Array
    controls: Array


def draw(
    rng_key: Key,
    proposal: Proposal,
    num_pairs: tuple[int, ...],
    witness: Array | None = None,
    width: Array | float = 1.0,
) -> Drawn:
    """Draws of all parts.

    Args:
        rng_key: a random key.
        proposal: in coordinates where the reference is N(0, I).
        num_pairs: of the proposal, the reference and the witness; of the proposal alone.
        witness: where the third part is, `(dim,)`; None for the proposal alone.
        width: of the third part, in units of the proposal's.

    Returns:
        The draws.
    """
    mean = proposal.mean
    noise = random.normal(rng_key, (sum(num_pairs), 1, mean.size), mean.dtype)
    noise = jnp.concatenate([noise, -noise], 1).reshape(-1, mean.size)
    if witness is None:
        square = jnp.sum(noise**2, -1)
        controls = controls_of(jnp.zeros_like(square), square, mean.size)
        return Drawn(mean + proposal.scaled(noise), proposal.log_density(square), controls)
    ends = [2 * sum(num_pairs[:i]) for i in (1, 2)]
    own, wide, other = jnp.split(noise, ends)
    gap = proposal.whitened(witness[None])
    other = width * other
    e = jnp.concatenate([mean + proposal.scaled(own), wide, witness + proposal.scaled(other)])
    # In units of the proposal's noise both Gaussians of its shape are standard normal.
    noise = jnp.concatenate([own, proposal.whitened(wide), gap + other])
    square = jnp.sum(noise**2, -1)
    gaussian = proposal.log_density(square)
    parts = [
        gaussian,
        -0.5 * jnp.sum(e**2, -1),
        proposal.log_density(jnp.sum(((noise - gap) / width) ** 2, -1))
        - mean.size * jnp.log(width),
    ]
    shares = [math.log(count / sum(num_pairs)) for count in num_pairs]
    log_density = jax.nn.logsumexp(jnp.stack(parts) + jnp.array(shares)[:, None], axis=0)
    return Drawn(e, log_density, controls_of(gaussian - log_density, square, mean.size))
