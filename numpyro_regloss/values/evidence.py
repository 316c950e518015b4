# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""The evidence Z = E exp(-loss / T) under the reference, from a Gaussian that was fitted to q.

Importance sampling takes a defensive mixture: shares of the draws come from the fitted Gaussian N and from the
reference p, all are weighted by p exp(-loss / T) / (a N + (1 - a) p), at most exp(-least loss / T) / (1 - a),
with N itself as a control variate, and the variance is that of the strata, over antithetic pairs. Bridge sampling
adds draws of q.

References: Hesterberg (1995), "Weighted Average Importance Sampling and Defensive Mixture Distributions"; Owen &
Zhou (2000), "Safe and Effective Importance Sampling"; and those of `draws.bridge`.
"""

import jax.numpy as jnp
from jax import random

from numpyro_regloss._core.linalg import after
from numpyro_regloss._core.mesh import mapped
from numpyro_regloss._core.pareto import MAX_KHAT
from numpyro_regloss._core.stats import (
    effective_sample_size,
    log_mean_exp,
    split_rhat,
    standard_error,
    weight_ess,
)
from numpyro_regloss._core.tail import rare_term, tail_index
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import StoredDraws
from numpyro_regloss.draws.bridge import bridge
from numpyro_regloss.draws.control_variates import Chains
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.shift.smc.ladder import bounded_energy
from numpyro_regloss.values.estimate import BridgeEstimate, GaussianEstimate

__all__ = ["by_bridge", "by_gaussian", "pair_error"]

DEFENSIVE_SHARE = 0.1
# Digits that sums of some dozen terms lose.
ROUNDING = 4.0
# Chains that disagree more than this have not found the same modes.
MAX_RHAT = 1.1


def pair_error(independent: Array) -> Array:
    """Standard error of a mean, infinite where it is not finite.

    Args:
        independent: terms of the mean, `(pair,)`.

    Returns:
        A scalar.
    """
    error = standard_error(independent)
    return jnp.where(jnp.isfinite(error), error, jnp.inf)


def by_gaussian(
    rng_key: Key,
    target: RegularizedLoss,
    fitted: AnyGaussian,
    num_samples: int,
    chunk_size: int,
) -> GaussianEstimate:
    """Importance sampling from a Gaussian, mixed with the reference.

    Args:
        rng_key: a random key.
        target: loss, reference and temperature.
        fitted: the Gaussian.
        num_samples: loss evaluations, even, twenty at least.
        chunk_size: evaluations at once.

    Returns:
        The estimate of -T log Z.
    """
    defensive = 2 * max(2, round(0.5 * DEFENSIVE_SHARE * num_samples))
    counts = num_samples - defensive, defensive
    keys = random.split(rng_key)
    strata = [
        _pairs(key, gaussian, count // 2)
        for key, gaussian, count in zip(keys, (fitted, target.reference), counts, strict=True)
    ]
    x = jnp.concatenate(strata)
    energy = mapped(target.energy, x, min(chunk_size, num_samples))
    # Where the loss fails at draws from the reference there is no expectation, and the value is NaN. The fitted
    # Gaussian may reach further, and there a failure is a wall, as on the paths of chains.
    failed, _ = bounded_energy(energy[: counts[0]])
    energy = energy.at[: counts[0]].set(failed)
    log_reference = target.reference.log_prob(x)
    log_share = [jnp.log(count / num_samples) for count in counts]
    log_fitted = fitted.log_prob(after(log_reference[0], x))
    log_mixture = jnp.logaddexp(log_share[0] + log_fitted, log_share[1] + log_reference)
    log_weight = log_reference - log_mixture - energy
    log_mean = log_mean_exp(log_weight)
    weight = jnp.exp(log_weight - log_mean)
    # The density ratio of N averages to one over the mixture. Subtracting it leaves no variance where q is N, and
    # no rare draws between N and the reference that an error estimate would miss.
    control = jnp.exp(log_fitted - log_mixture) - 1.0
    centered = control - jnp.mean(control)
    slope = jnp.mean(weight * centered) / jnp.mean(centered**2)
    corrected = weight - slope * control
    usable = jnp.mean(corrected) > 0
    pair = jnp.mean(jnp.where(usable, corrected, weight).reshape(-1, 2), 1)
    mean = jnp.mean(pair)
    split = counts[0] // 2
    shares = jnp.asarray(counts, pair.dtype) / num_samples
    errors = jnp.stack([pair_error(pair[:split]), pair_error(pair[split:])])
    rounding = _rounding(log_reference[: 2 * split], log_fitted[: 2 * split], energy[: 2 * split])
    khat = tail_index(log_weight, pair)
    # Weights that are equal but for rounding have no tail.
    khat = jnp.where(jnp.max(log_weight) - log_mean <= rounding, -jnp.inf, khat)
    strata = jnp.hypot(jnp.sqrt(jnp.sum((shares * errors) ** 2)), rare_term(pair, khat))
    relative = jnp.hypot(strata / mean, rounding)
    # Without a weight there is no ratio: the loss is infinite wherever it was looked at.
    log_z = jnp.where(jnp.isneginf(log_mean), log_mean, log_mean + jnp.log(mean))
    value = -target.temperature * log_z
    error = jnp.where(khat <= MAX_KHAT, target.temperature * relative, jnp.inf)
    return GaussianEstimate(value, _or_infinite(error, value), weight_ess(log_weight), khat)


def by_bridge(
    rng_key: Key,
    target: RegularizedLoss,
    draws: StoredDraws,
    fitted: AnyGaussian,
    num_samples: int,
    chunk_size: int,
) -> BridgeEstimate:
    """Bridge sampling between draws of q and a Gaussian that was fitted to others.

    Args:
        rng_key: a random key.
        target: loss, reference and temperature.
        draws: Markov chains.
        fitted: the Gaussian.
        num_samples: draws of the Gaussian, even.
        chunk_size: evaluations at once.

    Returns:
        The estimate of -T log Z; its error is infinite where chains disagree, since then they have not found all
        of q, or each of them another part.
    """
    x = draws.x.reshape(-1, target.dim)
    y = _pairs(rng_key, fitted, num_samples // 2)
    energy, _ = bounded_energy(mapped(target.energy, y, min(chunk_size, num_samples)))
    points = jnp.concatenate([x, y])
    log_reference = target.reference.log_prob(points)
    log_fitted = fitted.log_prob(after(log_reference[0], points))
    log_ratio = log_reference - log_fitted
    at_q = log_ratio[: len(x)] - draws.loss.reshape(-1) / target.temperature
    at_p = log_ratio[len(x) :] - energy
    shape = draws.loss.shape
    chains = Chains(shape[0], jnp.full(len(x), 1.0 / len(x)), x, None, None)
    # Antithetic pairs are one block each: consecutive draws, whose correlation the error counts.
    independent = Chains(1, jnp.full(len(y), 1.0 / len(y)), y, None, None)
    size = effective_sample_size(at_q.reshape(shape))
    log_z, error, overlap = bridge(at_q, at_p, chains, independent, size)
    rhat = jnp.maximum(jnp.max(split_rhat(draws.x)), split_rhat(draws.loss))
    rounding = _rounding(log_reference, log_fitted, energy)
    error = jnp.where(rhat < MAX_RHAT, jnp.hypot(error, rounding), jnp.inf)
    value = -target.temperature * log_z
    no_tail = jnp.full_like(value, -jnp.inf)
    return BridgeEstimate(value, _or_infinite(target.temperature * error, value), overlap, no_tail)


def _pairs(rng_key: Key, gaussian: AnyGaussian, count: int) -> Array:
    offset = gaussian.sample(rng_key, (count,)) - gaussian.mean
    return (gaussian.mean + jnp.stack([offset, -offset], 1)).reshape(-1, offset.shape[-1])


def _rounding(*terms: Array) -> Array:
    # Of log densities whose difference hardly varies: a Gaussian that is q leaves no other error.
    # Behind walls there is nothing to round.
    known = [jnp.where(jnp.isfinite(term), jnp.abs(term), jnp.nan) for term in terms]
    size = jnp.nan_to_num(jnp.stack([jnp.nanmedian(term) for term in known]))
    return ROUNDING * jnp.finfo(size.dtype).eps * (1.0 + jnp.sum(size))


def _or_infinite(error: Array, value: Array) -> Array:
    return jnp.where(jnp.isfinite(value) & jnp.isfinite(error), error, jnp.inf)
