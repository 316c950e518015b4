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
    "eval_params",
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


def eval_params(state: Any, params: Tree) -> Tree:
    """The centre: the parameters to evaluate, to report and to keep.

    Args:
        state: of one of these transformations, alone or within `optax.chain`, `optax.MultiSteps` and others.
        params: as the loop has them, for their types.

    Returns:
        The centre, in the structure, shapes and types of `params`.

    Raises:
        ValueError: if the state holds no centre.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from numpyro_regloss import transforms
        >>> params = {"w": jnp.ones(3)}
        >>> optimizer = transforms.heat(optax.sgd(0.1), tau=0.01)
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update({"w": jnp.ones(3)}, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> eval_params(state, params)["w"], bool((params["w"] == 0.9).any())
        (Array([0.9, 0.9, 0.9], dtype=float32), False)
    """
    centers = [center for _, center in optax.tree.get_all_with_path(state, "center")]
    if not centers:
        raise ValueError(
            "transforms.eval_params: expected the state of one of these transformations, got one without a "
            "centre; pass the optimizer's state as update returned it."
        )

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def chosen(center: Any, place: Array) -> Array:
        return place if is_masked(center) else center.astype(place.dtype)

    for center in centers:
        params = jax.tree.map(chosen, center, params, is_leaf=is_masked)
    return params


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
    """
    return jax.tree.broadcast(tau(count) if callable(tau) else tau, params)


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
