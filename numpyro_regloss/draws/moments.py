# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Mean and covariance of weighted draws, each with its standard error.

Draws of Markov chains are held in memory: errors follow from autocorrelations, and scores, where there are
any, become control variates. Clouds of independent blocks (antithetic pairs) are visited chunk by chunk: errors
are the delta method's, of a block that is left out.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from numpyro_regloss._core.linalg import after
from numpyro_regloss._core.stats import normalize_log_weight
from numpyro_regloss._core.types import Array
from numpyro_regloss.draws.base import Chunk, Draws, Shared
from numpyro_regloss.draws.batches import NUM_BATCHES, batch_size_of, in_batches
from numpyro_regloss.draws.control_variates import Chains, Control, choose, series_error
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = [
    "DOMINANT_WEIGHT",
    "Moments",
    "log_density_of",
    "of_draws",
    "standardized",
    "with_rounding",
]

# A mean that hangs on one draw cannot tell its own error.
DOMINANT_WEIGHT = 0.999
LEAST_DRAWS = 4
# Of more numbers than this, errors of chains without scores are those of means of batches.
MANY_NUMBERS = 2**22
FEW_ROWS = 8
# Of larger blocks covariance errors follow from a matrix per block, of smaller ones from products of members.
MEMBERS = 2
# Rounding of a sum in units of the last digit of its largest term: a floor of errors.
ROUNDING = 8.0


class Moments(NamedTuple):
    """Moments and their standard errors, in the units of the draws.

    Attributes:
        mean: `(dim,)`.
        mean_error: `(dim,)`.
        covariance: `(dim, dim)` dense, `(dim,)` the variances, `()` their mean (isotropic), or None.
        covariance_error: of the same shape.
        control: index of the control variate of the mean, see `control_variates.CONTROLS`.
        covariance_control: that of the covariance.
        compatible: whether scores were those of a differentiable density.
        alone: whether one weighted draw carries the mean.
    """

    mean: Array
    mean_error: Array
    covariance: Any
    covariance_error: Any
    control: Array
    covariance_control: Array
    compatible: Array
    alone: Array


def standardized(x: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Mean, standard deviations (one where draws are all equal) and standardized draws, of `(draw, dim)`."""
    # What has no weight may be anything.
    center = x[jnp.argmax(weight)]
    x = jnp.where(weight[:, None] > 0, x, center)
    # About one of the draws, since a distant mean would cost all digits.
    offset = x - center
    shift = weight @ offset
    unit = jnp.max(jnp.abs(offset - shift), 0)
    unit = jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1.0)
    z = (offset - shift) / unit
    sd = jnp.sqrt(weight @ z**2)
    sd = jnp.where(sd > 0, sd, 1.0)
    return center + shift, unit * sd, z / sd


def of_draws(
    draws: Draws,
    unit: Array,
    log_density: Array | None = None,
    *,
    structure: str | None = None,
    control: str,
) -> Moments:
    """Moments of draws of any kind.

    Args:
        draws: from a shift.
        unit: standard deviations to compute clouds in, `(dim,)`.
        log_density: see `of_chains`.
        structure: see `of_chains`.
        control: see `of_chains`.

    Returns:
        The moments.
    """
    if draws.block_size is not None and draws.score is None:
        return of_blocks(draws, unit, structure=structure)
    x, log_weight, spread = draws.x, draws.log_weight, draws.spread
    many = x.size > MANY_NUMBERS and x.shape[1] > NUM_BATCHES
    if many and spread is None and draws.score is None and structure != "dense":
        # Autocorrelations of all coordinates would take longer than the draws did.
        x, log_weight, spread = in_batches(x, log_weight, batch_size_of(x.shape[1]))
    return of_chains(
        x,
        log_weight,
        draws.score,
        log_density,
        structure=structure,
        control=control,
        spread=spread,
        block_size=draws.block_size,
    )


def log_density_of(target: RegularizedLoss, draws: Draws) -> Array | None:
    """Log density of q at draws that have scores, up to a constant, to check the scores by.

    Args:
        target: of the draws; without a reference, the density exp(-loss / T).
        draws: from a shift.

    Returns:
        `(chain, draw)`, or None for draws without scores.
    """
    if draws.score is None:
        return None
    log_density = -draws.loss / draws.temperature
    if target.reference is None:
        return log_density
    # Solves with a dense scale come one after another, the engine's for the scores first.
    x = after(draws.score.reshape(-1)[0], draws.x)
    return log_density + target.reference.log_prob(x)


def of_chains(
    x: Array,
    log_weight: Array,
    score: Array | None,
    log_density: Array | None,
    *,
    structure: str | None,
    control: str,
    spread: Array | None = None,
    block_size: int | None = None,
) -> Moments:
    """Moments of draws in memory: of Markov chains, or of independent blocks that have scores.

    Args:
        x: `(chain, draw, dim)`.
        log_weight: `(chain, draw)`, unnormalized.
        score: gradient of the log density at the draws, like `x`, or None.
        log_density: of the draws up to a constant, `(chain, draw)`, or None; only to check the scores.
        structure: `"dense"`, `"diagonal"`, `"isotropic"`, or None for the mean alone.
        control: `"auto"`, or one of `control_variates.CONTROLS`.
        spread: where `x` are means of draws, the variances within, like `x`; without scores, and not for a
            dense covariance.
        block_size: see `Draws`; None for Markov chains.

    Returns:
        The moments.
    """
    dim = x.shape[-1]
    weight = normalize_log_weight(log_weight).reshape(-1)
    flat, used = x.reshape(-1, dim), weight > 0
    if log_density is not None:
        log_density = log_density.reshape(-1)
        log_density = jnp.where(used, log_density, log_density[jnp.argmax(weight)])
        # Its triangular solve, where the reference is dense, comes before ours.
        flat = after(log_density[0], flat)
    if score is None and structure is None:
        return _mean_alone(flat, weight, x.shape[0], block_size)
    mean, unit, z = standardized(flat, weight)
    if score is not None:
        # Copies of the heaviest draw, as its x and its density are: no jump is seen on the way to them.
        score = score.reshape(-1, dim)
        score = jnp.where(used[:, None], score, score[jnp.argmax(weight)]) * unit
    chains = Chains(x.shape[0], weight, z, score, log_density, block_size)
    of_mean, of_variances = choose(chains, control, variances=structure is not None)
    mean = mean - unit * of_mean.shift
    alone = jnp.max(weight) > DOMINANT_WEIGHT
    error = with_rounding(unit * of_mean.error, mean, unit)
    covariance = covariance_error = None
    covariance_control = jnp.asarray(0)
    if of_variances:
        if spread is not None:
            spread = jnp.where(used[:, None], spread.reshape(-1, dim), 0.0) / unit**2
        covariance, covariance_error = _covariance(chains, of_variances[0], unit, structure, spread)
        covariance_control = of_variances[0].kind
        if len(of_variances) > 1:
            # A corrected covariance need not be positive; that of the draws always is.
            plain, plain_error = _covariance(chains, of_variances[1], unit, structure)
            positive = _is_positive(covariance, unit, structure)
            covariance = jnp.where(positive, covariance, plain)
            covariance_error = jnp.where(positive, covariance_error, plain_error)
            covariance_control = jnp.where(positive, covariance_control, 0)
        # Two or three draws say nothing of the error of their variance.
        unknown = alone | (weight.size < LEAST_DRAWS)
        covariance_error = jnp.where(unknown, jnp.inf, covariance_error)
    return Moments(
        mean,
        jnp.where(alone, jnp.inf, error),
        covariance,
        covariance_error,
        of_mean.kind,
        covariance_control,
        of_mean.compatible,
        alone,
    )


def _mean_alone(x: Array, weight: Array, num_chains: int, block_size: int | None) -> Moments:
    # As `of_chains`, in the units of the draws: of a network there are few of many parameters, and every passage
    # over them takes as long as a good part of a gradient.
    center = x[jnp.argmax(weight)]
    rows, shares = _few_rows(x), _few_rows(weight[:, None])
    offset = [jnp.where(w > 0, row - center, 0.0) for row, w in zip(rows, shares, strict=True)]
    terms = [w * row for row, w in zip(offset, shares, strict=True)]
    shift = _over_rows(jnp.add, terms)
    left_out = [(row - shift) / (1.0 - w) for row, w in zip(offset, shares, strict=True)]
    if block_size is None and 1 < len(x) < LEAST_DRAWS * num_chains:
        error = _error_of_few(left_out, shares, num_chains, len(x))
    else:
        values = jnp.concatenate(left_out)
        error = series_error(Chains(num_chains, weight, values, None, None, block_size), values)
    mean, alone = center + shift, jnp.max(weight) > DOMINANT_WEIGHT
    error = with_rounding(error, mean, _over_rows(jnp.maximum, [jnp.abs(row) for row in offset]))
    error = jnp.where(alone, jnp.inf, error)
    none = jnp.asarray(0)
    return Moments(mean, error, None, None, none, none, jnp.asarray(True), alone)


def _error_of_few(
    values: list[Array], weight: list[Array], num_chains: int, num_draws: int
) -> Array:
    # What `series_error` is where chains are too short to have autocorrelations.
    influence = [num_draws * w * row for row, w in zip(values, weight, strict=True)]
    mean = _over_rows(jnp.add, influence) / num_draws
    influence = [row - mean for row in influence]
    unit = _over_rows(jnp.maximum, [jnp.abs(row) for row in influence])
    unit = jnp.where(unit > 0, unit, 1.0)
    square = _over_rows(jnp.add, [(row / unit) ** 2 for row in influence]) / (num_draws - 1)
    error = unit * jnp.sqrt(square / num_chains)
    return jnp.where(jnp.isfinite(error), error, jnp.inf)


def _few_rows(rows: Array) -> list[Array]:
    # Few rows one by one, many as they are: XLA sums over a leading axis of few without vector instructions, and
    # where it fuses slices of an array with what follows, it computes the rows anew for each of them.
    return jnp.split(rows, len(rows)) if len(rows) <= FEW_ROWS else [rows]


def _over_rows(combine: Callable[[Array, Array], Array], rows: list[Array]) -> Array:
    if len(rows) > 1:
        return functools.reduce(combine, rows)[0]
    return jnp.max(rows[0], 0) if combine is jnp.maximum else jnp.sum(rows[0], 0)


def of_blocks(draws: Draws, unit: Array, *, structure: str | None) -> Moments:
    """Moments of a cloud, by one pass over its chunks for the mean and one for the covariance.

    Args:
        draws: with a `block_size`.
        unit: standard deviations to compute in, `(dim,)`.
        structure: `"dense"`, `"diagonal"`, `"isotropic"`, or None for the mean alone.

    Returns:
        The moments.
    """
    weights = _Weights(draws)
    center, shift, variance = _mean_of_blocks(draws, weights, jnp.zeros_like(unit))
    mean = center + shift
    error = with_rounding(jnp.sqrt(jnp.maximum(variance, 0.0)), shift, 0.0)
    alone = weights.largest > DOMINANT_WEIGHT
    covariance = covariance_error = None
    if structure is not None:
        covariance, covariance_error = _covariance_of_blocks(draws, weights, mean, unit, structure)
        covariance_error = jnp.where(alone, jnp.inf, covariance_error)
    none = jnp.asarray(0)
    error = jnp.where(alone, jnp.inf, error)
    return Moments(mean, error, covariance, covariance_error, none, none, jnp.asarray(True), alone)


def with_rounding(error: Array, mean: Array, unit: Array | float) -> Array:
    """Standard errors that are not below the rounding of sums of so large numbers, all `(dim,)`."""
    eps = jnp.finfo(error.dtype).eps
    return jnp.sqrt(error**2 + (ROUNDING * eps * (jnp.abs(mean) + unit)) ** 2)


def _covariance(
    chains: Chains,
    control: Control,
    unit: Array,
    structure: str | None,
    spread: Array | None = None,
) -> tuple[Array, Array]:
    weight, z, residual = chains.weight, chains.z, control.residual
    # 1 / (1 - Σ w²) is n / (n - 1) for equal weights: the covariance is about its own mean.
    about_mean = 1.0 / (1.0 - jnp.minimum(jnp.sum(weight**2), DOMINANT_WEIGHT))
    if structure != "dense":
        a = control.coefficient
        a = jnp.diagonal(a) if a.ndim == 2 else a
        variance = (weight @ (residual * z)) * about_mean - a
        values, error = control.left_out * z, control.error
        if spread is not None:
            variance = variance + weight @ spread
            values = values + spread
            error = series_error(chains, values) if structure == "diagonal" else error
        if structure == "diagonal":
            return unit**2 * variance, unit**2 * error
        values = jnp.mean(unit**2 * values, -1, keepdims=True)
        return jnp.mean(unit**2 * variance), series_error(chains, values)[0]
    a = control.coefficient
    a = _symmetric(a) if a.ndim == 2 else jnp.diag(a)
    covariance = _symmetric((weight[:, None] * residual).T @ z) * about_mean - a
    scale = unit[:, None] * unit
    return scale * covariance, scale * _dense_error(chains, control)


def _is_positive(covariance: Array, unit: Array, structure: str | None) -> Array:
    if structure != "dense":
        return jnp.all(covariance > 0)
    standard = covariance / unit[:, None] / unit
    eps = 100.0 * jnp.finfo(unit.dtype).eps
    shifted = standard - eps * jnp.eye(unit.size, dtype=unit.dtype)
    return jnp.isfinite(jnp.linalg.cholesky(shifted)).all()


def _dense_error(chains: Chains, control: Control) -> Array:
    # Σ w² (U - H)² of the products U = sym(e zᵀ), entry by entry: that of independent draws. Entries take the
    # autocorrelation times of the variances on their row and column, in the geometric mean.
    z, e, weight = chains.z, control.left_out, chains.weight
    square = (weight**2)[:, None]
    mean = _symmetric((weight[:, None] * e).T @ z)
    first = _symmetric((square * e).T @ z)
    second = 0.5 * (_symmetric((square * e**2).T @ z**2) + (square * e * z).T @ (e * z))
    variance = jnp.maximum(second - 2.0 * mean * first + mean**2 * jnp.sum(square), 0.0)
    diagonal = jnp.diagonal(variance)
    time = control.error**2 / jnp.where(diagonal > 0, diagonal, 1.0)
    error = jnp.sqrt(variance * jnp.sqrt(time[:, None] * time))
    return jnp.where(jnp.eye(len(time), dtype=bool), control.error, error)


def _symmetric(matrix: Array) -> Array:
    return 0.5 * (matrix + matrix.mT)


class _Weights:
    # Log weights are scalars, so they are normalized once, before the draws are visited chunk by chunk.
    def __init__(self, draws: Draws) -> None:
        self.block_size = draws.block_size or 1
        peak = jnp.max(draws.log_weight, initial=-jnp.inf)
        self.peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
        weight = jnp.exp(draws.log_weight - self.peak)
        self.total = jnp.sum(weight)
        blocks = weight.reshape(-1)
        blocks = jnp.pad(blocks, (0, -blocks.size % self.block_size)).reshape(-1, self.block_size)
        self.largest = jnp.max(jnp.sum(blocks, 1), initial=0.0) / self.total
        self.square = jnp.sum((weight / self.total) ** 2)

    def of(self, chunk: Chunk) -> tuple[Array, Array, Array]:
        # Of the pairs, of the blocks, and the squared factor of a block that is left out.
        weight = jnp.exp(chunk.pair_log_weight - self.peak) / self.total
        block = jnp.sum(weight.reshape(-1, self.block_size), 1)
        return weight, block, (1.0 - jnp.minimum(block, DOMINANT_WEIGHT)) ** -2


class _Sums(NamedTuple):
    # Of values v over draws or blocks b of them, weights w adding to one: Σ w v, Σ c_b V_b², Σ c_b W_b V_b and
    # Σ c_b W_b² with V_b = Σ_{i in b} w_i v_i and c_b the leave-one-out factor.
    first: Array
    square: Array
    cross: Array
    weight: Array

    @classmethod
    def zero(cls, like: Array) -> "_Sums":
        return cls(like, like, like, jnp.zeros((), like.dtype))

    @property
    def variance(self) -> Array:
        return self.square - 2.0 * self.first * self.cross + self.first**2 * self.weight


def _mean_of_blocks(draws: Draws, weights: _Weights, zero: Array) -> tuple[Array, Array, Array]:
    def add(carry: tuple[Shared, _Sums], chunk: Chunk) -> tuple[Shared, _Sums]:
        sums = carry[1]
        weight, block, factor = weights.of(chunk)
        # Of a pair only the difference of the weights counts, and draws are never formed.
        signed = weight @ chunk.sign
        offset, coefficient = chunk.offset, signed
        rows = weights.block_size // chunk.sign.size
        if rows > 1:
            offset = jnp.sum((signed[:, None] * offset).reshape(-1, rows, offset.shape[-1]), 1)
            coefficient = jnp.ones_like(offset[:, 0])
        first, cross = jnp.stack([coefficient, factor * block * coefficient]) @ offset
        return Shared(chunk.center, jnp.asarray(True)), _Sums(
            sums.first + first,
            sums.square + (factor * coefficient**2) @ offset**2,
            sums.cross + cross,
            sums.weight + jnp.sum(factor * block**2),
        )

    start = Shared(zero, jnp.asarray(False)), _Sums.zero(zero)
    center, sums = draws.fold(add, start)
    return center.value, sums.first, sums.variance


def _covariance_of_blocks(
    draws: Draws, weights: _Weights, mean: Array, unit: Array, structure: str
) -> tuple[Array, Array]:
    dim, size = mean.size, weights.block_size
    shape = {"dense": (dim, dim), "diagonal": (dim,), "isotropic": (1,)}[structure]

    def add(sums: _Sums, chunk: Chunk) -> _Sums:
        weight, block, factor = weights.of(chunk)
        weight = weight.reshape(-1)
        z = (chunk.x - mean) / unit
        if structure == "dense":
            first = (weight[:, None] * z).T @ z
            cross = (jnp.repeat(factor * block, size)[:, None] * weight[:, None] * z).T @ z
            if size > MEMBERS:
                members = z.reshape(-1, size, dim)
                share = weight.reshape(-1, size, 1)
                total = jnp.einsum("bsi,bsj->bij", share * members, members)
                square = jnp.einsum("b,bij->ij", factor, total**2)
            else:
                # (Σ w z_i z_j)² over a block is a sum over pairs of its members of products of i and of j.
                members = z.reshape(-1, size, dim)
                products = (members[:, :, None] * members[:, None]).reshape(-1, dim)
                share = weight.reshape(-1, size)
                share = factor[:, None, None] * share[:, :, None] * share[:, None]
                square = (share.reshape(-1, 1) * products).T @ products
        else:
            values = z**2
            if structure == "isotropic":
                values = jnp.mean((unit * z) ** 2, -1, keepdims=True)
            total = jnp.sum((weight[:, None] * values).reshape(-1, size, values.shape[-1]), 1)
            first = jnp.sum(total, 0)
            square, cross = factor @ total**2, (factor * block) @ total
        return _Sums(
            sums.first + first,
            sums.square + square,
            sums.cross + cross,
            sums.weight + jnp.sum(factor * block**2),
        )

    sums = draws.fold(add, _Sums.zero(jnp.zeros(shape, mean.dtype)))
    about_mean = 1.0 / (1.0 - jnp.minimum(weights.square, DOMINANT_WEIGHT))
    covariance, error = sums.first * about_mean, jnp.sqrt(jnp.maximum(sums.variance, 0.0))
    if structure == "isotropic":
        return covariance[0], error[0]
    scale = unit[:, None] * unit if structure == "dense" else unit**2
    return scale * covariance, scale * error
