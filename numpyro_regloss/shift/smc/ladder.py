# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The ladder of tempering: its next rung, evidence rung by rung, resampling within islands.

    q_s ∝ exp(-s E) N(0, I),   s = 0, …, 1

Islands are populations that share the ladder and the tuning of the moves, and nothing else: what they find
differs as independent runs do, which is where errors come from.

References: Del Moral, Doucet & Jasra (2006), "Sequential Monte Carlo Samplers"; Zhou, Johansen & Aston (2016),
"Toward Automatic Model Comparison: An Adaptive Sequential Monte Carlo Approach"; Vergé, Dubarry, Del Moral &
Moulines (2015), "On Parallel Implementation of Sequential Monte Carlo Methods: The Island Particle Model".
"""

import jax
import jax.numpy as jnp
from scipy.special import stdtrit

from numpyro_regloss._core.stats import bisect, log_mean_exp
from numpyro_regloss._core.types import Array

__all__ = ["bounded_energy", "evidence", "next_rung"]

BISECTIONS = 40
# The smallest step of s that is looked for: energies that vary by more than its inverse are walls.
LOG_SMALLEST = -69.0
# Of intervals that cover 95 %.
UPPER, NORMAL_QUANTILE = 0.975, 1.959964


def bounded_energy(energy: Array) -> tuple[Array, Array]:
    """Energies with +inf for failures, and what failed.

    Args:
        energy: of any shape. +inf is a wall; NaN and -inf are failures of the loss.

    Returns:
        The energy, nowhere NaN or -inf, and the booleans where it was.
    """
    failed = jnp.isnan(energy) | (energy == -jnp.inf)
    return jnp.where(failed, jnp.inf, energy), failed


def next_rung(energy: Array, s: Array, ess_fraction: Array) -> tuple[Array, Array, Array]:
    """The next s, at which the weights exp(-(s' - s) E) have the effective sample size that is asked for.

    Args:
        energy: `(island, particle)`, of equal weights.
        s: the last one.
        ess_fraction: effective over actual number of particles, those within walls left out.

    Returns:
        The next s, log weights of the particles `(island, particle)`, and the log of their mean in every
        island `(island,)`.
    """
    inside = jnp.isfinite(energy)
    lowest = jnp.min(energy)
    lowest = jnp.where(jnp.isfinite(lowest), lowest, 0.0)
    excess = jnp.where(inside, energy - lowest, jnp.inf)
    count = jnp.maximum(jnp.sum(inside), 1)

    def enough(step: Array) -> Array:
        weight = jnp.where(inside, jnp.exp(-step * jnp.where(inside, excess, 0.0)), 0.0)
        ess = jnp.sum(weight) ** 2 / jnp.maximum(jnp.sum(weight**2), jnp.finfo(s.dtype).tiny)
        return ess >= ess_fraction * count

    left = 1.0 - s

    zero = jnp.zeros_like(s)
    log_step, _ = bisect(
        lambda middle: enough(left * jnp.exp(middle)), zero + LOG_SMALLEST, zero, BISECTIONS
    )
    after = jnp.where(enough(left), 1.0, s + left * jnp.exp(log_step))
    # The step as rounded, so that all steps add up to one exactly.
    step = after - s
    log_weight = jnp.where(inside, -step * jnp.where(inside, excess, 0.0), -jnp.inf)
    increment = jax.vmap(log_mean_exp)(log_weight) - step * lowest
    return after, log_weight, increment


def evidence(log_evidence: Array) -> tuple[Array, Array]:
    """Log of the mean evidence of islands, and its standard error.

    The spread of a few islands is itself uncertain: the error is stretched by the ratio of Student's quantile
    to the normal one, so that intervals of 1.96 errors cover 95 %. The error is that of a log-normal evidence, or
    where some islands have none at all, that of the mean.

    Args:
        log_evidence: `(island,)`.

    Returns:
        The logarithm of the mean and its error, infinite for a single island.
    """
    count = log_evidence.size
    value = log_mean_exp(log_evidence)
    if count < 2:
        return value, jnp.full_like(value, jnp.inf)
    # Islands that found nothing inside of a wall have no logarithm, and count as zeros.
    relative = jnp.exp(log_evidence - value)
    empty = jnp.any(log_evidence == -jnp.inf)
    variance = jnp.expm1(jnp.var(jnp.where(empty, 0.0, log_evidence), ddof=1))
    variance = jnp.where(empty, jnp.var(relative, ddof=1), variance)
    stretch = float(stdtrit(count - 1, UPPER)) / NORMAL_QUANTILE
    error = stretch * jnp.sqrt(variance / count)
    return value, jnp.where(jnp.isfinite(error), error, jnp.inf)
