# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Statistics of weighted and of correlated draws, computed on the device.

Importance weights (log mean, effective sample size), Markov chains
(effective sample size, split R-hat, Monte Carlo error) and a Cholesky factor that exists for every
finite symmetric matrix. The functions are pure, can be vmapped, keep the dtype of their input, and
report trouble by documented values (zero, infinity) rather than by NaN. The longer ones are jitted
here: called outside of a trace they would compile a hundred operations one by one.

References:
    - Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021), "Rank-normalization, folding, and
      localization: an improved R-hat for assessing convergence of MCMC".
    - Geyer (1992), "Practical Markov chain Monte Carlo".
    - Kong (1992), "A note on importance sampling using standardized weights".
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from numpyro_regloss._core.settings import own_settings

__all__ = [
    "bisect",
    "standard_error",
    "effective_sample_size",
    "log_mean_exp",
    "monte_carlo_error",
    "normalize_log_weight",
    "split_rhat",
    "tempered",
    "weight_ess",
]

_MIN_DRAWS = 4
# Half chains of so few draws have their autocorrelations summed directly.
_FEW_LAGS = 8
# Of powers of weights: of e^-40 all weights are equal, and steps of its logarithm are a hundredth.
LEAST_LOG_POWER, NUM_HALVINGS = -40.0, 12


def log_mean_exp(log_weight: Float[Array, " draw"]) -> Float[Array, ""]:
    """Logarithm of the mean weight, `log(sum_i exp(l_i) / n)`, without overflow.

    Args:
        log_weight: log weights, shape `(draw,)`; entries of `-inf` are weights of zero.

    Returns:
        A scalar; `-inf` if all weights are zero.
    """
    return jax.nn.logsumexp(log_weight) - math.log(log_weight.size)


def normalize_log_weight(log_weight: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Weights `w_i = exp(l_i) / sum_j exp(l_j)`, normalized over all axes.

    Args:
        log_weight: log weights of any shape; entries of `-inf` are weights of zero.

    Returns:
        Weights of the same shape that sum to one; all zeros if there is no positive weight.
    """
    weight = _weight_over_largest(log_weight)
    total = jnp.sum(weight)
    return weight / jnp.where(total == 0, 1, total)


def weight_ess(log_weight: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Effective number of draws behind importance weights, `1 / sum_i w_i^2` (Kong 1992).

    Args:
        log_weight: log weights of any shape, not necessarily normalized.

    Returns:
        A scalar between one and the number of weights; zero if there is no positive weight, and where a weight is
        NaN or `inf`.
    """
    weight = _weight_over_largest(log_weight)
    total_of_squares = jnp.sum(weight**2)
    ess = jnp.sum(weight) ** 2 / jnp.where(total_of_squares == 0, 1, total_of_squares)
    return jnp.where(jnp.isfinite(ess), ess, 0)


def standard_error(independent: Float[Array, " term"]) -> Float[Array, ""]:
    """Standard error of a mean of independent terms."""
    return jnp.std(independent, ddof=1) / jnp.sqrt(independent.size)


def tempered(log_weight: Float[Array, " draw"], enough: Array | float) -> Float[Array, " draw"]:
    """Weights to a power at most one, of so many effective draws at least.

    Args:
        log_weight: up to a constant; -inf for none.
        enough: effective sample size.

    Returns:
        Weights that add to one.
    """
    peak = jnp.max(log_weight)
    log_weight = jnp.where(log_weight > -jnp.inf, log_weight - peak, -jnp.inf)

    def is_below(log_power: Array) -> Array:
        return weight_ess(jnp.exp(log_power) * log_weight) > enough

    # By its logarithm: far from a steep density log weights differ by millions.
    zero = jnp.zeros_like(peak)
    even = is_below(zero)
    # Mostly they are as they come: no halvings then.
    low, _ = bisect(is_below, zero + LEAST_LOG_POWER, zero, jnp.where(even, 0, NUM_HALVINGS))
    power = jnp.where(even, 1.0, jnp.exp(low))
    return jax.nn.softmax(power * log_weight)


def bisect(
    is_below: Callable[[Array], Array], low: Array, high: Array, num_halvings: Array | int
) -> tuple[Array, Array]:
    """A bracket of the place where a condition ends to hold.

    Args:
        is_below: of a place, whether the one that is looked for is higher.
        low: the lower end.
        high: the upper end.
        num_halvings: how often the bracket is halved.

    Returns:
        Both ends.
    """

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        below = is_below(middle)
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    return lax.fori_loop(0, num_halvings, halve, (low, high))


@jax.jit
@own_settings
def effective_sample_size(x: Float[Array, "chain draw *event"]) -> Float[Array, "*event"]:
    """Effective sample size of the mean of Markov chains, ArviZ's `method="mean"`.

    `S / (1 + 2 sum_t rho_t)` for `S` draws, with every chain split in halves, autocorrelations
    `rho_t` that count the disagreement of chains, and the sum ended by Geyer's initial monotone
    positive sequence (Vehtari et al. 2021). Antithetic chains reach `S log10(S)` at most.

    Args:
        x: draws, shape `(chain, draw, *event)`.

    Returns:
        One value per event coordinate, shape `(*event,)`: `chain * draw` where all draws are equal;
        `chain` for fewer than four draws, when autocorrelation cannot be judged and only chains
        count as independent; zero where a draw is not finite.
    """
    chains, draws = x.shape[:2]
    if draws < _MIN_DRAWS:
        finite = jnp.all(jnp.isfinite(x), axis=(0, 1))
        return jnp.where(finite, chains, 0).astype(x.dtype)
    centered, mean, equal = _split_moments(x)
    count, half = centered.shape[:2]

    # Chains are averaged in the frequency domain: one inverse transform per coordinate.
    if half <= _FEW_LAGS:
        # Transforms of a few numbers each would take many times as long.
        lags = [centered[:, : half - t] * centered[:, t:] for t in range(half)]
        covariance = jnp.stack([jnp.mean(jnp.sum(a, 1), 0) for a in lags], -1) / half
    else:
        length = 1 << (2 * half - 1).bit_length()
        spectrum = jnp.fft.rfft(jnp.moveaxis(centered, 1, -1), n=length)
        power = jnp.mean(spectrum.real**2 + spectrum.imag**2, axis=0)
        covariance = jnp.fft.irfft(power, n=length)[..., :half] / half
    within = covariance[..., :1] * half / (half - 1)
    total = covariance[..., :1] + jnp.var(mean, axis=0, ddof=1)[..., None]
    rho = 1 - (within - covariance) / jnp.where(equal[..., None], 1, total)
    rho = rho.at[..., 0].set(1)

    # Pairs before the first non-positive one count in full, made monotone; of the pair that ends
    # the sequence only its even member does, as in ArviZ and Stan.
    last = max((half - 1) // 2 - 1, 0)
    even, odd = rho[..., 0 : 2 * last + 1 : 2], rho[..., 1 : 2 * last + 2 : 2]
    pair = even + odd
    axis = pair.ndim - 1
    before = lax.cumprod((pair > 0).astype(int), axis=axis)[..., :last]
    monotone = lax.cummin(pair, axis=axis)[..., :last]
    end = jnp.sum(before, axis=-1, keepdims=True)
    even_end = jnp.take_along_axis(even, end, axis=-1)[..., 0]
    pair_end = jnp.take_along_axis(pair, end, axis=-1)[..., 0]
    time = 2 * jnp.sum(monotone * before, axis=-1) - 1
    time = time + jnp.where((even_end > 0) | (pair_end >= 0), even_end, 0)

    size = count * half
    ess = size / jnp.maximum(time, 1 / math.log10(size))
    ess = jnp.where(equal, chains * draws, ess)
    return jnp.where(jnp.isfinite(total[..., 0]), ess, 0).astype(x.dtype)


@jax.jit
@own_settings
def split_rhat(x: Float[Array, "chain draw *event"]) -> Float[Array, "*event"]:
    """Split R-hat of Markov chains, not rank-normalized, ArviZ's `method="split"`.

    `sqrt((m - 1) / m + B / W)` over half chains of `m` draws, `B` the variance of their means, `W`
    the mean of their variances (Vehtari et al. 2021). A single chain is judged by its halves.

    Args:
        x: draws, shape `(chain, draw, *event)`.

    Returns:
        One value per event coordinate, shape `(*event,)`: one where all draws are equal; `inf`
        where half chains are constant but differ, where a draw is not finite, and for fewer than
        four draws, when it cannot be told.
    """
    if x.shape[1] < _MIN_DRAWS:
        return jnp.full(x.shape[2:], jnp.inf, x.dtype)
    centered, mean, equal = _split_moments(x)
    half = centered.shape[1]
    within = jnp.mean(jnp.sum(centered**2, axis=1), axis=0) / (half - 1)
    between = jnp.var(mean, axis=0, ddof=1)
    rhat = jnp.sqrt((half - 1) / half + between / jnp.where(within > 0, within, 1))
    return jnp.where(within > 0, rhat, jnp.where(equal, 1, jnp.inf)).astype(x.dtype)


@jax.jit
@own_settings
def monte_carlo_error(x: Float[Array, "chain draw *event"]) -> Float[Array, "*event"]:
    """Standard error of the mean of Markov chains, `sd / sqrt(ess)`, ArviZ's `mcse` of the mean.

    Args:
        x: draws, shape `(chain, draw, *event)`.

    Returns:
        One value per event coordinate, shape `(*event,)`, in the unit of `x`; the effective sample
        size counts as one at least. Zero where all draws are equal; `inf` for a single draw, and
        where a draw is not finite.
    """
    if x.shape[0] * x.shape[1] < 2:
        return jnp.full(x.shape[2:], jnp.inf, x.dtype)
    standardized, unit = _shift_and_scale(x)
    error = jnp.std(standardized, axis=(0, 1), ddof=1) * unit
    error = error / jnp.sqrt(jnp.maximum(effective_sample_size(x), 1))
    error = jnp.where(jnp.isfinite(error), error, jnp.inf)
    return jnp.where(jnp.all(x == x[:1, :1], axis=(0, 1)) & jnp.isfinite(x[0, 0]), 0, error)


def _weight_over_largest(log_weight: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    # With no positive weight the largest is -inf, and its difference from itself NaN.
    largest = jnp.max(log_weight)
    return jnp.exp(log_weight - jnp.where(largest == -jnp.inf, 0, largest))


def _shift_and_scale(
    x: Float[Array, "chain draw *event"],
) -> tuple[Float[Array, "chain draw *event"], Float[Array, "*event"]]:
    # In units of the largest deviation squares neither overflow nor vanish, and a distant mean
    # costs no precision. Division before the sum, which could overflow.
    x = x - jnp.sum(x / (x.shape[0] * x.shape[1]), axis=(0, 1))
    unit = jnp.max(jnp.abs(x), axis=(0, 1))
    return x / jnp.where(unit == 0, 1, unit), unit


def _split_moments(
    x: Float[Array, "chain draw *event"],
) -> tuple[
    Float[Array, " split half *event"], Float[Array, " split *event"], Bool[Array, "*event"]
]:
    # Half chains about their means (NaN where any draw is not finite), these means in an arbitrary
    # origin and unit, and whether all draws are equal.
    half = x.shape[1] // 2
    x = jnp.where(jnp.all(jnp.isfinite(x), axis=(0, 1)), x, jnp.nan)
    x = jnp.concatenate([x[:, :half], x[:, -half:]])
    # The rounding of means, which may differ from one fused kernel to the next, must not give
    # constant draws a variance, so they are recognized by equality, before any arithmetic.
    constant = jnp.all(x == x[:, :1], axis=1)
    equal = jnp.all(x == x[:1, :1], axis=(0, 1))
    x, _ = _shift_and_scale(x)
    mean = jnp.where(constant, x[:, 0], jnp.mean(x, axis=1))
    return jnp.where(constant[:, None], 0, x - mean[:, None]), mean, equal
