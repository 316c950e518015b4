# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""The Gaussian of fixed covariance that minimizes KL(Gaussian || q), by stochastic approximation.

The mean y solves the implicit equation  E ∇loss(y + scale ξ) + T Σ⁻¹ (y - centre) = 0: the heat step,
a proximal step on the heat-regularized loss. In whitened coordinates y = centre + scale u,

    u ← u - a_j [ scaleᵀ ∇loss(centre + scale (u + ξ_j)) / T + u ],

or, without gradients, with the values  [loss(centre + scale (u + ξ_j)) - loss(centre + scale (u - ξ_j))] ξ_j / 2T
in place of the gradient (score form).

The *natural steps* a_j = 1/j, that is (tau/T)/j in parameters, end at minus the mean of the gradients along the
way. M of them multiply the error in a direction of curvature λ (tau times that of loss/T) by Π_j (j - 1 - λ) / j,
a binomial coefficient of λ over M. So M steps together are stable for λ < M, and in between errors grow by up to λ
over λ/2. Let κ be the steepest curvature. Natural steps are taken with minibatches and few steps, for κ below M
and 4; for larger κ, steps are cut at 1 / (1 + κ).

In all other cases a_j = (1 + κ)⁻¹ ((1 + κ) / (j + κ))^0.6, and iterates are averaged with weights proportional to
j. This forgets the start also in directions of negative curvature, where natural steps take very long.

κ is measured by a power iteration that continues over the outer steps that measure.

The noise of the score form is multiplicative: steps are stable in mean square where a_j times the trace of the
curvature is below about two. Its κ is therefore the mean of |ξᵀ Hessian ξ| from second differences of values, at
least the absolute trace, and no step is longer than one reference scale.

References: Robbins & Monro (1951), "A Stochastic Approximation Method"; Polyak & Juditsky (1992),
"Acceleration of Stochastic Approximation by Averaging"; García Trillos, Kaplan & Sanz-Alonso (2019),
"Variational Characterizations of Local Entropy and Heat Regularization in Deep Learning".
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jax import lax, random

from numpyro_regloss._core.checks import (
    cast_fields,
    check_choice,
    check_count,
    check_flag,
    check_positive,
    check_schedule,
)
from numpyro_regloss._core.pytree import pytree_dataclass, static_field
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.fit.base import Fit
from numpyro_regloss.fit.robbins_monro import error as running
from numpyro_regloss.fit.robbins_monro import gradient as evaluations
from numpyro_regloss.fit.robbins_monro.gradient import Estimator, GradientEstimate
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["RobbinsMonro", "RobbinsMonroInfo", "RobbinsMonroState"]

# Between 1/2 and 1: any such decay averages to the optimal variance; slower ones forget the start sooner.
DECAY = 0.6
# The stopping rule waits for an error that rests on so many steps, and looks again every so many.
FIRST_CHECK, CHECK_EVERY = 32, 16
# Of the mean's last digit.
ROUNDING = 4.0
# Looks cost this share of the evaluations by default; the first one is longer.
LOOK_SHARE = 0.03
# So many natural steps at most, and their largest curvature: errors grow by six on the way.
FEW_STEPS, NATURAL_LIMIT = 32, 4.0


class RobbinsMonroState(NamedTuple):
    """What is known of the curvature.

    Attributes:
        direction: unit vector of the steepest curvature so far, `(dim,)`, whitened.
        curvature: κ along it at the last measurement, for the score form κ alone; negative before the first step.
        unit: mean variance of the reference over T then.
        age: steps since then; at zero the next step measures.
    """

    direction: Array
    curvature: Array
    unit: Array
    age: Array


class RobbinsMonroInfo(NamedTuple):
    """Diagnostics of one fit.

    Attributes:
        ok: the mean is finite, which requires that all losses and gradients were.
        num_loss: loss evaluations; zero where gradients are used.
        num_grad: gradient evaluations; zero with the score form.
        curvature: κ, tau times the curvature of loss / T in its steepest direction, or the number that bounds the
            steps of the score form (-1 with a step size of your own, which needs none). In steps without a
            measurement it is the last one, in the units of this step's tau.
        residual: norm of the implicit equation at the mean, from one more gradient, in units of the
            reference scale: about as large as the noise of that gradient when the equation is solved; infinite if
            that gradient is not finite, NaN in steps without a measurement.
        mean_error: standard error of the mean as solution of the implicit equation, `(dim,)`, in units of
            the parameters; infinite where it is unknown, as it is after one step.
        num_steps: inner steps done.
        converged: whether error and average drift fell below `tolerance`; false without one.
        looked: whether curvature and residual were measured, see `diagnose_every`.
        loss: at the points of the first inner step, on its minibatch; None for a loss without minibatches.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    curvature: Array
    residual: Array
    mean_error: Array
    num_steps: Array
    converged: Array
    looked: Array
    loss: Any = None

    @property
    def biased(self) -> bool:
        """True: `mean_error` contains the remaining way. The same at all steps, so no column of the history."""
        return True


class Path(NamedTuple):
    """Where inner steps led.

    Attributes:
        u: the solution, `(dim,)`, whitened.
        moment: second moments of its error, `(dim, dim)` or their diagonal.
        loss: at the points of the first step.
        num_steps: steps done.
        converged: whether a tolerance was met.
    """

    u: Array
    moment: Array
    loss: Array
    num_steps: Array
    converged: Array


Evaluate = Callable[[Array, Array], tuple[Array, GradientEstimate]]


@pytree_dataclass
class RobbinsMonro(Fit):
    """The paper's heat step.

    Let κ be tau times the steepest curvature of loss / T. In directions in which the loss is flat, the mean needs
    about 1 + κ steps to move; with fewer it stays near the centre. `info.residual` shows that.

    `info.mean_error` contains the noise and the remaining way to the solution, both estimated from the curvature
    along the way. Do not trust it after fewer than about a hundred steps or 1 + κ steps (the `residual` is then
    far above the noise of the gradient). If the equation has several roots, it is the error of the nearest one.
    Above 32 parameters it leaves out correlations. For natural steps, which are few, it is the scatter of their
    gradients, as if the loss were flat, and too large where the loss is steep.

    With minibatches five inner steps need five gradients, and some more as `diagnose_every` says. The loss in the
    history comes with the first of them, so it is the loss at a draw of the reference around the centre. The
    curvature is that of one batch at a time. Where batches have so few rows that their curvatures differ by
    factors, steps may be too long for some, and a run diverges: draw more rows, or use a smaller tau.

    Args:
        num_steps: inner steps, at most; each draws fresh noise and a fresh minibatch.
        antithetic: average the gradients at ±ξ (two gradients per step). The error then has no linear part, and
            quadratics are solved without noise. Without pairs, the score form subtracts the loss at the mean
            instead. Default: pairs, but not for gradients of minibatches, since pairs do not reduce the noise of a
            batch.
        averaging: return the weighted average of the iterates instead of the last one. Default: yes, except for up
            to 32 steps with gradients of minibatches and without a tolerance. These are natural steps where the
            curvature allows that.
        step_size: None for the steps above; a number or a schedule of the inner step (from 0) in units
            of tau / T otherwise: `lambda j: 1 / (j + 1)` are the natural steps.
        gradient: `"reparametrized"`, gradients of the loss; `"score"`, values of the loss alone, which
            may be integers or jump. The latter's variance is about dim |∇|² / num_pairs.
        num_pairs: noise vectors per step.
        tolerance: None for all of `num_steps`; otherwise stop once the error of the mean and the average
            drift, their largest coordinates in units of the reference scale, are below it.
        diagnose_every: interval, in outer steps, at which curvature and residual are measured; they are also
            measured after a rejected step. Default: so long that this takes some 3 % of the evaluations, besides
            the first time.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range, or a tolerance is given without averaging.

    Example:
        >>> RobbinsMonro(num_steps=20).gradient
        'reparametrized'
    """

    num_steps: int = static_field(default=20)
    antithetic: bool | None = static_field(default=None)
    averaging: bool | None = static_field(default=None)
    step_size: Any = None
    gradient: str = static_field(default="reparametrized")
    num_pairs: int = static_field(default=1)
    tolerance: Any = None
    diagnose_every: int | None = static_field(default=None)

    uses_draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count(self.num_steps, "RobbinsMonro: num_steps")
        check_count(self.num_pairs, "RobbinsMonro: num_pairs")
        check_choice(self.gradient, "RobbinsMonro: gradient", ("reparametrized", "score"))
        flags = [name for name in ("antithetic", "averaging") if vars(self)[name] is not None]
        cast_fields(self, flags, check_flag)
        if self.diagnose_every is not None:
            check_count(self.diagnose_every, "RobbinsMonro: diagnose_every")
        if callable(self.step_size):
            # At the last step, since warm-ups start at zero.
            check_schedule(self.step_size, self.num_steps - 1, "RobbinsMonro: step_size")
        elif self.step_size is not None:
            step_size = check_positive(self.step_size, "RobbinsMonro: step_size")
            object.__setattr__(self, "step_size", step_size)
        if self.tolerance is not None:
            tolerance = check_positive(self.tolerance, "RobbinsMonro: tolerance")
            object.__setattr__(self, "tolerance", tolerance)
            if self.averaging is False:
                raise ValueError(
                    "RobbinsMonro: expected averaging=True with a tolerance, got False: the rule watches "
                    "the error of the average; use averaging=True or tolerance=None."
                )

    @property
    def uses_gradient(self) -> bool:  # ty: ignore[incompatible-property-override]
        """Whether the loss is differentiated."""
        return self.gradient != "score"

    def init(self, rng_key: Key, target: RegularizedLoss) -> RobbinsMonroState:
        """A random direction, no curvature yet."""
        direction = random.normal(rng_key, (target.dim,), target.reference.mean.dtype)
        return RobbinsMonroState(
            direction / jnp.linalg.norm(direction),
            jnp.full((), -1.0, direction.dtype),
            jnp.ones((), direction.dtype),
            jnp.asarray(0),
        )

    def step(
        self, rng_key: Key, state: RobbinsMonroState, target: RegularizedLoss, draws: Draws
    ) -> tuple[RobbinsMonroState, AnyGaussian, RobbinsMonroInfo]:
        """Solves the implicit equation of the mean.

        Args:
            rng_key: a random key.
            state: the curvature so far.
            target: the target.
            draws: unused.

        Returns:
            The next state, the Gaussian with the reference's scale, and the info.
        """
        del draws
        key_look, key_steps = random.split(rng_key)
        target = target.split_over(self.num_steps)
        pairs, score = self._has_pairs(target), self.gradient == "score"
        build = evaluations.score if score else evaluations.reparametrized
        estimate = build(target, antithetic=pairs)
        every = self._interval(pairs)
        looked = (state.age == 0) | (every == 1)

        def evaluate(j: Array, u: Array) -> tuple[Array, GradientEstimate]:
            key_batch, key_noise = random.split(random.fold_in(key_steps, j))
            noise = random.normal(key_noise, (self.num_pairs, *u.shape), u.dtype)
            return noise, estimate(key_batch, u, noise)

        state, first, spent = self._look(key_look, state, target, estimate, every)
        if self._is_short(target):
            path = self._few_steps(evaluate, state.curvature, first)
        else:
            path = self._averaged(evaluate, state.curvature, first, pairs=pairs)
        reference = target.reference
        mean, per_step = reference.unwhiten(path.u), self._per_step(pairs)
        error = running.in_parameters(path.moment, reference)
        # No noise and no bias still leave what the last digits hide.
        error = jnp.maximum(error, ROUNDING * jnp.finfo(mean.dtype).eps * jnp.abs(mean))

        def residual() -> Array:
            found = jnp.linalg.norm(evaluate(path.num_steps, path.u)[1].gradient + path.u)
            return jnp.where(jnp.isfinite(found), found, jnp.inf)

        unknown = jnp.full((), jnp.nan, mean.dtype)
        found = residual() if every == 1 else lax.cond(looked, residual, lambda: unknown)
        count = spent + per_step * (path.num_steps + looked)
        info = RobbinsMonroInfo(
            ok=jnp.isfinite(mean).all(),
            num_loss=count if score else jnp.zeros_like(count),
            num_grad=jnp.zeros_like(count) if score else count,
            curvature=state.curvature,
            residual=found,
            mean_error=jnp.where(jnp.isfinite(error), error, jnp.inf),
            num_steps=path.num_steps,
            converged=path.converged,
            looked=looked,
            loss=path.loss if target.loss.minibatch is not None else None,
        )
        age = jnp.where(looked, 1, state.age + 1) % every
        return state._replace(age=age), reference._replace(mean=mean), info

    def after_rejection(self, old: RobbinsMonroState, new: RobbinsMonroState) -> RobbinsMonroState:
        """The old state; its curvature is measured again, since a larger one may be the cause."""
        del new
        return old._replace(age=jnp.zeros_like(old.age))

    def center_loss(self, info: RobbinsMonroInfo) -> Array | None:
        """The loss that came with the first gradient, if there are minibatches."""
        return info.loss

    def _look(
        self,
        rng_key: Key,
        state: RobbinsMonroState,
        target: RegularizedLoss,
        estimate: Estimator,
        every: int,
    ) -> tuple[RobbinsMonroState, Array, Array]:
        # The state, where to start, and what was spent.
        reference = target.reference
        nowhere, nothing = jnp.zeros_like(reference.mean), jnp.asarray(0)
        if self.step_size is not None:
            return state, nowhere, nothing
        unit = jnp.mean(reference.variance) / target.temperature
        unit = unit.astype(state.unit.dtype)
        # A tau that changes, changes κ with it; before the first look there is none.
        scaled = state.curvature * jnp.where(state.curvature < 0, 1.0, unit / state.unit)
        state = state._replace(curvature=scaled, unit=unit)

        def look() -> tuple[RobbinsMonroState, Array, Array]:
            if self.gradient == "score":
                curvature, start, spent = evaluations.curvature_of_values(
                    rng_key, state.curvature, target
                )
                return state._replace(curvature=curvature), start, spent
            direction, curvature, start, spent = evaluations.curvature_of_gradients(
                rng_key, state.direction, state.curvature, estimate
            )
            spent = spent * (2 if self._has_pairs(target) else 1)
            return state._replace(direction=direction, curvature=curvature), start, spent

        if every == 1:
            return look()
        return lax.cond(state.age == 0, look, lambda: (state, nowhere, nothing))

    def _few_steps(self, evaluate: Evaluate, curvature: Array, first: Array) -> Path:
        limit = min(max(2.0, self.num_steps), NATURAL_LIMIT)
        longest = jnp.where(curvature < limit, 1.0, 1.0 / (1.0 + curvature))

        def advance(
            j: Array, carry: tuple[Array, running.Scatter]
        ) -> tuple[Array, running.Scatter]:
            u, scatter = carry
            _, found = evaluate(j, u)
            size = jnp.minimum(longest, 1.0 / (j + 1.0)).astype(u.dtype)
            u = u - size * (found.gradient + u)
            return u, scatter.add(j, size, found.gradient, found.loss)

        carry = (first, running.Scatter.zero(first))
        u, scatter = lax.fori_loop(0, self.num_steps, advance, carry)
        num_steps = jnp.asarray(self.num_steps)
        moment = scatter.moment(u, self.num_steps)
        return Path(u, moment, scatter.loss, num_steps, jnp.asarray(False))

    def _averaged(self, evaluate: Evaluate, curvature: Array, first: Array, *, pairs: bool) -> Path:
        score, averaging = self.gradient == "score", self.averaging is not False

        def advance(
            j: Array, carry: tuple[Array, running.Sums, Array]
        ) -> tuple[Array, running.Sums, Array]:
            u, sums, loss = carry
            noise, found = evaluate(j, u)
            drift = found.gradient + u
            response = found.per_pair
            if not (score or pairs):
                # Centred, as the odd part of a pair would be.
                response = response + (u - sums.drift)
            change = self._step_size(j, curvature) * drift
            if score and self.step_size is None:
                # Values have heavier tails than gradients: one of them must not throw u to where the
                # loss is steeper still. Steps shrink, so that this ends soon and leaves no bias.
                change = change / jnp.maximum(jnp.linalg.norm(change), 1.0)
            u = u - change
            sums = running.add(sums, j, u, drift, noise, response, even=score)
            return u, sums, jnp.where(j == 0, found.loss, loss)

        zero = jnp.zeros_like(first)
        sums = running.start(zero, dense=self._is_dense(zero.size))
        carry = (first, sums, jnp.zeros((), zero.dtype))
        num_steps, converged = jnp.asarray(self.num_steps), jnp.asarray(False)
        if self.tolerance is None:
            u, sums, loss = lax.fori_loop(0, self.num_steps, advance, carry)
        else:
            num_steps, converged, (u, sums, loss) = self._until_tolerance(advance, carry)
        if averaging:
            u, moment = sums.average, running.error_of_average(sums, num_steps)
        else:
            moment = running.error_of_last(
                sums, self.num_steps, lambda j: self._step_size(j, curvature)
            )
        return Path(u, moment, loss, num_steps, converged)

    def _has_pairs(self, target: RegularizedLoss) -> bool:
        if self.antithetic is not None:
            return self.antithetic
        return self.gradient == "score" or target.loss.minibatch is None

    def _is_short(self, target: RegularizedLoss) -> bool:
        ours = self.uses_gradient and self.step_size is None and self.averaging is None
        drawn = target.loss.minibatch is not None
        return ours and drawn and self.tolerance is None and self.num_steps <= FEW_STEPS

    def _interval(self, pairs: bool) -> int:  # noqa: FBT001
        if self.diagnose_every is not None:
            return self.diagnose_every
        per_step = self._per_step(pairs)
        cost = per_step
        if self.step_size is None and self.uses_gradient:
            cost += evaluations.GRADIENT_LOOK * (2 if pairs else 1)
        elif self.step_size is None:
            cost += evaluations.VALUE_LOOK
        return math.ceil(cost / (LOOK_SHARE * per_step * self.num_steps))

    def _is_dense(self, dim: int) -> bool:
        # A matrix is worth its noise where there are several equations per entry: a pair of gradients
        # gives `dim` of them, a pair of values one.
        unknowns = dim if self.uses_gradient else dim**2
        return dim <= running.DENSE_DIM and 8 * unknowns <= self.num_steps * self.num_pairs

    def _per_step(self, pairs: bool) -> int:  # noqa: FBT001
        if pairs:
            return 2 * self.num_pairs
        return self.num_pairs + 1 if self.gradient == "score" else self.num_pairs

    def _until_tolerance(self, advance: Callable, carry: Any) -> tuple[Array, Array, Any]:
        def look(now: tuple[Array, Array, Any]) -> Array:
            return (now[0] < self.num_steps) & ~now[1]

        def go_on(now: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
            begin, _, carry = now
            end = jnp.minimum(
                jnp.where(begin > 0, begin + CHECK_EVERY, FIRST_CHECK), self.num_steps
            )
            carry = lax.fori_loop(begin, end, advance, carry)
            sums = carry[1]
            moment = running.error_of_average(sums, end)
            variance = jnp.diagonal(moment) if moment.ndim == 2 else moment
            error = jnp.maximum(jnp.sqrt(jnp.max(variance)), jnp.max(jnp.abs(sums.drift)))
            return end, error < self.tolerance, carry

        return lax.while_loop(look, go_on, (jnp.asarray(0), jnp.asarray(False), carry))

    def _step_size(self, j: Array, curvature: Array) -> Array:
        if callable(self.step_size):
            return jnp.asarray(self.step_size(j), curvature.dtype)
        if self.step_size is not None:
            return self.step_size
        slowest = 1.0 + curvature
        return (slowest / (j + slowest)) ** DECAY / slowest
