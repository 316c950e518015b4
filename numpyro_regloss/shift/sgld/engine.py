# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Stochastic gradient Langevin dynamics on the shifted density.

    z ← z - η P [g + T Σ⁻¹ (z - centre)] + sqrt(2 η T P) ξ

with g the gradient of the loss of a fresh minibatch, Σ the covariance of the reference (tau I) and P a diagonal
preconditioner. For a quadratic loss with Hessian H and full batches the chain's own law is Gaussian, with the
exact mean and, for A = H + T Σ⁻¹ and P = I, the covariance T A⁻¹ (I - η A / 2)⁻¹ instead of T A⁻¹; it is stable if
and only if the eigenvalues of η A stay below 2. In general averages are biased at first order in η, by the
discretization and by the noise of the batches, as long as P is fixed.

With a perturbation p the gradient is that at z + sqrt(p) ζ, fresh normal ζ at every step: an unbiased gradient
of the heat regularization F^H_p(z) = E loss(z + sqrt(p) ζ), so that the chain samples
exp(-F^H_p / T) N(centre, Σ), up to a bias of first order in η. F^H_p is loss + p tr(Hessian) / 2 up to terms
of p², small where a minimum is flat. Of a quadratic loss the trace is a constant: the law keeps its mean, and its
covariance is the C of

    C = (I - η P A) C (I - η P A)ᵀ + 2 η T P + η² p P H² P,

T A⁻¹ again as η goes to zero.

Draws carry no scores. The gradient of a batch is not that of log q, and the identities behind control variates
hold for draws of q, not of the law of the chain, which is another at first order in η.

References: Welling & Teh (2011), "Bayesian Learning via Stochastic Gradient Langevin Dynamics"; Li, Chen, Carlson
& Carin (2016), "Preconditioned Stochastic Gradient Langevin Dynamics for Deep Neural Networks"; Vollmer, Zygalakis
& Teh (2016), "Exploration of the (Non-)Asymptotic Bias and Variance of Stochastic Gradient Langevin Dynamics";
García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy and Heat
Regularization in Deep Learning"; Bruno, Hwang, An, Sabanis & Lim (2025), "Flatness-Aware Stochastic Gradient
Langevin Dynamics", arXiv 2510.02174, of random weight perturbation.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from numpyro_regloss._core.checks import (
    check_choice,
    check_count,
    check_differentiable,
    check_positive,
    check_schedule,
)
from numpyro_regloss._core.linalg import power_iteration
from numpyro_regloss._core.pytree import (
    is_concrete,
    pytree_dataclass,
    replace_fields,
    static_field,
    strip_weak_types,
)
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import BatchMeans, StoredDraws
from numpyro_regloss.draws.batches import NUM_BATCHES
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.shift.base import Shift
from numpyro_regloss.shift.sgld import langevin
from numpyro_regloss.shift.sgld.langevin import LangevinChains, RMSprop

__all__ = ["SGLD", "RMSprop", "SGLDInfo", "SGLDState"]

# Draws of up to four megabytes are stored where a dense covariance may be wanted; else means of batches are, as
# many as tell their errors and cost little beside the chain.
KEPT_ELEMENTS, KEPT_DIM = 2**20, 1_000
MOST_BATCHES, LEAST_BATCHES = NUM_BATCHES, 4
# Power iterations at the first step; later steps refine the direction by one each.
FIRST_ITERATIONS = 10
# An eigenvalue of the step from which a chain diverges, and by how much its moves have grown when it did.
LIMIT, EXPLODED = 2.0, 3.0
# Looks at the curvature cost this share of the gradients by default; the first one is longer.
LOOK_SHARE = 0.03


class SGLDState(NamedTuple):
    """The least that the next shift needs.

    Attributes:
        x: where the chains stopped, `(chain, dim)`, or None if they start at the centre.
        moment: of the gradients, for `RMSprop`, or None.
        direction: unit vector of the steepest curvature so far, `(dim,)`.
        curvature: of the regularized target along `direction`, when it was last measured.
        warm: whether the curvature has been measured.
        age: steps since the last measurement; at zero the next step measures.
    """

    x: Any
    moment: Any
    direction: Array
    curvature: Array
    warm: Array
    age: Array


class SGLDInfo(NamedTuple):
    """Diagnostics of one shift, over all chains.

    Attributes:
        ok: draws and losses are finite, and the chains did not diverge.
        num_loss: zero: losses come with the gradients.
        num_grad: gradient evaluations, including warm-up and the measurement of the curvature.
        step_size: the largest one.
        stability: step size times the steepest curvature of the regularized target, on one batch where a chain
            starts; from 2 on chains diverge, and well below 1 the bias is small. In steps without a measurement
            the curvature is the last one that was measured.
        growth: how much longer moves are at the end than in the beginning; far above one the chains diverge. NaN
            in steps without a measurement, if the step size is stable.
        ess: effective sample size of the mean, from batches of the chain, over all coordinates together; NaN in
            the same steps.
        looked: whether curvature, growth and ess were measured, see `diagnose_every`.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    step_size: Array
    stability: Array
    growth: Array
    ess: Array
    looked: Array


@pytree_dataclass
class SGLD(Shift):
    """Langevin dynamics with minibatches.

    In directions in which the loss is flat, a chain needs about tau / (T step_size) inner steps to reach q.
    Shorter chains that start at the centre give a mean between the centre and the mean of q, and so a shorter
    outer step. The fit's `mean_error` includes neither this nor the bias by the step size.

    With minibatches five inner steps need five gradients, and some more as `diagnose_every` says. Losses come with
    the gradients. So the loss of a draw is that of its batch at the start of the step to the draw, and the loss of
    the centre in the history is that of the first step. Without minibatches losses are those of the draws, for one
    gradient more.

    Args:
        step_size: η > 0, in squared units of the parameters per unit of the loss; a number, or a schedule of the
            inner step (from 0, warm-up included, anew at every outer step) such as Optax's, built once.
        num_samples: draws per chain and outer step.
        num_warmup: inner steps before them that are thrown away.
        num_chains: chains, run side by side by `vmap`, each with batches of its own.
        preconditioner: None, a fixed diagonal P > 0 of shape `(dim,)` in the order of `loss.flat_names`, or
            `RMSprop()`, for which the bias does not vanish with the step size.
        averaging_decay: None for plain averages, otherwise weights decay^(age of the draw), between 0 and 1:
            Entropy-SGD has 0.75. They are normalized, so the start has no weight. Errors of such averages are
            based on few, correlated draws and are too small, for 0.75 by a factor of up to about two.
        start: `"center"` (the paper) or `"last"`, where the chains stopped in the last outer step.
        noise: `"normal"`, or `"two_point"`: ±1, cheaper, of the same mean and covariance, so that averages have
            the same order of accuracy in the step size.
        keep: what the fit gets. `"draws"` are the draws themselves. `"batch_means"` are the means of a few dozen
            batches of consecutive draws, with the variances within. They give the mean, variances and their errors
            in the memory of a few dozen draws. `"auto"` stores draws of up to 1,000 parameters and a million
            numbers, and batch means beyond.
        perturbation: None, or the variance p > 0 of a random weight perturbation, in squared units of the
            parameters; a number, or `(dim,)` in the order of `loss.flat_names`. Each gradient is then taken at a
            perturbed point: Langevin dynamics on the heat regularization of the loss (fSGLD). Losses are those at
            the perturbed points. The distribution of the perturbation is that of `noise`.
        diagnose_every: interval, in outer steps, at which curvature, growth and ess are measured; they are also
            measured after a rejected step. Default: so long that this takes some 3 % of the gradients, besides the
            first time.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range.

    Example:
        >>> SGLD(step_size=0.1, num_samples=20, averaging_decay=0.75).start
        'center'
    """

    step_size: Any
    num_samples: int = static_field()
    num_warmup: int = static_field(default=0)
    num_chains: int = static_field(default=1)
    preconditioner: Any = None
    averaging_decay: Any = None
    start: str = static_field(default="center")
    noise: str = static_field(default="normal")
    keep: str = static_field(default="auto")
    perturbation: Any = None
    diagnose_every: int | None = static_field(default=None)

    uses_gradient: ClassVar[bool] = True
    hands_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count(self.num_samples, "SGLD: num_samples")
        check_count(self.num_warmup, "SGLD: num_warmup", 0)
        check_count(self.num_chains, "SGLD: num_chains")
        if self.num_samples * self.num_chains < 2:
            raise ValueError(
                "SGLD: expected two draws at least, got num_samples=1 of num_chains=1; the error of a mean "
                "cannot be estimated from one."
            )
        if callable(self.step_size):
            for step in (0, self._num_steps - 1):
                check_schedule(self.step_size, step, "SGLD: step_size")
        else:
            number = check_positive(self.step_size, "SGLD: step_size")
            object.__setattr__(self, "step_size", number)
        if self.averaging_decay is not None:
            decay = check_positive(self.averaging_decay, "SGLD: averaging_decay")
            if is_concrete(decay) and decay > 1:
                raise ValueError(f"SGLD: expected averaging_decay between 0 and 1, got {decay}.")
            object.__setattr__(self, "averaging_decay", decay)
        if self.preconditioner is not None and not isinstance(self.preconditioner, RMSprop):
            shape = np.shape(self.preconditioner)
            if len(shape) != 1:
                raise TypeError(
                    "SGLD: expected preconditioner as None, RMSprop() or an array of shape (dim,), got "
                    f"{type(self.preconditioner).__name__}; a single number belongs in step_size."
                )
            fixed = check_positive(self.preconditioner, "SGLD: preconditioner", (shape,))
            object.__setattr__(self, "preconditioner", fixed)
        if self.perturbation is not None:
            shape = np.shape(self.perturbation)
            shapes = ((), shape) if len(shape) == 1 else ((),)
            number = check_positive(self.perturbation, "SGLD: perturbation", shapes)
            object.__setattr__(self, "perturbation", number)
        if self.diagnose_every is not None:
            check_count(self.diagnose_every, "SGLD: diagnose_every")
        check_choice(self.start, "SGLD: start", ("center", "last"))
        check_choice(self.noise, "SGLD: noise", langevin.NOISES)
        check_choice(self.keep, "SGLD: keep", ("auto", "draws", "batch_means"))

    def remedy(self, info: SGLDInfo, ok: Any) -> str:
        """What to do about chains that diverged, or whose step size is at the limit of stability."""
        return remedy(info, ok)

    def init(self, rng_key: Key, target: RegularizedLoss) -> SGLDState:
        """Chains at the centre, and a random direction.

        Args:
            rng_key: a random key.
            target: the first target.

        Returns:
            The state.

        Raises:
            TypeError: if the loss returns integers or is external.
            ValueError: if a fixed preconditioner or a perturbation does not fit the parameters.
        """
        mean = target.reference.mean
        check_differentiable(["SGLD"], target.loss, "SGLD")
        for name in ("preconditioner", "perturbation"):
            shape = np.shape(vars(self)[name])
            if shape not in ((), mean.shape):
                raise ValueError(
                    f"SGLD: expected a {name} with one entry for each of the {mean.size} parameters, "
                    f"got shape {shape}; see loss.flat_names for their order."
                )
        direction = random.normal(rng_key, mean.shape, mean.dtype)
        adaptive = isinstance(self.preconditioner, RMSprop)
        return SGLDState(
            x=jnp.tile(mean, (self.num_chains, 1)) if self.start == "last" else None,
            moment=self.preconditioner.init(mean) if adaptive else None,
            direction=direction / jnp.linalg.norm(direction),
            curvature=jnp.zeros((), mean.dtype),
            warm=jnp.asarray(False),
            age=jnp.asarray(0),
        )

    def step(
        self, rng_key: Key, state: SGLDState, target: RegularizedLoss
    ) -> tuple[SGLDState, StoredDraws | BatchMeans, SGLDInfo]:
        """Draws from q, up to the bias of the step size.

        Args:
            rng_key: a random key.
            state: from `init` or the last step.
            target: the target.

        Returns:
            The next state, draws of shape `(num_chains, num_samples, dim)` or means of batches of them, and the
            diagnostics.
        """
        target, drawn = target.split_over(self._num_steps), target.loss.minibatch is not None
        key_batch, key_noise = random.split(rng_key)
        keys = random.split(key_batch, self.num_chains)
        pull = langevin.pull(target.reference, target.temperature)

        def evaluate(j: Array | int, x: Array) -> tuple[Array, Array]:
            if self.perturbation is not None:
                key = random.fold_in(random.fold_in(key_noise, self._num_steps), j)
                shape = (self.num_chains, x.shape[-1])
                aside = langevin.draw_noise(self.noise, key, shape, x.dtype)[: len(x)]
                x = x + jnp.sqrt(self.perturbation).astype(x.dtype) * aside
            return langevin.gradients(target, keys, j, x)

        def meet(j: Array | int, now: LangevinChains) -> LangevinChains:
            loss, gradient = evaluate(j, now.x)
            moment = self._moment(now.moment, gradient)
            first = jnp.where(j == 0, loss, now.first)
            return strip_weak_types(LangevinChains(now.x, gradient, loss, first, moment))

        def advance(j: Array, now: LangevinChains) -> LangevinChains:
            now = meet(j, now) if drawn else now
            assert now.gradient is not None
            step_size = self._step_size(j, now.x.dtype)
            diagonal = self._diagonal(now.moment)
            key = random.fold_in(key_noise, j)
            noise = langevin.draw_noise(self.noise, key, now.x.shape, now.x.dtype)
            variance = 2.0 * step_size * target.temperature * diagonal
            drift = now.gradient + pull(now.x)
            x = now.x - step_size * diagonal * drift + jnp.sqrt(variance) * noise
            now = strip_weak_types(now._replace(x=x))
            return now._replace(gradient=None) if drawn else meet(j + 1, now)

        x = state.x
        if x is None:
            x = jnp.tile(target.reference.mean, (self.num_chains, 1))
        none = jnp.zeros(self.num_chains, x.dtype)
        chains = strip_weak_types(LangevinChains(x, None, none, none, state.moment))
        if not drawn:
            chains = meet(0, chains)
        every = self._interval(drawn=drawn)
        last, draws = self._sample(advance, chains, target.temperature)
        if drawn or (self.start == "center" and self.perturbation is None):
            draws = replace_fields(draws, center_loss=jnp.mean(last.first))
        looked = (state.age == 0) | (every == 1)
        state, spent = self._look(state, target, evaluate, chains, every)
        x = last.x if self.start == "last" else None
        age = jnp.where(looked, 1, state.age + 1) % every
        state = state._replace(x=x, moment=last.moment, age=age)
        spent = spent + self.num_chains * (self._num_steps + (not drawn))
        return state, draws, self._info(draws, last, state.curvature, spent, looked)

    def after_rejection(self, old: SGLDState, new: SGLDState) -> SGLDState:
        """The old state; its curvature is measured again, since a larger one may be the cause."""
        del new
        return old._replace(age=jnp.zeros_like(old.age))

    def center_loss(self, draws: StoredDraws | BatchMeans) -> Array | None:
        """The loss that came with the first gradients; None if that is not the loss at the centre."""
        return draws.center_loss

    @property
    def _num_steps(self) -> int:
        return self.num_warmup + self.num_samples

    def _step_size(self, j: Array, dtype: Any) -> Array:
        step_size = self.step_size(j) if callable(self.step_size) else self.step_size
        return jnp.asarray(step_size, dtype)

    def _largest_step_size(self, dtype: Any) -> Array:
        if not callable(self.step_size):
            return self._step_size(jnp.asarray(0), dtype)
        return jnp.max(jax.vmap(partial(self._step_size, dtype=dtype))(jnp.arange(self._num_steps)))

    def _moment(self, moment: Any, gradient: Array) -> Any:
        adaptive = isinstance(self.preconditioner, RMSprop)
        return self.preconditioner.update(moment, gradient) if adaptive else None

    def _diagonal(self, moment: Any) -> Array | float:
        if isinstance(self.preconditioner, RMSprop):
            return self.preconditioner.diagonal(moment)
        return 1.0 if self.preconditioner is None else self.preconditioner

    def _batches(self, dim: int) -> tuple[int, int]:
        # Draws per batch and number of batches.
        numbers = self.num_samples * self.num_chains * dim
        few = dim <= KEPT_DIM and numbers <= KEPT_ELEMENTS
        if self.keep == "draws" or (self.keep == "auto" and few):
            return 1, self.num_samples
        room = min(KEPT_ELEMENTS // (self.num_chains * dim), self.num_samples // 4, MOST_BATCHES)
        size = -(-self.num_samples // max(room, LEAST_BATCHES))
        return size, -(-self.num_samples // size)

    def _sample(
        self, advance: Callable, chains: LangevinChains, temperature: Array
    ) -> tuple[LangevinChains, StoredDraws | BatchMeans]:
        size, count = self._batches(chains.x.shape[-1])
        decay = 1.0 if self.averaging_decay is None else self.averaging_decay
        log_weight = langevin.decaying_weights(self.num_samples, size, decay)
        log_weight = jnp.tile(log_weight.astype(chains.x.dtype), (self.num_chains, 1))
        lengths = (self.num_warmup, self.num_samples)
        if size == 1:
            last, x, loss = langevin.store(advance, chains, *lengths)
            return last, StoredDraws(x, log_weight, loss, temperature)
        last, sums = langevin.sum_up(advance, chains, *lengths, size, count, decay)
        draws = BatchMeans(sums.mean, log_weight, sums.loss, temperature, spread=sums.spread)
        return last, draws

    def _interval(self, *, drawn: bool) -> int:
        if self.diagnose_every is not None:
            return self.diagnose_every
        cost = 2 if drawn else 1
        return math.ceil(cost / (LOOK_SHARE * self.num_chains * self._num_steps))

    def _look(
        self,
        state: SGLDState,
        target: RegularizedLoss,
        evaluate: Callable,
        chains: LangevinChains,
        every: int,
    ) -> tuple[SGLDState, Array]:
        # Differences over one reference scale, on the first batch of the first chain, at its start: where a chain
        # that diverged has gone nothing is to be learnt.
        x, known = chains.x[:1], chains.gradient
        scale = jnp.sqrt(jnp.mean(target.reference.variance))
        pull = langevin.pull(target.reference, target.temperature)
        at_centre = pull(x)

        def look() -> tuple[SGLDState, Array]:
            gradient = evaluate(0, x)[1] if known is None else known[:1]
            moment = self._moment(state.moment, gradient) if known is None else chains.moment
            root = jnp.sqrt(self._diagonal(moment))

            def multiply(direction: Array) -> Array:
                change = root * direction
                length = scale / jnp.maximum(jnp.linalg.norm(change), jnp.finfo(x.dtype).tiny)
                moved = x + length * change
                found = evaluate(0, moved)[1] + pull(moved) - gradient - at_centre
                return root * found[0] / length

            iterations = jnp.where(state.warm, 1, FIRST_ITERATIONS)
            found = power_iteration(state.direction, iterations, multiply)
            new = state._replace(
                direction=found.direction, curvature=found.quotient, warm=jnp.asarray(True)
            )
            return new, iterations + (known is None)

        if every == 1:
            return look()
        return lax.cond(state.age == 0, look, lambda: (state, jnp.asarray(0)))

    def _info(
        self,
        draws: StoredDraws | BatchMeans,
        last: LangevinChains,
        curvature: Array,
        spent: Array,
        looked: Array,
    ) -> SGLDInfo:
        finite = jnp.isfinite(draws.x).all() & jnp.isfinite(draws.loss).all()
        if last.gradient is not None:
            finite = finite & jnp.isfinite(last.gradient).all()
        largest = self._largest_step_size(draws.x.dtype)
        stability = largest * curvature
        unknown = jnp.full((), jnp.nan, draws.x.dtype)
        ess, grown = lax.cond(
            looked | (stability >= LIMIT),
            lambda: langevin.diagnose(draws.x, draws.log_weight, draws.spread),
            lambda: (unknown, unknown),
        )
        diverged = (stability >= LIMIT) & (grown > EXPLODED)
        return SGLDInfo(
            ok=finite & ~diverged,
            num_loss=jnp.asarray(0),
            num_grad=spent,
            step_size=largest,
            stability=stability,
            growth=grown,
            ess=ess,
            looked=looked,
        )


def remedy(info: SGLDInfo, ok: Any) -> str:
    """What to do about chains that diverged, or whose step size is at the limit of stability.

    Args:
        info: of all steps of a run, as NumPy arrays.
        ok: which of them were taken.

    Returns:
        A sentence, or nothing.
    """
    stability = np.nan_to_num(info.stability, posinf=0.0)
    unstable = stability >= LIMIT
    if np.median(stability) < LIMIT and not (unstable & ~ok).any():
        lost = np.sum(np.isinf(info.growth))
        if not lost:
            return ""
        return (
            f"SGLD: in {lost} of {ok.size} steps chains became infinite or NaN though the step size is stable "
            "where they start: use a smaller step_size if the loss is steeper where they went, or look for "
            "NaN among the data."
        )
    worst = np.argmax(stability)
    limit = info.step_size[worst] * LIMIT / stability[worst]
    return (
        f"SGLD: the step size was unstable for the regularized target in {unstable.sum()} of {ok.size} steps "
        f"(step size times steepest curvature up to {stability[worst]:.3g}; chains diverge from 2 on): use a "
        f"step_size below {limit:.2g}, half of it for a small bias, or a preconditioner."
    )
