# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Networks of Flax NNX, Equinox and Flax Linen: what is trained of them, what is held, and how they come back.

A layout takes a module apart into leaves and builds it from leaves. Frameworks are never imported: whoever has a
module of one has imported it.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import random

__all__ = ["Layout", "Parts", "Tree", "name_of", "refuse_state", "take_apart"]

HOW = "Loss.from_module"
BATCH_NORM = "batch_stats"


class Layout(Protocol):
    """How leaves make what the user wrote; hashable, since it compiles."""

    def build(self, leaves: Sequence[Any], key: Any = None) -> Any:
        """What the user wrote; its own streams of random numbers begin at the key, if there is one."""
        ...

    def leaves(self, params: Any) -> list[Any]:
        """The inverse, of the same structure.

        Raises:
            ValueError: if the structure is another one.
        """
        ...

    def trained(self, leaves: Sequence[Any], is_trained: Sequence[bool]) -> Any:
        """The part that is trained, as the framework's own gradients are."""
        ...

    def groups(self, leaves: Sequence[Any], is_trained: Sequence[bool]) -> Any:
        """The same as a tree of which a user may give a prefix."""
        ...

    def called(self, fn: Any, module: Any, args: tuple, kwargs: dict) -> Any:
        """What the function returns."""
        ...

    def updated(self, module: Any, aux: Any) -> list[Any]:
        """All leaves after a call in training mode.

        Args:
            module: that was given to the function.
            aux: what it returned beside the loss, or None.

        Raises:
            ValueError: if the function does not hand out the new state.
        """
        ...

    def settled(self, module: Any) -> Any:
        """The module whose running averages were set by hand, with what its framework divides them by."""
        ...

    @property
    def has_streams(self) -> bool:
        """Whether the module has streams of random numbers of its own."""
        ...

    @property
    def num_first(self) -> int:
        """How many arguments of the function come before the data."""
        ...

    @property
    def is_module(self) -> bool:
        """Whether it is a framework's."""
        ...


class Parts:
    """A module that was taken apart.

    Attributes:
        layout: how to build it.
        names: of the leaves.
        paths: where they are, for error messages.
        leaves: all of them.
        is_trained: which are parameters.
    """

    def __init__(
        self, layout: Layout, paths: list[Any], leaves: list[Any], is_trained: list[bool]
    ) -> None:
        self.layout, self.paths, self.leaves, self.is_trained = layout, paths, leaves, is_trained


@dataclasses.dataclass(frozen=True)
class Tree:
    """Any pytree; `Loss.from_function` has these.

    Attributes:
        structure: the tree's.
    """

    structure: Any

    has_streams = False
    is_module = False

    @property
    def num_first(self) -> int:
        """The tree alone."""
        return 1

    def build(self, leaves: Sequence[Any], key: Any = None) -> Any:
        """The tree."""
        del key
        return jax.tree.unflatten(self.structure, leaves)

    def leaves(self, params: Any) -> list[Any]:
        """Its leaves."""
        leaves, structure = jax.tree.flatten(params)
        if structure != self.structure:
            raise ValueError(f"parameters of the structure {self.structure}, got {structure}")
        return leaves

    def trained(self, leaves: Sequence[Any], is_trained: Sequence[bool]) -> Any:
        """The whole tree: settings among the leaves are there too, as zeros of their types."""
        del is_trained
        return self.build(leaves)

    def groups(self, leaves: Sequence[Any], is_trained: Sequence[bool]) -> Any:
        """The same."""
        return self.trained(leaves, is_trained)

    def called(self, fn: Any, module: Any, args: tuple, kwargs: dict) -> Any:
        """What the function returns."""
        return fn(module, *args, **kwargs)

    def updated(self, module: Any, aux: Any) -> list[Any]:
        """A plain tree has no state."""
        raise ValueError(
            f"Loss.recalibrate: expected a loss from {HOW}, whose modules have states."
        )

    def settled(self, module: Any) -> Any:
        """The same."""
        return module


@dataclasses.dataclass(frozen=True)
class Equinox(Tree):
    """A module of Equinox, or a pair of one with its `eqx.nn.State`."""

    has_state: bool

    is_module = True

    @property
    def num_first(self) -> int:
        """The module, and its state if there is one."""
        return 1 + self.has_state

    def __reduce__(self) -> Any:
        # Structures of Equinox hold a sentinel that is compared by identity; modules pickle.
        example = self.build(range(self.structure.num_leaves))
        return _equinox_like, (example, self.has_state)

    def trained(self, leaves: Sequence[Any], is_trained: Sequence[bool]) -> Any:
        """The module with None in all other places, as `eqx.filter_grad` has it."""
        kept = [a if t else None for a, t in zip(leaves, is_trained, strict=True)]
        found = self.build(kept)
        return found[0] if self.has_state else found

    def called(self, fn: Any, module: Any, args: tuple, kwargs: dict) -> Any:
        """What the function returns of module and state."""
        return fn(*module, *args, **kwargs) if self.has_state else fn(module, *args, **kwargs)

    def updated(self, module: Any, aux: Any) -> list[Any]:
        """The state is among what the function returns."""
        if not self.has_state:
            raise ValueError(
                "Loss.recalibrate: expected a pair (module, state) of Equinox, as eqx.nn.make_with_state makes "
                f"it, got a module alone, which has no state; build the loss with {HOW}(fn, (module, state))."
            )
        state = sys.modules["equinox"].nn.State
        found = [a for a in _leaves(aux, state) if isinstance(a, state)]
        return self.leaves((module[0], _the_one(found, "eqx.nn.State")))

    def settled(self, module: Any) -> Any:
        """Its batch norm in the mode "batch" divides by one minus a power of the momentum."""
        if not self.has_state:
            return module
        net, state = module
        kind, hidden = sys.modules["equinox"].nn.BatchNorm, {}
        for norm in [a for a in _leaves(net, kind) if isinstance(a, kind)]:
            if norm.batch_counter is not None:
                count = state.get(norm.batch_counter)
                scale = jnp.where(count == 0, 1.0, 1.0 - norm.momentum**count)
                index = norm.batch_state_index
                # By index: a layer that is there twice has one state, which is divided once.
                hidden[index.marker] = index, [a * scale.astype(a.dtype) for a in state.get(index)]
        for index, averages in hidden.values():
            state = state.set(index, tuple(averages))
        return net, state


@dataclasses.dataclass(frozen=True)
class Linen(Tree):
    """The variables of a module of Flax Linen: collections by name."""

    collections: tuple[str, ...]

    is_module = True

    def trained(self, leaves: Sequence[Any], is_trained: Sequence[bool]) -> Any:
        """The collections that are trained."""
        del is_trained
        return {name: self.build(leaves)[name] for name in self.collections}

    def updated(self, module: Any, aux: Any) -> list[Any]:
        """New collections are among what the function returns, as `apply(..., mutable=[...])` has them."""
        others = set(module) - set(self.collections)

        def is_update(node: Any) -> bool:
            # Others are made by the call: intermediates, or caches.
            return isinstance(node, Mapping) and bool(others & set(node))

        if not others:
            raise ValueError(
                "Loss.recalibrate: expected variables with collections beside the parameters, got "
                f"{sorted(module)}."
            )
        nodes = jax.tree.leaves(aux, is_leaf=is_update)
        found = _the_one([a for a in nodes if is_update(a)], f"a dict of {sorted(others)}")
        known = {name: found[name] for name in others & set(found)}
        return self.leaves(type(module)({**module, **known}))


@dataclasses.dataclass(frozen=True)
class Nnx:
    """A module of Flax NNX, with what it shares.

    Attributes:
        graph: the module's.
        structure: of its state.
        wrt: which variables are trained.
        keys: places of the keys of its streams among the leaves.
    """

    graph: Any
    structure: Any
    wrt: Any
    keys: tuple[int, ...]

    num_first = 1
    is_module = True

    @property
    def has_streams(self) -> bool:
        """Whether there are any."""
        return bool(self.keys)

    def build(self, leaves: Sequence[Any], key: Any = None) -> Any:
        """The module."""
        leaves = list(leaves)
        for place in self.keys if key is not None else ():
            shape = jnp.shape(leaves[place])
            fresh = random.fold_in(key, place)
            leaves[place] = random.split(fresh, shape) if shape else fresh
        return _nnx().merge(self.graph, jax.tree.unflatten(self.structure, leaves))

    def leaves(self, params: Any) -> list[Any]:
        """The leaves of its state."""
        # A module in evaluation mode has another graph, and the same state.
        leaves, structure = jax.tree.flatten(_nnx().split(params)[1])
        if structure != self.structure:
            raise ValueError(f"a module of {self.structure}, got {structure}")
        return leaves

    def trained(self, leaves: Sequence[Any], is_trained: Sequence[bool]) -> Any:
        """A state of what is trained, as `nnx.grad` has it."""
        del is_trained
        state = jax.tree.unflatten(self.structure, leaves)
        return _nnx().filter_state(state, self.wrt)

    def groups(self, leaves: Sequence[Any], is_trained: Sequence[bool]) -> Any:
        """A nested dict of what is trained."""
        return _nnx().to_pure_dict(self.trained(leaves, is_trained))

    def called(self, fn: Any, module: Any, args: tuple, kwargs: dict) -> Any:
        """What the function returns."""
        return fn(module, *args, **kwargs)

    def updated(self, module: Any, aux: Any) -> list[Any]:
        """The module has changed itself."""
        del aux
        return self.leaves(module)

    def settled(self, module: Any) -> Any:
        """The same."""
        return module


def take_apart(module: Any, wrt: Any = None) -> Parts:
    """Leaves of a module, and which of them its framework trains.

    Args:
        module: of NNX; of Equinox, or a pair of one with its state; or variables of Linen.
        wrt: what is trained instead: a filter of NNX, a filter of Equinox's `partition`, or names of collections.

    Returns:
        The parts.

    Raises:
        TypeError: if it is none of these.
    """
    if _is_nnx(module):
        return _of_nnx(module, wrt)
    has_state = isinstance(module, tuple) and len(module) == 2 and _is_equinox_state(module[1])
    if _is_equinox(module[0] if has_state else module):
        return _of_equinox(module, wrt, has_state=has_state)
    if isinstance(module, Mapping) and "params" in module:
        return _of_linen(module, wrt)
    raise TypeError(
        f"{HOW}: expected a module of Flax NNX, one of Equinox or a pair (module, state), or the variables of one "
        f"of Flax Linen, a dict with 'params', got {type(module).__name__}; other pytrees of parameters are for "
        "Loss.from_function."
    )


def refuse_state(params: Any, what: str) -> None:
    """Refuses parameters among which a framework has a state: it would be trained.

    Args:
        params: any pytree.
        what: begins the error message.

    Raises:
        TypeError: if there is one.
    """

    def is_module(node: Any) -> bool:
        return _is_nnx(node) or _is_equinox_state(node) or _is_nnx_variable(node)

    for node in _leaves(params, is_module):
        if _is_nnx(node):
            kind = "a module of Flax NNX, whose batch statistics and keys would be trained too"
        elif _is_equinox_state(node):
            kind = "an eqx.nn.State, whose running averages would be trained too"
        elif _is_nnx_variable(node) and not isinstance(node, _nnx().Param):
            kind = f"an nnx.{type(node).__name__}, which is no parameter"
        else:
            continue
        raise TypeError(f"{what}: expected parameters, got {kind}; use {HOW}(fn, module, *args).")
    if isinstance(params, Mapping) and {"params", BATCH_NORM} <= set(params):
        raise TypeError(
            f"{what}: expected parameters, got variables of Flax Linen with {BATCH_NORM!r}, which would be "
            f"trained too; use {HOW}(fn, variables, *args)."
        )


def name_of(path: tuple[Any, ...], slash: str = "/") -> str:
    """A path as one name; slashes within keys are spelled out as in JSON pointers where asked for."""
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if slash != "/":
        parts = [part.replace("~", "~0").replace("/", slash) for part in parts]
    return "/".join(parts) or "params"


def _of_nnx(module: Any, wrt: Any) -> Parts:
    nnx = _nnx()
    wrt = nnx.Param if wrt is None else wrt
    graph, state = nnx.split(module)
    flat, structure = jax.tree_util.tree_flatten_with_path(state)
    # The last key is the variable's value.
    paths = [path[:-1] for path, _ in flat]
    kinds = dict(nnx.to_flat_state(state))
    chosen = {path for path, _ in nnx.to_flat_state(nnx.filter_state(state, wrt))}
    is_trained = [_keys(path) in chosen for path in paths]
    keys = [i for i, path in enumerate(paths) if isinstance(kinds[_keys(path)], nnx.RngKey)]
    layout = Nnx(graph, structure, wrt, tuple(keys))
    return Parts(layout, paths, [leaf for _, leaf in flat], is_trained)


def _of_equinox(module: Any, wrt: Any, *, has_state: bool) -> Parts:
    equinox = sys.modules["equinox"]
    net = module[0] if has_state else module
    chosen = equinox.filter(net, equinox.is_inexact_array if wrt is None else wrt)
    kept = {path for path, _ in jax.tree_util.tree_flatten_with_path(chosen)[0]}
    flat, structure = jax.tree_util.tree_flatten_with_path(module)
    first = 1 if has_state else 0
    in_net = [not has_state or path[0] == jax.tree_util.SequenceKey(0) for path, _ in flat]
    is_trained = [i and path[first:] in kept for i, (path, _) in zip(in_net, flat, strict=True)]
    paths = [path[first:] if i else path for i, (path, _) in zip(in_net, flat, strict=True)]
    return Parts(Equinox(structure, has_state), paths, [leaf for _, leaf in flat], is_trained)


def _equinox_like(example: Any, has_state: bool) -> Equinox:  # noqa: FBT001
    return Equinox(jax.tree.structure(example), has_state)


def _of_linen(variables: Any, wrt: Any) -> Parts:
    names = ("params",) if wrt is None else (wrt,) if isinstance(wrt, str) else tuple(wrt)
    missing = set(names) - set(variables)
    if missing:
        raise ValueError(
            f"{HOW}: expected wrt among the collections {sorted(variables)}, got {sorted(missing)}."
        )
    flat, structure = jax.tree_util.tree_flatten_with_path(variables)
    is_trained = [path[0].key in names for path, _ in flat]
    paths = [path for path, _ in flat]
    return Parts(Linen(structure, names), paths, [leaf for _, leaf in flat], is_trained)


def _keys(path: Any) -> tuple[Any, ...]:
    return tuple(key.key if isinstance(key, jax.tree_util.DictKey) else key for key in path)


def _leaves(tree: Any, is_leaf: Any) -> list[Any]:
    test = (lambda node: isinstance(node, is_leaf)) if isinstance(is_leaf, type) else is_leaf
    return jax.tree.leaves(tree, is_leaf=test)


def _the_one(found: list[Any], what: str) -> Any:
    if len(found) != 1:
        raise ValueError(
            f"Loss.recalibrate: expected {what} among what the function returns beside the loss, got "
            f"{len(found) or 'none'}; return (loss, state) and build the loss with has_aux=True."
        )
    return found[0]


def _nnx() -> Any:
    return sys.modules["flax.nnx"]


def _is_nnx(node: Any) -> bool:
    return "flax.nnx" in sys.modules and isinstance(node, _nnx().Module)


def _is_nnx_variable(node: Any) -> bool:
    return "flax.nnx" in sys.modules and isinstance(node, _nnx().Variable)


def _is_equinox(node: Any) -> bool:
    return "equinox" in sys.modules and isinstance(node, sys.modules["equinox"].Module)


def _is_equinox_state(node: Any) -> bool:
    return "equinox" in sys.modules and isinstance(node, sys.modules["equinox"].nn.State)
