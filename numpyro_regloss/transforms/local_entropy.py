# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Local entropy for a training loop: every gradient is one step of a Langevin chain around the centre.

    y ← y - η (g(y) + T (y - x) / tau) + √(2 η T) noise

and every `num_samples` steps the optimizer moves the centre x by the gradient of F_tau,

    ∇F_tau(x) = T (x - E_q[y]) / tau,

with the chain's average for E_q. The chain begins at the centre.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import random

from numpyro_regloss._core.checks import (
    check_choice,
    check_count,
    check_optimizer,
    check_positive,
)
from numpyro_regloss._core.pytree import is_concrete
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.transforms import base

__all__ = ["LocalEntropyState", "entropy_sgd", "local_entropy"]

NOISES = {"normal": random.normal, "two_point": random.rademacher}


class LocalEntropyState(NamedTuple):
    """State of `local_entropy` and `entropy_sgd`.

    Attributes:
        count: outer steps done.
        inner_count: steps of the chain since then.
        rng_key: of the noise.
        center: the parameters that are optimized, in at least single precision.
        average: of the draws, less the centre.
        weight: sum of the draws' weights, relative to that of the last.
        opt_state: of the centre's optimizer.
    """

    count: Array
    inner_count: Array
    rng_key: Array
    center: Any
    average: Any
    weight: Array
    opt_state: Any


def local_entropy(
    optimizer: optax.GradientTransformation,
    tau: Any,
    *,
    step_size: Any,
    temperature: Any = 1.0,
    num_samples: int = 20,
    num_warmup: int = 0,
    averaging_decay: Any = 1.0,
    noise: str = "normal",
    direction: str = "gradient",
    key: Key | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Minimizes the local entropy F_tau by stochastic-gradient Langevin dynamics.

    One gradient per call of `update`. The loop's parameters are the chain's; `eval_params` gives the centre.

    Args:
        optimizer: of the centre, such as `optax.sgd(0.1)`: it is called once in `num_warmup + num_samples` calls.
        tau: variance of the regularizer, in squared units of the parameters: a number, a schedule of the outer
            step, or a pytree prefix of the parameters, with a number per group.
        step_size: η > 0 of the chain, in squared units of the parameters per unit of the loss.
        temperature: T > 0, in units of the loss.
        num_samples: draws per outer step.
        num_warmup: steps of the chain before them.
        averaging_decay: weight of a draw relative to the next one, at most 1.
        noise: `"normal"`, or `"two_point"`, which is cheaper and as accurate in the step size.
        direction: what the optimizer is handed: `"gradient"`, that of F_tau; or `"displacement"`, centre less
            average, for which a rate of one is a step all the way whatever tau is.
        key: a random key or a seed.

    Returns:
        The transformation. `update` takes `grad_fn=` too, `(params, i) -> gradients`: then one call makes a whole
        outer step, of which the gradients that it is given are the first, and the parameters are the centre.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range.

    References:
        Chaudhari et al. (2017), "Entropy-SGD: Biasing Gradient Descent Into Wide Valleys"; García Trillos, Kaplan
        & Sanz-Alonso (2019).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from numpyro_regloss import transforms
        >>> loss = lambda x: jnp.sum((x - 1.0) ** 2)
        >>> params = jnp.zeros(3)
        >>> optimizer = local_entropy(optax.sgd(5.0), tau=0.1, step_size=0.02, temperature=0.01)
        >>> state = optimizer.init(params)
        >>> @jax.jit
        ... def step(params, state):
        ...     updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> for _ in range(600):
        ...     params, state = step(params, state)
        >>> bool(jnp.all(jnp.abs(transforms.eval_params(state, params) - 1.0) < 0.1))
        True
    """
    what = "transforms.local_entropy"
    check_optimizer(optimizer, what)
    base.check_width(tau, what)
    check_positive(step_size, f"{what}: step_size")
    check_positive(temperature, f"{what}: temperature")
    check_count(num_samples, f"{what}: num_samples")
    check_count(num_warmup, f"{what}: num_warmup", 0)
    check_positive(averaging_decay, f"{what}: averaging_decay")
    if is_concrete(averaging_decay) and averaging_decay > 1:
        raise ValueError(
            f"{what}: expected averaging_decay between 0 and 1, got {averaging_decay}."
        )
    check_choice(noise, f"{what}: noise", tuple(NOISES))
    check_choice(direction, f"{what}: direction", ("gradient", "displacement"))
    optimizer, rng_key = optax.with_extra_args_support(optimizer), base.as_key(key, what)
    num_steps = num_warmup + num_samples

    def init(params: Any) -> LocalEntropyState:
        center = base.full(params)
        return LocalEntropyState(
            jnp.zeros((), int),
            jnp.zeros((), int),
            jnp.copy(rng_key),
            center,
            optax.tree.zeros_like(center),
            jnp.zeros(()),
            optimizer.init(center),
        )

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        grad_fn: Any = None,
        **extra: Any,
    ) -> tuple[Any, LocalEntropyState]:
        def step(gradients: Any, state: LocalEntropyState, place: Any) -> tuple[Any, Any]:
            pulls = jax.tree.map(
                lambda tau: temperature / tau, base.at(tau, state.count, state.center)
            )
            next_key, key_noise = random.split(state.rng_key)
            spread = jnp.sqrt(2.0 * step_size * temperature)

            def walked(x: Array, y: Array, g: Array, pull: Array, xi: Array) -> Array:
                offset = y.astype(x.dtype) - x
                change = spread * xi - step_size * (g.astype(x.dtype) + pull * offset)
                return (offset + change).astype(x.dtype)

            xi = optax.tree.random_like(key_noise, state.center, NOISES[noise])
            offset = jax.tree.map(walked, state.center, place, gradients, pulls, xi)
            inner_count = state.inner_count + 1
            weight = jnp.where(inner_count > num_warmup, averaging_decay * state.weight + 1.0, 0.0)
            share = jnp.where(weight > 0, 1.0 / jnp.maximum(weight, 1.0), 0.0)
            average = base.toward(state.average, offset, share)
            state = state._replace(
                inner_count=inner_count, rng_key=next_key, average=average, weight=weight
            )

            def inner() -> tuple[Any, LocalEntropyState]:
                return optax.apply_updates(state.center, offset), state

            def outer() -> tuple[Any, LocalEntropyState]:
                scale = pulls if direction == "gradient" else jax.tree.map(jnp.ones_like, pulls)
                handed = jax.tree.map(
                    lambda mean, scale: (-scale * mean).astype(mean.dtype), average, scale
                )
                center, opt_state = base.moved(
                    optimizer, handed, state.opt_state, state.center, extra
                )
                return center, LocalEntropyState(
                    state.count + 1,
                    jnp.zeros_like(inner_count),
                    next_key,
                    center,
                    optax.tree.zeros_like(average),
                    jnp.zeros_like(weight),
                    opt_state,
                )

            moved, state = base.cond(inner_count == num_steps, outer, inner)
            return optax.tree.cast_like(moved, place), state

        return base.updates_to(step, updates, state, params, grad_fn, num_steps - 1)

    return optax.GradientTransformationExtraArgs(init, update)


def entropy_sgd(
    tau: Any,
    *,
    temperature: Any = 1e-8,
    step_size: Any = 0.1,
    num_samples: int = 20,
    averaging_decay: Any = 0.75,
    noise: str = "normal",
    optimizer: optax.GradientTransformation | None = None,
    key: Key | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Entropy-SGD as an Optax transformation, with the settings of `schemes.entropy_sgd`.

    Args:
        tau: T / gamma, in squared units of the parameters; a number, a schedule such as `schedules.Scoping`, or a
            pytree prefix of the parameters.
        temperature: T, in the units of the loss.
        step_size: of the inner steps.
        num_samples: inner steps per outer step, one gradient each.
        averaging_decay: weight of a draw relative to the next one.
        noise: `"normal"` or `"two_point"`, which is cheaper.
        optimizer: of the centre; a rate of one is a step all the way to the average. Default: that rate with a
            Nesterov momentum of 0.9.
        key: a random key or a seed.

    Returns:
        The transformation, see `local_entropy`.

    References:
        Chaudhari et al. (2017), "Entropy-SGD: Biasing Gradient Descent Into Wide Valleys".

    Example:
        >>> import jax.numpy as jnp
        >>> optimizer = entropy_sgd(tau=1e-6)
        >>> int(optimizer.init({"w": jnp.zeros(3)}).count)
        0
    """
    if optimizer is None:
        optimizer = optax.sgd(1.0, momentum=0.9, nesterov=True)
    return local_entropy(
        optimizer,
        tau,
        step_size=step_size,
        temperature=temperature,
        num_samples=num_samples,
        averaging_decay=averaging_decay,
        noise=noise,
        direction="displacement",
        key=key,
    )
