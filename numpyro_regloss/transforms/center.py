# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The centre of a training loop, out of a state and the loop's parameters."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from numpyro_regloss.transforms.gradient_free import GradientFreeState

__all__ = ["eval_params"]

Tree = Any
WHAT = "transforms.eval_params"


def eval_params(state: Any, params: Tree) -> Tree:
    """The centre: the parameters to evaluate, to report and to keep.

    Args:
        state: of one of these transformations, alone or within `optax.chain`, `optax.MultiSteps` and others; or
            `optimizer.opt_state` of an `nnx.Optimizer`.
        params: as the loop has them, for their types; with NNX `nnx.state(model, nnx.Param)`.

    Returns:
        The centre, in the structure, shapes and types of `params`. With `gradient_free` the parameters of the loop
        are the centre.

    Raises:
        ValueError: if the state holds no centre, or one of other parameters.

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
    structure = jax.tree.structure(params)
    state, params = _without_variables(state), _without_variables(params)
    centers = [center for _, center in optax.tree.get_all_with_path(state, "center")]
    if not centers and not _has_gradient_free(state):
        raise ValueError(
            f"{WHAT}: expected the state of one of these transformations, got one without a centre; pass the "
            "optimizer's state as update returned it."
        )
    for center in centers:
        try:
            params = jax.tree.map(_chosen, center, params, is_leaf=_is_masked)
        except ValueError as error:
            raise ValueError(
                f"{WHAT}: expected parameters like those that init got, {_shapes(center)}, got "
                f"{_shapes(params)}; with NNX pass nnx.state(model, nnx.Param), with Equinox "
                "eqx.filter(model, eqx.is_array)."
            ) from error
    return jax.tree.unflatten(structure, jax.tree.leaves(params))


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _chosen(center: Any, place: Any) -> Any:
    if _is_masked(center):
        return place
    if not jax.tree_util.all_leaves([place]) or jnp.shape(place) != center.shape:
        raise ValueError("another structure or shape")
    return center.astype(jnp.result_type(place))


def _shapes(tree: Tree) -> Tree:
    return jax.tree.map(lambda a: jnp.shape(a) if isinstance(a, jax.Array) else a, tree)


def _has_gradient_free(state: Any) -> bool:
    def is_one(node: Any) -> bool:
        return isinstance(node, GradientFreeState)

    return any(is_one(node) for node in jax.tree.leaves(state, is_leaf=is_one))


def _without_variables(tree: Tree) -> Tree:
    """Arrays in place of the variables of NNX, whose types in an optimizer's state are others."""
    return sys.modules["flax.nnx"].as_pure(tree) if "flax.nnx" in sys.modules else tree
