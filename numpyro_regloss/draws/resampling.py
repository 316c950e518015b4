# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Weighted draws as equally weighted ones, for views that know no weights and for particles.

Systematic resampling: draw i is shown n w_i times, up or down to a whole number. Copies stay side by side, so
that what counts autocorrelation finds about as many effective draws as the weights leave.

Reference: Kitagawa (1996), "Monte Carlo Filter and Smoother for Non-Gaussian Nonlinear State Space Models".
"""

import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_regloss._core.types import Array, Key

__all__ = ["equal_weights", "stratified", "systematic"]

# Chains whose totals agree to single precision are chains; others are parts of one weighted cloud.
SAME_TOTAL = 1e-3


def equal_weights(log_weight: np.ndarray) -> tuple[np.ndarray, bool]:
    """Which draws to show.

    Args:
        log_weight: `(chain, draw)`, unnormalized; -inf for no weight.

    Returns:
        Positions among all draws, flattened, `(chain, draw)`, and whether draws were resampled. Draws without
        weight are left out; where the others weigh the same nothing is resampled. A cloud whose chains differ
        in total weight becomes one chain.

    Raises:
        ValueError: if a weight is NaN or infinite, or all of them are zero.
    """
    log_weight = np.asarray(log_weight, float)
    if np.isnan(log_weight).any() or not np.isfinite(log_weight.max(initial=-np.inf)):
        raise ValueError(
            "to_arviz: expected draws with finite log weights, some of them above -inf, got NaN, infinity or no "
            "weight at all; look at history.shift, and use a smaller tau or another start."
        )
    index = np.arange(log_weight.size).reshape(log_weight.shape)
    weight = np.exp(log_weight - log_weight.max())
    used = weight > 0
    counts = used.sum(1)
    if np.ptp(log_weight[used]) == 0 and np.ptp(counts) == 0:
        return index[used].reshape(log_weight.shape[0], -1), False
    totals = weight.sum(1)
    if np.ptp(totals) > SAME_TOTAL * totals.max():
        index, weight = index.reshape(1, -1), weight.reshape(1, -1)
    number = index.shape[1]
    chosen = [row[stratified(part, number)] for row, part in zip(index, weight, strict=True)]
    return np.stack(chosen), True


def stratified(weight: np.ndarray, count: int) -> np.ndarray:
    """Draws of equal weight that stand for weighted ones: the middle of each stratum, so that no key is needed.

    Args:
        weight: `(draw,)`.
        count: how many.

    Returns:
        Indices, `(count,)`, ascending.
    """
    total = np.cumsum(weight)
    index = np.searchsorted(total, total[-1] * (np.arange(count) + 0.5) / count)
    return np.minimum(index, weight.size - 1)


def systematic(rng_key: Key, log_weight: Array, count: int) -> Array:
    """Systematic resampling: which particles survive, in their order.

    Args:
        rng_key: a random key.
        log_weight: `(particle,)`.
        count: how many survivors.

    Returns:
        Indices, `(count,)`, ascending, so that relatives stay neighbors.
    """
    peak = jnp.max(log_weight)
    weight = jnp.exp(log_weight - jnp.where(jnp.isfinite(peak), peak, 0.0))
    # An island where all weights underflow keeps its particles; its evidence is zero.
    weight = jnp.where(jnp.isfinite(peak), weight, 1.0)
    total = jnp.cumsum(weight)
    positions = (jnp.arange(count) + random.uniform(rng_key, (), weight.dtype)) / count
    index = jnp.searchsorted(total, positions * total[-1], side="right")
    # Rounding of the last position must not reach a particle without weight.
    last = weight.size - 1 - jnp.argmax(weight[::-1] > 0)
    return jnp.minimum(index, last)
