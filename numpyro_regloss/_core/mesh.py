# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Work that is divided among the devices of a mesh, with the same bits on any number of them.

A whole step runs on every device, on the same numbers (`on_mesh`). Within it, what is costly is divided:
`divided` stands for `jax.vmap`, `sum_of_blocks` for a sum over parts. Both cut their work into blocks, whose
number and size do not depend on the number of devices. Each device does its share of them one after the other,
results are gathered in the order of the blocks, and sums are added in a fixed tree. Nothing is left to a compiler
that divides programs by itself: it may evaluate everything everywhere, and adds in an order of its own.

Rows of data that the user has divided along a second axis, `"rows"`, stay divided: within a block the compiler
adds what the devices of the block found. Outside of `on_mesh` both are what they stand for.
"""

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from numpyro_regloss._core.foreign import attribute
from numpyro_regloss._core.processes import placed
from numpyro_regloss._core.pytree import is_concrete
from numpyro_regloss._core.settings import own_settings
from numpyro_regloss._core.types import Array

__all__ = [
    "MOST_BLOCKS",
    "check_mesh",
    "copied",
    "divided",
    "is_divided",
    "mapped",
    "meshed",
    "num_blocks",
    "on_mesh",
    "sum_of_blocks",
    "values_of_blocks",
]

T = TypeVar("T")

DRAWS, ROWS = "draws", "rows"
# The axis within a step. A user may have an axis "draws" of his own, within which whole steps run.
AXIS = "draws of numpyro_regloss"
# Blocks at most, which many devices may share; and at least, of 16 rows where there are as many.
MOST_BLOCKS, LEAST_BLOCKS, ROWS_PER_BLOCK = 64, 8, 16
HOW = 'write jax.make_mesh((8,), ("draws",), axis_types=(jax.sharding.AxisType.Auto,))'


def check_mesh(mesh: Any, what: str, *, external: bool) -> Mesh | None:
    """Refuses what is no mesh with an axis "draws", or "draws" and "rows".

    Args:
        mesh: of devices, with Auto or Explicit axes, or None.
        what: begins the error message.
        external: whether the loss is called on the host.

    Returns:
        The same devices with Auto axes, or None.

    Raises:
        TypeError: if it is no mesh.
        ValueError: if it has other axes, or the loss is called on the host.
    """
    if mesh is None:
        return None
    if external:
        raise ValueError(
            f"{what}: expected None with Loss.from_external, whose calls run on the host; give Loss.from_external "
            "an executor, which divides them among its workers."
        )
    if not isinstance(mesh, Mesh):
        raise TypeError(f"{what}: expected a jax.sharding.Mesh or None, got {mesh!r}; {HOW}.")
    if mesh.axis_names not in ((DRAWS,), (DRAWS, ROWS)):
        raise ValueError(
            f'{what}: expected an axis "draws", or the axes "draws" and "rows", got {mesh.axis_names}; {HOW}, or '
            'jax.make_mesh((4, 2), ("draws", "rows")) with data that jax.device_put has divided along "rows".'
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def on_mesh(mesh: Mesh | None, fn: Callable[..., T]) -> Callable[..., T]:
    """A function that every device of a mesh runs on the same arguments, and that may divide work.

    Args:
        mesh: from `check_mesh`; None for the function as it is.
        fn: of pytrees of arrays, to one; the same on all devices.

    Returns:
        The function.

    Raises:
        ValueError: within `jax.set_mesh` or `jax.shard_map`, whose mesh is another one.
    """
    if mesh is None:
        return fn
    _check_context(mesh)
    same = PartitionSpec()
    return jax.shard_map(
        fn, mesh=_inner(mesh), in_specs=same, out_specs=same, axis_names={AXIS}, check_vma=False
    )


def copied(mesh: Mesh | None, tree: T) -> T:
    """The same arrays on every device of a mesh, as `on_mesh` takes them: elsewhere they are another program.

    What is divided along an axis "rows" stays so, if the mesh has one.

    Args:
        mesh: from `check_mesh`, or None.
        tree: of arrays.

    Returns:
        The tree.
    """
    if mesh is None or not is_concrete(tree):
        return tree
    _check_context(mesh)
    inner, known = _inner(mesh), {}

    def place(leaf: Any) -> Any:
        # Data that an optimizer has are its step's arguments too: one copy of them.
        if id(leaf) not in known:
            known[id(leaf)] = placed(leaf, jax.NamedSharding(inner, _by_rows(leaf, mesh)))
        return known[id(leaf)]

    return jax.tree.map(place, tree)


def _by_rows(leaf: Any, mesh: Mesh) -> PartitionSpec:
    sharding = attribute(leaf, "sharding", None)
    if ROWS not in mesh.axis_names or not isinstance(sharding, jax.NamedSharding):
        return PartitionSpec()
    names = [axis if isinstance(axis, tuple) else (axis,) for axis in sharding.spec]
    return PartitionSpec(*(ROWS if ROWS in some else None for some in names))


def _check_context(mesh: Mesh) -> None:
    context = jax.sharding.get_abstract_mesh()
    if context.axis_names:
        raise ValueError(
            f"mesh: expected no other mesh around work on {dict(mesh.shape)}, got {dict(context.shape)}, "
            "that of jax.set_mesh or jax.shard_map; leave it (end its `with` block) before the run, or use "
            "mesh=None."
        )


def _inner(mesh: Mesh) -> Mesh:
    names = (AXIS, *mesh.axis_names[1:])
    return Mesh(mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))


def is_divided() -> bool:
    """Whether the program that is traced runs on a mesh, by `on_mesh`."""
    return AXIS in jax.sharding.get_abstract_mesh().axis_names


def num_blocks(num_rows: int) -> int:
    """How many blocks rows are cut into at most, on any number of devices."""
    wanted = min(max(num_rows // ROWS_PER_BLOCK, LEAST_BLOCKS), MOST_BLOCKS)
    return max(1, min(num_rows, wanted))


def divided(fn: Callable[..., T], in_axes: tuple[int | None, ...] | int = 0) -> Callable[..., T]:
    """`jax.vmap`, of which each device does its share.

    Args:
        fn: of one row.
        in_axes: zero or None for each argument, or zero for all.

    Returns:
        The function of arguments with a leading axis of rows; the same on all devices.
    """
    return _shared(fn, jax.vmap(fn, in_axes), in_axes)


def mapped(fn: Callable[[Any], T], rows: Any, batch_size: int | None = None) -> T:
    """`jax.lax.map`, of which each device does its share.

    Args:
        fn: of one row.
        rows: a tree of arrays with a leading axis of rows.
        batch_size: rows that are evaluated at once; None for one after the other.

    Returns:
        Its values with a leading axis of rows; the same on all devices.
    """

    def several(rows: Any) -> T:
        return lax.map(fn, rows, batch_size=batch_size)

    return _shared(fn, several, 0)(rows)


def meshed(*settings: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """`jax.jit` of a function of arrays, with a further argument: the `mesh` that divides its work, or None.

    Args:
        *settings: names of arguments that compile, given by name.

    Returns:
        A decorator.
    """

    def decorate(fn: Callable[..., T]) -> Callable[..., T]:
        def run(*args: Any, mesh: Mesh | None = None, **known: Any) -> T:
            return on_mesh(mesh, partial(fn, **known))(*args)

        update_wrapper(run, fn)
        # JAX would look for `mesh` among the arguments of what it wraps.
        del vars(run)["__wrapped__"]
        return jax.jit(own_settings(run), static_argnames=(*settings, "mesh"))

    return decorate


def _shared(
    fn: Callable[..., T], several: Callable[..., T], in_axes: tuple[int | None, ...] | int
) -> Callable[..., T]:
    def call(*args: Any) -> T:
        if not is_divided():
            return several(*args)
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        rows = [arg for arg, axis in zip(args, axes, strict=True) if axis is not None]
        count = jax.tree.leaves(rows)[0].shape[0]
        size = -(-count // num_blocks(count))

        def one(index: Array) -> T:
            # The last block has the last row several times.
            places = jnp.minimum(index * size + jnp.arange(size), count - 1)
            places = places[0] if size == 1 else places
            some = jax.tree.map(lambda a: a[places], rows)
            taken = iter(some)
            parts = [
                arg if axis is None else next(taken) for arg, axis in zip(args, axes, strict=True)
            ]
            # Conditionals of a single row run one branch.
            return jax.tree.map(lambda a: a[None], fn(*parts)) if size == 1 else several(*parts)

        found = values_of_blocks(one, -(-count // size))
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:count], found)

    return call


def values_of_blocks(fn: Callable[[Array], T], count: int) -> T:
    """A function of every block, computed where the block is and gathered; only within `on_mesh`.

    Args:
        fn: of the number of a block.
        count: how many there are.

    Returns:
        Its values with a leading axis of blocks, the same on all devices.
    """
    per_device = -(-count // lax.axis_size(AXIS))
    fn = jax.jit(fn)  # so that it is traced once
    shapes = jax.eval_shape(fn, lax.axis_index(AXIS))
    blank = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    found = _gathered(_local(fn, count, per_device, blank))
    return jax.tree.map(lambda a: a[:count], found)


def sum_of_blocks(fn: Callable[[Array], T], count: int, zero: T, merge: Callable[[T, T], T]) -> T:
    """The sum of a function of every block, in the order of a fixed tree; only within `on_mesh`.

    Where the number of devices is a power of two, one sum per device is gathered; else one per block.

    Args:
        fn: of the number of a block.
        count: how many there are.
        zero: the sum of no blocks.
        merge: adds two sums.

    Returns:
        The sum, the same on all devices.
    """
    devices, leaves = lax.axis_size(AXIS), 1 << (count - 1).bit_length()
    per_device = -(-leaves // devices)
    local = _local(fn, count, per_device, zero)
    if devices * per_device == leaves:
        local, per_device = _tree(local, per_device, merge), 1
        leaves = devices
    found = jax.tree.map(lambda a: a[:leaves], _gathered(local))
    return lax.optimization_barrier(jax.tree.map(lambda a: a[0], _tree(found, leaves, merge)))


def _gathered(tree: T) -> T:
    # Of a single device XLA knows that nothing is gathered, and fuses what is before with what is after.
    whole = jax.tree.map(
        lambda a: lax.all_gather(a, AXIS, tiled=True), lax.optimization_barrier(tree)
    )
    return lax.optimization_barrier(whole)


def _tree(sums: Any, count: int, merge: Callable[[Any, Any], Any]) -> Any:
    while count > 1:
        halves = (jax.tree.map(lambda a, i=i: a[i::2], sums) for i in (0, 1))
        sums = jax.vmap(merge)(*halves)
        count //= 2
    return sums


def _local(fn: Callable[[Array], T], count: int, per_device: int, blank: T) -> T:
    # A loop whose length is known at run time alone: one whose length depends on the number of devices would be
    # compiled in other ways, and rounded in others.
    first = lax.optimization_barrier(lax.axis_index(AXIS)) * per_device
    blank = jax.tree.map(lambda a: jnp.broadcast_to(a, (per_device, *jnp.shape(a))), blank)

    def body(i: Array, rows: T) -> T:
        found = fn(first + i)
        return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, i, 0), rows, found)

    return lax.fori_loop(0, jnp.clip(count - first, 0, per_device), body, blank)
