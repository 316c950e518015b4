# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Errors of means that know of the terms that were not drawn.

A sample that missed the rare large terms shows too small a mean and too small a spread. Of a sum with a heavy tail
a large deviation is one large term. The largest of n terms is about their 1 - 1/n quantile; the term that is
exceeded once in twenty such samples is 20^k times as large, k the shape of the tail:

    error² = s² / n + ( 20^k largest deviation / (1.96 n) )²,

which for a light tail (k ≤ 0) is the usual error. Above k = 0.7 neither mean nor error can be trusted, and the
error is infinite.

References: Foss, Korshunov & Zachary (2013), "An Introduction to Heavy-Tailed and Subexponential Distributions"
(one large term); Vehtari, Simpson, Gelman, Yao & Gabry (2024), "Pareto Smoothed Importance Sampling" (0.7).
"""

import jax.numpy as jnp

from numpyro_regloss._core.pareto import MAX_KHAT, pareto_khat
from numpyro_regloss._core.stats import standard_error
from numpyro_regloss._core.types import Array

__all__ = ["mean_with_error", "rare_term", "tail_error", "tail_index", "with_rounding"]

# Once in so many samples a 95 % interval may miss; and its half width in standard errors.
RARE, QUANTILE = 20.0, 1.96
# The tail of fewer draws has less than twenty, against a prior that counts as ten: chance decides.
LEAST_FITTED = 100
# Terms that carry the variance when it is known to a fifth: (Σ d²)² / Σ d⁴ of deviations d.
LEAST_CARRIERS = 30.0
# Draws whose median is the center of all: where exactly it lies does not matter.
NUM_CENTER = 1_000
# In units of the last digit of the largest number.
ROUNDING = 8.0


def tail_index(log_size: Array, independent: Array) -> Array:
    """k-hat, or what stands in for it where no tail can be fitted or the tail does not matter.

    That is where there are few draws, few of them above zero, or ties; and where many terms carry the variance,
    which is then known, whatever a few of them look like. Of n draws with an exponential tail (k = 0) the largest
    is about 1 / sqrt(n) of the sum; equal ones have 1 / n (k = -1, as the uniform distribution), and a single one
    has all (k = 1). So between them

        k = 1 - 2 log(sum / largest) / log(n).

    Args:
        log_size: logarithms of what may be too large, `(draw,)`; -inf for nothing.
        independent: terms of the mean that is judged, `(term,)`.

    Returns:
        A scalar; `inf` where there is nothing but one draw, or something is NaN or infinite.
    """
    khat = pareto_khat(log_size)
    peak = jnp.max(log_size)
    count = jnp.sum(log_size > -jnp.inf)
    total = jnp.sum(jnp.exp(log_size - jnp.where(jnp.isfinite(peak), peak, 0.0)))
    share = 1.0 - 2.0 * jnp.log(total) / jnp.log(jnp.maximum(count, 2))
    share = jnp.where((count > 1) & jnp.isfinite(peak), share, jnp.inf)
    deviation, largest = _deviations(independent)
    square = (deviation / jnp.where(largest > 0, largest, 1.0)) ** 2
    carried = jnp.sum(square) ** 2 >= LEAST_CARRIERS * jnp.sum(square**2)
    fitted = (khat < jnp.inf) & (log_size.size >= LEAST_FITTED) & ~carried
    return jnp.where(fitted | (khat == -jnp.inf), khat, share)


def tail_error(independent: Array, khat: Array) -> Array:
    """Standard error of a mean, with room for the large term that was not drawn.

    Args:
        independent: terms of the mean, `(term,)`.
        khat: shape of their tail.

    Returns:
        A scalar, infinite where k-hat is above 0.7 and where the mean is not finite.
    """
    error = standard_error(independent)
    error = jnp.hypot(error, rare_term(independent, khat))
    return jnp.where(jnp.isfinite(error) & (khat <= MAX_KHAT), error, jnp.inf)


def rare_term(independent: Array, khat: Array) -> Array:
    """What a term that was not drawn adds to the standard error of a mean."""
    _, largest = _deviations(independent)
    return RARE ** jnp.clip(khat, 0.0, MAX_KHAT) * largest / (QUANTILE * independent.size)


def with_rounding(error: Array, value: Array) -> Array:
    """A standard error, with what the last digit of the value hides.

    Args:
        error: standard error.
        value: of which it is.

    Returns:
        The error, larger where a large constant in the loss leaves few digits for its differences.
    """
    unit = jnp.finfo(value.dtype).eps * jnp.abs(value)
    return jnp.hypot(error, jnp.where(jnp.isfinite(value), unit, 0.0))


def _deviations(independent: Array) -> tuple[Array, Array]:
    deviation = jnp.abs(independent - jnp.mean(independent))
    return deviation, jnp.max(deviation)


def mean_with_error(independent: Array, size: Array) -> tuple[Array, Array, Array]:
    """A mean, its error and k-hat of the larger of the two tails of its terms.

    Args:
        independent: the terms, `(term,)`.
        size: of the numbers that the terms were computed from, whose rounding is no tail.

    Returns:
        Three scalars; k-hat is -inf where the terms are equal up to rounding.
    """
    center = jnp.median(independent[:: -(-independent.size // NUM_CENTER)])
    deviation = jnp.abs(independent - center)
    khat = tail_index(jnp.log(deviation), independent)
    rounding = ROUNDING * jnp.finfo(independent.dtype).eps * size
    khat = jnp.where(jnp.max(deviation) <= rounding, -jnp.inf, khat)
    return jnp.mean(independent), tail_error(independent, khat), khat
