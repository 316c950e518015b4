# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""The Gaussian of fixed covariance that minimizes KL(Gaussian || q), by stochastic approximation.

The mean y solves the implicit equation  E ∇loss(y + scale ξ) + T Σ⁻¹ (y - centre) = 0: the heat step,
a proximal step on the heat-regularized loss. In whitened coordinates y = centre + scale u,

    u ← u - a_j [ scaleᵀ ∇loss(centre + scale (u + ξ_j)) / T + u ],

or, without gradients, with the values  [loss(centre + scale (u + ξ_j)) - loss(centre + scale (u - ξ_j))] ξ_j / 2T
in place of the gradient (score form).

The natural steps a_j = 1/j (that is (tau/T)/j in parameters) are stable only where tau times the
curvature of loss/T is below about one. Here a_j = (1 + κ)⁻¹ ((1 + κ) / (j + κ))^0.6 with κ that
curvature, measured along a power iteration that is carried over outer steps (one more gradient each),
and iterates are averaged with weights proportional to j.

The noise of the score form is multiplicative: steps are stable in mean square where a_j times the trace of the
curvature is below about two. Its κ is therefore the mean of |ξᵀ Hessian ξ| from second differences of values, at
least the absolute trace, and no step is longer than one reference scale.

References: Robbins & Monro (1951), "A Stochastic Approximation Method"; Polyak & Juditsky (1992),
"Acceleration of Stochastic Approximation by Averaging"; García Trillos, Kaplan & Sanz-Alonso (2019),
"Variational Characterizations of Local Entropy and Heat Regularization in Deep Learning".
"""

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
from numpyro_regloss.fit.robbins_monro.gradient import GradientEstimate
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["RobbinsMonro", "RobbinsMonroInfo", "RobbinsMonroState"]

# Between 1/2 and 1: any such decay averages to the optimal variance; slower ones forget the start sooner.
DECAY = 0.6
# The stopping rule waits for an error that rests on so many steps, and looks again every so many.
FIRST_CHECK, CHECK_EVERY = 32, 16
# Of the mean's last digit.
ROUNDING = 4.0


class RobbinsMonroState(NamedTuple):
    """What is known of the curvature.

    Attributes:
        direction: unit vector of the steepest curvature so far, `(dim,)`, whitened.
        curvature: κ ≥ 0 along it, of the score form κ alone; negative before the first step.
    """

    direction: Array
    curvature: Array


class RobbinsMonroInfo(NamedTuple):
    """Diagnostics of one fit.

    Attributes:
        ok: the mean is finite, as it is when the losses and gradients on the way were.
        num_loss: loss evaluations; zero where gradients are used.
        num_grad: gradient evaluations; zero with the score form.
        curvature: κ, tau times the curvature of loss / T in its steepest direction, or what bounds the
            steps of the score form (-1 with a step size of your own, which needs none).
        residual: norm of the implicit equation at the mean, from one more gradient, in units of the
            reference scale: of the size of that gradient's noise when the equation is solved; infinite
            where that gradient is not finite.
        mean_error: standard error of the mean as solution of the implicit equation, `(dim,)`, in units of
            the parameters; infinite where it is unknown, as it is after one step.
        num_steps: inner steps done.
        converged: whether error and average drift fell below `tolerance`; false without one.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    curvature: Array
    residual: Array
    mean_error: Array
    num_steps: Array
    converged: Array


@pytree_dataclass
class RobbinsMonro(Fit):
    """The paper's heat step.

    About 1 + κ steps are needed before directions in which the loss is flat have moved, κ being tau times
    the steepest curvature of loss / T; fewer leave the mean near the centre. `info.residual` tells.

    `info.mean_error` holds the noise and the part of the way that is left, both by the curvature met on
    the way. Do not trust it after fewer than about a hundred steps or 1 + κ of them (a `residual` far
    above the gradient's noise tells), nor where the equation has several roots: it is the error of the
    nearest. Above 32 parameters it leaves out how they are correlated.

    Args:
        num_steps: inner steps, at most; each draws fresh noise and a fresh minibatch.
        antithetic: average the gradients at ±ξ (two gradients per step): the error then has no linear
            part, and quadratics are solved without noise. Without, the score form subtracts the loss at
            the mean instead.
        averaging: return the weighted average of the iterates instead of the last one.
        step_size: None for the steps above; a number or a schedule of the inner step (from 0) in units
            of tau / T otherwise: `lambda j: 1 / (j + 1)` are the natural steps.
        gradient: `"reparametrized"`, gradients of the loss; `"score"`, values of the loss alone, which
            may be integers or jump. The latter's variance is about dim |∇|² / num_pairs.
        num_pairs: noise vectors per step.
        tolerance: None for all of `num_steps`; otherwise stop once the error of the mean and the average
            drift, their largest coordinates in units of the reference scale, are below it.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range, or a tolerance is given without averaging.

    Example:
        >>> RobbinsMonro(num_steps=20).averaging
        True
    """

    num_steps: int = static_field(default=20)
    antithetic: bool = static_field(default=True)
    averaging: bool = static_field(default=True)
    step_size: Any = None
    gradient: str = static_field(default="reparametrized")
    num_pairs: int = static_field(default=1)
    tolerance: Any = None

    uses_draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count(self.num_steps, "RobbinsMonro: num_steps")
        check_count(self.num_pairs, "RobbinsMonro: num_pairs")
        check_choice(self.gradient, "RobbinsMonro: gradient", ("reparametrized", "score"))
        cast_fields(self, ("antithetic", "averaging"), check_flag)
        if callable(self.step_size):
            # At the last step, since warm-ups start at zero.
            check_schedule(self.step_size, self.num_steps - 1, "RobbinsMonro: step_size")
        elif self.step_size is not None:
            step_size = check_positive(self.step_size, "RobbinsMonro: step_size")
            object.__setattr__(self, "step_size", step_size)
        if self.tolerance is not None:
            tolerance = check_positive(self.tolerance, "RobbinsMonro: tolerance")
            object.__setattr__(self, "tolerance", tolerance)
            if not self.averaging:
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
            direction / jnp.linalg.norm(direction), jnp.full((), -1.0, direction.dtype)
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
        key_curvature, key_steps = random.split(rng_key)
        score, reference = self.gradient == "score", target.reference
        build = evaluations.score if score else evaluations.reparametrized
        estimate = build(target, antithetic=self.antithetic)
        zero, spent = jnp.zeros_like(reference.mean), jnp.asarray(0)
        first = zero
        if self.step_size is None and score:
            curvature, first, spent = evaluations.curvature_of_values(
                key_curvature, state.curvature, target
            )
            state = state._replace(curvature=curvature)
        elif self.step_size is None:
            *known, first, spent = evaluations.curvature_of_gradients(
                key_curvature, *state, estimate
            )
            state, spent = RobbinsMonroState(*known), spent * (2 if self.antithetic else 1)

        def evaluate(j: Array, u: Array) -> tuple[Array, GradientEstimate]:
            key_batch, key_noise = random.split(random.fold_in(key_steps, j))
            noise = random.normal(key_noise, (self.num_pairs, *u.shape), u.dtype)
            return noise, estimate(key_batch, u, noise)

        def advance(j: Array, carry: tuple[Array, running.Sums]) -> tuple[Array, running.Sums]:
            u, sums = carry
            noise, found = evaluate(j, u)
            drift = found.gradient + u
            response = found.per_pair
            if not (score or self.antithetic):
                # Centred, as the odd part of a pair would be.
                response = response + (u - sums.drift)
            change = self._step_size(j, state.curvature) * drift
            if score and self.step_size is None:
                # Values have heavier tails than gradients: one of them must not throw u to where the
                # loss is steeper still. Steps shrink, so that this ends soon and leaves no bias.
                change = change / jnp.maximum(jnp.linalg.norm(change), 1.0)
            u = u - change
            return u, running.add(sums, j, u, drift, noise, response, even=score)

        carry = (first, running.start(zero, dense=self._is_dense(zero.size)))
        num_steps, converged = jnp.asarray(self.num_steps), jnp.asarray(False)
        if self.tolerance is None:
            u, sums = lax.fori_loop(0, self.num_steps, advance, carry)
        else:
            num_steps, converged, (u, sums) = self._until_tolerance(advance, carry)
        if self.averaging:
            u, moment = sums.average, running.error_of_average(sums, num_steps)
        else:
            moment = running.error_of_last(
                sums, self.num_steps, lambda j: self._step_size(j, state.curvature)
            )
        mean = reference.unwhiten(u)
        error = running.in_parameters(moment, reference)
        # No noise and no bias still leave what the last digits hide.
        error = jnp.maximum(error, ROUNDING * jnp.finfo(mean.dtype).eps * jnp.abs(mean))
        residual = jnp.linalg.norm(evaluate(num_steps, u)[1].gradient + u)
        count, none = spent + self._per_step() * (num_steps + 1), jnp.asarray(0)
        info = RobbinsMonroInfo(
            ok=jnp.isfinite(mean).all(),
            num_loss=count if score else none,
            num_grad=none if score else count,
            curvature=state.curvature,
            residual=jnp.where(jnp.isfinite(residual), residual, jnp.inf),
            mean_error=jnp.where(jnp.isfinite(error), error, jnp.inf),
            num_steps=num_steps,
            converged=converged,
        )
        return state, reference._replace(mean=mean), info

    def _is_dense(self, dim: int) -> bool:
        # A matrix is worth its noise where there are several equations per entry: a pair of gradients
        # gives `dim` of them, a pair of values one.
        unknowns = dim if self.uses_gradient else dim**2
        return dim <= running.DENSE_DIM and 8 * unknowns <= self.num_steps * self.num_pairs

    def _per_step(self) -> int:
        if self.antithetic:
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
