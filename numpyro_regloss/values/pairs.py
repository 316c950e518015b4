# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Both values from the losses at antithetic pairs, and what is said where their tails leave no error."""

import warnings

import jax.numpy as jnp
import numpy as np

from numpyro_regloss._core.pareto import MAX_KHAT
from numpyro_regloss._core.pytree import is_concrete
from numpyro_regloss._core.stats import log_mean_exp, weight_ess
from numpyro_regloss._core.tail import mean_with_error, tail_error, tail_index, with_rounding
from numpyro_regloss._core.types import Array
from numpyro_regloss.values.estimate import Estimate, ImportanceEstimate

__all__ = ["HEAT_REMEDY", "entropy_of_pairs", "heat_of_means", "heat_of_pairs", "warn_of_errors"]

HEAT_REMEDY = "Use a smaller tau or more draws, or the local entropy, to which few large losses matter little."


def entropy_of_pairs(loss: Array, temperature: Array) -> ImportanceEstimate:
    """F_tau of the losses `(sample,)` at antithetic pairs from the reference."""
    # A NaN among the losses makes the value NaN: there is no expectation to estimate.
    # Weights are not smoothed: where that would help their error is wide, and elsewhere it is a bias.
    log_weight = -loss / temperature
    log_mean = log_mean_exp(log_weight)
    pair = jnp.mean(jnp.exp(log_weight - log_mean).reshape(-1, 2), 1)
    khat = tail_index(log_weight, pair)
    value = -temperature * log_mean
    return ImportanceEstimate(
        value=value,
        error=with_rounding(temperature * tail_error(pair, khat), value),
        ess=weight_ess(log_weight),
        khat=khat,
    )


def heat_of_pairs(loss: Array) -> Estimate:
    """F^H_tau of the same."""
    return heat_of_means(jnp.mean(loss.reshape(-1, 2), 1), jnp.max(jnp.abs(loss)))


def heat_of_means(pair: Array, largest: Array) -> Estimate:
    """F^H_tau of the mean losses of pairs `(pair,)`, and the largest size of a loss."""
    mean, error, khat = mean_with_error(pair, largest)
    error = with_rounding(error, mean)
    return Estimate(mean, error, jnp.asarray(2.0 * pair.size, pair.dtype), khat)


def warn_of_errors(what: str, estimates: dict[str, Estimate], remedy: str, level: int = 3) -> None:
    """One warning where values have no error; none inside of a trace, nor where the value itself says it.

    Args:
        what: begins the message.
        estimates: by what they are of; of any shape.
        remedy: ends the message.
        level: of the caller of the public function.
    """
    if not is_concrete(estimates):
        return
    found = []
    for name, estimate in estimates.items():
        value, error, khat = (
            np.atleast_1d(a) for a in (estimate.value, estimate.error, estimate.khat)
        )
        lost = np.isfinite(value) & np.isposinf(error)
        if lost.any():
            where = f" at {lost.sum()} of {lost.size}" if lost.size > 1 else ""
            worst = khat[lost].max()
            why = f" (k-hat {worst:.2f})" if worst > MAX_KHAT else ""
            found.append(f"{name}{where}{why}")
    if found:
        warnings.warn(
            f"{what}: the error of {' and of '.join(found)} is not known and is given as infinite. Where k-hat is "
            f"above {MAX_KHAT}, the average hangs on few draws, or on draws that are missing. {remedy}",
            stacklevel=level,
        )
