# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The gradient of the local entropy from values alone, for any optimizer of Optax.

One step of the scheme: importance sampling shifts, moment matching fits, and the optimizer is handed
∇F_tau(x) = T (x - E_q[x']) / tau.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import random

from numpyro_regloss._core.checks import check_optimizer, check_positive
from numpyro_regloss._core.settings import own_settings
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.fit.forward_kl import ForwardKL
from numpyro_regloss.gaussians.gaussian import Gaussian
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.shift.importance import Importance
from numpyro_regloss.transforms import base

__all__ = ["GradientFreeInfo", "GradientFreeState", "gradient_free"]


class GradientFreeInfo(NamedTuple):
    """Diagnostics of one step.

    Attributes:
        ok: whether the step was taken: some draw has a finite loss, and the gradient is finite.
        ess: effective sample size of the weights, in draws.
        khat: Pareto shape of the weights; above 0.7 the gradient and its error are not to be trusted.
        temperature: T of the weights, in units of the loss.
        loss: mean of the loss under the weights.
        gradient_norm: of the estimated gradient of F_tau.
        error_norm: of its standard errors.
    """

    ok: Array
    ess: Array
    khat: Array
    temperature: Array
    loss: Array
    gradient_norm: Array
    error_norm: Array


class GradientFreeState(NamedTuple):
    """State of `gradient_free`.

    Attributes:
        count: steps done.
        rng_key: of the draws.
        opt_state: of the optimizer.
        info: of the last step.
    """

    count: Array
    rng_key: Array
    opt_state: Any
    info: GradientFreeInfo


def gradient_free(
    optimizer: optax.GradientTransformation,
    tau: Any,
    *,
    num_samples: int = 100,
    temperature: Any = 1.0,
    ess: Any = 0.5,
    chunk_size: int | None = None,
    key: Key | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Minimizes the local entropy F_tau of a loss that has values and no gradient.

    `update(params, state, params, value_fn=...)` evaluates `value_fn` at `num_samples` draws from N(params, tau),
    and passes the estimated gradient to the optimizer. The updates that it gets are not used. A step without a
    finite loss is not taken.

    Args:
        optimizer: such as `optax.adam(0.01)`.
        tau: variance of the draws, in squared units of the parameters: a number, a schedule of the step, or a
            pytree prefix of the parameters, with a number per group.
        num_samples: evaluations per step, antithetic pairs.
        temperature: T > 0, in units of the loss; used if `ess` is None or all losses are equal.
        ess: None, or the effective sample size as a share of the draws that sets the temperature of each step.
        chunk_size: draws that are evaluated at once; by default all.
        key: a random key or a seed.

    Returns:
        The transformation. `update` needs `value_fn=`, `(params) -> scalar`, which runs under `jax.jit`.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range.

    References:
        García Trillos, Kaplan & Sanz-Alonso (2019).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> loss = lambda x: jnp.sum(jnp.floor(4 * jnp.abs(x - 1.0)))
        >>> optimizer = gradient_free(optax.adam(0.1), tau=0.1, num_samples=200)
        >>> params = jnp.zeros(3)
        >>> state = optimizer.init(params)
        >>> @jax.jit
        ... def step(params, state):
        ...     updates, state = optimizer.update(params, state, params, value_fn=loss)
        ...     return optax.apply_updates(params, updates), state
        >>> for _ in range(60):
        ...     params, state = step(params, state)
        >>> float(loss(params)), bool(state.info.khat < 0.7)
        (0.0, True)
    """
    what = "transforms.gradient_free"
    check_optimizer(optimizer, what)
    base.check_width(tau, what)
    temperature = check_positive(temperature, f"{what}: temperature")
    engine = Importance(num_samples, ess=ess, chunk_size=chunk_size)
    optimizer, rng_key = optax.with_extra_args_support(optimizer), base.as_key(key, what)

    def init(params: Any) -> GradientFreeState:
        zero = jnp.zeros(())
        info = GradientFreeInfo(jnp.asarray(True), zero, zero, temperature, zero, zero, zero)
        return GradientFreeState(
            jnp.zeros((), int), jnp.copy(rng_key), optimizer.init(base.full(params)), info
        )

    @own_settings
    def estimate(state: GradientFreeState, params: Any, loss: Loss) -> tuple[Any, GradientFreeInfo]:
        widths = jax.tree.map(
            lambda tau, x: jnp.broadcast_to(jnp.asarray(tau, float), x.shape),
            base.at(tau, state.count, params),
            params,
        )
        variance = loss.unconstrain(widths)
        reference = Gaussian(loss.x0, jnp.sqrt(variance))
        target = RegularizedLoss(loss, reference, temperature=temperature)
        _, draws, shift_info = engine.step(
            random.fold_in(state.rng_key, state.count), engine.init(state.rng_key, target), target
        )
        _, fitted, fit_info = ForwardKL().step(state.rng_key, (), target, draws)
        weight = jax.nn.softmax(draws.log_weight.reshape(-1))
        scale = draws.temperature / variance
        gradient, error = scale * (loss.x0 - fitted.mean), scale * fit_info.mean_error
        info = GradientFreeInfo(
            shift_info.ok & jnp.isfinite(gradient).all(),
            shift_info.ess,
            shift_info.khat,
            jnp.asarray(draws.temperature, float),
            jnp.sum(jnp.where(weight > 0, weight * draws.loss.reshape(-1), 0.0)),
            jnp.linalg.norm(gradient),
            jnp.linalg.norm(error),
        )
        return loss.constrain(gradient), info

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        value_fn: Callable[[Any], Any] | None = None,
        **extra: Any,
    ) -> tuple[Any, GradientFreeState]:
        del updates
        if params is None:
            raise ValueError(base.NO_PARAMS)
        if value_fn is None:
            raise ValueError(
                f"{what}: expected value_fn, a function of the parameters; write "
                "update(params, state, params, value_fn=loss)."
            )
        gradient, info = estimate(state, params, Loss.from_function(value_fn, params))
        moves, opt_state = optimizer.update(gradient, state.opt_state, params, **extra)
        moves = jax.tree.map(lambda a: jnp.where(info.ok, a, 0), moves)
        opt_state = jax.tree.map(
            lambda new, old: jnp.where(info.ok, new, old), opt_state, state.opt_state
        )
        return moves, GradientFreeState(state.count + 1, state.rng_key, opt_state, info)

    return optax.GradientTransformationExtraArgs(init, update)
