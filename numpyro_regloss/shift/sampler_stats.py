# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Statistics of every draw of a sampler, by the names that ArviZ knows."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from numpyro_regloss._core.types import Array
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["sampler_stats"]


def sampler_stats(
    target: RegularizedLoss,
    noise: Array,
    loss: Array,
    *,
    kinetic: Array | None = None,
    num_steps: Array | None = None,
    is_tree: bool = False,
    **others: Any,
) -> dict[str, Array]:
    """What ArviZ plots of draws by a Markov chain, each `(chain, draw)`.

    Args:
        target: of the draws.
        noise: the draws in units of the reference, `(chain, draw, dim)`.
        loss: of the draws.
        kinetic: kinetic energies, of HMC.
        num_steps: leapfrog steps.
        is_tree: whether they are those of a binary tree.
        **others: statistics by ArviZ's names, or None.

    Returns:
        `lp`, the log density of q at each draw but for its normalization, as `RegularizedLoss.log_density` has it,
        and what of `energy`, `n_steps`, `tree_depth` and the others there is.
    """
    constant = 0.5 * target.dim * math.log(2 * math.pi) + target.reference.log_det
    lp = -0.5 * jnp.sum(noise**2, -1) - constant - loss / target.temperature
    stats = {"lp": lp, "n_steps": num_steps, **others}
    stats["energy"] = None if kinetic is None else kinetic - lp
    if is_tree and num_steps is not None:
        # A tree of depth d has up to 2^d - 1 steps.
        stats["tree_depth"] = 32 - lax.clz(num_steps.astype(jnp.int32))
    return {name: jnp.broadcast_to(a, loss.shape) for name, a in stats.items() if a is not None}
