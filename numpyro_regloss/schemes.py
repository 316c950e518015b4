# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Named schemes with good defaults; each returns a configured `TwoStep`.

References: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy
and Heat Regularization in Deep Learning"; Chaudhari, Choromanska, Soatto, LeCun, Baldassi, Borgs, Chayes, Sagun &
Zecchina (2017), "Entropy-SGD: Biasing Gradient Descent into Wide Valleys"; Chaudhari, Baldassi, Zecchina, Soatto,
Talwalkar & Oberman (2017), "Parle: Parallelizing Stochastic Gradient Descent"; Kingma & Ba (2015), "Adam: A Method
for Stochastic Optimization".
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from numpyro_regloss._core.checks import check_count, check_positive
from numpyro_regloss._core.optimizers import TracedAdam, momentum
from numpyro_regloss._core.pytree import is_concrete
from numpyro_regloss._core.types import Key
from numpyro_regloss.anchor import Anchor, Optax, Proximal
from numpyro_regloss.fit import Fit, ForwardKL, RobbinsMonro
from numpyro_regloss.losses.groups import check_groups
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.minibatch import Minibatch
from numpyro_regloss.losses.replicas import Tied, replicate
from numpyro_regloss.schedules import Geometric
from numpyro_regloss.shift import SGLD, Auto, Implicit, Importance, Shift
from numpyro_regloss.two_step.optimizer import TwoStep, TwoStepResult
from numpyro_regloss.two_step.record import Record

__all__ = ["anneal", "entropy_sgd", "gradient_free", "heat", "local_entropy", "minimize", "parle"]

# The width of the first cloud of `anneal` over that of the last.
NARROWING = 1e4


def local_entropy(
    loss: Loss,
    tau: Any,
    shift: Shift | None = None,
    fit: Fit | None = None,
    anchor: Anchor | None = None,
    temperature: Any = 1.0,
    record: Record | None = None,
    mesh: Mesh | None = None,
) -> TwoStep:
    """Minimizes F_tau(x) = -T log E exp(-loss(x') / T), x' ~ N(x, tau I), by moment matching.

    Args:
        loss: the loss.
        tau: variance of the regularizer, in squared units of the parameters.
        shift: engine that draws from q; default `Auto()`, importance sampling from a Gaussian that follows q, and
            NUTS when no Gaussian is near enough to q. Use `Importance(num_samples)` for losses without a gradient.
        fit: default `ForwardKL()`.
        anchor: default `Proximal()`.
        temperature: T, in the units of the loss.
        record: a `Record`, for verdicts and values in the history.
        mesh: devices that divide the draws, see `TwoStep`.

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
        shift=Auto() if shift is None else shift,
        fit=ForwardKL() if fit is None else fit,
        anchor=Proximal() if anchor is None else anchor,
        temperature=temperature,
        record=record,
        mesh=mesh,
    )


def heat(
    loss: Loss,
    tau: Any,
    fit: Fit | None = None,
    anchor: Anchor | None = None,
    temperature: Any = 1.0,
    record: Record | None = None,
    mesh: Mesh | None = None,
) -> TwoStep:
    """Minimizes F^H_tau(x) = E loss(x'), x' ~ N(x, tau I), by proximal steps.

    Args:
        loss: the loss.
        tau: variance of the regularizer, in squared units of the parameters.
        fit: finds the next centre, the root of an equation; default `RobbinsMonro()`.
        anchor: default `Proximal()`.
        temperature: T, in the units of the loss; only tau / T matters for the size of a step.
        record: a `Record`, for verdicts and values in the history.
        mesh: devices that divide the draws, see `TwoStep`.

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
        mesh=mesh,
    )


def entropy_sgd(
    loss: Loss,
    tau: Any,
    *,
    temperature: Any = 1e-8,
    step_size: Any = 0.1,
    num_samples: int = 20,
    averaging_decay: Any = 0.75,
    noise: str = "normal",
    optimizer: Any = None,
    mesh: Mesh | None = None,
) -> TwoStep:
    """Entropy-SGD: short cold Langevin chains, exponential averages, and an optimizer for the outer steps.

    In the notation of Chaudhari et al., gamma = T / tau is the strength of the pull to the centre, sqrt(T) the
    noise, `num_samples` is L and `step_size` the inner rate. `schedules.Scoping` lets gamma grow. In their average
    the centre has the weight 0.75^L, which acts as a factor of the outer rate; here it has none. The outer
    optimizer gets the displacement x - E_q[x], without the factor gamma, as in their code.

    Args:
        loss: averaged over its rows, with a `Minibatch`, of which a fresh one is drawn at every inner step.
        tau: T / gamma, in squared units of the parameters; a number or a schedule such as
            `schedules.Scoping`.
        temperature: T, in the units of the loss.
        step_size: of the inner steps, see `shift.SGLD`.
        num_samples: inner steps per outer step.
        averaging_decay: weight of a draw relative to the next one.
        noise: `"normal"` or `"two_point"`, which is cheaper.
        optimizer: an Optax optimizer, built once; a rate of one is a step all the way to the average. Default:
            that rate with a Nesterov momentum of 0.9.
        mesh: devices of the run, see `TwoStep`. The single chain is not divided, but the evaluations of a `Record`
            are.

    Returns:
        The optimizer.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> loss = Loss.from_function(lambda x: jnp.sum((x - 2.0) ** 2), jnp.zeros(2))
        >>> from numpyro_regloss.schedules import Scoping
        >>> optimizer = entropy_sgd(loss, tau=Scoping(1e-6, rate=1e-3, least=1e-9))
        >>> result = optimizer.run(random.key(0), 50, progress_bar=False)
        >>> bool(jnp.all(jnp.abs(result.params - 2.0) < 0.01))
        True
    """
    shift = SGLD(step_size, num_samples, averaging_decay=averaging_decay, noise=noise)
    anchor = Optax(momentum() if optimizer is None else optimizer, direction="displacement")
    return TwoStep(loss, tau, shift, ForwardKL(), anchor, temperature, mesh=mesh)


def parle(
    loss: Loss,
    tau: Any,
    *,
    num_replicas: int = 3,
    coupling: Any = 0.1,
    temperature: Any = 1e-8,
    step_size: Any = 0.1,
    num_samples: int = 20,
    averaging_decay: Any = 0.75,
    noise: str = "normal",
    optimizer: Any = None,
    mesh: Mesh | None = None,
) -> TwoStep:
    """Parle: replicas of Entropy-SGD, each with its own centre and batches, that attract each other.

    Minimizes Σ_a [F_tau(x_a) + rho |x_a - mean|² / 2] over the replicas x_a, with rho = coupling T / tau, so that
    a schedule of tau (`schedules.Scoping`) strengthens both pulls. With `coupling=0` replicas are independent.

    Parameters have a leading axis of replicas, and losses of the history are summed over them. The replicas'
    mean, `jax.tree.map(lambda a: a.mean(0), result.params)` for a function's parameters, is the answer. A module
    has other arrays, which have no mean. With the loss of one replica, the answer is then
    `loss.constrain(result.state.reference.mean.reshape(num_replicas, -1).mean(0))`.

    Args:
        loss: of one replica; see `entropy_sgd`.
        tau: T / gamma, in squared units of the parameters; a number, a schedule, or values by group as for one
            replica.
        num_replicas: two at least.
        coupling: the share of its distance from the mean by which a replica moves towards the mean per outer step,
            at a rate of one; from 0 (not at all) to 1.
        temperature: see `entropy_sgd`.
        step_size: see `entropy_sgd`.
        num_samples: see `entropy_sgd`.
        averaging_decay: see `entropy_sgd`.
        noise: see `entropy_sgd`.
        optimizer: see `entropy_sgd`; one for all replicas.
        mesh: see `entropy_sgd`.

    Returns:
        The optimizer, of the loss of all replicas.

    Raises:
        TypeError: if `loss` is not a `Loss`, or the coupling not a number.
        ValueError: if the coupling is not between 0 and 1, or data are fewer than the replicas take at once.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> loss = Loss.from_function(lambda x: jnp.sum((x - 2.0) ** 2), jnp.zeros(2))
        >>> result = parle(loss, tau=1e-6, num_replicas=3).run(random.key(0), 50, progress_bar=False)
        >>> result.params.shape, bool(jnp.all(jnp.abs(result.params.mean(0) - 2.0) < 0.01))
        ((3, 2), True)
    """
    if not isinstance(loss, Loss):
        raise TypeError(
            f"schemes.parle: expected a Loss, got {type(loss).__name__}; wrap it with Loss.from_function."
        )
    check_count(num_replicas, "schemes.parle: num_replicas", 2)
    if isinstance(coupling, bool) or not isinstance(coupling, int | float | np.number):
        raise TypeError(f"schemes.parle: expected coupling as a number, got {coupling!r}.")
    if not 0 <= coupling <= 1:
        raise ValueError(f"schemes.parle: expected coupling between 0 and 1, got {coupling}.")
    all_replicas = replicate(loss, num_replicas)
    base = entropy_sgd(
        all_replicas,
        tau,
        temperature=temperature,
        step_size=step_size,
        num_samples=num_samples,
        averaging_decay=averaging_decay,
        noise=noise,
        optimizer=optimizer,
        mesh=mesh,
    )
    tied = Tied(base.anchor.optimizer, np.asarray(coupling, all_replicas.x0.dtype))
    return dataclasses.replace(base, anchor=Optax(tied, direction="displacement"))


def anneal(
    loss: Loss,
    width: Any,
    num_steps: int,
    *,
    last_width: Any = None,
    num_samples: int = 1000,
    ess: float = 0.4,
    mesh: Mesh | None = None,
) -> TwoStep:
    """Looks for the global minimum of a loss with many local ones, without gradients.

    The scheme combines clouds of importance sampling with a temperature set by their effective sample size, moment
    matching, and a tau that falls geometrically from `width`² to `last_width`² over `num_steps` steps. While the
    cloud is wider than the ripples of a loss, the ripples are averaged out, and the step follows the rest. The
    result depends on how slowly the cloud narrows and how exact its mean is: on `num_steps` and `num_samples`. A
    larger `ess` is slower and safer. There is no theorem that the minimum is found, and no F_tau that falls at
    every step.

    Args:
        loss: the loss.
        width: standard deviation of the first cloud, in units of the parameters: a quarter of the width of the box
            in which the minimum is expected. A number, or, if units differ, one per group of parameters, as for
            tau: `(dim,)`, or a pytree prefix of the parameters (a dict by site name for a model).
        num_steps: steps until the cloud has its last width, which it keeps.
        last_width: standard deviation of the last cloud, in the same forms: about the wanted precision of the
            minimizer times sqrt(num_samples). Default: `width` / 10,000.
        num_samples: loss evaluations per step, and one more for the centre: some tens per parameter.
        ess: effective sample size as a share of the cloud.
        mesh: devices that divide the cloud, see `TwoStep`.

    Returns:
        The optimizer, to be run for `num_steps` steps.

    Raises:
        TypeError: if `loss` is not a `Loss`.
        ValueError: if a width is not positive, not for the loss's parameters, or the last is above the first.

    Example:
        >>> from jax import random
        >>> from numpyro_regloss import problems
        >>> problem = problems.rastrigin(5).transformed(shift=1.5)  # about 10^5 local minima in its box
        >>> optimizer = anneal(Loss.from_function(problem.loss, problem.start), width=2.5, num_steps=100)
        >>> result = optimizer.run(random.key(0), 100, progress_bar=False)
        >>> bool(abs(result.params - 1.5).max() < 0.01)
        True
    """
    if not isinstance(loss, Loss):
        raise TypeError(
            f"schemes.anneal: expected a Loss, got {type(loss).__name__}; wrap it with Loss.from_function."
        )
    check_count(num_steps, "schemes.anneal: num_steps")
    first = check_groups(width, loss, "schemes.anneal: width")
    last = first / NARROWING
    if last_width is not None:
        last = check_groups(last_width, loss, "schemes.anneal: last_width")
    if is_concrete((first, last)) and (last > first).any():
        raise ValueError(
            f"schemes.anneal: expected last_width <= width, got {last_width} > {width}; the cloud narrows."
        )
    tau = Geometric(first**2, last**2, num_steps)
    cloud = Importance(num_samples, ess=ess)
    return TwoStep(loss, tau, shift=cloud, fit=ForwardKL(), mesh=mesh)


def gradient_free(
    loss: Loss,
    width: Any,
    num_samples: int = 64,
    *,
    rate: Any = 1.5,
    ess: Any = 0.5,
    chunk_size: int | None = None,
    record: Record | None = None,
    mesh: Mesh | None = None,
) -> TwoStep:
    """Trains a network from values of its loss alone.

    Small clouds of importance sampling, with a temperature T set by their effective sample size, estimate the
    gradient of the local entropy, T (x - E_q[x']) / tau with tau = `width`². Adam follows that gradient. As the
    loss falls, T and the gradients fall too, and Adam's memory turns smaller gradients into smaller steps. T and
    F_tau change at every step, so no F_tau is sure to fall. Many small clouds go further than few large ones,
    since Adam averages over steps.

    It is `TwoStep(loss, width**2, shift.Importance(num_samples, ess=ess), fit.ForwardKL(),
    anchor.Optax(optax.adam(...)))`; write that for another optimizer.

    Args:
        loss: the loss; with a `Minibatch` each step has one batch.
        width: standard deviation of the clouds, in units of the parameters. For a network it is a fraction of the
            size of its weights. If the loss is a staircase, it must be wide enough that the loss changes within a
            cloud. A number, or one per group of parameters, as for `anneal`.
        num_samples: loss evaluations per step in antithetic pairs, and one more for the centre.
        rate: of Adam, in widths per step.
        ess: effective sample size as a share of the cloud.
        chunk_size: draws evaluated at once, see `shift.Importance`.
        record: a `Record`, for verdicts and values in the history.
        mesh: devices that divide the cloud, see `TwoStep`.

    Returns:
        The optimizer.

    Raises:
        TypeError: if `loss` is not a `Loss`.
        ValueError: if a width or the rate is not positive, or a width not for the loss's parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> terraces = lambda x: jnp.sum(jnp.floor(4 * jnp.abs(x - 1.0)))
        >>> optimizer = gradient_free(Loss.from_function(terraces, jnp.zeros(100)), width=0.05)
        >>> result = optimizer.run(random.key(0), 300, progress_bar=False)
        >>> float(terraces(jnp.zeros(100))), float(terraces(result.params))
        (400.0, 0.0)
    """
    if not isinstance(loss, Loss):
        raise TypeError(
            f"schemes.gradient_free: expected a Loss, got {type(loss).__name__}; wrap it with "
            "Loss.from_function."
        )
    widths = check_groups(width, loss, "schemes.gradient_free: width")
    rate = check_positive(rate, "schemes.gradient_free: rate")
    cloud = Importance(num_samples, ess=ess, chunk_size=chunk_size)
    rates = rate * widths
    anchor = Optax(TracedAdam(loss.source.as_tree(rates) if rates.ndim else rates))
    return TwoStep(loss, widths**2, cloud, ForwardKL(), anchor, record=record, mesh=mesh)


def minimize(
    rng_key: Key,
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    num_steps: int,
    tau: Any,
    temperature: Any = None,
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
        temperature: T, in the units of the loss; default: the scheme's own.
        scheme: `local_entropy`, `heat`, `entropy_sgd` or `parle`.
        minibatch: which arguments are data to be drawn in batches.
        progress_bar: show progress.
        **kwargs: passed to the scheme (`shift`, `fit`, `anchor`, `mesh`, …).

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
    if temperature is not None:
        kwargs["temperature"] = temperature
    optimizer = scheme(loss, tau, **kwargs)
    return optimizer.run(rng_key, num_steps, progress_bar=progress_bar)
