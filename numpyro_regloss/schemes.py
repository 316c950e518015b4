# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Named schemes with good defaults; each returns a configured `TwoStep`.

Reference: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy
and Heat Regularization in Deep Learning".
"""

from collections.abc import Callable
from typing import Any

from numpyro_regloss._typing import Key
from numpyro_regloss.anchor import Proximal
from numpyro_regloss.fit import ForwardKL, RobbinsMonro
from numpyro_regloss.loss import Loss
from numpyro_regloss.minibatch import Minibatch
from numpyro_regloss.shift import NUTS, Implicit
from numpyro_regloss.two_step import TwoStep, TwoStepResult

__all__ = ["heat", "local_entropy", "minimize"]


def local_entropy(
    loss: Loss,
    tau: Any,
    shift: Any = None,
    fit: Any = None,
    anchor: Any = None,
    temperature: Any = 1.0,
    record: Any = None,
) -> TwoStep:
    """Minimizes F_tau(x) = -T log E exp(-loss(x') / T), x' ~ N(x, tau I), by moment matching.

    Args:
        loss: the loss.
        tau: variance of the regularizer, in squared units of the parameters.
        shift: engine that draws from q; default `NUTS()`. Use `Importance(num_samples)` for losses
            without a gradient.
        fit: default `ForwardKL()`.
        anchor: default `Proximal()`.
        temperature: T, in the units of the loss.
        record: a `Record`, for verdicts and values in the history.

    Returns:
        The optimizer.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = Loss.from_function(lambda x: jnp.sum(x**2), jnp.ones(2))
        >>> local_entropy(loss, tau=0.1).fit.covariance
        'reference'
    """
    return TwoStep(
        loss,
        tau,
        shift=NUTS() if shift is None else shift,
        fit=ForwardKL() if fit is None else fit,
        anchor=Proximal() if anchor is None else anchor,
        temperature=temperature,
        record=record,
    )


def heat(
    loss: Loss,
    tau: Any,
    fit: Any = None,
    anchor: Any = None,
    temperature: Any = 1.0,
    record: Any = None,
) -> TwoStep:
    """Minimizes F^H_tau(x) = E loss(x'), x' ~ N(x, tau I), by proximal steps.

    Args:
        loss: the loss.
        tau: variance of the regularizer, in squared units of the parameters.
        fit: solver of the implicit equation; default `RobbinsMonro()`.
        anchor: default `Proximal()`.
        temperature: T, in the units of the loss; only tau / T matters for the size of a step.
        record: a `Record`, for verdicts and values in the history.

    Returns:
        The optimizer.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = Loss.from_function(lambda x: jnp.sum(x**2), jnp.ones(2))
        >>> heat(loss, tau=0.1).shift
        Implicit()
    """
    return TwoStep(
        loss,
        tau,
        shift=Implicit(),
        fit=RobbinsMonro() if fit is None else fit,
        anchor=Proximal() if anchor is None else anchor,
        temperature=temperature,
        record=record,
    )


def minimize(
    rng_key: Key,
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    num_steps: int,
    tau: Any,
    temperature: Any = 1.0,
    scheme: Callable[..., TwoStep] = local_entropy,
    minibatch: Minibatch | None = None,
    progress_bar: bool = False,
    **kwargs: Any,
) -> TwoStepResult:
    """Minimizes a regularized loss of a function in one call.

    Args:
        rng_key: a random key.
        loss_fn: `loss_fn(params, *args)` returning a scalar.
        params: starting values, any pytree of floats.
        *args: data and settings of the loss.
        num_steps: outer steps.
        tau: variance of the regularizer, in squared units of the parameters.
        temperature: T, in the units of the loss.
        scheme: `local_entropy` or `heat`.
        minibatch: which arguments are data to be drawn in batches.
        progress_bar: show progress.
        **kwargs: passed to the scheme (`shift`, `fit`, `anchor`).

    Returns:
        Parameters, state and history.

    Raises:
        TypeError: if the scheme is not a function.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> result = minimize(random.key(0), lambda x: jnp.sum((x - 2.0) ** 2), jnp.zeros(2),
        ...                   num_steps=10, tau=1.0)
        >>> bool(jnp.all(jnp.abs(result.params - 2.0) < 0.2))
        True
    """
    if not callable(scheme):
        raise TypeError(
            f"schemes.minimize: expected scheme as schemes.local_entropy or schemes.heat, got {scheme!r}."
        )
    loss = Loss.from_function(loss_fn, params, *args, minibatch=minibatch)
    optimizer = scheme(loss, tau, temperature=temperature, **kwargs)
    return optimizer.run(rng_key, num_steps, progress_bar=progress_bar)
