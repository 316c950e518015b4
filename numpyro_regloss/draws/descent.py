# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""How far the local entropy falls from one centre to another, seen by draws that are at hand.

    F_tau(x) - F_tau(x') = T log E_q[ N(X; x', tau I) / N(X; x, tau I) ],   X ~ q at x

An expectation under the draws of the shift, at no further loss evaluation. Where the log ratio varies too much for
its exponential to be averaged, the first two cumulants take its place. On the very draws that chose x' it is
positive by construction, also at a fixed point; so x' comes from one half of the draws and is judged by the other,
both ways, and the two are averaged.

References: Caffo, Jank & Jones (2005), "Ascent-Based Monte Carlo Expectation-Maximization"; Mira, Solgi &
Imparato (2013), "Zero Variance Markov Chain Monte Carlo for Bayesian Estimators".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg

from numpyro_regloss._core.pytree import replace_fields
from numpyro_regloss._core.stats import normalize_log_weight
from numpyro_regloss._core.types import Array
from numpyro_regloss.draws.base import Chunk, Draws
from numpyro_regloss.draws.control_variates import Chains, series_error
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["Change", "CrossFitted", "cross_fitted", "decrease", "half_masks", "is_far", "masked"]

# A regression on more scores than these has small gains left; each iteration is two passes over the draws.
CG_ITERATIONS = 30
CG_RIDGE = 1e-4
# Of the expectation; a control that would take more away is not to be trusted.
MOST_CORRECTION = 0.5
# Relative to two uncorrelated controls; below it rounding decides.
LEAST_DETERMINANT = 1e-5
# Where a regression passes through a draw it says nothing of its error.
LEAST_LEFT = 1e-3
# In units of the last digit.
ROUNDING = 8.0


class Change(NamedTuple):
    """A decrease of F_tau and its standard error, in the units of the loss; errors are infinite for one draw."""

    value: Array
    error: Array


class CrossFitted(NamedTuple):
    """A decrease of F_tau that was judged by other draws, in the units of the loss.

    Attributes:
        value: the decrease that a centre from half of the draws brings.
        error: its standard error.
        noise: how far F_tau can have risen, on average, by the Monte Carlo error of such a centre alone.
    """

    value: Array
    error: Array
    noise: Array


def half_masks(draws: Draws) -> Array:
    """Two halves, `(2, chain, draw)` booleans: whole chains, whole blocks, or the two ends of one chain."""
    # Of the draws that have weight, since they may be half of the draws already.
    used = draws.log_weight > -jnp.inf
    if draws.block_size is not None:
        flat = used.reshape(-1)
        blocks = jnp.pad(flat, (0, -flat.size % draws.block_size)).reshape(-1, draws.block_size)
        rank = jnp.cumsum(jnp.any(blocks, 1)) - 1
        index = jnp.repeat(rank, draws.block_size)[: flat.size].reshape(used.shape)
    else:
        by_chain = jnp.cumsum(jnp.any(used, 1)) - 1
        order = jnp.cumsum(used, 1) - 1
        by_time = 2 * order // jnp.maximum(jnp.sum(used, 1, keepdims=True), 1)
        index = jnp.where(by_chain[-1] > 0, by_chain[:, None], by_time)
    first = jnp.broadcast_to(index % 2 == 0, used.shape)
    return jnp.stack([first, ~first])


def masked(draws: Draws, mask: Array) -> Draws:
    """The draws of the mask `(chain, draw)`: the others get weight zero."""
    return replace_fields(draws, log_weight=jnp.where(mask, draws.log_weight, -jnp.inf))


def cross_fitted(
    target: RegularizedLoss,
    draws: Draws,
    propose: Callable[[Draws], tuple[Array, Array]],
) -> CrossFitted:
    """The decrease that a centre from half of the draws brings.

    A lower bound, on average, of what the same rule brings on all draws, since half of them are noisier. The two
    estimates share the draws, so that their errors are averaged and not combined.

    Args:
        target: the target of the draws.
        draws: from q, with weights.
        propose: makes the centre `(dim,)` of draws, others having weight zero, and says whether it used their
            scores: a decrease that is known better than the centre would call its noise progress.

    Returns:
        The decrease, its standard error and the noise of the centre.
    """
    masks = half_masks(draws)
    means, scores = jax.vmap(lambda mask: propose(masked(draws, mask)))(masks)

    def judge(mean: Array, mask: Array) -> Change:
        judges, others = masked(draws, ~mask), masked(draws, mask)
        return decrease(target, judges, mean, regress_on=others, scores=jnp.all(scores))

    both = jax.vmap(judge)(means, masks)
    # The Hessian of F_tau is at most T / tau, and the two centres differ by twice the variance of each.
    apart = target.reference._replace(mean=means[1])
    noise = 0.25 * draws.temperature * jnp.sum(apart.whiten(means[0]) ** 2)
    return CrossFitted(jnp.mean(both.value), jnp.mean(both.error), noise)


def decrease(
    target: RegularizedLoss,
    draws: Draws,
    mean: Array,
    *,
    regress_on: Draws | None = None,
    scores: Array | bool = True,
) -> Change:
    """F_tau at the reference's mean minus F_tau at `mean`.

    Args:
        target: the target of the draws.
        draws: from q, with weights; not those that chose `mean`.
        mean: the other centre, `(dim,)`.
        regress_on: other draws, for the coefficients of control variates; without them there are none.
        scores: whether scores, if there are any, may be used.

    Returns:
        The decrease and its standard error.
    """
    # The slope of log N(x; mean) - log N(x; center), which is linear in x.
    reference = target.reference
    slope = -jax.grad(reference.log_prob)(mean)
    middle = 0.5 * (reference.mean + mean)
    if draws.block_size is not None and draws.score is None:
        log_ratio, error = _of_blocks(draws, slope, middle)
    else:
        log_ratio, error = _of_chains(draws, slope, middle, regress_on, scores)
    usable = jnp.isfinite(log_ratio) & jnp.isfinite(error)
    # Sums of ratios near one carry rounding, however well controls explain them.
    error = jnp.hypot(error, ROUNDING * jnp.finfo(error.dtype).eps * (1.0 + jnp.abs(log_ratio)))
    scale = draws.temperature
    return Change(scale * log_ratio, jnp.where(usable, scale * error, jnp.inf))


def _of_chains(
    draws: Draws, slope: Array, middle: Array, regress_on: Draws | None, scores: Any
) -> tuple[Array, Array]:
    weight, x = _flat(draws)
    chains = Chains(draws.log_weight.shape[0], weight, x, None, None)
    log_ratio = (x - middle) @ slope
    first = weight @ log_ratio
    u = log_ratio - first
    second = weight @ u**2
    far = is_far(second, 1.0 / (weight @ weight))
    peak = jnp.max(jnp.where(weight > 0, log_ratio, -jnp.inf))
    ratio = jnp.where(weight > 0, jnp.exp(log_ratio - peak), 0.0)
    average = weight @ ratio
    # In units of the average: an error of these is one of its logarithm.
    ratio = jnp.where(weight > 0, ratio / average, 1.0)
    value = jnp.where(far, first + 0.5 * second, peak + jnp.log(average))
    response = jnp.where(far, u + 0.5 * (u**2 - second), ratio - 1.0)
    if draws.score is None or regress_on is None or regress_on.score is None:
        error = series_error(chains, response[:, None])[0]
        return value, _with_third(error, weight @ u**3, far)
    # Stein's identity for the fields b, and ratio b or u b: E b·g = 0, E ratio (slope·b + b·g) = 0.
    direction = _coefficient(regress_on, regress_on.score, slope)
    along = jnp.where(weight > 0, draws.score.reshape(x.shape) @ direction, 0.0)
    rise = direction @ slope
    other = jnp.where(far, u * (along - weight @ along) + rise, ratio * (rise + along))
    controls = jnp.stack([along, other], -1)
    level = weight @ controls
    centered = controls - level
    inverse = _inverse_two((weight[:, None] * centered).T @ centered)
    factor = inverse @ ((weight * response) @ centered)
    # Of every draw, the residual of a regression without it.
    leverage = weight * (1.0 + jnp.sum((centered @ inverse) * centered, -1))
    rest = (response - centered @ factor) / jnp.maximum(1.0 - leverage, LEAST_LEFT)
    errors = series_error(chains, jnp.stack([response, rest], -1))
    correction = factor @ level
    use = scores & (errors[1] < errors[0]) & (far | (jnp.abs(correction) < MOST_CORRECTION))
    # The next cumulant stands for all that are left out; u² b is the field whose identity takes its noise away.
    third = weight @ u**3
    steady = third - weight @ (u**2 * centered[:, 0] + 2.0 * rise * u)
    error = jnp.where(use, errors[1], errors[0])
    error = _with_third(error, jnp.where(use, steady, third), far)
    small = jnp.log1p(jnp.where(use & ~far, -correction, 0.0))
    return value + jnp.where(far & use, -correction, small), error


def is_far(variance: Array, ess: Array) -> Array:
    """Whether so many effective draws cannot tell the mean of exp(u) of a normal u with this variance."""
    # Their average is then what the largest of them allow, and not exp(variance / 2).
    return variance > 0.5 * jnp.log(jnp.maximum(ess, 1.0))


def _with_third(error: Array, third: Array, far: Array) -> Array:
    return jnp.hypot(error, jnp.where(far, jnp.abs(third) / 6.0, 0.0))


def _inverse_two(matrix: Array) -> Array:
    # By hand, without LAPACK; where the two are one but for rounding, of the first alone.
    (a, b), (_, d) = matrix
    determinant = a * d - b * b
    regular = determinant > LEAST_DETERMINANT * a * d
    both = jnp.stack([jnp.stack([d, -b]), jnp.stack([-b, a])])
    first = jnp.zeros_like(matrix).at[0, 0].set(1.0 / jnp.where(a > 0, a, jnp.inf))
    return jnp.where(regular, both / jnp.where(regular, determinant, 1.0), first)


def _flat(draws: Draws) -> tuple[Array, Array]:
    weight = normalize_log_weight(draws.log_weight).reshape(-1)
    x = draws.x.reshape(weight.size, -1)
    # What has no weight may be anything.
    return weight, jnp.where(weight[:, None] > 0, x, x[jnp.argmax(weight)])


def _coefficient(draws: Draws, score: Array, slope: Array) -> Array:
    # Of the regression of slope · x on the scores, by conjugate gradients: one right-hand side needs no
    # factorization of a dim × dim matrix.
    weight, x = _flat(draws)
    centered = x - weight @ x
    unit = jnp.sqrt(weight @ centered**2)
    score = jnp.where(weight[:, None] > 0, score.reshape(x.shape), 0.0) * unit
    score = score - weight @ score
    ridge = CG_RIDGE * jnp.mean(weight @ score**2) + jnp.finfo(unit.dtype).tiny

    def moments(v: Array) -> Array:
        return (weight * (score @ v)) @ score + ridge * v

    solution, _ = cg(moments, (weight * (centered @ slope)) @ score, maxiter=CG_ITERATIONS)
    return unit * solution


class _Sums(NamedTuple):
    # Of the weights w and the log ratios u of the draws: Σ w (e^u, 1, u, u², u³), the first over exp(peak); the
    # products of the first four of each block, summed over blocks; and Σ w² of single draws.
    peak: Array
    moments: Array
    products: Array
    square: Array

    def merged(self, other: "_Sums") -> "_Sums":
        peak = jnp.maximum(self.peak, other.peak)
        safe = jnp.where(jnp.isfinite(peak), peak, 0.0)
        both = []
        for sums in (self, other):
            old = jnp.ones_like(sums.moments).at[0].set(jnp.exp(sums.peak - safe))
            both.append((old * sums.moments, old[:4, None] * old[:4] * sums.products))
        (moments, products), (more, products_too) = both
        return _Sums(peak, moments + more, products + products_too, self.square + other.square)


def _of_blocks(draws: Draws, slope: Array, middle: Array) -> tuple[Array, Array]:
    # Blocks are independent, and without scores there is nothing to regress on: one pass over the cloud.
    peak_weight = jnp.max(draws.log_weight)
    peak_weight = jnp.where(jnp.isfinite(peak_weight), peak_weight, 0.0)
    size = draws.block_size or 1

    def add(sums: _Sums, chunk: Chunk) -> _Sums:
        weight = jnp.exp(chunk.pair_log_weight - peak_weight)
        log_ratio = (chunk.center - middle) @ slope + (chunk.offset @ slope)[:, None] * chunk.sign
        log_ratio = jnp.where(weight > 0, log_ratio, 0.0)
        peak = jnp.maximum(sums.peak, jnp.max(jnp.where(weight > 0, log_ratio, -jnp.inf)))
        safe = jnp.where(jnp.isfinite(peak), peak, 0.0)
        ratio = jnp.where(weight > 0, jnp.exp(log_ratio - safe), 0.0)
        powers = [log_ratio**k for k in range(4)]
        terms = weight * jnp.stack([ratio, *powers])
        blocks = jnp.sum(terms[:4].reshape(4, -1, size), 2)
        old = jnp.ones_like(sums.moments).at[0].set(jnp.exp(sums.peak - safe))
        return _Sums(
            peak,
            old * sums.moments + jnp.sum(terms, (1, 2)),
            old[:4, None] * old[:4] * sums.products + blocks @ blocks.T,
            sums.square + jnp.sum(weight**2),
        )

    moments = jnp.zeros((5,), slope.dtype)
    start = _Sums(moments[0] - jnp.inf, moments, jnp.zeros((4, 4), slope.dtype), moments[0])
    sums = draws.fold(add, start)
    tilted, total, *raw = sums.moments
    first, square, cube = (moment / total for moment in raw)
    second = square - first**2
    third = cube - 3.0 * first * square + 2.0 * first**3
    far = is_far(second, total**2 / sums.square)
    # What a block adds to the value: to the logarithm of the mean ratio, or to the first two cumulants.
    none, one = jnp.zeros_like(first), jnp.ones_like(first)
    near_by = jnp.stack([total / tilted, -one, none, none])
    far_off = jnp.stack([none, 0.5 * (first**2 - second) - first, one - first, 0.5 * one])
    response = jnp.where(far, far_off, near_by) / total
    error = jnp.sqrt(jnp.maximum(response @ sums.products @ response, 0.0))
    # A mean that hangs on one block cannot tell its own error.
    alone = sums.products[1, 1] > 0.998 * total**2
    error = jnp.where(alone, jnp.inf, _with_third(error, third, far))
    return jnp.where(far, first + 0.5 * second, sums.peak + jnp.log(tilted / total)), error
