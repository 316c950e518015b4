# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The mean of the weights of one round, E exp(-loss / T) over the reference, with its standard error.

Under the law p of the draws, a mixture of a Gaussian and others, the Gaussian's density over p has the mean one,
and its product with the Gaussian's squared noise the mean dim. They are control variates of the weights, and take
away what a proposal wider than q costs.

References: Owen & Zhou (2000), "Safe and Effective Importance Sampling"; MacKinnon & White (1985), "Some
Heteroskedasticity-Consistent Covariance Matrix Estimators" (their jackknife, HC3).
"""

from itertools import accumulate

import jax.numpy as jnp

from numpyro_regloss._core.types import Array

__all__ = ["controls_of", "mean_weight"]

# Of the larger second moment of the controls: nothing, but where one of them is constant.
RIDGE = 1e-6
# What the controls may take off the standard error: rare far pairs, which they do not follow, are seldom seen.
MOST_GAIN = 4.5
# Of the squared error: controls that leave more are not used. Their slope comes from the same pairs, and its bias,
# of the order of one over their number, would count beside the error.
MOST_KEPT = 0.5
# Of one minus the leverage, against division by zero.
LEAST_FREE = 0.05


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


def mean_weight(weight: Array, controls: Array, num_pairs: tuple[int, ...]) -> tuple[Array, Array]:
    """Mean over the reference and its standard error.

    Args:
        weight: of antithetic pairs, one after the other, `(draw,)`.
        controls: from `controls_of`.
        num_pairs: pairs of each part of the mixture, in their order; two at least.

    Returns:
        Two scalars.
    """
    pairs = jnp.mean(weight.reshape(-1, 2), -1)
    known = jnp.mean(controls.reshape(len(pairs), 2, -1), 1)
    # In strata: so many pairs come from each part in every round.
    ends = list(accumulate(num_pairs))
    strata = [slice(end - count, end) for end, count in zip(ends, num_pairs, strict=True)]

    def centered(values: Array) -> Array:
        return jnp.concatenate([values[part] - jnp.mean(values[part], 0) for part in strata])

    x, y = centered(known), centered(pairs)
    second = x.T @ x
    ridge = RIDGE * jnp.max(jnp.diagonal(second)) + jnp.finfo(x.dtype).tiny
    # Two by two: Cramer's rule.
    (a, b), (_, d) = second + ridge * jnp.eye(2, dtype=x.dtype)
    inverse = jnp.array([[d, -b], [-b, a]]) / (a * d - b * b)
    slope = inverse @ (x.T @ y)
    mean = jnp.mean(pairs - known @ slope)
    # A far pair bends the regression towards itself: residuals as they are without each of them.
    own = jnp.concatenate([jnp.full(n, 1 / n, x.dtype) for n in num_pairs])
    leverage = own + jnp.sum((x @ inverse) * x, -1)
    rest = (y - x @ slope) / jnp.maximum(1.0 - leverage, LEAST_FREE)
    plain = y / (1.0 - own)
    usable = (mean > 0) & (jnp.sum(rest**2) < MOST_KEPT * jnp.sum(plain**2))
    rest = jnp.where(usable, rest, plain)
    # What no pair was far enough to see is no part of the residuals.
    square = jnp.maximum(jnp.sum(rest**2), jnp.sum(y**2) / MOST_GAIN**2)
    return jnp.where(usable, mean, jnp.mean(pairs)), jnp.sqrt(square) / len(pairs)
