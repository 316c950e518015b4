# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Sequential Monte Carlo: from the reference to the shifted density over a ladder of temperatures.

    q_s ∝ exp(-s loss / T) N(x, tau I),   s = 0, …, 1

At every stage the particles are weighted by exp(-(s' - s) loss / T), resampled, and moved by Markov kernels that
keep q_s' and learn their proposals from the particles. The next s is where the weights' effective sample size
falls to a given fraction; the last state is q itself, and the mean weights multiply to the evidence E exp(-loss /
T) under the reference: exp(-F_tau / T). Works where weights of one step from reference to q degenerate, on several
modes, and by default without gradients.

Few survivors of resampling move many times each, and all states on the way are the particles of the next stage. So
there is one evaluation per particle and stage, and none is thrown away.

References: Del Moral, Doucet & Jasra (2006), "Sequential Monte Carlo Samplers"; Dau & Chopin (2022), "Waste-Free
Sequential Monte Carlo"; and those of `ladder` and `moves`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_regloss._core.checks import check_choice, check_count, check_positive
from numpyro_regloss._core.mesh import divided
from numpyro_regloss._core.pytree import (
    is_concrete,
    pytree_dataclass,
    static_field,
    strip_weak_types,
)
from numpyro_regloss._core.stats import effective_sample_size, weight_ess
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import StoredDraws
from numpyro_regloss.draws.resampling import systematic
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.shift.base import Shift
from numpyro_regloss.shift.smc import moves as kernels
from numpyro_regloss.shift.smc.ladder import bounded_energy, evidence, next_rung
from numpyro_regloss.shift.smc.moves import MOVES, Particles

__all__ = ["SMC", "SMCInfo"]

# Particles that hardly moved are copies of few.
LEAST_ACCEPTANCE = 0.02
# Particles whose Hamiltonian moves are accepted less often than this share of the usual sit where moves do not
# reach, in the neck of a funnel. What all islands miss there, their spread cannot show: about so many times the
# share of such particles was found missing, over models with a scale parameter. The other moves tell nothing.
STUCK, STUCK_ERROR = 0.5, 5.0
# Effective islands: where one of them has all the evidence, its particles have no equal to be judged by.
LEAST_ISLANDS = 1.5


class SMCInfo(NamedTuple):
    """Diagnostics of one run from reference to q.

    Attributes:
        ok: q was reached, with particles that moved, in more than one island.
        num_loss: loss evaluations beside those that come with a gradient.
        num_grad: gradient evaluations.
        log_evidence: log E exp(-loss / T) under the reference; -T times it is F_tau.
        log_evidence_error: standard error of it, from the spread of islands, and for moves of `"hmc"` from the
            share of particles that hardly moved, where all islands may miss something.
        ess: least effective sample size of the mean over the coordinates.
        num_stages: number of densities from the reference to q.
        accept_prob: mean acceptance probability at the last stage.
        step_size: of the moves at the end, see `SMC`.
        num_rejected: evaluations where the loss was NaN or -infinity: draws got weight zero, moves were rejected.
        num_undefined: the rejected evaluations that are at draws from the reference; E exp(-loss / T) is then
            undefined. The others are on the paths of moves, which may lead anywhere, and do no harm.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    log_evidence: Array
    log_evidence_error: Array
    ess: Array
    num_stages: Array
    accept_prob: Array
    step_size: Array
    num_rejected: Array
    num_undefined: Array


class _Carry(NamedTuple):
    particles: Particles
    s: Array
    log_evidence: Array
    step_size: Array
    accept_prob: Array
    stuck: Array
    most_stuck: Array
    num_stages: Array
    num_rejected: Array


@pytree_dataclass
class SMC(Shift):
    """Adaptive tempering from the reference to q, in islands.

    *Islands* are populations of particles that do not mix. Draws are `(num_islands, num_particles, dim)`: islands
    take the place of chains, and particles with a common ancestor are next to each other. So errors that allow for
    autocorrelation and the disagreement of chains allow for common ancestors and the disagreement of islands.
    Islands are weighted by their evidence.

    Args:
        num_particles: in every island; a multiple of `num_moves`.
        num_islands: populations that share only the temperatures and the tuning, an even number; take eight or
            more for reliable errors.
        num_moves: states in a row from every survivor of resampling; more where acceptance is low.
        moves: `"crank_nicolson"`, without gradients, which needs some hundred particles per dimension over all
            islands; or `"hmc"`, for a differentiable loss, which is better from about 20 dimensions on and for
            modes that are far apart.
        num_leapfrog: leapfrog steps, hence gradients, of a move of `"hmc"`.
        ess_fraction: share of the particles that are effective after reweighting, between 0 and 1. A larger share
            means more stages, which pays in many dimensions.
        max_stages: number of stages after which a run that has not reached q is given up as not ok. Some twenty
            for q a hundred times narrower than the reference in one direction, some twelve for each reference
            scale that lies between their centres.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range.

    Example:
        >>> from numpyro_regloss import Gaussian, Loss, RegularizedLoss
        >>> loss = Loss.from_function(lambda x: 500.0 * jnp.sum(x**2), jnp.ones(3))
        >>> target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau=1.0))
        >>> _, draws, info = SMC(num_particles=200).step(random.key(0), (), target)
        >>> draws.x.shape, bool(info.ok)
        ((8, 200, 3), True)
        >>> bool(jnp.abs(info.log_evidence + 11.863) < 4 * info.log_evidence_error)
        True
    """

    num_particles: int = static_field(default=200)
    num_islands: int = static_field(default=8)
    num_moves: int = static_field(default=10)
    moves: str = static_field(default="crank_nicolson")
    num_leapfrog: int = static_field(default=5)
    max_stages: int = static_field(default=1000)
    ess_fraction: Any = 0.8

    def __post_init__(self) -> None:
        check_count(self.num_moves, "SMC: num_moves")
        check_count(self.num_particles, "SMC: num_particles", 2 * self.num_moves)
        check_count(self.num_islands, "SMC: num_islands", 2)
        check_count(self.num_leapfrog, "SMC: num_leapfrog")
        check_count(self.max_stages, "SMC: max_stages")
        check_choice(self.moves, "SMC: moves", MOVES)
        if self.num_particles % self.num_moves:
            raise ValueError(
                f"SMC: expected num_particles as a multiple of num_moves={self.num_moves}, got "
                f"{self.num_particles}; every survivor of resampling gives num_moves particles."
            )
        if self.num_islands % 2:
            raise ValueError(
                f"SMC: expected num_islands as an even number, got {self.num_islands}; each half of them "
                "tunes the moves of the other."
            )
        fraction = check_positive(self.ess_fraction, "SMC: ess_fraction")
        if is_concrete(fraction) and fraction >= 1:
            raise ValueError(f"SMC: expected ess_fraction between 0 and 1, got {fraction}.")
        object.__setattr__(self, "ess_fraction", fraction)

    @property
    def uses_gradient(self) -> bool:  # ty: ignore[incompatible-property-override]
        """Whether moves differentiate the loss."""
        return self.moves == "hmc"

    def init(self, rng_key: Key, target: RegularizedLoss) -> tuple[()]:
        """Returns an empty state: runs do not depend on each other.

        Args:
            rng_key: unused.
            target: the target.

        Returns:
            `()`.

        Raises:
            TypeError: if moves need a gradient and the loss has none.
        """
        del rng_key
        if self.uses_gradient and (why := target.loss.lacks_gradient):
            raise TypeError(
                f'SMC: moves="hmc" follow gradients, and {why}; use moves="crank_nicolson".'
            )
        return ()

    def step(
        self, rng_key: Key, state: tuple[()], target: RegularizedLoss
    ) -> tuple[tuple[()], StoredDraws, SMCInfo]:
        """One run from the reference to q.

        Args:
            rng_key: a random key.
            state: `()`.
            target: the target.

        Returns:
            `()`, draws of shape `(num_islands, num_particles, dim)` and the diagnostics.
        """
        key_batch, key_start, key_run = random.split(rng_key, 3)
        # One batch for the whole run: weights of different losses cannot be compared.
        target = target.on_batch(key_batch)
        evaluate = partial(self._evaluate, target)
        dtype = target.reference.mean.dtype
        survivors = self.num_islands * self.num_particles // (2 * self.num_moves)
        noise = random.normal(key_start, (self.num_moves, 2, survivors, target.dim), dtype)
        particles, failures = lax.map(jax.vmap(evaluate), noise)
        zero = jnp.zeros((), dtype)
        count = jnp.asarray(0)
        carry = strip_weak_types(
            _Carry(
                self._in_islands(particles),
                zero,
                jnp.zeros(self.num_islands, dtype),
                kernels.first_step_size(self.moves, dtype),
                zero + 1.0,
                zero,
                zero,
                count,
                count + jnp.sum(failures),
            )
        )

        def unfinished(carry: _Carry) -> Array:
            alive = jnp.isfinite(carry.particles.energy).any()
            return (carry.s < 1) & (carry.num_stages < self.max_stages) & alive

        carry = lax.while_loop(unfinished, partial(self._stage, key_run, evaluate), carry)
        return state, *self._report(target, carry, jnp.sum(failures))

    def _stage(self, rng_key: Key, evaluate: kernels.Evaluate, carry: _Carry) -> _Carry:
        key_resample, key_move = random.split(random.fold_in(rng_key, carry.num_stages))
        particles = carry.particles
        s, log_weight, increment = next_rung(particles.energy, carry.s, self.ess_fraction)
        halves = (2, -1)
        noise = particles.noise.reshape(*halves, particles.noise.shape[-1])
        # Each half of the islands moves by what the other half has learned. A proposal that was fitted to the very
        # particles that it moves keeps their deviations from q, and over a ladder these add up in the evidence.
        own = noise, log_weight.reshape(halves)
        other = jax.tree.map(lambda a: a[::-1], own)
        # But a half of which nothing is left has nothing to teach.
        empty = jnp.all(other[1] == -jnp.inf, 1)
        other = (
            jnp.where(empty[:, None, None], own[0], other[0]),
            jnp.where(empty[:, None], own[1], other[1]),
        )
        frames = jax.vmap(kernels.frame_of)(*other)
        keys = random.split(key_resample, self.num_islands)
        survive = partial(systematic, count=self.num_particles // self.num_moves)
        index = jax.vmap(survive)(keys, log_weight)

        def gather(a: Array) -> Array:
            rows = jnp.take_along_axis(a, index.reshape(*index.shape, *(1,) * (a.ndim - 2)), 1)
            return rows.reshape(*halves, *a.shape[2:])

        move = kernels.crank_nicolson
        if self.uses_gradient:
            move = partial(kernels.hmc, num_leapfrog=self.num_leapfrog)

        def body(
            state: tuple[Particles, Array], key: Key
        ) -> tuple[tuple[Particles, Array], tuple[Particles, Array, Array]]:
            now, step_size = state
            propose = partial(move, s=s, step_size=step_size, evaluate=evaluate)
            # Particles behind a wall have no weight and tell nothing of the step size.
            inside = jnp.isfinite(now.energy)
            now, probability, failures = jax.vmap(propose)(random.split(key), now, frame=frames)
            accept_prob = jnp.sum(jnp.where(inside, probability, 0.0)) / jnp.maximum(
                jnp.sum(inside), 1
            )
            step_size = kernels.adapt(self.moves, step_size, accept_prob)
            return (now, step_size), (now, jnp.where(inside, probability, 0.0), failures)

        start = jax.tree.map(gather, particles), carry.step_size
        (_, step_size), (states, probability, failures) = lax.scan(
            body, start, random.split(key_move, self.num_moves)
        )
        inside = jnp.isfinite(start[0].energy)
        by_survivor = jnp.mean(probability, 0)
        slow = inside & (by_survivor < STUCK * kernels.TARGET_ACCEPTANCE["hmc"])
        count = jnp.maximum(jnp.sum(inside), 1)
        return _Carry(
            self._in_islands(states),
            s,
            carry.log_evidence + increment,
            step_size,
            jnp.sum(jnp.where(inside, by_survivor, 0.0)) / count,
            jnp.sum(slow) / count,
            # What moves after the last rung do no longer matters for the evidence.
            jnp.maximum(carry.most_stuck, carry.stuck),
            carry.num_stages + 1,
            carry.num_rejected + jnp.sum(failures),
        )

    def _evaluate(self, target: RegularizedLoss, noise: Array) -> tuple[Particles, Array]:
        def energy_at(noise: Array) -> Array:
            return target.energy(target.reference.unwhiten(noise))

        if self.uses_gradient:
            energy, gradient = divided(jax.value_and_grad(energy_at))(noise)
        else:
            energy, gradient = divided(energy_at)(noise), None
        energy, failed = bounded_energy(energy)
        return Particles(noise, energy, gradient), jnp.sum(failed)

    def _in_islands(self, states: Particles) -> Particles:
        # From (move, half, survivor, ...) to (island, particle, ...), the states of one survivor in a row.
        def arrange(a: Array) -> Array:
            shape = (self.num_islands, self.num_particles, *a.shape[3:])
            return jnp.moveaxis(a, 0, 2).reshape(shape)

        return jax.tree.map(arrange, states)

    def _report(
        self, target: RegularizedLoss, carry: _Carry, num_undefined: Array
    ) -> tuple[StoredDraws, SMCInfo]:
        particles = carry.particles
        alive = jnp.isfinite(particles.energy).any()
        islands = jnp.where(alive, carry.log_evidence, -jnp.inf)
        x = target.reference.unwhiten(particles.noise)
        score = None
        if self.uses_gradient:
            score = -target.reference.unscale_transpose(particles.noise + particles.gradient)
        peak = jnp.max(islands)
        relative = islands - jnp.where(jnp.isfinite(peak), peak, 0.0)
        log_weight = jnp.broadcast_to(relative[:, None], particles.energy.shape)
        log_weight = jnp.where(jnp.isfinite(particles.energy), log_weight, -jnp.inf)
        loss = particles.energy * target.temperature
        log_evidence, error = evidence(islands)
        if self.uses_gradient:
            error = jnp.hypot(error, STUCK_ERROR * carry.most_stuck)
        size = particles.energy.size
        evaluations = size * (1 + carry.num_stages)
        gradients = size * (1 + carry.num_stages * self.num_leapfrog)
        agreeing = weight_ess(relative)
        usable = jnp.isfinite(log_evidence) & (agreeing >= LEAST_ISLANDS)
        usable &= carry.accept_prob >= LEAST_ACCEPTANCE
        if score is not None:
            usable &= (jnp.isfinite(score).all(-1) | (log_weight == -jnp.inf)).all()
        info = SMCInfo(
            ok=(carry.s >= 1) & usable,
            num_loss=jnp.zeros_like(evaluations) if self.uses_gradient else evaluations,
            num_grad=gradients if self.uses_gradient else jnp.zeros_like(evaluations),
            log_evidence=log_evidence,
            log_evidence_error=error,
            ess=jnp.min(effective_sample_size(x)) * agreeing / self.num_islands,
            num_stages=carry.num_stages,
            accept_prob=carry.accept_prob,
            step_size=carry.step_size,
            num_rejected=carry.num_rejected,
            num_undefined=num_undefined,
        )
        draws = StoredDraws(x, log_weight, loss, target.temperature, score)
        return draws, info
