# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Heat regularization for a training loop: every gradient is taken at a perturbed point.

    ∇ E[Φ(x')] = E[∇Φ(x')],    x' ~ N(x, tau)

The loop's parameters are x', at which it takes its gradient anyway; the optimizer moves the centre x.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax, random

from numpyro_regloss._core.checks import (
    check_count,
    check_flag,
    check_optimizer,
    check_positive,
)
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.transforms import base

__all__ = ["HeatState", "fsgld", "heat"]


class HeatState(NamedTuple):
    """State of `heat` and `fsgld`.

    Attributes:
        count: steps of the centre.
        inner_count: gradients since the last one.
        rng_key: of the noise.
        center: the parameters that are optimized, in at least single precision.
        average: of the gradients since the last step.
        opt_state: of the centre's optimizer.
    """

    count: Array
    inner_count: Array
    rng_key: Array
    center: Any
    average: Any
    opt_state: Any


def heat(
    optimizer: optax.GradientTransformation,
    tau: Any,
    *,
    num_samples: int = 1,
    antithetic: bool = True,
    key: Key | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Minimizes the heat regularization E[Φ(x')] by gradients at perturbed points.

    One gradient per call of `update`. The loop's parameters are perturbed; `eval_params` gives the centre. The
    first gradient of a loop, and its mirror, are at the unperturbed start.

    Args:
        optimizer: of the centre, such as `optax.adam(1e-3)`: it is called once in `num_samples` calls.
        tau: variance of the perturbation, in squared units of the parameters: a number, a schedule of the outer
            step, or a pytree prefix of the parameters, with a number per group.
        num_samples: gradients that are averaged for a step of the centre.
        antithetic: whether every second perturbation mirrors the one before; of an odd number of samples the last
            has no mirror.
        key: a random key or a seed.

    Returns:
        The transformation. `update` takes `grad_fn=` too, `(params, i) -> gradients`: then one call makes a whole
        step from gradients of its own, the parameters are the centre, and the gradients that it is given are not
        used: `params` may stand in their place.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range.

    References:
        García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy and Heat
        Regularization in Deep Learning".

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from numpyro_regloss import transforms
        >>> loss = lambda x: jnp.sum(x**4 / 4 - x)
        >>> params = jnp.zeros(3)
        >>> optimizer = heat(optax.sgd(0.02), tau=0.2, num_samples=4)
        >>> state = optimizer.init(params)
        >>> @jax.jit
        ... def step(params, state):
        ...     updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> for _ in range(2_000):
        ...     params, state = step(params, state)
        >>> x = transforms.eval_params(state, params)  # of x³ + 3 tau x = 1
        >>> bool(jnp.all(jnp.abs(x - 0.814) < 0.15))
        True
    """
    what = "transforms.heat"
    check_optimizer(optimizer, what)
    base.check_width(tau, what)
    check_count(num_samples, f"{what}: num_samples")
    check_flag(antithetic, f"{what}: antithetic")
    optimizer, rng_key = optax.with_extra_args_support(optimizer), base.as_key(key, what)

    def init(params: Any) -> HeatState:
        center = base.full(params)
        return HeatState(
            jnp.zeros((), int),
            jnp.zeros((), int),
            jnp.copy(rng_key),
            center,
            optax.tree.zeros_like(center),
            optimizer.init(center),
        )

    def perturbed(state: HeatState) -> tuple[Any, HeatState]:
        rng_key, key_noise = random.split(state.rng_key)
        noise = optax.tree.random_like(key_noise, state.center)
        widths = base.at(tau, state.count, state.center)
        place = jax.tree.map(
            lambda x, xi, tau: (x + jnp.sqrt(tau) * xi).astype(x.dtype),
            state.center,
            noise,
            widths,
        )
        return place, state._replace(rng_key=rng_key)

    def update(
        updates: Any, state: Any, params: Any = None, *, grad_fn: Any = None, **extra: Any
    ) -> tuple[Any, HeatState]:
        def averaged(gradients: Any, state: HeatState) -> HeatState:
            average = base.toward(state.average, gradients, 1.0 / (state.inner_count + 1))
            state = state._replace(inner_count=state.inner_count + 1, average=average)

            def outer() -> HeatState:
                center, opt_state = base.moved(
                    optimizer, average, state.opt_state, state.center, extra
                )
                return HeatState(
                    state.count + 1,
                    jnp.zeros_like(state.inner_count),
                    state.rng_key,
                    center,
                    optax.tree.zeros_like(average),
                    opt_state,
                )

            return base.cond(state.inner_count == num_samples, outer, lambda: state)

        def following(state: HeatState, place: Any) -> tuple[Any, HeatState]:
            # The mirror of the place that was, where there is one and its turn has come.
            def mirrored() -> tuple[Any, HeatState]:
                return jax.tree.map(
                    lambda x, y: 2 * x - y.astype(x.dtype), state.center, place
                ), state

            if not antithetic or num_samples == 1:
                return perturbed(state)
            return base.cond(state.inner_count % 2 == 1, mirrored, lambda: perturbed(state))

        def step(gradients: Any, state: HeatState, place: Any) -> tuple[Any, HeatState]:
            moved, state = following(averaged(gradients, state), place)
            return optax.tree.cast_like(moved, place), state

        if grad_fn is None:
            return base.updates_to(step, updates, state, params)

        def whole(_: Any, state: HeatState, place: Any) -> tuple[Any, HeatState]:
            def one(i: Array, carry: tuple[Any, HeatState]) -> tuple[Any, HeatState]:
                moved, state = carry
                return step(grad_fn(moved, i), state, moved)

            moved, state = perturbed(state)
            moved = optax.tree.cast_like(moved, place)
            _, state = lax.fori_loop(0, num_samples, one, (moved, state))
            return optax.tree.cast_like(state.center, place), state

        return base.updates_to(whole, updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


def fsgld(
    step_size: Any, tau: Any, temperature: Any, *, key: Key | int = 0
) -> optax.GradientTransformationExtraArgs:
    """Flatness-aware stochastic-gradient Langevin dynamics: SGLD with gradients at perturbed points.

    One gradient per step. For small steps it samples exp(-E[Φ(x')] / T), x' ~ N(x, tau): a gradient at a perturbed
    point is an unbiased estimate of that of the heat regularization.

    Args:
        step_size: η > 0, in squared units of the parameters per unit of the loss.
        tau: variance of the perturbation, see `heat`.
        temperature: T > 0, in units of the loss; noise of variance 2 η T is added to every step.
        key: a random key or a seed.

    Returns:
        The transformation; `eval_params` gives the parameters without the last perturbation.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range.

    References:
        "Flatness-Aware Stochastic Gradient Langevin Dynamics" (2025), arXiv 2510.02174.

    Example:
        >>> import jax.numpy as jnp
        >>> optimizer = fsgld(step_size=0.01, tau=1e-3, temperature=1e-4)
        >>> int(optimizer.init(jnp.zeros(3)).count)
        0
    """
    what = "transforms.fsgld"
    step_size = check_positive(step_size, f"{what}: step_size")
    temperature = check_positive(temperature, f"{what}: temperature")
    key_noise, key_place = random.split(base.as_key(key, what))
    noisy = optax.noisy_sgd(step_size, eta=2.0 * temperature / step_size, gamma=0.0, key=key_noise)
    return heat(noisy, tau, key=key_place)
