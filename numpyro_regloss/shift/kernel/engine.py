# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Any MCMC kernel of NumPyro on the shifted density, built by a factory inside the trace of each step.

Some kernels (BarkerMH, AIES, ESS) bind their target when they are initialized, and all remember their first
initialization. So every step builds the kernel anew, on `numpyro_regloss.model` with this step's target as
its argument, and initializes it there. Chains start at their last positions in whitened coordinates: when the
reference moves, they move with it, and are burnt in again.

References: Livingstone & Zanella (2022), "The Barker Proposal: Combining Robustness and Efficiency in
Gradient-Based MCMC"; Goodman & Weare (2010), "Ensemble Samplers with Affine Invariance"; Karamanis & Beutler
(2021), "Ensemble Slice Sampling"; Zhu (2019), "Sample Adaptive MCMC".
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random
from numpyro.infer import HMC, BarkerMH, init_to_value
from numpyro.infer.mcmc import MCMCKernel

from numpyro_regloss._core.checks import check_choice, check_count, check_differentiable
from numpyro_regloss._core.foreign import attribute
from numpyro_regloss._core.mesh import divided
from numpyro_regloss._core.pytree import (
    all_finite,
    pytree_dataclass,
    replace_fields,
    static_field,
    strip_weak_types,
)
from numpyro_regloss._core.stats import effective_sample_size, split_rhat
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import StoredDraws
from numpyro_regloss.losses.regularized import RegularizedLoss, latent_name, model
from numpyro_regloss.shift.base import Shift
from numpyro_regloss.shift.kernel.tuning import LEAST_BURN_IN, moved, renewed, resumed, tuning_of
from numpyro_regloss.shift.kernel.walkers import batches, ess_of_blocks
from numpyro_regloss.shift.metric import unit_of
from numpyro_regloss.shift.sampler_stats import sampler_stats

__all__ = ["Kernel", "KernelInfo", "KernelState"]

# A shift is rejected when its chains hardly moved, and a step size below which they do so is tuned anew.
LEAST_MOVED, REWARM_BELOW = 0.02, 0.1


class KernelState(NamedTuple):
    """The least that the next step needs.

    Attributes:
        noise: last positions in units of the reference, (x - mean) / scale, `(chain, dim)`.
        tuning: step size and mass matrix of each chain, where the kernel adapts them as HMC does; else None.
        warm: whether a step has set `tuning`.
        unit: scale of the reference over the root of the temperature, in which mass matrices are.
    """

    noise: Array
    tuning: Any
    warm: Array
    unit: Array


class KernelInfo(NamedTuple):
    """Diagnostics of one shift, over all chains; the warm-up counts in the evaluations only.

    Attributes:
        ok: draws are finite and the chains moved.
        num_loss: loss evaluations beside those that come with a gradient; a lower bound, one per chain and
            iteration, for kernels that do not report them (ensembles, which need several).
        num_grad: gradient evaluations.
        accept_prob: mean acceptance probability, or the share of transitions that moved where a kernel has none.
        num_divergent: divergent transitions.
        ess: least effective sample size of the mean over the coordinates; of an ensemble by batch means.
        rhat: greatest split R-hat over the coordinates. Walkers of an ensemble may change places, so for an
            ensemble it shows drift only.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    accept_prob: Array
    num_divergent: Array
    ess: Array
    rhat: Array


class _Row(NamedTuple):
    noise: Array
    potential: Any
    gradient: Any
    stats: dict[str, Any]


class _Tally(NamedTuple):
    accept_prob: Array
    num_moved: Array
    num_divergent: Array
    num_steps: Array


@pytree_dataclass
class Kernel(Shift):
    """Draws by any of NumPyro's MCMC kernels, or one of your own.

    `NUTS` and `HMC` of this package are faster ways to those two kernels. With kernels that adapt step size and
    mass matrix as HMC does (HMC, NUTS, BarkerMH) the first step does so for `num_warmup` iterations and later
    ones are burnt in for half as many; others (AIES, ESS, SA) run all of them at every step. Where the loss or its
    gradient is not a number, a proposal is rejected. SA needs thousands of iterations.

    Args:
        make_kernel: a function of a model that returns a kernel of it, such as `numpyro.infer.BarkerMH` or
            `lambda model: AIES(model, moves={AIES.StretchMove(): 1.0})`; build it once.
        num_warmup: iterations before draws are kept.
        num_samples: draws per chain and outer step.
        num_chains: chains, run side by side; for an ensemble kernel its walkers: an even number, better twice the
            number of parameters or more.
        metric: of kernels that adapt a mass matrix. With "scores" the second step takes it from the draws and
            scores of all chains in the first, and so on, and adapts the step size in its burn-in, if that has 20
            iterations or more. With "variance" the matrix of each chain stays as the kernel has found it in the
            first step; it is for losses whose gradients do not belong to their values.

    Raises:
        TypeError: if `make_kernel` is not such a function, or a count not an integer.
        ValueError: if a count is out of range, or does not go with an ensemble.

    Example:
        >>> from numpyro.infer import AIES
        >>> from numpyro_regloss import Gaussian, Loss
        >>> loss = Loss.from_function(lambda x: 0.5 * jnp.sum(x**2), jnp.full(2, 4.0))
        >>> target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau=1.0))
        >>> engine = Kernel(AIES, num_warmup=100, num_samples=200, num_chains=20)
        >>> state = engine.init(random.key(0), target)
        >>> state, draws, info = engine.step(random.key(1), state, target)
        >>> bool(jnp.all(jnp.abs(draws.x.mean((0, 1)) - 2.0) < 0.3))  # half way to the minimum
        True
    """

    make_kernel: Callable[..., Any] = static_field()
    num_warmup: int = static_field(default=200)
    num_samples: int = static_field(default=100)
    num_chains: int = static_field(default=4)
    metric: str = static_field(default="scores")

    _remedy: ClassVar[str] = (
        "pass a function of a model such as numpyro.infer.BarkerMH or lambda model: BarkerMH(model, step_size=0.1)"
    )

    def __post_init__(self) -> None:
        if isinstance(self.make_kernel, MCMCKernel) or not callable(self.make_kernel):
            raise TypeError(
                f"Kernel: expected a function that makes a kernel, got {_named(self.make_kernel)}; a kernel "
                f"remembers the first target that it met: {self._remedy}."
            )
        check_count(self.num_warmup, "Kernel: num_warmup", 0)
        check_count(self.num_samples, "Kernel: num_samples")
        check_count(self.num_chains, "Kernel: num_chains")
        check_choice(self.metric, "Kernel: metric", ("scores", "variance"))
        if self._made().is_ensemble_kernel and (self.num_chains % 2 or self.num_chains < 2):
            raise ValueError(
                "Kernel: expected an even number of chains for an ensemble kernel, got "
                f"num_chains={self.num_chains}; its walkers move in two halves: use twice the number of "
                "parameters or more."
            )

    @property
    def uses_gradient(self) -> bool:  # ty: ignore[incompatible-property-override]
        """Whether the kernel is one of NumPyro's that follow gradients; False for unknown kernels."""
        kernel = self._made()
        return isinstance(attribute(kernel, "inner_kernel", kernel), HMC | BarkerMH)

    def init(self, rng_key: Key, target: RegularizedLoss) -> KernelState:
        """Chains at draws of the reference; the first step tunes them.

        Args:
            rng_key: a random key.
            target: the first target.

        Returns:
            The state.

        Raises:
            TypeError: if the kernel follows gradients and the loss returns integers or is external.
            ValueError: if the kernel cannot be set up on the model.
        """
        check_differentiable(["Kernel"] * self.uses_gradient, target.loss, "shift.Kernel")
        mean = target.reference.mean
        noise = random.normal(rng_key, (self.num_chains, target.dim), mean.dtype)
        tuning = None
        if not self._made().is_ensemble_kernel:
            shapes = jax.eval_shape(partial(self._tuned_at, target), noise[0])
            zeros = jax.tree.map(lambda a: jnp.zeros((self.num_chains, *a.shape), a.dtype), shapes)
            tuning = strip_weak_types(zeros)
        return KernelState(noise, tuning, jnp.asarray(False), unit_of(target))

    def step(
        self, rng_key: Key, state: KernelState, target: RegularizedLoss
    ) -> tuple[KernelState, StoredDraws, KernelInfo]:
        """Draws from q.

        Args:
            rng_key: a random key.
            state: from `init` or the last step.
            target: the target.

        Returns:
            The next state, the draws and the diagnostics. Draws are `(num_chains, num_samples, dim)`, with scores
            where the kernel has gradients; those of an ensemble are grouped by batches of time, since its
            walkers depend on one another: `(batch, draw, dim)`.

        Raises:
            ValueError: if the kernel cannot be set up on the model.
        """
        key_batch, rng_key = random.split(rng_key)
        # One batch for the whole shift: the chains' target must not change under them.
        target = target.on_batch(key_batch)
        target = replace_fields(target, loss=target.loss.walled)
        start = _usable(target, state.noise)
        warm = state.warm if state.tuning is not None else jnp.asarray(False)
        keys = random.split(rng_key, self.num_chains)
        if self._made().is_ensemble_kernel:
            noise, rows, tally, tuning = self._run(target, keys, start, None, warm)
            rows = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), rows)
        else:
            tuning = state.tuning
            if tuning is not None and self._adapts_metric:
                tuning = moved(tuning, state.unit, unit_of(target))
            run = partial(self._run, target, warm=warm)
            noise, rows, tally, tuning = divided(run)(keys, start, tuning)
        return self._report(target, noise, rows, tally, tuning)

    def after_rejection(self, old: KernelState, new: KernelState) -> KernelState:
        """Positions go back, and the next step is tuned anew.

        Args:
            old: the state before the rejected step.
            new: the state after it, unused.

        Returns:
            The state to go on with.
        """
        del new
        return old._replace(warm=jnp.zeros_like(old.warm))

    @property
    def _burn_in(self) -> int:
        return self.num_warmup // 2

    @property
    def _adapts_metric(self) -> bool:
        # A user who gave a matrix and told the kernel to leave it keeps it.
        return bool(attribute(self._made(), "_adapt_mass_matrix", False))

    @property
    def _takes_metric(self) -> bool:
        return self.metric == "scores" and self._burn_in >= LEAST_BURN_IN and self._adapts_metric

    def _made(self) -> MCMCKernel:
        kernel = self.make_kernel(model)
        if not isinstance(kernel, MCMCKernel):
            raise TypeError(
                f"Kernel: expected make_kernel(model) to return a numpyro.infer MCMCKernel, got {_named(kernel)}; "
                f"{self._remedy}."
            )
        return kernel

    def _started(
        self, target: RegularizedLoss, rng_key: Key, noise: Array
    ) -> tuple[MCMCKernel, Any]:
        # A kernel of this trace, and its state at the given positions.
        kernel, name = self._made(), latent_name(target)
        if hasattr(kernel, "_init_strategy") and not kernel.is_ensemble_kernel:
            # BarkerMH and SA do not heed init_params.
            kernel._init_strategy = init_to_value(values={name: noise})  # ty: ignore  # noqa: SLF001
        try:
            state = kernel.init(rng_key, self.num_warmup, {name: noise}, (target,), {})
            z = attribute(state, kernel.sample_field)
            fits = isinstance(z, dict) and {k: jnp.shape(v) for k, v in z.items()} == {
                name: noise.shape
            }
        except Exception as error:
            raise ValueError(
                f"Kernel: {_named(kernel)} could not be set up on the regularized model: "
                f"{type(error).__name__}: {error} The model's one latent site is the real vector {name!r}: "
                "kernels for discrete sites or subsampled plates do not apply. Use NUTS, HMC, BarkerMH, AIES, ESS "
                "or SA, built on the model that make_kernel is given."
            ) from error
        if not fits:
            raise ValueError(
                f"Kernel: expected a kernel of the site {name!r} of shape {noise.shape}, got one of "
                f"{jax.tree.map(jnp.shape, z)}; build it on the model that make_kernel is given."
            )
        if isinstance(kernel, BarkerMH):
            kernel._potential_fn = _bounded(kernel._potential_fn)  # noqa: SLF001
        return kernel, state

    def _tuned_at(self, target: RegularizedLoss, noise: Array) -> Any:
        return tuning_of(self._started(target, random.key(0), noise)[1])

    def _run(
        self, target: RegularizedLoss, rng_key: Key, noise: Array, tuning: Any, warm: Array
    ) -> tuple[Array, _Row, _Tally, Any]:
        name = latent_name(target)  # of one chain, or one ensemble of them
        kernel, state = self._started(target, rng_key, noise)
        num_leading = jnp.asarray(self.num_warmup)
        if tuning is not None:
            adapting = self._burn_in if self._takes_metric else 0
            adapted = resumed(state, tuning, self.num_warmup, adapting)
            state = jax.tree.map(partial(jnp.where, warm), adapted, state)
            num_leading = jnp.where(warm, self._burn_in, num_leading)
        state = strip_weak_types(state)

        def body(i: Array, carry: tuple[Any, _Row, _Tally]) -> tuple[Any, _Row, _Tally]:
            state, rows, tally = carry
            after = strip_weak_types(kernel.sample(state, (target,), {}))
            row = _observe(after, kernel, name)
            old = attribute(state, kernel.sample_field)[name]
            moved = jnp.mean(jnp.any(row.noise != old, -1).astype(noise.dtype))
            counts = i >= num_leading
            accept_prob = _found(after, "accept_prob", moved)
            tally = _Tally(
                tally.accept_prob + jnp.where(counts, accept_prob, 0.0),
                tally.num_moved + jnp.where(counts, moved, 0.0),
                tally.num_divergent
                + jnp.where(counts, jnp.sum(_found(after, "diverging", False)), 0),
                tally.num_steps + jnp.sum(_found(after, "num_steps", 1)),
            )
            write = partial(
                lax.dynamic_update_index_in_dim, index=jnp.maximum(i - num_leading, 0), axis=0
            )
            return after, jax.tree.map(write, rows, row), tally

        blank = jax.tree.map(
            lambda a: jnp.zeros((self.num_samples, *a.shape), a.dtype),
            jax.eval_shape(lambda s: _observe(s, kernel, name), state),
        )
        zero, none = jnp.zeros((), noise.dtype), jnp.asarray(0)
        carry = state, blank, _Tally(zero, zero, none, none)
        state, rows, tally = lax.fori_loop(0, num_leading + self.num_samples, body, carry)
        return attribute(state, kernel.sample_field)[name], rows, tally, tuning_of(state)

    def _report(
        self, target: RegularizedLoss, noise: Array, rows: _Row, tally: _Tally, tuning: Any
    ) -> tuple[KernelState, StoredDraws, KernelInfo]:
        reference = target.reference
        x = reference.unwhiten(rows.noise)
        iterations = tally.num_steps
        has_gradient = rows.gradient is not None
        if rows.potential is not None:
            constant = 0.5 * target.dim * math.log(2 * math.pi)
            energy = rows.potential - 0.5 * jnp.sum(rows.noise**2, -1) - constant
            loss, num_loss = energy * target.temperature, jnp.asarray(0)
        else:
            loss = lax.map(jax.vmap(target.value), x)
            num_loss = jnp.asarray(loss.size)
        # A set-up evaluates each chain's start two or three times.
        evaluations = jnp.sum(iterations) * (1 if iterations.ndim else self.num_chains)
        evaluations = evaluations + 3 * self.num_chains
        score = -reference.unscale_transpose(rows.gradient) if has_gradient else None
        ess, rhat = jnp.min(effective_sample_size(x)), jnp.max(split_rhat(x))
        finite = jnp.isfinite(loss).all() & jnp.isfinite(x).all()
        block_size = None
        if self._made().is_ensemble_kernel:
            x, loss = batches(x), batches(loss)
            block_size = x.shape[1]
            ess = jnp.min(ess_of_blocks(x))
        # Stretches of an ensemble have no place for what belongs to its walkers.
        stats = sampler_stats(target, rows.noise, loss, **rows.stats) if rows.stats else None
        weight = jnp.zeros_like(loss)
        draws = StoredDraws(x, weight, loss, target.temperature, score, block_size, stats)
        if tuning is not None and has_gradient and self._takes_metric:
            tuning = renewed(tuning, rows.noise, rows.gradient)
        accept_prob = jnp.mean(tally.accept_prob) / self.num_samples
        moved = jnp.mean(tally.num_moved) / self.num_samples
        info = KernelInfo(
            ok=finite & (moved >= LEAST_MOVED),
            num_loss=num_loss + (0 if has_gradient else evaluations),
            num_grad=evaluations if has_gradient else jnp.asarray(0),
            accept_prob=accept_prob,
            num_divergent=jnp.sum(tally.num_divergent),
            ess=ess,
            rhat=rhat,
        )
        # A metric of scores is right before the chains are, and goes with a step size of its own.
        least = LEAST_MOVED if self._takes_metric else REWARM_BELOW
        return KernelState(noise, tuning, accept_prob >= least, unit_of(target)), draws, info


def _observe(state: Any, kernel: MCMCKernel, name: str) -> _Row:
    gradient = attribute(state, "z_grad", None)
    gradient = gradient[name] if isinstance(gradient, dict) else gradient
    noise = attribute(state, kernel.sample_field)[name]
    potential = attribute(state, "potential_energy", None)
    stats = {}
    if not kernel.is_ensemble_kernel:
        energy, adapt_state = _found(state, "energy", None), attribute(state, "adapt_state", None)
        stats = {
            "kinetic": None if energy is None or potential is None else energy - potential,
            "num_steps": _found(state, "num_steps", None),
            "diverging": _found(state, "diverging", None),
            "acceptance_rate": _found(state, "accept_prob", None),
            "step_size": attribute(adapt_state, "step_size", None),
        }
    return _Row(noise, potential, gradient, stats)


def _found(state: Any, name: str, default: Any) -> Any:
    inner = attribute(state, "inner_state", None)
    return attribute(state, name, attribute(inner, name, default))


def _bounded(potential: Any) -> Callable[[Any], Array]:
    # A wall where the potential or its gradient is no number. HMC rejects such proposals. BarkerMH would take the
    # NaN into its step size, and never move again.
    def bounded(z: Any) -> Array:
        start = lax.stop_gradient(z)
        value, gradient = jax.value_and_grad(potential)(start)
        ok = jnp.isfinite(value) & all_finite(gradient)
        slope = jax.tree.map(lambda g: jnp.where(ok, g, 0.0), gradient)
        # Zero, with that slope.
        rise = jax.tree.map(lambda g, a, b: jnp.sum(g * (a - b)), slope, z, start)
        return jnp.where(ok, value, jnp.inf) + sum(jax.tree.leaves(rise))

    return bounded


def _usable(target: RegularizedLoss, noise: Array) -> Array:
    # Where the new target is not finite a chain starts at the centre; one point for all would be no ensemble, so
    # that each keeps a little of its own place.
    def finite(point: Array) -> Array:
        return jnp.isfinite(target.whitened_potential(point))

    usable = jax.vmap(finite)(noise) & jnp.all(jnp.isfinite(noise), -1)
    near = 0.01 * jnp.where(jnp.isfinite(noise), noise, 0.0)
    return jnp.where(usable[:, None], noise, near)


def _named(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
