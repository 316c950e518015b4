# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Statistics of weighted and of correlated draws, computed on the device.

Importance weights (log mean, effective sample size, Pareto smoothing and k-hat), Markov chains
(effective sample size, split R-hat, Monte Carlo error) and a Cholesky factor that exists for every
finite symmetric matrix. The functions are pure, can be vmapped, keep the dtype of their input, and
report trouble by documented values (zero, infinity) rather than by NaN. The longer ones are jitted
here: called outside of a trace they would compile a hundred operations one by one.

References:
    - Vehtari, Simpson, Gelman, Yao & Gabry (2024), "Pareto smoothed importance sampling".
    - Zhang & Stephens (2009), "A new and efficient estimation method for the generalized Pareto
      distribution".
    - Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021), "Rank-normalization, folding, and
      localization: an improved R-hat for assessing convergence of MCMC".
    - Geyer (1992), "Practical Markov chain Monte Carlo".
    - Kong (1992), "A note on importance sampling using standardized weights".
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

__all__ = [
    "cholesky_with_floor",
    "effective_sample_size",
    "log_mean_exp",
    "monte_carlo_error",
    "normalize_log_weight",
    "pareto_khat",
    "pareto_smooth",
    "split_rhat",
    "weight_ess",
]

# The logarithm of the smallest normal float64: ArviZ and NumPyro end the tail at weights that small
# relative to the largest. One constant for all dtypes, so that float32 has the same tail.
_LOG_NEGLIGIBLE = -708.3964185322641
_MIN_TAIL = 5
_MIN_DRAWS = 4


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
        A scalar between one and the number of weights; zero if there is no positive weight.
    """
    weight = _weight_over_largest(log_weight)
    total_of_squares = jnp.sum(weight**2)
    return jnp.sum(weight) ** 2 / jnp.where(total_of_squares == 0, 1, total_of_squares)


@jax.jit
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

    # Without the barrier XLA merges the slices below into a sort of all draws, 20 times slower.
    values, indices = lax.optimization_barrier(lax.top_k(log_weight, slots + 1))
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


@jax.jit
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


@partial(jax.jit, static_argnames="floor")
def cholesky_with_floor(
    matrix: Float[Array, "dim dim"], floor: float = 1e-6
) -> tuple[Float[Array, "dim dim"], Bool[Array, ""]]:
    """Lower Cholesky factor of a covariance matrix, made positive definite where it is not.

    With `D` the standard deviations and `C = D^-1 A D^-1 = V diag(e) V^T` the correlation form,

        L L^T = D V diag(max(e, floor)) V^T D,

    so that units do not matter. When `C - floor I` has a Cholesky factor, the plain factor of `A`
    is returned and no eigenvalues are computed. Correlations are cut to [-1, 1]. A coordinate with
    a zero, negative or subnormal variance is made uncorrelated, with a variance of `floor` times
    the mean of the others, or `floor` if there are none: the zero matrix gives `sqrt(floor) I`.

    Args:
        matrix: symmetric matrix, shape `(dim, dim)`.
        floor: smallest eigenvalue of the correlation form, without unit; the machine epsilon of the
            dtype if that is larger.

    Returns:
        The lower factor, shape `(dim, dim)`, with a positive diagonal, and whether it is that of
        another matrix than the one given. A matrix that is not finite gives a factor of NaN.
    """
    floor = max(floor, float(jnp.finfo(matrix.dtype).eps))
    finite = jnp.all(jnp.isfinite(matrix))
    identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    matrix = jnp.where(finite, matrix, identity)

    variance = jnp.diagonal(matrix)
    valid = variance >= jnp.finfo(matrix.dtype).tiny
    count = jnp.maximum(jnp.sum(valid), 1)
    mean = jnp.sum(jnp.where(valid, variance, 0) / count)
    scale = jnp.sqrt(jnp.where(valid, variance, jnp.where(mean > 0, mean, 1)))
    correlation = jnp.clip(matrix / scale[:, None] / scale, -1, 1)
    correlation = jnp.where(identity == 1, 1, correlation)
    correlation = jnp.where(valid[:, None] & valid, correlation, 0)

    plain = jnp.linalg.cholesky(matrix)
    shifted = jnp.linalg.cholesky(correlation - floor * identity)
    enough = jnp.all(jnp.isfinite(plain)) & jnp.all(jnp.isfinite(shifted))

    def raise_eigenvalues() -> Float[Array, "dim dim"]:
        value, vector = jnp.linalg.eigh(correlation)
        # The triangle of QR is that of Cholesky, but rounding cannot take away the floor again,
        # which in float32 it can when the product is formed first.
        root = jnp.sqrt(jnp.maximum(value, floor))[:, None] * vector.T
        lower = jnp.linalg.qr(root, mode="r").T
        return lower * jnp.where(jnp.diagonal(lower) < 0, -1, 1) * scale[:, None]

    lower = lax.cond(enough, lambda: plain, raise_eigenvalues)
    return jnp.where(finite, lower, jnp.nan), ~enough


def _weight_over_largest(log_weight: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    # With no positive weight the largest is -inf, and its difference from itself NaN.
    largest = jnp.max(log_weight)
    return jnp.exp(log_weight - jnp.where(largest == -jnp.inf, 0, largest))


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
