# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Batch and match: draws of a Gaussian, whose scores say what Gaussian to draw from next.

A batch of draws from a Gaussian N_t and the scores of q at these draws give the next one, that of least Fisher
divergence over the batch; where the batch has no information, N_t is kept. For a Gaussian q the result is q
itself. Two things differ from the publication:

- Draws are weighted by (q / N_t)^p, with the largest power p ≤ 1 that leaves enough effective draws. Without
  weights the draws are distributed as narrowly as the solution, and for a skewed q both are far too narrow.
- The draws of the last steps, which come from nearly the same Gaussian, are used together for the final fit. The
  alternative, a falling learning rate, would have to average over them as well.

Up to 256 dimensions N_t is dense, and beyond that a diagonal plus factors. If half of the scores are not finite
after a step, or the bound KL(N || q) is much larger, the step is tried again closer to N_t.

References: Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei & Saul (2024), "Batch and Match: Black-Box
Variational Inference with a Score-Based Divergence".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_regloss._core.pytree import all_finite
from numpyro_regloss._core.stats import tempered
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import StoredDraws
from numpyro_regloss.draws.base_draws import base_draws
from numpyro_regloss.fit.score_matching.low_rank import factors_of_least_divergence
from numpyro_regloss.fit.score_matching.regression import Anchored, Standard, solve
from numpyro_regloss.gaussians.gaussian import AnyGaussian, Gaussian, kl_divergence
from numpyro_regloss.gaussians.low_rank import LowRankGaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["DENSE_DIM", "Matched", "batch_and_match"]

# Up to this dimension draws come from a dense Gaussian.
DENSE_DIM = 256
# A bound that is larger by so many nats per dimension, and so many standard errors, is that of a step too far.
MUCH_WORSE, SIGMAS = 2.0, 5.0
# How much closer to the Gaussian before a step is tried again.
CLOSER = 30.0
# Effective draws, as a share of a batch, that weights must leave.
EFFECTIVE = 0.4
# A search has settled after so many batches in which the mean moved by less than one standard deviation, and the
# Gaussian by less than so many nats per dimension.
LAST, MOVED = 20, 0.25
# An exact solution is its own: nats, and nats per dimension, that rounding may move it. A factor that the draws do
# not spread along yet hardly counts in their divergence, and grows with the next batch.
STILL = (0.5, 1e-4)
# Batches of as many numbers as those of factors are few.
LAST_OF_FACTORS = 4
# Variance along a new factor in units of that before: a few directions of many hardly count in a divergence.
GROWN = 2.0
# A Fisher divergence that is rounding: per dimension of a regression in units of the squared machine epsilon; over
# all dimensions of a search for factors, which the slopes of a sum of squares end, in units of the epsilon.
ROUNDING, ROUNDING_OF_FACTORS = 1e4, 1e3
# Evaluations of the search for factors, which goes on with the next batch.
FEW_TRIALS = 60


class Matched(NamedTuple):
    """Where batch and match ended.

    Attributes:
        draws: of the last steps, without weight where there were fewer steps, one chain.
        gaussian: the one that would be drawn from next.
        settled: whether it had stopped moving.
        num_steps: batches.
        num_rejected: those after which a step was tried again.
    """

    draws: StoredDraws
    gaussian: AnyGaussian
    settled: Array
    num_steps: Array
    num_rejected: Array


class _Batch(NamedTuple):
    x: Array
    score: Array
    weight: Array


class _Search(NamedTuple):
    now: AnyGaussian  # to be drawn from
    before: AnyGaussian  # the one that the last good batch came from
    batch: _Batch  # the last good one
    bound: Array  # of `before`
    extra: Array  # factor of the strength with which the Gaussian before is kept
    kept: _Batch  # the last good ones, (slot, draw, ...)
    num_good: Array
    since: Array  # good batches since the Gaussian moved by much
    num_steps: Array
    done: Array


def batch_and_match(
    rng_key: Key, target: RegularizedLoss, start: AnyGaussian, num_steps: int, num_draws: int
) -> Matched:
    """Follows the scores of a target.

    Args:
        rng_key: a random key.
        target: the target.
        start: dense or of low rank; later Gaussians are like it.
        num_steps: batches at most.
        num_draws: draws of a batch, from `round_up`.

    Returns:
        Draws with scores from Gaussians near the solution, and what they cost.
    """
    key_draws, key_batch = random.split(rng_key)
    of_factors = isinstance(start, LowRankGaussian)
    dim, slots = start.dim, min(num_steps, LAST_OF_FACTORS if of_factors else LAST)
    dtype = start.mean.dtype
    eps = jnp.finfo(dtype).eps
    rounding = ROUNDING_OF_FACTORS * eps / dim if of_factors else ROUNDING * eps**2
    score_of = _scores(target, random.split(key_batch, num_draws))

    def unfinished(search: _Search) -> Array:
        return ~search.done & (search.num_steps < num_steps)

    def advance(search: _Search) -> _Search:
        key = random.fold_in(key_draws, search.num_steps)
        noise = base_draws(key, num_draws, dim).astype(dtype)
        x = search.now.unwhiten(noise)
        energy, score = score_of(x)
        finite = jnp.isfinite(energy) & jnp.isfinite(score).all(-1)
        count = jnp.maximum(jnp.sum(finite), 1)
        weight = finite / count.astype(dtype)
        log_ratio = jnp.where(finite, 0.5 * jnp.sum(noise**2, -1) - energy, -jnp.inf)
        energy, score = jnp.where(finite, energy, 0.0), jnp.where(finite[:, None], score, 0.0)
        mean = weight @ energy
        error = jnp.sqrt(weight @ (energy - mean) ** 2 / count)
        bound = mean - search.now.log_det
        slack = MUCH_WORSE * dim + SIGMAS * error
        good = (2 * jnp.sum(finite) > num_draws) & ~(bound > search.bound + slack)
        fresh = _Batch(x, score, tempered(log_ratio, EFFECTIVE * num_draws))
        batch = _where(good, fresh, search.batch)
        before = _where(good, search.now, search.before)
        slot = jnp.mod(search.num_good, slots)
        kept = jax.tree.map(
            lambda rows, row, old: rows.at[slot].set(jnp.where(good, row, old[slot])),
            search.kept,
            fresh,
            search.kept,
        )
        extra = jnp.where(good, jnp.maximum(search.extra / CLOSER, 1.0), search.extra * CLOSER)
        num_good = search.num_good + good
        strength = extra * num_good.astype(dtype) / (num_draws * dim)
        after, divergence = _matched(before, batch, strength)
        # Before the first good batch there is nothing but a narrower start.
        first = num_good == 0
        after = _where(first, _narrowed(search.now), after)
        after = _where(all_finite(after), after, before)
        far = jnp.sum(after.whiten(before.mean) ** 2) > 1.0
        distance = kl_divergence(before, after)
        far |= distance > MOVED * dim
        if isinstance(after, LowRankGaussian):
            grown = before.whiten_columns(after.factor)
            far |= jnp.max(jnp.linalg.eigvalsh(grown.T @ grown)) > GROWN
        still = distance < STILL[0] + STILL[1] * dim
        # The batch at hand came from where the move ends only if there was none.
        since = jnp.where(good, search.since + 1, search.since)
        exact = good & ~far & still & (divergence < rounding)
        since = jnp.where(exact, 1, jnp.where(far, 0, since))
        return _Search(
            after,
            before,
            batch,
            jnp.where(good, bound, search.bound),
            extra,
            kept,
            num_good,
            since,
            search.num_steps + 1,
            exact | (since >= slots),
        )

    blank = _Batch(
        jnp.tile(start.mean, (num_draws, 1)),
        jnp.zeros((num_draws, dim), dtype),
        jnp.zeros(num_draws, dtype),
    )
    zero = jnp.zeros((), dtype)
    first = _Search(
        start,
        start,
        blank,
        zero + jnp.inf,
        zero + 1.0,
        jax.tree.map(lambda a: jnp.tile(a, (slots, *[1] * a.ndim)), blank),
        *3 * [jnp.asarray(0)],
        jnp.asarray(False),
    )
    last = lax.while_loop(unfinished, advance, first)
    # Of the good batches those since the last large move, the last one at least.
    age = jnp.mod(last.num_good - 1 - jnp.arange(slots), slots)
    num_kept = jnp.maximum(last.since, 1)
    share = jnp.where((age < num_kept)[:, None], last.kept.weight, 0.0)
    # Antithetic pairs side by side: a batch has its first half, then their mirror images.
    x, score, share = (_side_by_side(a) for a in (last.kept.x, last.kept.score, share))
    draws = StoredDraws(
        x, jnp.log(share), jnp.zeros_like(share), jnp.ones((), dtype), score, block_size=2
    )
    return Matched(draws, last.now, last.done, last.num_steps, last.num_steps - last.num_good)


def _scores(target: RegularizedLoss, keys: Key) -> Callable[[Array], tuple[Array, Array]]:
    # Minus the log density and its negative gradient.
    def single(rng_key: Key, x: Array) -> tuple[Array, Array]:
        batch = target.on_batch(rng_key)
        energy, slope = jax.value_and_grad(batch.energy)(x)
        return energy, -slope

    def scores(x: Array) -> tuple[Array, Array]:
        energy, score = jax.vmap(single)(keys, x)
        reference = target.reference
        if reference is None:
            return energy, score
        e = reference.whiten(x)
        return energy + 0.5 * jnp.sum(e**2, -1), score - reference.unscale_transpose(e)

    return scores


def _matched(before: AnyGaussian, batch: _Batch, strength: Array) -> tuple[AnyGaussian, Array]:
    if isinstance(before, LowRankGaussian):
        # Few numbers for each coordinate, which a batch determines.
        x, score, weight = batch
        mean, mean_score = weight @ x, weight @ score
        data = Standard(weight, x - mean, score - mean_score, mean_score)
        first = solve(data, "diagonal", jnp.ones_like(mean))
        found = factors_of_least_divergence(data, first.scale, before.rank, before, FEW_TRIALS)
        width = found.gaussian
        moved = width.scaled(width.scaled_transpose(mean_score))
        center = mean + moved
        share = strength / (1.0 + strength)
        center = share * before.mean + (1.0 - share) * center
        return width._replace(mean=center), found.divergence
    # In coordinates whitened by the Gaussian before all numbers are near one.
    e, a = before.whiten(batch.x), jax.vmap(before.scaled_transpose)(batch.score)
    mean, mean_score = batch.weight @ e, batch.weight @ a
    data = Standard(batch.weight, e - mean, a - mean_score, mean_score)
    identity = jnp.eye(before.dim, dtype=e.dtype)
    anchored = Anchored(-mean, identity, strength, strength / (1.0 + strength))
    found = solve(data, "dense", jnp.ones_like(mean), anchored)
    scale = jnp.tril(before.scale @ found.scale)
    return Gaussian(before.unwhiten(mean + found.offset), scale), found.divergence


def _narrowed(gaussian: AnyGaussian) -> AnyGaussian:
    if isinstance(gaussian, LowRankGaussian):
        return gaussian._replace(
            diagonal=gaussian.diagonal / CLOSER**2, factor=gaussian.factor / CLOSER
        )
    return gaussian._replace(scale=gaussian.scale / CLOSER)


def _where(chosen: Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(chosen, x, y), a, b)


def _side_by_side(values: Array) -> Array:
    half = values.shape[1] // 2
    pairs = jnp.stack([values[:, :half], values[:, half:]], 2)
    return pairs.reshape(1, -1, *values.shape[2:])
