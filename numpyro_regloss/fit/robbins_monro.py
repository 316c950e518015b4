# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""The Gaussian of fixed covariance that minimizes KL(Gaussian || q), by stochastic approximation.

The mean y solves the implicit equation  E ∇loss(y + scale ξ) + T Σ⁻¹ (y - centre) = 0: the heat step,
a proximal step on the heat-regularized loss. In whitened coordinates y = centre + scale u,

    u ← u - a_j [ scaleᵀ ∇loss(centre + scale (u + ξ_j)) / T + u ].

The natural steps a_j = 1/j (that is (tau/T)/j in parameters) are stable only where tau times the
curvature of loss/T is below about one. Here a_j = (1 + κ)⁻¹ ((1 + κ) / (j + κ))^0.6 with κ that
curvature, measured along a power iteration that is carried over outer steps (one more gradient each),
and iterates are averaged with weights proportional to j.

References: Robbins & Monro (1951), "A Stochastic Approximation Method"; Polyak & Juditsky (1992),
"Acceleration of Stochastic Approximation by Averaging"; García Trillos, Kaplan & Sanz-Alonso (2019),
"Variational Characterizations of Local Entropy and Heat Regularization in Deep Learning".
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_regloss._checks import check_count, check_positive, check_schedule
from numpyro_regloss._pytree import pytree_dataclass, static_field
from numpyro_regloss._typing import Array, Key
from numpyro_regloss.draws import Draws
from numpyro_regloss.fit.base import Fit
from numpyro_regloss.gaussian import AnyGaussian
from numpyro_regloss.regularized import RegularizedLoss

__all__ = ["RobbinsMonro", "RobbinsMonroInfo", "RobbinsMonroState"]

# Between 1/2 and 1: any such decay averages to the optimal variance; slower ones forget the start sooner.
DECAY = 0.6
# Power iterations at the first step; later steps refine the direction by one each.
FIRST_ITERATIONS = 10


class RobbinsMonroState(NamedTuple):
    """What is known of the curvature.

    Attributes:
        direction: unit vector of the steepest curvature so far, `(dim,)`, whitened.
        curvature: κ ≥ 0 along it; negative before the first step.
    """

    direction: Array
    curvature: Array


class RobbinsMonroInfo(NamedTuple):
    """Diagnostics of one fit.

    Attributes:
        ok: the mean is finite, as it is when the losses and gradients on the way were.
        num_loss: zero.
        num_grad: gradient evaluations.
        curvature: κ, tau times the curvature of loss / T in its steepest direction (-1 with a step size of
            your own, which needs none).
        residual: norm of the implicit equation at the mean, from one more gradient, in units of the
            reference scale: of the size of that gradient's noise when the equation is solved; infinite
            where that gradient is not finite.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    curvature: Array
    residual: Array


@pytree_dataclass
class RobbinsMonro(Fit):
    """The paper's heat step.

    About 1 + κ steps are needed before directions in which the loss is flat have moved, κ being tau times
    the steepest curvature of loss / T; fewer leave the mean near the centre. `info.residual` tells.

    Args:
        num_steps: inner steps; each draws fresh noise and a fresh minibatch.
        antithetic: average the gradients at ±ξ (two gradients per step): the error then has no linear
            part, and quadratics are solved without noise.
        averaging: return the weighted average of the iterates instead of the last one.
        step_size: None for the steps above; a number or a schedule of the inner step (from 0) in units
            of tau / T otherwise: `lambda j: 1 / (j + 1)` are the natural steps.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range.

    Example:
        >>> RobbinsMonro(num_steps=20).averaging
        True
    """

    num_steps: int = static_field(default=20)
    antithetic: bool = static_field(default=True)
    averaging: bool = static_field(default=True)
    step_size: Any = None

    uses_gradient: ClassVar[bool] = True
    uses_draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count(self.num_steps, "RobbinsMonro: num_steps")
        for name in ("antithetic", "averaging"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"RobbinsMonro: expected {name} as True or False, got {getattr(self, name)!r}."
                )
        if callable(self.step_size):
            # At the last step, since warm-ups start at zero.
            check_schedule(self.step_size, self.num_steps - 1, "RobbinsMonro: step_size")
        elif self.step_size is not None:
            step_size = check_positive(self.step_size, "RobbinsMonro: step_size")
            object.__setattr__(self, "step_size", step_size)

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
        gradient = _whitened_gradient(target, antithetic=self.antithetic)
        spent = jnp.asarray(0)
        if self.step_size is None:
            state, spent = _refine(key_curvature, state, gradient)
        reference = target.reference

        def body(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            u, average = carry
            key_batch, key_noise = random.split(random.fold_in(key_steps, j))
            noise = random.normal(key_noise, u.shape, u.dtype)
            u = u - self._step_size(j, state.curvature) * (gradient(key_batch, u, noise) + u)
            # Weights 1, 2, …, n have the running average  ū ← ū + 2 (u - ū) / (n + 1).
            return u, average + 2.0 * (u - average) / (j + 2.0)

        zero = jnp.zeros_like(reference.mean)
        u, average = lax.fori_loop(0, self.num_steps, body, (zero, zero))
        u = average if self.averaging else u
        mean = reference.unwhiten(u)
        key_batch, key_noise = random.split(random.fold_in(key_steps, self.num_steps))
        drift = gradient(key_batch, u, random.normal(key_noise, u.shape, u.dtype)) + u
        residual = jnp.linalg.norm(drift)
        per_gradient = 2 if self.antithetic else 1
        info = RobbinsMonroInfo(
            ok=jnp.isfinite(mean).all(),
            num_loss=jnp.asarray(0),
            num_grad=per_gradient * (self.num_steps + 1 + spent),
            curvature=state.curvature,
            residual=jnp.where(jnp.isfinite(residual), residual, jnp.inf),
        )
        return state, reference._replace(mean=mean), info

    def _step_size(self, j: Array, curvature: Array) -> Array:
        if callable(self.step_size):
            return jnp.asarray(self.step_size(j), curvature.dtype)
        if self.step_size is not None:
            return self.step_size
        slowest = 1.0 + curvature
        return (slowest / (j + slowest)) ** DECAY / slowest


def _whitened_gradient(
    target: RegularizedLoss, *, antithetic: bool
) -> Callable[[Key, Array, Array], Array]:
    reference = target.reference

    def single(key_batch: Key, noise: Array) -> Array:
        batch = target.on_batch(key_batch)
        value, gradient = jax.value_and_grad(batch.energy)(reference.unwhiten(noise))
        # Where a loss is a constant NaN its gradient is zero, and nothing else would tell.
        return jnp.where(jnp.isfinite(value), reference.scaled_transpose(gradient), jnp.nan)

    def gradient(key_batch: Key, u: Array, noise: Array) -> Array:
        if not antithetic:
            return single(key_batch, u + noise)
        points = jnp.stack([u + noise, u - noise])
        return jnp.mean(jax.vmap(single, in_axes=(None, 0))(key_batch, points), 0)

    return gradient


def _refine(
    rng_key: Key, state: RobbinsMonroState, gradient: Callable[[Key, Array, Array], Array]
) -> tuple[RobbinsMonroState, Array]:
    # The secant over one reference scale, not the Hessian: it sees kinks, and only the curvature that
    # is left after smoothing matters for stability.
    key_batch, key_noise = random.split(rng_key)
    noise = random.normal(key_noise, state.direction.shape, state.direction.dtype)
    base = gradient(key_batch, jnp.zeros_like(noise), noise)

    def iterate(_: Array, now: RobbinsMonroState) -> RobbinsMonroState:
        secant = gradient(key_batch, now.direction, noise) - base
        curvature = jnp.linalg.norm(secant)
        usable = jnp.isfinite(curvature) & (curvature > 0)
        direction = jnp.where(usable, secant / jnp.where(usable, curvature, 1.0), now.direction)
        return RobbinsMonroState(direction, jnp.where(usable, curvature, 0.0))

    iterations = jnp.where(state.curvature < 0, FIRST_ITERATIONS, 1)
    return lax.fori_loop(0, iterations, iterate, state), iterations + 1
