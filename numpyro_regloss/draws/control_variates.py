# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Stein control variates: moments of Markov chains whose scores are known.

For a differentiable density E_q[∇ log q] = 0, so that with g = ∇ log q and any matrix A

    E_q[x] = E_q[x - A g],   Cov_q = E_q[sym((x - A g)(x - E_q x)ᵀ)] - sym(A).

A is regressed, x on g. Where q is Gaussian both are exact from a few draws. Of skewed q the quadratic controls
1 + (x_i - m_i) g_i, of mean zero for every m, take more off the error of the mean. Elsewhere a regression can do
harm, so that none, a diagonal or a full A, for the mean also one with quadratic controls, is chosen by
leave-one-out error. A loss that jumps has derivatives but no score; two checks find it:

    - E_q[g] = 0 must hold within errors;
    - between consecutive draws log q must change as the scores say. What the trapezoid rule misses is
      compared with the part of the scores that is not affine, since of an affine score it misses nothing.

References: Assaraf & Caffarel (1999), "Zero-Variance Principle for Monte Carlo Algorithms"; Mira, Solgi &
Imparato (2013), "Zero Variance Markov Chain Monte Carlo for Bayesian Estimators"; South, Oates, Mira &
Drovandi (2022), "Regularized Zero-Variance Control Variates".
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.scipy.special import ndtri

from numpyro_regloss._core.linalg import after, inverse_root
from numpyro_regloss._core.stats import monte_carlo_error
from numpyro_regloss._core.types import Array

__all__ = ["CONTROLS", "Chains", "Control", "choose", "series_error"]

CONTROLS = ("none", "diagonal", "full", "quadratic")
# Of the mean eigenvalue of the scores' second moments: enough for float32, of no effect otherwise.
RIDGE = 1e-6
# A control must cut the squared error of the simpler ones by this much, since its estimated error is itself noisy:
# none, diagonal and full, quadratic.
HANDICAP = (0.64, 0.8, 0.9, 1.0)
# Effective draws per coefficient of a row of A that a regression needs.
LEAST_DRAWS = 1.2
# Draws per dimension that quadratic controls, two of them for each, need.
QUADRATIC_DRAWS = 4
# Correlations of consecutive draws from which on one counts as a copy of the other, and the largest that is used.
COPIES, MOST_CORRELATION = 0.5, 0.99
# Probability that scores which do average to zero are rejected, over all coordinates.
FALSE_ALARM = 1e-6
# The trapezoid rule's squared error over the squared contribution of what is not affine. Of polynomials, double
# wells and kinks it is below one; of jumps on quadratics it is infinite.
MOST_UNEXPLAINED = 3.0
# In nats: what rounding, or a jump that moves no mean, may leave unexplained.
LEAST_UNEXPLAINED = 0.05
# Blocks whose draws are added one by one.
SHORT = 8
# Elements of the series whose autocorrelations are computed at once.
CHUNK_ELEMENTS = 4_000_000


class Chains(NamedTuple):
    """Draws of Markov chains about their mean, in units of their standard deviations, chains flattened.

    Attributes:
        num_chains: how many.
        weight: adding to one, `(draw,)`.
        z: `(draw, dim)`, mean zero.
        score: `(draw, dim)` in the same units, or None.
        log_density: of every draw up to a constant, `(draw,)`, or None.
        block_size: of draws that are independent from one block of consecutive ones to the next, or None.
    """

    num_chains: int
    weight: Array
    z: Array
    score: Any
    log_density: Any
    block_size: int | None = None


class Control(NamedTuple):
    """What is subtracted, in standardized units.

    Attributes:
        kind: index into `CONTROLS`.
        compatible: whether the scores are those of a differentiable density, as far as can be told.
        coefficient: A, `(dim, dim)` where a full one was possible, else its diagonal `(dim,)`; without that of
            quadratic controls.
        shift: the controls' average times their coefficients, to be subtracted from the mean, `(dim,)`.
        residual: z - A g (less quadratic controls) about its mean, `(draw, dim)`.
        left_out: the residual of every draw from a regression without it, `(draw, dim)`.
        error: standard error of the mean or, where variances were asked for, of the variances, `(dim,)`.
    """

    kind: Array
    compatible: Array
    coefficient: Array
    shift: Array
    residual: Array
    left_out: Array
    error: Array


def series_error(chains: Chains, values: Array) -> Array:
    """Standard error of the weighted mean of `values`, `(draw, k)` -> `(k,)`, from autocorrelations."""
    if chains.block_size is not None:
        return _error_of_blocks(chains, values, chains.block_size)
    # The influence of a draw on a ratio of sums; for equal weights the values themselves.
    influence = chains.weight.size * chains.weight[:, None] * (values - chains.weight @ values)
    series = influence.reshape(chains.num_chains, -1, values.shape[-1])
    width = max(1, CHUNK_ELEMENTS // chains.weight.size)
    if values.shape[-1] <= width:
        return monte_carlo_error(series)
    padded = jnp.pad(series, ((0, 0), (0, 0), (0, -values.shape[-1] % width)))
    parts = jnp.moveaxis(padded.reshape(*series.shape[:2], -1, width), 2, 0)
    return lax.map(monte_carlo_error, parts).reshape(-1)[: values.shape[-1]]


def _error_of_blocks(chains: Chains, values: Array, size: int) -> Array:
    # The delta method's, of a block that is left out, as in `moments.of_blocks`.
    weight = jnp.pad(chains.weight, (0, -chains.weight.size % size))
    influence = chains.weight[:, None] * (values - chains.weight @ values)
    influence = jnp.pad(influence, ((0, -len(influence) % size), (0, 0)))
    parts = influence.reshape(-1, size, values.shape[-1])
    of_blocks = sum(parts[:, i] for i in range(size)) if size < SHORT else jnp.sum(parts, 1)
    rest = 1.0 - jnp.sum(weight.reshape(-1, size), 1)
    least = jnp.finfo(rest.dtype).eps
    # As products: XLA would work out the draws again within a sum over them.
    return jnp.sqrt(jnp.maximum(rest, least) ** -2 @ of_blocks**2)


def choose(chains: Chains, which: str, *, variances: bool) -> tuple[Control, list[Control]]:
    """The controls with the smallest leave-one-out errors, or the one that is asked for.

    Args:
        chains: the draws.
        which: one of `CONTROLS`, or `"auto"`.
        variances: choose one for the variances too.

    Returns:
        The control of the mean, and those of the variances: the chosen one and, where there was a choice, none.
    """
    dim, weight, z = chains.z.shape[-1], chains.weight, chains.z
    zero = jnp.zeros(dim, z.dtype)
    candidates = [_Candidate(zero, zero, z, z / (1.0 - weight)[:, None])]
    mean, slope, enough = zero, None, jnp.asarray([True])
    if chains.score is not None and which != "none":
        mean = weight @ chains.score
        time = _correlation_time(chains)
        candidates.append(_diagonal(chains, mean, time))
        if dim < weight.size or which in ("full", "quadratic"):
            several, slope = _regressions(chains, time, quadratic=which == "quadratic")
            candidates += several
        # None, a diagonal, a full matrix and quadratic controls have so many coefficients for each coordinate.
        coefficients = jnp.asarray([0, 1, dim, 2 * dim][: len(candidates)])
        enough = LEAST_DRAWS * coefficients * time <= 1.0 / jnp.sum(weight**2)
    # With quadratic controls the errors of a covariance would be those of the mean too, and larger than stated.
    linear = candidates[:3] if variances else []
    series = [c.left_out for c in candidates] + [c.left_out * z for c in linear]
    compatible = jnp.asarray(True)
    if len(candidates) > 1:
        series.append(chains.score)
    # One call for all, since every one would be compiled.
    errors = series_error(chains, jnp.concatenate(series, -1)).reshape(-1, dim)
    if len(candidates) > 1:
        compatible = _average_to_zero(mean, errors[-1]) & _explained(chains, mean, slope)
    of_mean = _pick(candidates, which, compatible, enough, errors[: len(candidates)])
    if chains.block_size is not None:
        of_mean = of_mean._replace(error=_error_of_pairs(chains, of_mean))
    if not variances:
        return of_mean, []
    which = "full" if which == "quadratic" else which
    errors = errors[len(candidates) : len(candidates) + len(linear)]
    chosen = _pick(linear, which, compatible, enough[: len(linear)], errors)
    none = _pick(linear[:1], which, compatible, enough[:1], errors[:1])
    return of_mean, [chosen, none] if len(linear) > 1 else [none]


def _error_of_pairs(chains: Chains, control: Control) -> Array:
    # Scores of mirrored draws average to nearly zero, so that the error of the coefficients hardly moves the mean.
    # That of the residuals is left, and a regression makes them smaller by the root of one minus the leverage.
    between = jnp.sign(control.residual) * jnp.sqrt(control.residual * control.left_out)
    return series_error(chains, between)


class _Candidate(NamedTuple):
    coefficient: Array
    shift: Array
    residual: Array
    left_out: Array


def _pick(
    candidates: list[_Candidate], which: str, compatible: Array, enough: Array, errors: Array
) -> Control:
    kind = jnp.asarray(0)
    if which == "auto" and len(candidates) > 1:
        total = jnp.sum(errors**2, -1) * jnp.asarray(HANDICAP[: len(candidates)])
        kind = jnp.argmin(jnp.where(jnp.isfinite(total) & enough, total, jnp.inf))
    elif len(candidates) > 1:
        kind = jnp.asarray(CONTROLS.index(which))
    kind = jnp.where(compatible, kind, 0)
    coefficients = [c.coefficient for c in candidates]
    if len(candidates) > 2:
        coefficients = [jnp.diag(a) if a.ndim == 1 else a for a in coefficients]
    fields = (coefficients, *list(zip(*candidates, strict=True))[1:])
    return Control(kind, compatible, *(jnp.stack(field)[kind] for field in fields), errors[kind])


def _correlation_time(chains: Chains) -> Array | float:
    if chains.block_size is not None:
        # To a regression the second draw of a pair is a copy of the first.
        return float(chains.block_size)
    # From the correlation of consecutive draws. A draw that is left out leaves its near copies in a regression, so
    # many that its leverage counts as often.
    z = chains.z.reshape(chains.num_chains, -1, chains.z.shape[-1])
    variance = jnp.mean(z**2)
    lagged = jnp.mean(z[:, 1:] * z[:, :-1]) if z.shape[1] > 1 else jnp.zeros_like(variance)
    correlation = lagged / jnp.where(variance > 0, variance, 1.0)
    # Draws that are hardly correlated are no copies.
    correlation = correlation * jnp.clip(correlation / COPIES, 0.0, 1.0)
    correlation = jnp.clip(correlation, 0.0, MOST_CORRELATION)
    return (1.0 + correlation) / (1.0 - correlation)


def _diagonal(chains: Chains, mean: Array, time: Array | float) -> _Candidate:
    centered = chains.score - mean
    second = chains.weight @ centered**2
    usable = second > 0
    scale = jnp.where(usable, second, 1.0)
    coefficient = jnp.where(usable, (chains.weight @ (centered * chains.z)) / scale, 0.0)
    leverage = chains.weight[:, None] * (1.0 + centered**2 / scale)
    residual = chains.z - centered * coefficient
    left_out = residual / _without(time * leverage)
    return _Candidate(coefficient, coefficient * mean, residual, left_out)


def _regressions(
    chains: Chains, time: Array | float, *, quadratic: bool
) -> tuple[list[_Candidate], Array]:
    # Of the draws on their scores, without and with quadratic controls; and of the scores on the draws.
    z, score, weight = chains.z, chains.score, chains.weight
    dim = z.shape[-1]
    controls = score
    if quadratic or QUADRATIC_DRAWS * dim < weight.size:
        controls = jnp.concatenate([score, 1.0 + z * score], -1)
    mean = weight @ controls
    centered = controls - mean
    root = _inverse_root((weight[:, None] * centered).T @ centered)
    moments = after(root[0, 0], (weight[:, None] * z).T @ z)
    of_draws = _inverse_root(moments)
    cross = (weight[:, None] * z).T @ centered

    def regress(width: int) -> _Candidate:
        # A leading block of a Cholesky factor is the factor of that block.
        inverse = root[:width, :width].T @ root[:width, :width]
        part = centered[:, :width]
        coefficient = cross[:, :width] @ inverse
        leverage = weight * (1.0 + jnp.sum((part @ inverse) * part, -1))
        residual = z - part @ coefficient.T
        left_out = residual / _without(time * leverage)[:, None]
        shift = coefficient @ mean[:width]
        return _Candidate(coefficient[:, :dim], shift, residual, left_out)

    widths = (dim,) if controls.shape[-1] == dim else (dim, 2 * dim)
    return [regress(width) for width in widths], of_draws.T @ (of_draws @ cross[:, :dim])


def _without(leverage: Array) -> Array:
    # A regression that passes through every draw says nothing of its error: that is then a thousand times larger.
    return jnp.maximum(1.0 - leverage, 1e-3)


def _inverse_root(moments: Array) -> Array:
    identity = jnp.eye(moments.shape[-1], dtype=moments.dtype)
    ridge = RIDGE * jnp.trace(moments) / len(moments) + jnp.finfo(moments.dtype).tiny
    return inverse_root(moments + ridge * identity)


def _average_to_zero(mean: Array, error: Array) -> Array:
    statistic = jnp.abs(mean) / jnp.where(error > 0, error, 1.0)
    least = jnp.where(error > 0, statistic, jnp.where(jnp.abs(mean) > 0, jnp.inf, 0.0))
    return jnp.all(least < -ndtri(0.5 * FALSE_ALARM / mean.size))


def _explained(chains: Chains, mean: Array, slope: Array | None) -> Array:
    if chains.log_density is None:
        return jnp.asarray(True)
    z, weight, score = chains.z, chains.weight, chains.score
    centered = score - mean
    if slope is None:
        affine, freedom = z * (weight @ (centered * z)), 2.0
    else:
        affine, freedom = z @ slope, 1.0 + z.shape[-1]
    change = _differences(chains, chains.log_density[:, None])[..., 0]
    path = _differences(chains, z)
    missed = change - 0.5 * jnp.sum(_sums(chains, score) * path, -1)
    rest = 0.5 * jnp.sum(_sums(chains, centered - affine) * path, -1)
    # The regression took part of the rest away.
    kept = jnp.maximum(1.0 - freedom / weight.size, 1.0 / weight.size)
    unexplained, explained = jnp.mean(missed**2), jnp.mean(rest**2) / kept
    rounding = 8.0 * jnp.finfo(z.dtype).eps * jnp.max(jnp.abs(chains.log_density), initial=0.0)
    noise = (LEAST_UNEXPLAINED + rounding) ** 2
    return ~(unexplained > MOST_UNEXPLAINED * explained + noise)


def _differences(chains: Chains, values: Array) -> Array:
    return jnp.diff(values.reshape(chains.num_chains, -1, values.shape[-1]), axis=1)


def _sums(chains: Chains, values: Array) -> Array:
    by_chain = values.reshape(chains.num_chains, -1, values.shape[-1])
    return by_chain[:, 1:] + by_chain[:, :-1]
