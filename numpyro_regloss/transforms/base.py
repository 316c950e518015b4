# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What transformations share: a centre in full precision, widths by group, noise, and updates from places."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random

from numpyro_regloss._core.checks import check_key, check_positive, check_schedule
from numpyro_regloss._core.pytree import is_concrete
from numpyro_regloss._core.types import Array, Key

__all__ = [
    "NO_PARAMS",
    "as_key",
    "at",
    "check_width",
    "cond",
    "full",
    "moved",
    "toward",
    "updates_to",
]

Tree = Any
NO_PARAMS = (
    "transforms: expected the parameters as the third argument of update, got None; write "
    "update(gradients, state, params)."
)


def as_key(key: Any, what: str) -> Key:
    """A random key that the state may keep.

    Args:
        key: a random key or a seed.
        what: begins the error message.

    Returns:
        The key; a copy, since a loop may donate its state.
    """
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return random.key(key)
    return jnp.copy(check_key(key, f"{what}: key"))


def check_width(tau: Any, what: str) -> None:
    """Refuses a tau that is not positive.

    Args:
        tau: a number, a schedule, or a pytree of numbers.
        what: begins the error message.
    """
    if callable(tau):
        check_schedule(tau, 0, f"{what}: tau")
    else:
        jax.tree.map(lambda one: check_positive(one, f"{what}: tau", (jnp.shape(one),)), tau)


def at(tau: Any, count: Array, params: Tree) -> Tree:
    """Widths of the regularizer in an outer step, one for each leaf.

    Args:
        tau: a number, a schedule, or a pytree prefix of the parameters.
        count: outer steps done.
        params: the parameters.

    Returns:
        A pytree like the parameters.

    Raises:
        ValueError: if it is no prefix.
    """
    widths = tau(count) if callable(tau) else tau
    try:
        return jax.tree.broadcast(widths, params)
    except ValueError as error:
        raise ValueError(
            "transforms: expected tau as a number, or as a pytree prefix of the parameters (a number for each of "
            f"their groups, with the same names), got {jax.tree.structure(widths)} for parameters of "
            f"{jax.tree.structure(params)}."
        ) from error


def cond(predicate: Array, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """`lax.cond`, and Python's `if` in a loop that is not compiled, where every call would be another program."""
    if is_concrete(predicate):
        return yes() if predicate else no()
    return lax.cond(predicate, yes, no)


def full(params: Tree) -> Tree:
    """A copy in at least single precision: a centre moves by less than a number of 16 bits can show."""
    return jax.tree.map(lambda a: jnp.array(a, jnp.promote_types(a.dtype, jnp.float32)), params)


def toward(mean: Tree, new: Tree, share: Array) -> Tree:
    """A running mean, moved towards a new term by its share of the weight.

    Args:
        mean: so far, in full precision.
        new: the term, of any type.
        share: from 0 to 1.

    Returns:
        The mean, of the types of `mean`.
    """
    moved = jax.tree.map(lambda m, a: m + share * (a.astype(m.dtype) - m), mean, new)
    return optax.tree.cast_like(moved, mean)


def moved(
    optimizer: Any, gradient: Tree, opt_state: Any, center: Tree, extra: dict[str, Any]
) -> tuple[Tree, Any]:
    """The step of the centre.

    Args:
        optimizer: of the centre.
        gradient: what it is handed.
        opt_state: its state.
        center: before the step.
        extra: further arguments of its `update`.

    Returns:
        The next centre and the optimizer's state.
    """
    updates, opt_state = optimizer.update(gradient, opt_state, center, **extra)
    return optax.apply_updates(center, updates), opt_state


def updates_to(
    step: Callable[[Tree, Any, Tree], tuple[Tree, Any]],
    gradients: Tree,
    state: Any,
    params: Tree | None,
    grad_fn: Callable[[Tree, Array], Tree] | None = None,
    num_more: int = 0,
) -> tuple[Tree, Any]:
    """Updates that bring the parameters to the place where the next gradient is due.

    Args:
        step: `(gradients, state, place) -> (next place, state)`.
        gradients: at the place of the parameters.
        state: of the transformation.
        params: the place.
        grad_fn: `(params, i) -> gradients` at further places.
        num_more: how many of them.

    Returns:
        The updates and the state.

    Raises:
        ValueError: if there are no parameters.
    """
    if params is None:
        raise ValueError(NO_PARAMS)
    place, state = step(gradients, state, params)
    if grad_fn is not None and num_more:

        def more(i: Array, carry: tuple[Tree, Any]) -> tuple[Tree, Any]:
            place, state = carry
            return step(grad_fn(place, i), state, place)

        place, state = lax.fori_loop(0, num_more, more, (place, state))
    return optax.tree.cast_like(optax.tree.sub(place, params), params), state
