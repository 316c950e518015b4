# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Values and gradients of the regularized losses, for training loops of the user's own.

    ∇F_tau(x) = T (x - E_q x') / tau,   ∇F^H_tau(x) = E ∇loss(x'),  x' ~ N(x, tau I)

Reference: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy and Heat
Regularization in Deep Learning".
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from numpyro_regloss._core.checks import (
    check_choice,
    check_count,
    check_differentiable,
    check_key,
    check_positive,
    differentiating,
)
from numpyro_regloss._core.mesh import (
    check_mesh,
    copied,
    is_divided,
    num_blocks,
    on_mesh,
    values_of_blocks,
)
from numpyro_regloss._core.processes import here
from numpyro_regloss._core.pytree import is_concrete, with_context_axes
from numpyro_regloss._core.settings import own_settings
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.fit.forward_kl import ForwardKL
from numpyro_regloss.gaussians.gaussian import Gaussian
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.numpyro_model import ModelSource
from numpyro_regloss.losses.probe import Probe, check_gradient, probe
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.shift.base import Shift
from numpyro_regloss.shift.importance import Importance
from numpyro_regloss.values.estimate import Estimate
from numpyro_regloss.values.estimators import estimate_entropy
from numpyro_regloss.values.pairs import (
    HEAT_REMEDY,
    entropy_of_pairs,
    heat_of_means,
    warn_of_errors,
)

__all__ = ["value_and_grad"]

REMEDY = 'kind="local_entropy" with shift.Importance'
GRADIENT_REMEDY = "Use a smaller tau or more draws."
# Noise moves the mean of a cloud by sqrt(dim / draws) widths of the regularizer, all parameters together. Weights
# that still count many draws move it by about one.
SHORT_REMEDY = (
    'With gradients use kind="heat", shift.SGLD, schemes or transforms, which take a step for each.'
)
# So few effective draws do not tell their own error.
LEAST_ESS = 20.0


def value_and_grad(
    loss: Loss,
    tau: Any,
    shift: Any = None,
    *,
    kind: str = "local_entropy",
    temperature: Any = 1.0,
    num_samples: int = 1_000,
    mesh: Any = None,
) -> Callable[..., tuple[Estimate, Any]]:
    """A function that returns a regularized loss and its gradient, as `jax.value_and_grad` would.

    Args:
        loss: the loss, from `Loss.from_function`.
        tau: variance of the regularizer, in squared units of the parameters.
        shift: for the local entropy, the engine that draws from q, started anew in every call. Default: importance
            sampling with `num_samples` antithetic draws, without gradients of the loss. It needs more draws than
            parameters; a warning says so, and another one if the effective sample size is below 20.
        kind: `"local_entropy"` or `"heat"`, which differentiates the loss.
        temperature: T, in the units of the loss.
        num_samples: loss evaluations for the value, which the default engine shares; for the heat, gradients.
        mesh: devices that divide the draws, see `TwoStep`.

    Returns:
        `(params, rng_key, *args, **kwargs) -> (Estimate, grads)`, pure, for use under `jax.jit`; `grads` has the
        structure of `params`. A loss with a minibatch gives that of one batch. The error is infinite where k-hat
        is above 0.7, and outside of `jax.jit` a warning says so.

    Raises:
        TypeError: if an argument is of the wrong kind, the loss is that of a model, or it returns integers
            where its gradient is used.
        ValueError: if a setting is out of range, or a gradient that is used is zero everywhere around the start.

    Example:
        >>> loss = Loss.from_function(lambda p: 0.5 * jnp.sum(p["w"] ** 2), {"w": jnp.ones(2)})
        >>> regularized = jax.jit(value_and_grad(loss, tau=1.0, num_samples=20_000))
        >>> estimate, grads = regularized({"w": jnp.ones(2)}, random.key(0))
        >>> bool(jnp.all(jnp.abs(grads["w"] - 0.5) < 0.05))
        True
    """
    what = "values.value_and_grad"
    if not isinstance(loss, Loss):
        raise TypeError(
            f"{what}: expected a Loss, got {type(loss).__name__}; wrap it with Loss.from_function(fn, params)."
        )
    if isinstance(loss.source, ModelSource):
        raise TypeError(
            f"{what}: expected a loss from Loss.from_function; sites of a model are constrained, gradients are "
            "not: use Loss.from_function(loss.value, loss.x0)."
        )
    check_choice(kind, f"{what}: kind", ("local_entropy", "heat"))
    check_count(num_samples, f"{what}: num_samples", 4)
    tau = check_positive(tau, f"{what}: tau", ((), (loss.dim,)))
    temperature = check_positive(temperature, f"{what}: temperature")
    engine = Importance(num_samples + num_samples % 2) if shift is None else shift
    if not isinstance(engine, Shift) or not engine.makes_draws:
        raise TypeError(
            f"{what}: expected shift as an engine that makes draws, such as shift.Importance(1000), got "
            f"{shift!r}."
        )
    mesh = check_mesh(mesh, f"{what}: mesh", external=loss.is_external)
    heat = kind == "heat"
    is_short = shift is None and not heat and loss.dim > num_samples
    if is_short:
        warnings.warn(
            f"{what}: a cloud of {num_samples} draws, the default engine, says nothing of {loss.dim} parameters: "
            f"their gradient is noise. {SHORT_REMEDY}",
            stacklevel=2,
        )
    names = ['kind="heat"'] if heat else [type(engine).__name__] * engine.uses_gradient
    check_differentiable(names, loss, what, REMEDY)
    start = RegularizedLoss.unchecked(loss, Gaussian.isotropic(loss.x0, tau), loss.arguments, 1.0)
    if names and is_concrete(start):
        with differentiating(names, loss, what, REMEDY):
            found = _look(start)
        check_gradient(jax.device_get(found), names, what, REMEDY)

    if heat:
        find = partial(_heat, num_samples=num_samples)
    else:
        find = partial(_local_entropy, engine, num_samples=num_samples, shared=shift is None)
    # Operation by operation, as outside of `jax.jit`, what devices divide is slow.
    find = find if mesh is None else jax.jit(on_mesh(mesh, find))

    def regularized(params: Any, rng_key: Key, *args: Any, **kwargs: Any) -> tuple[Estimate, Any]:
        rng_key = check_key(rng_key, what)
        arguments = loss.bind(args, kwargs)
        x = loss.source.unconstrain(with_context_axes(params), *arguments.tree)
        target = RegularizedLoss.unchecked(loss, Gaussian.isotropic(x, tau), arguments, temperature)
        key_batch, *keys = random.split(rng_key, 4)
        target = target.on_batch(key_batch)
        estimate, gradient = here(find(*copied(mesh, (keys, target))))
        remedy = HEAT_REMEDY if kind == "heat" else GRADIENT_REMEDY
        warn_of_errors(what, {"the value": estimate}, remedy)
        if shift is None and not heat and not is_short:
            _warn_of_few(what, estimate, num_samples)
        return estimate, loss.source.tangent(gradient)  # ty: ignore[missing-union-attribute]

    return regularized


def _warn_of_few(what: str, estimate: Estimate, num_samples: int) -> None:
    # An estimate without an error has had its warning.
    if not is_concrete(estimate) or not np.isfinite(np.asarray(estimate.error)).all():
        return
    ess = float(np.min(estimate.ess))
    if ess < LEAST_ESS:
        warnings.warn(
            f"{what}: the effective sample size is {ess:.3g} of {num_samples} draws, so that the gradient is "
            f"that of a few of them. Use a smaller tau, a higher temperature or more draws. {SHORT_REMEDY}",
            stacklevel=3,
        )


@jax.jit
@own_settings
def _look(target: RegularizedLoss) -> Probe:
    key = random.key(0)
    return probe(key, target.on_batch(key))


@own_settings
def _local_entropy(
    engine: Any, keys: list[Key], target: RegularizedLoss, *, num_samples: int, shared: bool
) -> tuple[Estimate, Array]:
    _, draws, _ = engine.step(keys[0], engine.init(keys[1], target), target)
    _, fitted, _ = ForwardKL().step(keys[1], (), target, draws)
    if shared:
        estimate: Estimate = entropy_of_pairs(draws.loss[0], target.temperature)
    else:
        estimate = estimate_entropy(
            keys[2],
            target,
            method="importance",
            num_samples=num_samples,
            chunk_size=None,
            mesh=None,
        )
    offset = target.reference.mean - fitted.mean
    return estimate, draws.temperature * offset / target.reference.variance


@own_settings
def _heat(keys: list[Key], target: RegularizedLoss, *, num_samples: int) -> tuple[Estimate, Array]:
    reference, evaluate = target.reference, jax.vmap(jax.value_and_grad(target.value))

    def pair(total: Array, key: Key) -> tuple[Array, tuple[Array, Array]]:
        offset = reference.scaled(random.normal(key, (reference.dim,), reference.mean.dtype))
        value, gradient = evaluate(reference.mean + jnp.stack([offset, -offset]))
        return total + jnp.sum(gradient, 0), (jnp.mean(value), jnp.max(jnp.abs(value)))

    of_pairs = random.split(keys[0], -(-num_samples // 2))
    zero = jnp.zeros_like(reference.mean)
    if not is_divided():
        total, (means, largest) = lax.scan(pair, zero, of_pairs)
    else:
        count = len(of_pairs)
        size = -(-count // num_blocks(count))

        def block(index: Array) -> tuple[Array, tuple[Array, Array]]:
            places = index * size + jnp.arange(size)

            def one(total: Array, place: Array) -> tuple[Array, tuple[Array, Array]]:
                after, found = pair(total, of_pairs[jnp.minimum(place, count - 1)])
                return jnp.where(place < count, after, total), found

            return lax.scan(one, zero, places)

        totals, found = values_of_blocks(block, -(-count // size))
        means, largest = (a.reshape(-1)[:count] for a in found)
        total = jnp.sum(totals, 0)
    return heat_of_means(means, jnp.max(largest)), total / (2 * means.size)
