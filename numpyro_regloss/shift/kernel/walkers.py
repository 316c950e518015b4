# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Draws of an ensemble by batches of time, since its walkers depend on one another.

At one time they are independent draws, but over time they are not, and the usual autocorrelations of single
walkers miss the dependence between walkers. The scatter of means over batches of time includes all dependence.

References: Flegal & Jones (2010), "Batch Means and Spectral Variance Estimators in Markov Chain Monte Carlo".
"""

import jax.numpy as jnp
from jaxtyping import Float

from numpyro_regloss._core.types import Array

__all__ = ["batches", "ess_of_blocks"]

NUM_BATCHES = 10


def batches(a: Float[Array, "walker draw *event"]) -> Float[Array, "batch member *event"]:
    """Groups draws by time; the first ones, which would not fill a batch, are dropped.

    Args:
        a: of the walkers, `(walker, draw, ...)`.

    Returns:
        `(batch, draws of all walkers in it, ...)`, ten to nineteen batches, or one per draw of fewer.
    """
    length = max(1, a.shape[1] // NUM_BATCHES)
    number = a.shape[1] // length
    a = jnp.swapaxes(a, 0, 1)[a.shape[1] - number * length :]
    return a.reshape(number, length * a.shape[1], *a.shape[2:])


def ess_of_blocks(x: Float[Array, "batch member *event"]) -> Float[Array, "*event"]:
    """Effective sample size of the mean by batch means.

    Args:
        x: from `batches`.

    Returns:
        One value per event coordinate, between one and the number of draws; one where there is one batch or
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
