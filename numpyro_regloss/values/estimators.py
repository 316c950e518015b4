# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Values of the two regularized losses, each with its error.

    local entropy  F_tau(x) = -T log E exp(-loss(x') / T),   heat  F^H_tau(x) = E loss(x'),   x' ~ N(x, tau I)

F_tau ≤ F^H_tau always. References: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational
Characterizations of Local Entropy and Heat Regularization in Deep Learning"; Vehtari, Simpson, Gelman, Yao
& Gabry (2024), "Pareto Smoothed Importance Sampling"; and those of `shift.smc`, `evidence` and `draws.bridge`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, random
from jax.sharding import Mesh

from numpyro_regloss._core.checks import check_choice, check_count, check_key
from numpyro_regloss._core.mesh import check_mesh, copied, meshed
from numpyro_regloss._core.processes import here
from numpyro_regloss._core.pytree import all_finite, is_concrete
from numpyro_regloss._core.settings import own_settings
from numpyro_regloss._core.stats import monte_carlo_error
from numpyro_regloss._core.tail import with_rounding
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import StoredDraws
from numpyro_regloss.fit.forward_kl import ForwardKL
from numpyro_regloss.gaussians.gaussian import AnyGaussian, Gaussian
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.shift.adaptive_importance import AdaptiveImportance
from numpyro_regloss.shift.hmc import NUTS
from numpyro_regloss.shift.importance import Importance
from numpyro_regloss.shift.smc import SMC, SMCInfo
from numpyro_regloss.values.estimate import (
    BridgeEstimate,
    Estimate,
    GaussianEstimate,
    ImportanceEstimate,
    SMCEstimate,
)
from numpyro_regloss.values.evidence import by_bridge, by_gaussian
from numpyro_regloss.values.pairs import (
    HEAT_REMEDY,
    entropy_of_pairs,
    heat_of_pairs,
    warn_of_errors,
)

__all__ = [
    "METHODS",
    "Estimate",
    "estimate_entropy",
    "estimate_heat",
    "heat",
    "local_entropy",
]

METHODS = ("auto", "importance", "gaussian", "bridge", "smc")
# What "auto" asks of weights: a finite variance, with room for the error of k-hat, and enough draws behind it.
GOOD_KHAT, GOOD_ESS = 0.5, 100.0
# Two estimates of one number that differ by more have not seen the same q.
SIGMAS = 4.0
NUM_ISLANDS, NUM_MOVES = 16, 10
# Particles in an island of the run that the Gaussian is fitted to.
PILOT_PARTICLES = 100
# Steps of adaptive importance sampling before the one that the Gaussian is fitted to.
NUM_PILOT_STEPS = 2
# Fewer draws of a chain say little of its agreement with others.
NUM_CHAINS, NUM_WARMUP, LEAST_HALF = 8, 300, 100
# Divergent transitions of chains that "auto" lets pass, as a share of all.
MOST_DIVERGENT = 0.003
# Draws per dimension below which a Gaussian is fitted with a diagonal covariance.
DENSE_FROM = 4
# Random points at which a loss must show a gradient to be called differentiable.
NUM_PROBES = 16
CHUNK_SIZE = 1_000
ENTROPY_REMEDY = 'Use method="auto" or "smc", a smaller tau or more draws.'
AUTO_REMEDY = "No method found one: use a smaller tau, a higher temperature or more draws."


def local_entropy(
    rng_key: Key,
    target: RegularizedLoss,
    *,
    method: str = "auto",
    num_samples: int = 10_000,
    chunk_size: int | None = None,
    mesh: Any = None,
) -> Estimate:
    """F_tau at the reference's mean.

    - `"importance"`: importance sampling from the reference, in antithetic pairs. It is the cheapest method, for q
      not far from the reference.
    - `"smc"`: tempering from the reference to q (`shift.SMC`), in 16 islands whose spread is the error; for sharp
      q and for several modes, with Hamiltonian moves where the loss has a gradient. Costs `num_samples`
      evaluations (or five gradients) for each of some 5 to 100 temperatures.
    - `"gaussian"`: importance sampling from a Gaussian fitted to a short run of SMC, mixed with the reference;
      for q that is sharp but nearly Gaussian. `"auto"` fits it by adaptive importance sampling first.
    - `"bridge"`: bridge sampling between NUTS chains and a Gaussian that was fitted to their first halves; for
      sharp q of one mode in many dimensions. Its error is infinite if chains disagree. It misses modes that no
      chain found.
    - `"auto"`: the first of importance, gaussian, bridge (if the loss is differentiable) and smc that can be
      trusted. Its weights must have a k-hat below 0.5 and 100 effective draws. All but importance must also agree
      with the draws that the Gaussian was fitted to, or with a short run of SMC: in their values, and for chains
      in their moments. If no method can be trusted, it is one with a finite error. Inside `jax.jit` or `jax.vmap`
      such checks are not possible, and it is importance sampling: look at the error.

    `estimate.method` says which method it was. All data are used, even if the loss has a minibatch. If k-hat of
    the weights is above 0.7, the draws missed a part of the tail. Then the error is infinite, and a warning says
    so, but not inside `jax.jit`. A loss that is NaN or -infinity at draws from the reference has no local entropy,
    and the value is NaN. If only the paths of moves and chains meet such places, they do not enter, as if the loss
    were infinite there.

    Args:
        rng_key: a random key.
        target: loss, reference and temperature.
        method: one of these names.
        num_samples: loss evaluations of importance sampling, particles of SMC over all islands, draws of a
            bridge, half of them of chains; each rounded up to what its method needs.
        chunk_size: evaluations at once, in importance sampling and for the draws of a Gaussian.
        mesh: devices that divide the draws, see `TwoStep`.

    Returns:
        The estimate, in the units of the loss. Its error is infinite where the method failed; "auto" warns too
        if every method did.

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
    what = "values.local_entropy"
    check_choice(method, f"{what}: method", METHODS)
    rng_key = _checked(rng_key, target, num_samples, what)
    mesh = check_mesh(mesh, f"{what}: mesh", external=target.loss.is_external)
    settings = {"method": method, "num_samples": num_samples, "chunk_size": chunk_size}
    call = partial(estimate_entropy, **settings, mesh=mesh)
    estimate = target.loss.listen(what, call, rng_key, target)
    # Chains that disagree, and islands, say by an infinite error what they are there to say.
    if method not in ("bridge", "smc"):
        remedy = AUTO_REMEDY if method == "auto" else ENTROPY_REMEDY
        warn_of_errors(what, {"F_tau": estimate}, remedy)
    return estimate


def estimate_entropy(
    rng_key: Key,
    target: RegularizedLoss,
    *,
    method: str,
    num_samples: int,
    chunk_size: int | None,
    mesh: Mesh | None,
) -> Estimate:
    """`local_entropy` of arguments that were checked, without warnings."""
    rng_key, target = copied(mesh, (rng_key, target.without_batches()))
    return here(_entropy(rng_key, target, method, num_samples, chunk_size, mesh))


def _entropy(
    rng_key: Key,
    target: RegularizedLoss,
    method: str,
    num_samples: int,
    chunk_size: int | None,
    mesh: Mesh | None,
) -> Estimate:
    engine = _pairs(num_samples, chunk_size)
    num_samples, chunk_size = max(20, engine.num_samples), chunk_size or CHUNK_SIZE
    sizes: dict[str, Any] = {"num_samples": num_samples, "chunk_size": chunk_size, "mesh": mesh}
    if method == "auto" and is_concrete((rng_key, target)):
        return _automatic(rng_key, target, engine, sizes)
    if method in ("auto", "importance"):
        return _local_entropy(rng_key, target, engine=engine, mesh=mesh)
    differentiable = _is_differentiable(target)
    if method == "smc":
        return _by_smc(rng_key, target, engine=_smc(num_samples, differentiable), mesh=mesh)[0]
    if method == "gaussian":
        pilot = _smc(NUM_ISLANDS * PILOT_PARTICLES, differentiable)
        key_pilot, rng_key = random.split(rng_key)
        short, draws = _by_smc(key_pilot, target, engine=pilot, mesh=mesh)
        gaussian = _by_gaussian(rng_key, target, draws, **sizes)
        # A Gaussian of islands that disagree, or found nothing, may stand beside q, where no weight shows it.
        known = jnp.isfinite(short.error)
        return gaussian._replace(error=jnp.where(known, gaussian.error, jnp.inf))
    if not differentiable:
        raise TypeError(
            "values.local_entropy: expected a differentiable loss for a bridge, whose chains follow gradients, "
            'got one that has none, or is zero everywhere; use method="smc".'
        )
    key_start, rng_key = random.split(rng_key)
    start = target.reference.sample(key_start, (NUM_CHAINS,))
    return _by_bridge(rng_key, target, start, **sizes)[0]


def heat(
    rng_key: Key,
    target: RegularizedLoss,
    *,
    num_samples: int = 10_000,
    chunk_size: int | None = None,
    mesh: Any = None,
) -> Estimate:
    """F^H_tau at the reference's mean, by the mean over antithetic pairs.

    All data are used, even if the loss has a minibatch; the temperature does not matter. The more a few large
    losses dominate the mean, the larger is the error. If the k-hat of the losses is above 0.7, it is infinite, and
    a warning says so, but not inside `jax.jit`.

    Args:
        rng_key: a random key.
        target: loss and reference.
        num_samples: loss evaluations, rounded up to an even number.
        chunk_size: evaluations at once.
        mesh: devices that divide the draws, see `TwoStep`.

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
    what = "values.heat"
    rng_key = _checked(rng_key, target, num_samples, what)
    mesh = check_mesh(mesh, f"{what}: mesh", external=target.loss.is_external)
    settings = {"num_samples": num_samples, "chunk_size": chunk_size, "mesh": mesh}
    estimate = target.loss.listen(what, partial(estimate_heat, **settings), rng_key, target)
    warn_of_errors(what, {"the heat": estimate}, HEAT_REMEDY)
    return estimate


def estimate_heat(
    rng_key: Key,
    target: RegularizedLoss,
    *,
    num_samples: int,
    chunk_size: int | None,
    mesh: Mesh | None,
) -> Estimate:
    """`heat` of arguments that were checked, without warnings."""
    rng_key, target = copied(mesh, (rng_key, target.without_batches()))
    return here(_heat(rng_key, target, engine=_pairs(num_samples, chunk_size), mesh=mesh))


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
    target.loss.check_captured()
    return check_key(rng_key, what)


def _automatic(
    rng_key: Key, target: RegularizedLoss, engine: Importance, sizes: dict[str, Any]
) -> Estimate:
    keys, mesh = random.split(rng_key, 5), sizes["mesh"]
    first = _local_entropy(keys[0], target, engine=engine, mesh=mesh)
    # Where a loss failed there is no expectation to estimate.
    if _is_good(first) or jnp.isnan(first.value) or jnp.isneginf(first.value):
        return first
    differentiable = _is_differentiable(target)
    if differentiable:
        gaussian, own = _by_scores(random.fold_in(rng_key, 5), target, **sizes)
        if _is_good(gaussian) and jnp.isfinite(own.error) and _agree(gaussian, own):
            return gaussian
    pilot = _smc(NUM_ISLANDS * PILOT_PARTICLES, differentiable)
    short, draws = _by_smc(keys[1], target, engine=pilot, mesh=mesh)
    # Islands that disagree, or found nothing, say nothing of the others.
    if jnp.isfinite(short.error):
        gaussian = _by_gaussian(keys[2], target, draws, **sizes)
        if _is_good(gaussian) and _agree(gaussian, short):
            return gaussian
        if differentiable:
            step = draws.x.shape[1] * NUM_ISLANDS // NUM_CHAINS
            start = draws.x.reshape(-1, target.dim)[::step]
            bridge, same = _by_bridge(keys[3], target, start, draws, **sizes)
            if same and jnp.isfinite(bridge.error) and _agree(bridge, short):
                return bridge
    engine_of_all = _smc(sizes["num_samples"], differentiable)
    long = _by_smc(keys[4], target, engine=engine_of_all, mesh=mesh)[0]
    found = (long, first, short)
    least_bad = long if jnp.isfinite(long.value) else first
    return next((estimate for estimate in found if jnp.isfinite(estimate.error)), least_bad)


def _is_good(estimate: Estimate) -> bool:
    return bool(
        (estimate.khat < GOOD_KHAT) & (estimate.ess >= GOOD_ESS) & jnp.isfinite(estimate.error)
    )


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
    if target.loss.lacks_gradient:
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
@own_settings
def _has_gradient(target: RegularizedLoss) -> Array:
    probes = target.reference.sample(random.key(0), (NUM_PROBES,))
    value, gradient = jax.vmap(jax.value_and_grad(target.value))(probes)
    # Where the loss is a number its gradient should be one, or moves that follow it go nowhere.
    usable = jnp.isfinite(gradient).all(1) | ~jnp.isfinite(value)
    return usable.all() & jnp.any(jnp.isfinite(gradient) & (gradient != 0))


@meshed("engine")
def _local_entropy(rng_key: Key, target: RegularizedLoss, engine: Importance) -> ImportanceEstimate:
    return entropy_of_pairs(engine.losses(rng_key, target), target.temperature)


@meshed("engine")
def _by_smc(rng_key: Key, target: RegularizedLoss, engine: SMC) -> tuple[SMCEstimate, StoredDraws]:
    info: SMCInfo
    _, draws, info = engine.step(rng_key, (), target)
    # As above, whatever moves met on their ways; and what has not reached q knows no error.
    value = jnp.where(info.num_undefined > 0, jnp.nan, -target.temperature * info.log_evidence)
    error = with_rounding(target.temperature * info.log_evidence_error, value)
    error = jnp.where(info.ok & jnp.isfinite(value), error, jnp.inf)
    return SMCEstimate(value, error, info.ess, jnp.full_like(value, -jnp.inf)), draws


@meshed("num_samples", "chunk_size")
def _by_gaussian(
    rng_key: Key, target: RegularizedLoss, draws: StoredDraws, num_samples: int, chunk_size: int
) -> GaussianEstimate:
    key_fit, rng_key = random.split(rng_key)
    fitted = _fitted(key_fit, target, draws)
    return by_gaussian(rng_key, target, fitted, num_samples, chunk_size)


@meshed("num_samples", "chunk_size")
def _by_scores(
    rng_key: Key, target: RegularizedLoss, num_samples: int, chunk_size: int
) -> tuple[GaussianEstimate, Estimate]:
    # The Gaussian of adaptive importance sampling, and what its last draws say themselves.
    key_init, key_warm, key_draw, key_fit, rng_key = random.split(rng_key, 5)
    engine = AdaptiveImportance.for_dimension(target.dim)
    state = engine.init(key_init, target)

    def warm(state: Any, key: Key) -> tuple[Any, None]:
        return engine.step(key, state, target)[0], None

    state, _ = lax.scan(warm, state, random.split(key_warm, NUM_PILOT_STEPS))
    _, draws, info = engine.step(key_draw, state, target)
    fitted = _fitted(key_fit, target, draws)
    estimate = by_gaussian(rng_key, target, fitted, num_samples, chunk_size)
    return estimate, Estimate(info.local_entropy, info.local_entropy_error, info.ess, info.khat)


@meshed("num_samples", "chunk_size")
def _by_bridge(
    rng_key: Key,
    target: RegularizedLoss,
    start: Array,
    others: StoredDraws | None = None,
    *,
    num_samples: int,
    chunk_size: int,
) -> tuple[BridgeEstimate, Array]:
    # And whether the chains went everywhere, as far as they know, and their means are those of other draws.
    key_chain, key_fit, rng_key = random.split(rng_key, 3)
    half = max(LEAST_HALF, -(-num_samples // (4 * NUM_CHAINS)))
    engine = NUTS(num_warmup=NUM_WARMUP, num_samples=2 * half, num_chains=NUM_CHAINS)
    state = engine.init(key_chain, target)._replace(x=start)
    _, draws, info = engine.step(key_chain, state, target)
    first, second = (
        jax.tree.map(lambda a, p=part: a[:, p] if jnp.ndim(a) > 1 else a, draws)
        for part in (slice(None, half), slice(half, None))
    )
    fitted = _fitted(key_fit, target, first)
    estimate = by_bridge(rng_key, target, second, fitted, num_samples, chunk_size)
    # Transitions diverge at the neck of a funnel, which chains then leave out.
    same = info.num_divergent <= MOST_DIVERGENT * draws.loss.size
    if others is not None:
        weight = others.log_weight
        mean, error = _mean(draws.x, draws.log_weight)
        other_mean, other_error = _mean(others.x, weight)
        # A handful of coordinates more than four errors off is no accident, whatever the dimension.
        near = jnp.abs(mean - other_mean) < (SIGMAS + 1.0) * jnp.hypot(error, other_error)
        same &= jnp.all(near)
    return estimate, same


def _mean(x: Array, log_weight: Array) -> tuple[Array, Array]:
    weight = jax.nn.softmax(log_weight.reshape(-1)).reshape(log_weight.shape)
    mean = jnp.einsum("cd,cdi->i", weight, x)
    return mean, monte_carlo_error(weight[..., None] * weight.size * (x - mean))


def _fitted(rng_key: Key, target: RegularizedLoss, draws: StoredDraws) -> AnyGaussian:
    dense = draws.loss.size >= DENSE_FROM * target.dim
    method = ForwardKL("dense" if dense else "diagonal")
    fitted = method.step(rng_key, (), target, draws)[1]
    # Where no particle is left the reference itself stands in.
    usable = all_finite(fitted)
    sd = jnp.sqrt(target.reference.variance)
    other = Gaussian(target.reference.mean, jnp.diag(sd) if dense else sd)
    return jax.tree.map(lambda a, b: jnp.where(usable, a, b), fitted, other)


@meshed("engine")
def _heat(rng_key: Key, target: RegularizedLoss, engine: Importance) -> Estimate:
    return heat_of_pairs(engine.losses(rng_key, target))
