# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""NumPyro's HMC and NUTS on the whitened target, for a reference that moves at every outer step.

In whitened coordinates x = mean + scale ε the regularizer is a standard normal wherever the reference
is, so step size and mass matrix carry over when it moves. When its scale changes, the mass matrix changes with
it (`Metric.moved`). Warm-up runs once, as leading iterations of the same compiled loop, at a step size ε that the
chains share; then ε is frozen within a shift, so that each shift is a valid chain, and corrected once after it by
the law of Hamiltonian paths in many dimensions, acceptance = erfc(c ε²):

    ε ← ε sqrt( erfc⁻¹(target) / erfc⁻¹(acceptance) ),   by a factor of 2 at most.

Starting a new warm-up from the old step size would not be a warm start: it begins at ten times that.

Reference: Beskos, Pillai, Roberts, Sanz-Serna & Stuart (2013), "Optimal Tuning of the Hybrid Monte Carlo
Algorithm".
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro.infer.hmc import hmc
from numpyro.infer.util import ParamInfo

from numpyro_regloss._core.checks import (
    cast_fields,
    check_count,
    check_differentiable,
    check_positive,
)
from numpyro_regloss._core.coordinates import Coordinates
from numpyro_regloss._core.mesh import divided
from numpyro_regloss._core.pytree import is_concrete, strip_weak_types
from numpyro_regloss._core.stats import effective_sample_size, split_rhat
from numpyro_regloss._core.threefry import unrolled
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import StoredDraws
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.shift.hmc.warm_up import Adaptation, Places, Tuning, WarmUp
from numpyro_regloss.shift.metric import METRICS, Metric, unit_of
from numpyro_regloss.shift.sampler_stats import sampler_stats

__all__ = [
    "HMCInfo",
    "LEAST_ACCEPTANCE",
    "LEAST_STEP_SIZE",
    "MOST_DIVERGENT",
    "Settings",
    "HMCState",
    "after_rejection",
    "check_settings",
    "init",
    "remedy",
    "step",
]

# Below this mean acceptance one correction of the step size is not enough: warm up again.
REWARM_BELOW = 0.2
# NumPyro calls a path divergent that ends at a wall, where the loss is infinite, though its draws are right. With
# more divergent transitions than MOST_DIVERGENT, every chain must have moved in such a share of its transitions,
# and chains must agree: at a split R-hat of two the variance between them is three times that within.
LEAST_MOVED, MOST_RHAT = 0.1, 2.0
# NUTS stops at 2^10 leapfrog steps; the same bound keeps HMC from endless paths at a tiny step size.
MAX_LEAPFROG = 1024
# The acceptance of one shift is noisy, and near one it says little about the step size.
MOST_CORRECTION = 2.0
# Range of path lengths around the nominal one, so that no direction of q is a multiple of its period.
JITTER = 0.25
# A shift is rejected when its chains hardly moved, since their mean is then that of the last shift: at a
# lower acceptance, or with a smaller step. With variances it is in units of the reference, with scores in those of
# q, where the longest path at this step is a tenth of a standard deviation.
LEAST_ACCEPTANCE = 0.02
LEAST_STEP_SIZE, LEAST_STEP_SIZE_OF_SCORES = 1e-6, 1e-4
# How far from the centre gradients are compared, in units of the reference: near enough for the curvature where q
# is much narrower, and far enough for differences of rounded gradients.
PROBE = 1e-3
# A larger share of divergent transitions needs chains that moved and agree.
MOST_DIVERGENT = 0.5


class HMCState(NamedTuple):
    """The least that the next shift needs.

    Attributes:
        x: last positions of the chains, `(chain, dim)`.
        step_size: in units of the mass matrix, shared by the chains.
        coordinates: the mass matrix, shared by the chains.
        warm: whether step size and mass matrix are adapted.
        unit: scale of the reference over the root of the temperature, in which the mass matrix is.
    """

    x: Array
    step_size: Array
    coordinates: Coordinates
    warm: Array
    unit: Array


class HMCInfo(NamedTuple):
    """Diagnostics of one shift, over all chains; the warm-up counts in the evaluations only.

    Attributes:
        ok: draws are finite and the chains moved.
        num_loss: loss evaluations beside those that come with a gradient.
        num_grad: gradient evaluations, warm-up included.
        accept_prob: mean acceptance probability.
        step_size: of the leapfrog integrator, in units of the mass matrix (1 is about a standard deviation of q).
        num_divergent: divergent transitions, including those that ended at a wall, beyond which the loss is
            infinite. At a wall most transitions may be divergent although the draws are right, as they are while
            chains agree (`rhat`).
        num_steps: mean number of leapfrog steps per transition.
        ess: least effective sample size of the mean over the coordinates.
        rhat: greatest split R-hat over the coordinates.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    accept_prob: Array
    step_size: Array
    num_divergent: Array
    num_steps: Array
    ess: Array
    rhat: Array


class _Chains(NamedTuple):
    rng_key: Key
    potential: Array
    places: Places


class _Outcome(NamedTuple):
    accept_prob: Array
    num_steps: Array
    diverging: Array
    hamiltonian: Array


class _Tally(NamedTuple):
    accept_prob: Array
    num_divergent: Array
    num_steps: Array
    num_grad: Array


class _Buffers(NamedTuple):
    potential: Array
    places: Places
    outcome: _Outcome


class _Carry(NamedTuple):
    chains: _Chains
    tuning: Tuning
    adaptation: Adaptation
    buffers: _Buffers
    tally: _Tally


class Settings(NamedTuple):
    """What NUTS and HMC share; everything but the three last fields compiles."""

    algorithm: str
    num_warmup: int
    num_samples: int
    num_chains: int
    metric: Metric
    max_tree_depth: int
    trajectory_length: Array | float | None
    step_size: Array | float
    target_accept_prob: Array | float

    @property
    def least_step_size(self) -> float:
        """Chains with a smaller one are taken not to move."""
        return LEAST_STEP_SIZE_OF_SCORES if self.metric.from_scores else LEAST_STEP_SIZE


def init(settings: Settings, target: RegularizedLoss) -> HMCState:
    """Chains at the centre, not yet warm.

    Args:
        settings: of the kernel.
        target: the first target.

    Returns:
        The state.

    Raises:
        TypeError: if the loss returns integers or is external.
    """
    check_differentiable([settings.algorithm], target.loss, f"shift.{settings.algorithm}")
    mean = target.reference.mean
    return HMCState(
        x=jnp.broadcast_to(mean, (settings.num_chains, target.dim)),
        step_size=jnp.asarray(settings.step_size, mean.dtype),
        coordinates=settings.metric.identity(target.dim, mean.dtype),
        warm=jnp.asarray(False),
        unit=unit_of(target),
    )


def after_rejection(old: HMCState, new: HMCState) -> HMCState:
    """Positions go back; the next step warms up again from the last good step size.

    Args:
        old: the state before the rejected step.
        new: the state after it, unused.

    Returns:
        The state to go on with.
    """
    del new
    return old._replace(warm=jnp.zeros_like(old.warm))


def step(
    settings: Settings, rng_key: Key, state: HMCState, target: RegularizedLoss
) -> tuple[HMCState, StoredDraws, HMCInfo]:
    """One shift: warm-up if it is due, then `num_samples` transitions of every chain.

    Args:
        settings: of the kernel.
        rng_key: a random key.
        state: where the chains are and how they are tuned.
        target: the target, whose reference may have moved.

    Returns:
        The next state, the draws with their scores, and the diagnostics.
    """
    key_init, key_jitter, key_batch, key_probe = random.split(unrolled(rng_key), 4)
    # One batch for the whole shift: the chains' target must not change under them.
    target = target.on_batch(key_batch)
    potential, places, tuning = _start(settings, key_probe, state, target)
    transition = _kernel(settings, tuning, target)
    warm_up = WarmUp(settings.num_warmup, settings.target_accept_prob, settings.metric)
    num_leading = jnp.where(state.warm, 0, settings.num_warmup)

    def body(i: Array, carry: _Carry) -> _Carry:
        length = settings.trajectory_length
        if length is not None:
            length = length * random.uniform(
                random.fold_in(key_jitter, i), (), potential.dtype, 1 - JITTER, 1 + JITTER
            )
            length = jnp.minimum(length, MAX_LEAPFROG * carry.tuning.step_size)
        chains, outcome = transition(carry.chains, carry.tuning, length)
        counts = i >= num_leading
        accept_prob = jnp.mean(outcome.accept_prob)
        places, tuning, adaptation = lax.cond(
            counts,
            lambda: (chains.places, carry.tuning, carry.adaptation),
            lambda: warm_up.update(i, accept_prob, chains.places, carry.tuning, carry.adaptation),
        )
        chains = chains._replace(places=places)
        place = jnp.maximum(i - num_leading, 0)
        row = _Buffers(chains.potential, places, outcome)
        steps = jnp.sum(outcome.num_steps)
        tally = carry.tally
        return _Carry(
            chains,
            tuning,
            adaptation,
            jax.tree.map(
                lambda b, r: lax.dynamic_update_index_in_dim(b, r.astype(b.dtype), place, 0),
                carry.buffers,
                row,
            ),
            _Tally(
                tally.accept_prob + jnp.where(counts, accept_prob, 0.0),
                tally.num_divergent + jnp.where(counts, jnp.sum(outcome.diverging), 0),
                tally.num_steps + jnp.where(counts, steps, 0),
                tally.num_grad + steps,
            ),
        )

    chains = _Chains(random.split(key_init, settings.num_chains), potential, places)
    whole = jnp.zeros(settings.num_chains, int)
    outcome = _Outcome(potential, whole, whole > 0, potential)
    buffers = jax.tree.map(
        lambda a: jnp.zeros((settings.num_samples, *a.shape), a.dtype),
        _Buffers(potential, places, outcome),
    )
    zero = jnp.asarray(0)
    carry = _Carry(
        chains,
        tuning,
        warm_up.init(tuning, places),
        buffers,
        _Tally(jnp.zeros_like(state.step_size), zero, zero, zero),
    )
    carry = lax.fori_loop(0, num_leading + settings.num_samples, body, carry)
    return _report(settings, target, carry)


def _kernel(
    settings: Settings, tuning: Tuning, target: RegularizedLoss
) -> Callable[[_Chains, Tuning, Any], tuple[_Chains, _Outcome]]:
    def potential_of(coordinates: Coordinates) -> Callable[[Array], Array]:
        return lambda y: target.whitened_potential(coordinates.forth(y))

    # NumPyro's sampling function works only after its own initialization. That is done once, at the centre and
    # without adaptation, and what differs between chains or iterations is put in afterwards.
    init_kernel, sample_kernel = hmc(potential_fn_gen=potential_of, algo=settings.algorithm)
    zero = jnp.zeros_like(tuning.coordinates.scale)
    blank = init_kernel(
        ParamInfo(zero, jnp.zeros_like(zero[0]), zero),
        num_warmup=0,
        step_size=tuning.step_size,
        adapt_step_size=False,
        adapt_mass_matrix=False,
        trajectory_length=settings.trajectory_length,
        max_tree_depth=settings.max_tree_depth,
        model_args=(tuning.coordinates,),
        rng_key=random.key(0),
    )

    def transition(chain: _Chains, tuning: Tuning, length: Any) -> tuple[_Chains, _Outcome]:
        after = sample_kernel(
            blank._replace(
                z=chain.places.y,
                potential_energy=chain.potential,
                z_grad=chain.places.gradient,
                rng_key=chain.rng_key,
                trajectory_length=length,
                adapt_state=blank.adapt_state._replace(step_size=tuning.step_size),
            ),
            (tuning.coordinates,),
        )
        chain = _Chains(after.rng_key, after.potential_energy, Places(after.z, after.z_grad))
        outcome = _Outcome(after.accept_prob, after.num_steps, after.diverging, after.energy)
        return strip_weak_types((chain, outcome))

    def single(chains: _Chains, tuning: Tuning, length: Any) -> tuple[_Chains, _Outcome]:
        # Under vmap every conditional of a tree would run both of its branches.
        chain = jax.tree.map(lambda a: a[0], chains)
        return jax.tree.map(lambda a: a[None], transition(chain, tuning, length))

    several = divided(transition, in_axes=(0, None, None))
    return single if settings.num_chains == 1 else several


def _num_starts(settings: Settings) -> int:
    return settings.num_chains * (2 if settings.metric.from_scores else 1) + 1


def _start(
    settings: Settings, rng_key: Key, state: HMCState, target: RegularizedLoss
) -> tuple[Array, Places, Tuning]:
    # Potential and gradient belong to the old target and are computed anew. A chain that stands where
    # the new target is not finite restarts at the centre.
    noise = jax.vmap(target.reference.whiten)(state.x)
    # Signs: no coordinate is without a change, however few they are.
    probes = PROBE * random.rademacher(rng_key, noise.shape, noise.dtype)
    if not settings.metric.from_scores:
        probes = probes[:0]
    points = jnp.concatenate([noise, jnp.zeros_like(noise[:1]), probes])
    potential, gradient = divided(jax.value_and_grad(target.whitened_potential))(points)
    finite = jnp.isfinite(potential) & jnp.all(jnp.isfinite(gradient), -1)
    number = settings.num_chains

    def choose(a: Array) -> Array:
        usable = finite[:number].reshape(-1, *(1,) * (a.ndim - 1))
        return jnp.where(usable, a[:number], a[number])

    to = settings.metric.moved(state.coordinates, state.unit, unit_of(target))
    if settings.metric.from_scores:
        # Before there are draws, changes of the gradient around the centre tell of its curvature.
        near = settings.metric.first(points[number:], -gradient[number:], finite[number:])
        to = jax.tree.map(partial(jnp.where, state.warm), to, near)
    places = Places(to.back(choose(points)), to.gradient_back(choose(gradient)))
    return choose(potential), places, strip_weak_types(Tuning(state.step_size, to))


def _report(
    settings: Settings, target: RegularizedLoss, carry: _Carry
) -> tuple[HMCState, StoredDraws, HMCInfo]:
    tally, step_size = carry.tally, carry.tuning.step_size
    buffers = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), carry.buffers)
    potential, places, outcome = buffers
    coordinates = carry.tuning.coordinates
    noise = coordinates.forth(places.y)
    x = target.reference.unwhiten(noise)
    loss = (potential - 0.5 * jnp.sum(noise**2, -1)) * target.temperature
    score = -target.reference.unscale_transpose(coordinates.gradient_forth(places.gradient))
    draws = StoredDraws(
        x,
        jnp.zeros_like(loss),
        loss,
        target.temperature,
        score,
        stats=sampler_stats(
            target,
            noise,
            loss,
            kinetic=outcome.hamiltonian - potential,
            num_steps=outcome.num_steps,
            is_tree=settings.algorithm == "NUTS",
            diverging=outcome.diverging,
            acceptance_rate=outcome.accept_prob,
            step_size=step_size,
        ),
    )

    accept_prob = tally.accept_prob / settings.num_samples
    finite = jnp.isfinite(loss).all() & jnp.isfinite(noise).all()
    rhat = jnp.max(split_rhat(x))
    # Not of noise, which is rounded anew.
    changed = jnp.any(places.y[:, 1:] != places.y[:, :-1], -1)
    share = jnp.min(jnp.sum(changed, 1)) / max(settings.num_samples - 1, 1)
    mixed = (share >= LEAST_MOVED) & (rhat <= MOST_RHAT)
    moved = (
        (accept_prob >= LEAST_ACCEPTANCE)
        & ((tally.num_divergent <= MOST_DIVERGENT * loss.size) | mixed)
        & (step_size >= settings.least_step_size)
    )
    info = HMCInfo(
        ok=finite & moved,
        num_loss=jnp.asarray(0),
        num_grad=tally.num_grad + _num_starts(settings),
        accept_prob=accept_prob,
        step_size=step_size,
        num_divergent=tally.num_divergent,
        num_steps=tally.num_steps / (settings.num_samples * settings.num_chains),
        ess=jnp.min(effective_sample_size(x)),
        rhat=rhat,
    )
    state = HMCState(
        x=target.reference.unwhiten(coordinates.forth(carry.chains.places.y)),
        step_size=step_size * _correction(accept_prob, settings.target_accept_prob),
        coordinates=coordinates,
        warm=accept_prob >= REWARM_BELOW,
        unit=unit_of(target),
    )
    return state, draws, info


def _correction(accept_prob: Array, target_accept_prob: Array | float) -> Array:
    # The mean of ones may be rounded above one.
    missed = jnp.maximum(1.0 - accept_prob, 0.0)
    ratio = lax.erf_inv(1.0 - target_accept_prob) / lax.erf_inv(missed)
    return jnp.clip(jnp.sqrt(ratio), 1.0 / MOST_CORRECTION, MOST_CORRECTION)


def check_settings(engine: Any) -> None:
    """Casts settings that NUTS and HMC share and refuses what is out of range.

    Args:
        engine: the engine under construction.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range.
    """
    name = type(engine).__name__
    check_count(engine.num_warmup, f"{name}: num_warmup", 0)
    check_count(engine.num_samples, f"{name}: num_samples")
    check_count(engine.num_chains, f"{name}: num_chains")
    if not isinstance(engine.dense_mass, bool):
        raise TypeError(f"{name}: expected dense_mass as True or False, got {engine.dense_mass!r}.")
    if engine.metric not in METRICS:
        raise ValueError(
            f"{name}: expected metric as one of {', '.join(map(repr, METRICS))}, got {engine.metric!r}."
        )
    numbers = ("step_size", "target_accept_prob", "trajectory_length")
    # Numbers of one type whatever was given, since another type would be another program.
    cast_fields(engine, (field for field in numbers if field in vars(engine)), check_positive)
    if is_concrete(engine.target_accept_prob) and engine.target_accept_prob >= 1:
        raise ValueError(
            f"{name}: expected target_accept_prob between 0 and 1, got {engine.target_accept_prob}."
        )


def remedy(settings: Settings, info: Any, ok: np.ndarray) -> str:
    """What to use where chains were stopped again and again, at walls or by steepness.

    Args:
        settings: of the kernel.
        info: of all steps, as NumPy arrays.
        ok: which steps were taken.

    Returns:
        A sentence, or nothing.
    """
    size = settings.num_samples * settings.num_chains
    stuck = (info.accept_prob < LEAST_ACCEPTANCE) | (info.step_size < settings.least_step_size)
    stopped = ~ok & ~info.ok & (stuck | (info.num_divergent > MOST_DIVERGENT * size))
    if not stopped.any():
        return ""
    others = "shift.HMC, " if settings.algorithm == "NUTS" else ""
    return (
        f"{settings.algorithm}: in {stopped.sum()} rejected steps chains hardly moved, or were divergent in more "
        "than half of their transitions and did not agree (split R-hat up to "
        f"{np.max(info.rhat[stopped]):.3g}). Where a wall, at which the loss becomes infinite, cuts through the "
        f"reference, or the loss is very steep there, use {others}shift.SMC or shift.Importance, where draws "
        "beyond a wall have a weight of zero."
    )
