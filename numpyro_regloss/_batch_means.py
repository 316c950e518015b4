# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Draws of an ensemble of walkers as blocks of time, whose scatter gives errors.

Walkers learn from one another: at one time they are independent draws, over time they are not, and the usual
autocorrelations of single walkers miss what passes between them. Means over stretches of time contain all of it.

Reference: Flegal & Jones (2010), "Batch Means and Spectral Variance Estimators in Markov Chain Monte Carlo".
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["ess_of_blocks", "stretches"]

NUM_STRETCHES = 10


def stretches(a: Float[Array, "walker draw *event"]) -> Float[Array, "stretch member *event"]:
    """Groups draws by time; the first ones, which would not fill a stretch, are dropped.

    Args:
        a: of the walkers, `(walker, draw, ...)`.

    Returns:
        `(stretch, draws of all walkers in it, ...)`, ten to nineteen stretches, or one per draw of fewer.
    """
    length = max(1, a.shape[1] // NUM_STRETCHES)
    number = a.shape[1] // length
    a = jnp.swapaxes(a, 0, 1)[a.shape[1] - number * length :]
    return a.reshape(number, length * a.shape[1], *a.shape[2:])


def ess_of_blocks(x: Float[Array, "stretch member *event"]) -> Float[Array, "*event"]:
    """Effective sample size of the mean by batch means.

    Args:
        x: from `stretches`.

    Returns:
        One value per event coordinate, between one and the number of draws; one where there is one stretch or
        draws are not finite.
    """
    number, size = x.shape[:2]
    if number == 1:
        return jnp.ones(x.shape[2:], x.dtype)
    most = number * size
    of_mean = jnp.var(jnp.mean(x, 1), 0, ddof=1) / number
    ess = jnp.var(x, (0, 1)) / jnp.where(of_mean > 0, of_mean, 1)
    ess = jnp.where(of_mean > 0, jnp.clip(ess, 1, most), most)
    return jnp.where(jnp.isfinite(of_mean), ess, 1).astype(x.dtype)
