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
from numpyro_regloss.shift.adaptive_importance.proposal import Proposal

__all__ = ["Drawn", "draw"]


class Drawn(NamedTuple):
    """Antithetic pairs, one after the other, part by part.

    Attributes:
        e: `(draw, dim)`.
        log_density: of the mixture, up to (2 pi)^(-dim / 2), `(draw,)`.
        control: density of the proposal, before it is widened, over that of the mixture, less their mean, one;
            `(draw,)`.
    """

    e: Array
    log_density: Array
    control: Array


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
        proposal: in coordinates where the reference is N(0, I); draws come from a wider one.
        num_pairs: of the proposal, the reference and the witness; of the proposal alone.
        witness: where the third part is, `(dim,)`; None for the proposal alone.
        width: of the third part, in units of the wider one's.

    Returns:
        The draws.
    """
    mean, narrow, ratio = proposal.mean, proposal, proposal.widening**2
    proposal = proposal.widened()
    noise = random.normal(rng_key, (sum(num_pairs), 1, mean.size), mean.dtype)
    noise = jnp.concatenate([noise, -noise], 1).reshape(-1, mean.size)
    if witness is None:
        square = jnp.sum(noise**2, -1)
        log_density = proposal.log_density(square)
        control = jnp.expm1(narrow.log_density(ratio * square) - log_density)
        return Drawn(mean + proposal.scaled(noise), log_density, control)
    ends = [2 * sum(num_pairs[:i]) for i in (1, 2)]
    own, wide, other = jnp.split(noise, ends)
    gap = proposal.whitened(witness[None])
    other = width * other
    e = jnp.concatenate([mean + proposal.scaled(own), wide, witness + proposal.scaled(other)])
    # In units of the proposal's noise both Gaussians of its shape are standard normal.
    noise = jnp.concatenate([own, proposal.whitened(wide), gap + other])
    square = jnp.sum(noise**2, -1)
    parts = [
        proposal.log_density(square),
        -0.5 * jnp.sum(e**2, -1),
        proposal.log_density(jnp.sum(((noise - gap) / width) ** 2, -1))
        - mean.size * jnp.log(width),
    ]
    shares = [math.log(count / sum(num_pairs)) for count in num_pairs]
    log_density = jax.nn.logsumexp(jnp.stack(parts) + jnp.array(shares)[:, None], axis=0)
    return Drawn(e, log_density, jnp.expm1(narrow.log_density(ratio * square) - log_density))
