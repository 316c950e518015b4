# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The mean of the weights of one round, E exp(-loss / T) over the reference, with its standard error.

Under the law p of the draws, a mixture of a Gaussian and the reference, the Gaussian's density over p has the mean
one, and its product with the Gaussian's squared noise the mean dim. They are control variates of the weights, and
take away what a proposal wider than q costs.

Reference: Owen & Zhou (2000), "Safe and Effective Importance Sampling".
"""

import jax.numpy as jnp

from numpyro_regloss._core.stats import standard_error
from numpyro_regloss._core.types import Array

__all__ = ["controls_of", "mean_weight"]

# Of the larger second moment of the controls: nothing, but where one of them is constant.
RIDGE = 1e-6


def controls_of(log_ratio: Array, square: Array, dim: int) -> Array:
    """Two functions of the draws whose means are zero.

    Args:
        log_ratio: log density of the Gaussian over that of the mixture, `(draw,)`.
        square: squared length of the Gaussian's noise at the draws, `(draw,)`.
        dim: of the noise.

    Returns:
        `(draw, 2)`.
    """
    ratio = jnp.exp(log_ratio)
    # Far out the ratio is zero, and the square may be infinite.
    second = jnp.where(ratio > 0, ratio * (square / dim - 1.0), 0.0)
    return jnp.stack([ratio - 1.0, second], -1)


def mean_weight(weight: Array, controls: Array, num_defensive: int) -> tuple[Array, Array]:
    """Mean over the reference and its standard error.

    Args:
        weight: of antithetic pairs, one after the other, `(draw,)`.
        controls: from `controls_of`.
        num_defensive: pairs from the reference, the last ones; none, or two at least.

    Returns:
        Two scalars.
    """
    pairs = jnp.mean(weight.reshape(-1, 2), -1)
    known = jnp.mean(controls.reshape(len(pairs), 2, -1), 1)
    place = len(pairs) - num_defensive
    # In two strata: so many pairs come from the reference in every round.
    strata = [part for part in (slice(None, place), slice(place, None)) if len(pairs[part])]

    def centered(values: Array) -> Array:
        return jnp.concatenate([values[part] - jnp.mean(values[part], 0) for part in strata])

    x = centered(known)
    second = x.T @ x
    ridge = RIDGE * jnp.max(jnp.diagonal(second)) + jnp.finfo(x.dtype).tiny
    # Two by two: Cramer's rule.
    (a, b), (_, d) = second + ridge * jnp.eye(2, dtype=x.dtype)
    cross = x.T @ centered(pairs)
    slope = jnp.stack([d * cross[0] - b * cross[1], a * cross[1] - b * cross[0]]) / (a * d - b * b)
    rest = pairs - known @ slope
    plain = jnp.mean(pairs)
    usable = jnp.isfinite(slope).all() & (jnp.mean(rest) > 0)
    rest = jnp.where(usable, rest, pairs)
    variance = sum((rest[part].size * standard_error(rest[part])) ** 2 for part in strata)
    return jnp.where(usable, jnp.mean(rest), plain), jnp.sqrt(variance) / len(pairs)
