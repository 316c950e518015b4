# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Values of the two regularized losses, each with its error.

    local entropy  F_tau(x) = -T log E exp(-loss(x') / T),   heat  F^H_tau(x) = E loss(x'),   x' ~ N(x, tau I)

F_tau ≤ F^H_tau always. References: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational
Characterizations of Local Entropy and Heat Regularization in Deep Learning"; Vehtari, Simpson, Gelman, Yao
& Gabry (2024), "Pareto Smoothed Importance Sampling"; and those of `shift.smc`, `_evidence` and `_bridge`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import random

from numpyro_regloss._checks import check_choice, check_count, check_key
from numpyro_regloss._estimate import (
    BridgeEstimate,
    Estimate,
    GaussianEstimate,
    ImportanceEstimate,
    SMCEstimate,
)
from numpyro_regloss._evidence import by_bridge, by_gaussian, pair_error
from numpyro_regloss._pareto import pareto_smooth
from numpyro_regloss._pytree import is_concrete
from numpyro_regloss._stats import log_mean_exp, monte_carlo_error, weight_ess
from numpyro_regloss._typing import Array, Key
from numpyro_regloss.draws import StoredDraws
from numpyro_regloss.fit.forward_kl import ForwardKL
from numpyro_regloss.gaussian import AnyGaussian
from numpyro_regloss.regularized import RegularizedLoss
from numpyro_regloss.shift.importance import Importance
from numpyro_regloss.shift.nuts import NUTS
from numpyro_regloss.shift.smc import SMC, SMCInfo

__all__ = ["METHODS", "Estimate", "entropy_of_pairs", "heat", "heat_of_pairs", "local_entropy"]

METHODS = ("auto", "importance", "gaussian", "bridge", "smc")
# What "auto" asks of weights: a finite variance, with room for the error of k-hat, and enough draws behind it.
GOOD_KHAT, GOOD_ESS = 0.5, 100.0
# Two estimates of one number that differ by more have not seen the same q.
SIGMAS = 4.0
NUM_ISLANDS, NUM_MOVES = 16, 10
# Particles in an island of the run that the Gaussian is fitted to.
PILOT_PARTICLES = 100
# Fewer draws of a chain say little of its agreement with others.
NUM_CHAINS, NUM_WARMUP, LEAST_HALF = 8, 300, 100
# Draws per dimension below which a Gaussian is fitted with a diagonal covariance.
DENSE_FROM = 4
# Random points at which a loss must show a gradient to be called differentiable.
NUM_PROBES = 16
CHUNK_SIZE = 1_000


def local_entropy(
    rng_key: Key,
    target: RegularizedLoss,
    *,
    method: str = "auto",
    num_samples: int = 10_000,
    chunk_size: int | None = None,
) -> Estimate:
    """F_tau at the reference's mean.

    - `"importance"`: Pareto-smoothed importance sampling from the reference, in antithetic pairs; for q not far
      from it. The cheapest.
    - `"smc"`: tempering from the reference to q (`shift.SMC`), in 16 islands whose spread is the error; for sharp
      q and for several modes, with Hamiltonian moves where the loss has a gradient. Costs `num_samples`
      evaluations (or five gradients) for each of some 5 to 100 temperatures.
    - `"gaussian"`: importance sampling from a Gaussian fitted to a short run of SMC, mixed with the reference;
      for q that is sharp but nearly Gaussian.
    - `"bridge"`: bridge sampling between NUTS chains and a Gaussian that was fitted to their first halves; for
      sharp q of one mode in many dimensions. Its error is infinite where chains disagree; modes that none of
      them found are not seen.
    - `"auto"`: the first of importance, gaussian, bridge (of a differentiable loss) and smc that can be trusted:
      weights with k-hat below 0.5 and 100 effective draws, and, but for importance, agreement with a short run
      of SMC, of values and for chains of moments. Inside `jax.jit` or `jax.vmap`, where no number can be
      looked at, it is importance sampling: look at k-hat.

    The type of the estimate says which it was: `estimate.method`. Full data are used, whatever the minibatch.

    Args:
        rng_key: a random key.
        target: loss, reference and temperature.
        method: one of these names.
        num_samples: loss evaluations of importance sampling, particles of SMC over all islands, draws of a
            bridge, half of them of chains; each rounded up to what its method needs.
        chunk_size: evaluations at once, in importance sampling and for the draws of a Gaussian.

    Returns:
        The estimate, in the units of the loss. Its error is infinite where the method failed.

    Raises:
        TypeError: if a bridge is asked for and the loss has no gradient.

    Example:
        >>> from jax import random
        >>> from numpyro_regloss import Gaussian, Loss
        >>> loss = Loss.from_function(lambda x: 0.5 * jnp.sum(x**2), jnp.zeros(1))
        >>> target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau=1.0))
        >>> estimate = local_entropy(random.key(0), target)
        >>> bool(jnp.abs(estimate.value - 0.5 * jnp.log(2.0)) < 4 * estimate.error)
        True
        >>> estimate.method
        'importance'
    """
    check_choice(method, "values.local_entropy: method", METHODS)
    rng_key = _checked(rng_key, target, num_samples, "values.local_entropy")
    engine = _pairs(num_samples, chunk_size)
    target = target.without_batches()
    num_samples, chunk_size = max(20, engine.num_samples), chunk_size or CHUNK_SIZE
    if method == "auto" and is_concrete((rng_key, target)):
        return _automatic(rng_key, target, engine, num_samples, chunk_size)
    if method in ("auto", "importance"):
        return _local_entropy(rng_key, target, engine)
    differentiable = _is_differentiable(target)
    if method == "smc":
        return _by_smc(rng_key, target, _smc(num_samples, differentiable))[0]
    if method == "gaussian":
        pilot = _smc(NUM_ISLANDS * PILOT_PARTICLES, differentiable)
        key_pilot, rng_key = random.split(rng_key)
        draws = _by_smc(key_pilot, target, pilot)[1]
        return _by_gaussian(rng_key, target, draws, num_samples, chunk_size)
    if not differentiable:
        raise TypeError(
            "values.local_entropy: expected a differentiable loss for a bridge, whose chains follow gradients, "
            'got one that has none, or is zero everywhere; use method="smc".'
        )
    key_start, rng_key = random.split(rng_key)
    start = target.reference.sample(key_start, (NUM_CHAINS,))
    return _by_bridge(rng_key, target, start, num_samples, chunk_size)[0]


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
    return _heat(rng_key, target.without_batches(), _pairs(num_samples, chunk_size))


def _pairs(num_samples: int, chunk_size: int | None) -> Importance:
    return Importance(num_samples + num_samples % 2, chunk_size=chunk_size)


def _checked(rng_key: Key, target: RegularizedLoss, num_samples: int, what: str) -> Key:
    if not isinstance(target, RegularizedLoss) or target.reference is None:
        raise TypeError(
            f"{what}: expected a RegularizedLoss with a Gaussian reference, got "
            f"{'no reference' if isinstance(target, RegularizedLoss) else type(target).__name__}; build "
            "RegularizedLoss(loss, Gaussian.isotropic(x, tau))."
        )
    target.loss.check_precision(what)
    check_count(num_samples, f"{what}: num_samples", 4)
    return check_key(rng_key, what)


def _automatic(
    rng_key: Key, target: RegularizedLoss, engine: Importance, num_samples: int, chunk_size: int
) -> Estimate:
    keys = random.split(rng_key, 5)
    first = _local_entropy(keys[0], target, engine)
    # Where the mean is not finite, a loss failed or all were infinite: there is no expectation to estimate.
    if _is_good(first) or not jnp.isfinite(first.value):
        return first
    differentiable = _is_differentiable(target)
    pilot = _smc(NUM_ISLANDS * PILOT_PARTICLES, differentiable)
    short, draws = _by_smc(keys[1], target, pilot)
    if not jnp.isfinite(short.value):
        return short
    gaussian = _by_gaussian(keys[2], target, draws, num_samples, chunk_size)
    if _is_good(gaussian) and _agree(gaussian, short):
        return gaussian
    if differentiable and jnp.isfinite(short.error):
        step = draws.x.shape[1] * NUM_ISLANDS // NUM_CHAINS
        start = draws.x.reshape(-1, target.dim)[::step]
        bridge, same = _by_bridge(keys[3], target, start, num_samples, chunk_size, draws)
        if same and jnp.isfinite(bridge.error) and _agree(bridge, short):
            return bridge
    return _by_smc(keys[4], target, _smc(num_samples, differentiable))[0]


def _is_good(estimate: Estimate) -> bool:
    return bool((estimate.khat < GOOD_KHAT) & (estimate.ess >= GOOD_ESS))


def _agree(one: Estimate, other: Estimate) -> bool:
    error = jnp.hypot(one.error, other.error)
    return bool(jnp.abs(one.value - other.value) <= SIGMAS * error)


def _smc(num_samples: int, differentiable: bool) -> SMC:  # noqa: FBT001
    survivors = max(2, -(-num_samples // (NUM_ISLANDS * NUM_MOVES)))
    return SMC(
        survivors * NUM_MOVES,
        NUM_ISLANDS,
        NUM_MOVES,
        moves="hmc" if differentiable else "crank_nicolson",
    )


def _is_differentiable(target: RegularizedLoss) -> bool:
    if target.loss.returns_integers:
        return False
    try:
        if is_concrete(target):
            return bool(_has_gradient(target))
        # Within a trace only the types can be looked at.
        jax.eval_shape(jax.grad(target.value), target.reference.mean)
    except (TypeError, ValueError, NotImplementedError):
        return False
    return True


@jax.jit
def _has_gradient(target: RegularizedLoss) -> Array:
    probes = target.reference.sample(random.key(0), (NUM_PROBES,))
    gradient = jax.vmap(jax.grad(target.value))(probes)
    return jnp.any(jnp.isfinite(gradient) & (gradient != 0))


@partial(jax.jit, static_argnames="engine")
def _local_entropy(rng_key: Key, target: RegularizedLoss, engine: Importance) -> ImportanceEstimate:
    return entropy_of_pairs(engine.step(rng_key, (), target)[1].loss[0], target.temperature)


def entropy_of_pairs(loss: Array, temperature: Array) -> ImportanceEstimate:
    """F_tau of the losses `(sample,)` at antithetic pairs from the reference."""
    # A NaN among the losses makes the value NaN: there is no expectation to estimate.
    smoothed, khat = pareto_smooth(-loss / temperature)
    log_mean = log_mean_exp(smoothed)
    pair = jnp.mean(jnp.exp(smoothed - log_mean).reshape(-1, 2), 1)
    return ImportanceEstimate(
        value=-temperature * log_mean,
        error=temperature * pair_error(pair),
        ess=weight_ess(smoothed),
        khat=khat,
    )


@jax.jit
def _by_smc(rng_key: Key, target: RegularizedLoss, engine: SMC) -> tuple[SMCEstimate, StoredDraws]:
    info: SMCInfo
    _, draws, info = engine.step(rng_key, (), target)
    # As above; and what has not reached q knows no error.
    value = jnp.where(info.num_rejected > 0, jnp.nan, -target.temperature * info.log_evidence)
    error = target.temperature * info.log_evidence_error
    error = jnp.where(info.ok & jnp.isfinite(value), error, jnp.inf)
    return SMCEstimate(value, error, info.ess, jnp.full_like(value, -jnp.inf)), draws


@partial(jax.jit, static_argnames=("num_samples", "chunk_size"))
def _by_gaussian(
    rng_key: Key, target: RegularizedLoss, draws: StoredDraws, num_samples: int, chunk_size: int
) -> GaussianEstimate:
    key_fit, rng_key = random.split(rng_key)
    fitted = _fitted(key_fit, target, draws)
    return by_gaussian(rng_key, target, fitted, num_samples, chunk_size)


@partial(jax.jit, static_argnames=("num_samples", "chunk_size"))
def _by_bridge(
    rng_key: Key,
    target: RegularizedLoss,
    start: Array,
    num_samples: int,
    chunk_size: int,
    others: StoredDraws | None = None,
) -> tuple[BridgeEstimate, Array]:
    # And whether the means of the chains are those of other draws.
    key_chain, key_fit, rng_key = random.split(rng_key, 3)
    half = max(LEAST_HALF, -(-num_samples // (4 * NUM_CHAINS)))
    engine = NUTS(num_warmup=NUM_WARMUP, num_samples=2 * half, num_chains=NUM_CHAINS)
    state = engine.init(key_chain, target)._replace(x=start)
    draws = engine.step(key_chain, state, target)[1]
    first, second = (
        jax.tree.map(lambda a, p=part: a[:, p] if jnp.ndim(a) > 1 else a, draws)
        for part in (slice(None, half), slice(half, None))
    )
    fitted = _fitted(key_fit, target, first)
    estimate = by_bridge(rng_key, target, second, fitted, num_samples, chunk_size)
    same = jnp.asarray(True)
    if others is not None:
        weight = others.log_weight
        mean, error = _mean(draws.x, draws.log_weight)
        other_mean, other_error = _mean(others.x, weight)
        # A handful of coordinates more than four errors off is no accident, whatever the dimension.
        same = jnp.all(jnp.abs(mean - other_mean) < (SIGMAS + 1.0) * jnp.hypot(error, other_error))
    return estimate, same


def _mean(x: Array, log_weight: Array) -> tuple[Array, Array]:
    weight = jax.nn.softmax(log_weight.reshape(-1)).reshape(log_weight.shape)
    mean = jnp.einsum("cd,cdi->i", weight, x)
    return mean, monte_carlo_error(weight[..., None] * weight.size * (x - mean))


def _fitted(rng_key: Key, target: RegularizedLoss, draws: StoredDraws) -> AnyGaussian:
    dense = draws.loss.size >= DENSE_FROM * target.dim
    method = ForwardKL("dense" if dense else "diagonal")
    return method.step(rng_key, (), target, draws)[1]


@partial(jax.jit, static_argnames="engine")
def _heat(rng_key: Key, target: RegularizedLoss, engine: Importance) -> Estimate:
    return heat_of_pairs(engine.step(rng_key, (), target)[1].loss[0])


def heat_of_pairs(loss: Array) -> Estimate:
    """F^H_tau of the same."""
    pair = jnp.mean(loss.reshape(-1, 2), 1)
    return Estimate(
        value=jnp.mean(pair),
        error=pair_error(pair),
        ess=jnp.asarray(loss.size, loss.dtype),
        khat=jnp.asarray(-jnp.inf, loss.dtype),
    )
