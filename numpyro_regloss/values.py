# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Values of the two regularized losses, each with its error.

    local entropy  F_tau(x) = -T log E exp(-loss(x') / T),   heat  F^H_tau(x) = E loss(x'),   x' ~ N(x, tau I)

F_tau ≤ F^H_tau always. References: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational
Characterizations of Local Entropy and Heat Regularization in Deep Learning"; Vehtari, Simpson, Gelman, Yao
& Gabry (2024), "Pareto Smoothed Importance Sampling".
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_regloss._checks import check_choice, check_count, check_key
from numpyro_regloss._pareto import pareto_smooth
from numpyro_regloss._pytree import replace_fields
from numpyro_regloss._stats import log_mean_exp, weight_ess
from numpyro_regloss._typing import Array, Key
from numpyro_regloss.regularized import RegularizedLoss
from numpyro_regloss.shift.importance import Importance

__all__ = ["Estimate", "heat", "local_entropy"]


class Estimate(NamedTuple):
    """A number with its error.

    Attributes:
        value: the estimate, in the units of the loss.
        error: its standard error, in the same units; infinite where the value is not finite.
        ess: effective sample size behind it.
        khat: Pareto shape of the weights; above 0.7 neither value nor error is to be trusted. -inf where
            there are no weights.
    """

    value: Array
    error: Array
    ess: Array
    khat: Array


def local_entropy(
    rng_key: Key,
    target: RegularizedLoss,
    *,
    method: str = "auto",
    num_samples: int = 10_000,
    chunk_size: int | None = None,
) -> Estimate:
    """F_tau at the reference's mean, by Pareto-smoothed importance sampling from the reference.

    The error is the delta method's on antithetic pairs. Full data are used, whatever the minibatch.

    Args:
        rng_key: a random key.
        target: loss, reference and temperature.
        method: `"importance"`, or `"auto"`, which is the same for now.
        num_samples: loss evaluations, rounded up to an even number.
        chunk_size: evaluations at once.

    Returns:
        The estimate, in the units of the loss.

    Example:
        >>> from jax import random
        >>> from numpyro_regloss import Gaussian, Loss
        >>> loss = Loss.from_function(lambda x: 0.5 * jnp.sum(x**2), jnp.zeros(1))
        >>> target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau=1.0))
        >>> estimate = local_entropy(random.key(0), target)
        >>> bool(jnp.abs(estimate.value - 0.5 * jnp.log(2.0)) < 4 * estimate.error)
        True
    """
    check_choice(method, "values.local_entropy: method", ("auto", "importance"))
    rng_key = _checked(rng_key, target, num_samples, "values.local_entropy")
    return _local_entropy(rng_key, target, _pairs(num_samples, chunk_size))


def heat(
    rng_key: Key,
    target: RegularizedLoss,
    *,
    num_samples: int = 10_000,
    chunk_size: int | None = None,
) -> Estimate:
    """F^H_tau at the reference's mean, by the mean over antithetic pairs.

    Full data are used, whatever the minibatch; the temperature does not matter.

    Args:
        rng_key: a random key.
        target: loss and reference.
        num_samples: loss evaluations, rounded up to an even number.
        chunk_size: evaluations at once.

    Returns:
        The estimate, in the units of the loss.

    Example:
        >>> from jax import random
        >>> from numpyro_regloss import Gaussian, Loss
        >>> loss = Loss.from_function(lambda x: jnp.sum(x), jnp.full(3, 2.0))
        >>> target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau=1.0))
        >>> round(float(heat(random.key(0), target).value), 4)
        6.0
    """
    rng_key = _checked(rng_key, target, num_samples, "values.heat")
    return _heat(rng_key, target, _pairs(num_samples, chunk_size))


def _pairs(num_samples: int, chunk_size: int | None) -> Importance:
    return Importance(num_samples + num_samples % 2, chunk_size=chunk_size)


def _checked(rng_key: Key, target: RegularizedLoss, num_samples: int, what: str) -> Key:
    if not isinstance(target, RegularizedLoss) or target.reference is None:
        raise TypeError(
            f"{what}: expected a RegularizedLoss with a Gaussian reference, got "
            f"{'no reference' if isinstance(target, RegularizedLoss) else type(target).__name__}; build "
            "RegularizedLoss(loss, Gaussian.isotropic(x, tau))."
        )
    check_count(num_samples, f"{what}: num_samples", 4)
    return check_key(rng_key, what)


def _losses(rng_key: Key, target: RegularizedLoss, engine: Importance) -> Array:
    full = replace_fields(target, loss=replace_fields(target.loss, minibatch=None))
    return engine.step(rng_key, (), full)[1].loss[0]


@partial(jax.jit, static_argnames="engine")
def _local_entropy(rng_key: Key, target: RegularizedLoss, engine: Importance) -> Estimate:
    loss = _losses(rng_key, target, engine)
    # A NaN among the losses makes the value NaN: there is no expectation to estimate.
    smoothed, khat = pareto_smooth(-loss / target.temperature)
    log_mean = log_mean_exp(smoothed)
    pair = jnp.mean(jnp.exp(smoothed - log_mean).reshape(-1, 2), 1)
    return Estimate(
        value=-target.temperature * log_mean,
        error=target.temperature * _standard_error(pair),
        ess=weight_ess(smoothed),
        khat=khat,
    )


@partial(jax.jit, static_argnames="engine")
def _heat(rng_key: Key, target: RegularizedLoss, engine: Importance) -> Estimate:
    loss = _losses(rng_key, target, engine)
    pair = jnp.mean(loss.reshape(-1, 2), 1)
    return Estimate(
        value=jnp.mean(pair),
        error=_standard_error(pair),
        ess=jnp.asarray(loss.size, loss.dtype),
        khat=jnp.asarray(-jnp.inf, loss.dtype),
    )


def _standard_error(independent: Array) -> Array:
    error = jnp.std(independent, ddof=1) / jnp.sqrt(independent.size)
    return jnp.where(jnp.isfinite(error), error, jnp.inf)
