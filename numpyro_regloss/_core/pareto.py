# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Pareto smoothing of importance weights and its diagnostic k-hat, computed on the device.

References:
    - Vehtari, Simpson, Gelman, Yao & Gabry (2024), "Pareto smoothed importance sampling".
    - Zhang & Stephens (2009), "A new and efficient estimation method for the generalized Pareto
      distribution".
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from numpyro_regloss._core.settings import own_settings

__all__ = ["MAX_KHAT", "pareto_khat", "pareto_smooth"]

# Averages of weights are unreliable above (Vehtari et al. 2024).
MAX_KHAT = 0.7

# The logarithm of the smallest normal float64: ArviZ and NumPyro end the tail at weights that small
# relative to the largest. One constant for all dtypes, so that float32 has the same tail.
_LOG_NEGLIGIBLE = -708.3964185322641
_MIN_TAIL = 5


@jax.jit
@own_settings
def pareto_smooth(
    log_weight: Float[Array, " draw"],
) -> tuple[Float[Array, " draw"], Float[Array, ""]]:
    """Pareto smoothed importance sampling (Vehtari et al. 2024).

    The `M = ceil(min(n / 5, 3 sqrt(n)))` largest weights, as far as they exceed the next one `u`,
    are replaced by the quantiles `(i - 1/2) / M` of `u` plus the generalized Pareto distribution
    that fits `w - u` (Zhang & Stephens 2009; the shape k is drawn towards 0.5 with the weight of
    ten draws), cut at the largest raw weight. Rule of thumb: trust averages when k-hat < 0.7.

    The result is not normalized: its `log_mean_exp` estimates the log normalizing constant. The
    tail and the fit are those of ArviZ 0.23 and NumPyro. Equal weights stay equal, at the mean of
    their quantiles, so that the order of the draws does not matter (in ArviZ it does).

    Args:
        log_weight: log weights, shape `(draw,)`; entries of `-inf` are weights of zero.

    Returns:
        Smoothed log weights, shape `(draw,)`, and the scalar k-hat. The weights are unchanged and
        k-hat is `-inf` if all weights of the tail are equal, so that there is no tail, and `inf` if
        the tail cannot be judged: fewer than 21 draws (`M < 5`), fewer than `M` positive weights,
        fewer than five of them above `u` (ties, underflow), or NaN or `inf` among the weights.
    """
    n = log_weight.size
    slots = math.ceil(min(n / 5, 3 * math.sqrt(n)))
    if slots < _MIN_TAIL:
        return log_weight, jnp.full((), jnp.inf, log_weight.dtype)

    # Without the barriers XLA merges the slices below into a sort of all draws, 20 times slower. One barrier
    # for both ends the process where draws lie on several devices (JAX 0.10): XLA's own pass takes apart
    # what reads a top_k, and does not know a barrier there.
    values, indices = map(lax.optimization_barrier, lax.top_k(log_weight, slots + 1))
    largest = values[0]
    cutoff = jnp.maximum(values[slots], largest + _LOG_NEGLIGIBLE)
    values, indices = values[:slots], indices[:slots]
    above = values > cutoff
    size = jnp.sum(above)

    known = jnp.isfinite(largest) & jnp.isfinite(values[-1])
    enough = size >= _MIN_TAIL
    flat = known & ((largest == values[-1]) | (largest == values[size - 1]) & enough)
    fitted = known & enough & ~flat
    # An arbitrary proper tail stands in where there is none: what is discarded stays finite.
    size = jnp.where(fitted, size, slots)
    origin = jnp.where(fitted, largest, 0)
    height = jnp.linspace(0, -1, slots, dtype=values.dtype)
    height = jnp.where(above & fitted, values - origin, height)
    base = jnp.where(fitted, cutoff - origin, -2)

    # log(w - u) relative to the largest weight, without cancellation where weights are near u
    log_excess = height + jnp.log(-jnp.expm1(jnp.where(above | ~fitted, base - height, -1)))
    shape, log_scale = _fit_generalized_pareto(log_excess, size)
    count = size.astype(values.dtype)
    khat = (count * shape + 10 * 0.5) / (count + 10)
    fitted = fitted & jnp.isfinite(khat) & jnp.isfinite(log_scale)

    rank = jnp.maximum(count - 1 - jnp.arange(slots), 0)
    quantile = _log_pareto_quantile((rank + 0.5) / count, khat, log_scale)
    smoothed = _mean_of_ties(jnp.minimum(jnp.logaddexp(base, quantile), 0), values) + largest
    smoothed = log_weight.at[indices].set(jnp.where(above & fitted, smoothed, values))
    return smoothed, jnp.where(fitted, khat, jnp.where(flat, -jnp.inf, jnp.inf))


def pareto_khat(log_weight: Float[Array, " draw"]) -> Float[Array, ""]:
    """Shape k of the generalized Pareto tail of importance weights, see `pareto_smooth`.

    Args:
        log_weight: log weights, shape `(draw,)`.

    Returns:
        The scalar k-hat.
    """
    return pareto_smooth(log_weight)[1]


def _fit_generalized_pareto(
    log_excess: Float[Array, " slot"], size: Int[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Empirical Bayes fit of the generalized Pareto distribution (Zhang & Stephens 2009).

    Works with logarithms relative to the first quartile, so that float32 holds excesses of any
    range, and with a dynamic number of them, so that ties shorten the tail.

    Args:
        log_excess: logarithms of the excesses in descending order; the first `size` are used.
        size: their number, at least five.

    Returns:
        Shape k, before the prior on it, and the logarithm of the scale sigma.
    """
    slots, dtype = log_excess.shape[0], log_excess.dtype
    used = jnp.arange(slots) < size
    count = size.astype(dtype)
    quartile = log_excess[size - (size + 2) // 4]
    log_ratio = jnp.where(used, log_excess - quartile, 0)

    def mean_log1p(theta: Float[Array, "*grid"]) -> Float[Array, "*grid"]:
        # mean of log(1 - theta exp(log_ratio)); the ratio itself may overflow where theta < 0
        theta = theta[..., None]
        heavy = theta < 0
        log_theta = jnp.log(jnp.where(heavy, -theta, 1))
        light = jnp.where(heavy, 0, theta) * jnp.exp(jnp.where(heavy, 0, log_ratio))
        term = jnp.where(heavy, jnp.logaddexp(0, log_theta + log_ratio), jnp.log1p(-light))
        return jnp.sum(jnp.where(used, term, 0), axis=-1) / count

    def nonzero(theta: Float[Array, "*grid"]) -> Float[Array, "*grid"]:
        # The exponential law, theta = 0, is a removable singularity of the profile likelihood.
        smallest = jnp.finfo(dtype).eps ** 2
        return jnp.where(jnp.abs(theta) < smallest, -smallest, theta)

    # The grid has 30 + floor(sqrt(size)) points; those that only a longer tail has weigh nothing.
    steps = math.isqrt(slots)
    points = 30 + jnp.sum(jnp.arange(1, steps + 1) ** 2 <= size).astype(dtype)
    index = jnp.arange(1, 31 + steps, dtype=dtype)
    theta = (1 - jnp.sqrt(points / (jnp.minimum(index, points) - 0.5))) / 3
    theta = nonzero(theta + jnp.exp(quartile - log_excess[0]))
    shape = mean_log1p(theta)
    log_profile = count * (jnp.log(jnp.abs(theta)) - jnp.log(jnp.abs(shape)) - shape)
    weight = jax.nn.softmax(jnp.where(index <= points, log_profile, -jnp.inf))

    theta = nonzero(jnp.sum(weight * theta))
    shape = mean_log1p(theta)
    return shape, quartile + jnp.log(jnp.abs(shape)) - jnp.log(jnp.abs(theta))


def _log_pareto_quantile(
    probability: Float[Array, " slot"], shape: Float[Array, ""], log_scale: Float[Array, ""]
) -> Float[Array, " slot"]:
    # log of sigma ((1 - p)^-k - 1) / k, in a form that neither overflows nor divides by zero
    exponential = -jnp.log1p(-probability)
    size = jnp.maximum(jnp.abs(shape), jnp.finfo(shape.dtype).eps)
    log_standard = jnp.log(-jnp.expm1(-size * exponential)) - jnp.log(size)
    return log_scale + jnp.maximum(shape, 0) * exponential + log_standard


def _mean_of_ties(
    log_value: Float[Array, " slot"], sorted_key: Float[Array, " slot"]
) -> Float[Array, " slot"]:
    # Values whose keys are equal are replaced by their mean.
    new = sorted_key[1:] != sorted_key[:-1]
    group = jnp.concatenate([jnp.zeros(1, int), jnp.cumsum(new)])
    largest = jax.ops.segment_max(log_value, group, log_value.size)[group]
    total = jax.ops.segment_sum(jnp.exp(log_value - largest), group, log_value.size)[group]
    number = jax.ops.segment_sum(jnp.ones_like(log_value), group, log_value.size)[group]
    return largest + jnp.log(total / number)
