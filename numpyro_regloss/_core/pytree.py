# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Frozen dataclasses as pytrees: leaves are what changes, static fields are what compiles.

JAX's own registration rebuilds a dataclass through its constructor, with tracers and placeholders
inside, so a constructor could not check its values. Here constructors run for users only, and
transforms rebuild objects behind their back.
"""

import dataclasses
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from numpyro_regloss._core.foreign import attribute
from numpyro_regloss._core.rounding import check_number, check_rounding

__all__ = [
    "fields_of",
    "has_fields",
    "Constant",
    "Partition",
    "all_finite",
    "is_concrete",
    "pytree_dataclass",
    "replace_fields",
    "static_field",
    "strip_weak_types",
    "with_context_axes",
]


T = TypeVar("T")


def static_field(**kwargs: Any) -> Any:
    """Declares a field that is part of the compiled program (a function, a count, a name)."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def _field_is_static(field: dataclasses.Field, value: Any) -> bool:
    """Whether a value compiles: declared so, a plain function or an engine that is no pytree."""
    if field.metadata.get("static", False):
        return True
    return (callable(value) or hasattr(value, "step")) and jax.tree_util.all_leaves([value])


def all_finite(tree: Any) -> jax.Array:
    """Whether all numbers of a tree are finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def is_concrete(tree: Any) -> bool:
    """Whether no leaf is a tracer, so that values can be checked on the host."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


@dataclass_transform(frozen_default=True, field_specifiers=(static_field, dataclasses.field))
def pytree_dataclass(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass that prints, compares, hashes and is a pytree.

    Equality compares leaves by value; the hash looks at static fields only, so it is defined for
    objects that hold arrays.

    Args:
        cls: the class to decorate.

    Returns:
        The same class, registered with JAX.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)
    names = [field.name for field in fields]

    def split(obj: T) -> tuple[list[tuple[str, Any]], tuple[Hashable, ...]]:
        values = [vars(obj)[name] for name in names]
        fixed = [_field_is_static(f, v) for f, v in zip(fields, values, strict=True)]
        children = [(n, v) for n, v, s in zip(names, values, fixed, strict=True) if not s]
        static = tuple((n, v) for n, v, s in zip(names, values, fixed, strict=True) if s)
        return children, (tuple(name for name, _ in children), static)

    def flatten_with_keys(obj: T) -> tuple[list[tuple[Any, Any]], tuple[Hashable, ...]]:
        children, aux = split(obj)
        return [(jax.tree_util.GetAttrKey(name), value) for name, value in children], aux

    def flatten(obj: T) -> tuple[list[Any], tuple[Hashable, ...]]:
        children, aux = split(obj)
        return [value for _, value in children], aux

    def unflatten(aux: Any, children: Any) -> T:
        obj = object.__new__(cls)
        child_names, static = aux
        for name, value in (*zip(child_names, children, strict=True), *static):
            object.__setattr__(obj, name, value)
        return obj

    def equal(self: T, other: object) -> Any:
        if type(self) is not type(other):
            return NotImplemented
        leaves, structure = jax.tree.flatten(self)
        others, other_structure = jax.tree.flatten(other)
        return structure == other_structure and all(
            np.array_equal(a, b) for a, b in zip(leaves, others, strict=True)
        )

    def hashed(self: T) -> int:
        return hash((cls, jax.tree.structure(self)))

    for name, method in {"__eq__": equal, "__hash__": hashed}.items():
        setattr(cls, name, method)
    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def has_fields(info: Any) -> bool:
    """Whether something is a named tuple or a dataclass."""
    is_named = isinstance(info, tuple) and hasattr(info, "_asdict")
    return is_named or (dataclasses.is_dataclass(info) and not isinstance(info, type))


def fields_of(info: Any) -> dict[str, Any]:
    """What the info of an engine holds, by name.

    Args:
        info: a named tuple or a dataclass, which reports what it likes beside what it must; None holds nothing.

    Returns:
        Values by name.

    Raises:
        TypeError: if it is neither.
    """
    if info is None:
        return {}
    if not has_fields(info):
        raise TypeError(
            "numpyro_regloss: expected the info of an engine as a NamedTuple or a dataclass, since its fields are "
            f"read by name, got {type(info).__name__}."
        )
    if isinstance(info, tuple):
        return info._asdict()
    return {field.name: attribute(info, field.name) for field in dataclasses.fields(info)}


def strip_weak_types(tree: Any) -> Any:
    """The same tree without weak types, which would make another program of the same shapes.

    Args:
        tree: a pytree of arrays, random keys among them.

    Returns:
        Arrays of the same types, strongly typed.
    """

    def cast(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        return leaf if is_key else lax.convert_element_type(leaf, leaf.dtype)

    return jax.tree.map(cast, tree)


def with_context_axes(tree: T, *, divided: bool = False) -> T:
    """The same arrays, on meshes whose axes are Auto unless `jax.set_mesh` says that they are Explicit.

    With Explicit axes, the default of `jax.make_mesh`, JAX asks of every product that sums over them how its
    result lies on the devices: within that context it can answer by itself for most, outside of it neither it
    nor a loss can. No data are moved, but within the context what is not divided is copied to all devices.

    Args:
        tree: a pytree, of which arrays on several devices are looked at.
        divided: whether the arrays stay divided within `jax.set_mesh`, as data of a loss do. Parameters and draws
            do not: engines take them apart and put them together.

    Returns:
        The same tree.
    """
    return jax.tree.map(lambda leaf: _with_context_axes(leaf, divided=divided), tree)


def _with_context_axes(leaf: Any, *, divided: bool) -> Any:
    if not isinstance(leaf, jax.Array):
        return leaf
    traced = isinstance(leaf, Tracer)
    sharding = jax.typeof(leaf).sharding if traced else leaf.sharding
    if not isinstance(sharding, NamedSharding) or not sharding.mesh.axis_names:
        return leaf
    mesh, context = sharding.mesh, jax.sharding.get_abstract_mesh()
    if AxisType.Manual in mesh.axis_types:  # within jax.shard_map
        return leaf
    types, spec = (AxisType.Auto,) * len(mesh.axis_names), sharding.spec
    if AxisType.Explicit in context.axis_types:
        types = context.axis_types
        if not divided and any(axes is not None for axes in spec):
            spec = PartitionSpec()
        if context.shape != mesh.shape:
            raise ValueError(
                f"numpyro_regloss: expected arrays on the mesh of jax.set_mesh, {dict(context.shape)}, whose axes "
                f"are Explicit, got one on another mesh, {dict(mesh.shape)}; leave the context of jax.set_mesh, "
                "or put the array on its mesh with jax.device_put."
            )
    if (mesh.axis_types, sharding.spec) == (types, spec):
        return leaf
    if traced:
        mesh = mesh.update(axis_types=types)
    else:
        mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=types)
    return jax.device_put(leaf, NamedSharding(mesh, spec))


def replace_fields(obj: T, **changes: Any) -> T:
    """The same object with some fields changed, without the checks of its constructor.

    Args:
        obj: an instance of a `pytree_dataclass`.
        **changes: new values by field name.

    Returns:
        A new object.
    """
    new = object.__new__(type(obj))
    for field in dataclasses.fields(obj):  # ty: ignore[invalid-argument-type]
        object.__setattr__(new, field.name, changes.get(field.name, vars(obj)[field.name]))
    return new


@jax.tree_util.register_pytree_with_keys_class
class Partition:
    """A pytree split into leaves that are traced and values that compile.

    Arrays and floats (Python's and NumPy's) are leaves. Integers, booleans, strings and functions
    are static: they size plates, choose branches and index, and so are arrays that are named as constants.
    Everything else is refused.

    Args:
        tree: a pytree.
        where: names a leaf in error messages, from its path; or what their paths begin with.
        constants: names of arrays to be bound as constants.

    Attributes:
        structure: the tree's structure, hashable.
        static: per leaf the static value, or `Partition.TRACED`.
        leaves: the traced leaves, in order.
    """

    TRACED = "<traced>"

    def __init__(
        self,
        tree: Any,
        where: str | Callable[[Any], str] = "argument",
        constants: frozenset[str] = frozenset(),
    ) -> None:
        paths, self.structure = jax.tree_util.tree_flatten_with_path(tree)
        static, leaves = [], []
        for path, leaf in paths:
            name = jax.tree_util.keystr(path)
            what = where + name if isinstance(where, str) else where(path)
            content = Constant.content_of(leaf)
            if content is not None:
                static.append(Constant(leaf, content[-1]))
            elif not _is_traced(leaf, what):
                static.append(_Static(leaf))
            elif what in constants and not isinstance(leaf, Tracer):
                static.append(Constant(leaf, what))
            else:
                if isinstance(leaf, np.ndarray):
                    check_rounding(leaf, what)
                elif isinstance(leaf, float):  # NumPy's double precision too
                    check_number(leaf, what)
                static.append(Partition.TRACED)
                leaves.append(_canonical(leaf))
        self.static, self.leaves = tuple(static), tuple(leaves)

    @property
    def constants(self) -> frozenset[str]:
        """Names of the arrays that are bound as constants."""
        return frozenset(value.name for value in self.static if isinstance(value, Constant))

    @property
    def tree(self) -> Any:
        """The tree as it was given."""
        leaves = iter(self.leaves)
        return jax.tree.unflatten(
            self.structure,
            [value.value if isinstance(value, _Static) else next(leaves) for value in self.static],
        )

    def map(self, fn: Callable[[Any], Any]) -> "Partition":
        """The same split with `fn` applied to the traced leaves."""
        return self.tree_unflatten((self.structure, self.static), map(fn, self.leaves))

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """For JAX: leaves and what compiles."""
        return self.leaves, (self.structure, self.static)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        """For JAX: leaves with their position, and what compiles."""
        keyed = [(jax.tree_util.SequenceKey(i), leaf) for i, leaf in enumerate(self.leaves)]
        return keyed, (self.structure, self.static)

    @classmethod
    def tree_unflatten(cls, aux: tuple[Any, ...], leaves: Any) -> "Partition":
        """For JAX: rebuilds without checks."""
        obj = object.__new__(cls)
        obj.structure, obj.static = aux
        obj.leaves = tuple(leaves)
        return obj

    def __repr__(self) -> str:
        """The tree, with arrays by shape and type only."""

        def brief(leaf: Any) -> Any:
            kind = "constant " if Constant.content_of(leaf) else ""
            return f"{kind}{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else leaf

        return repr(jax.tree.map(brief, self.tree))


# An array that was bound as a constant stays one, wherever its tree is split anew.
_constants: dict[int, tuple[weakref.ref, tuple[Any, ...]]] = {}


@dataclasses.dataclass(frozen=True)
class _Static:
    """A static value compared with its type: 1, 1.0 and True compile different programs."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Static)
            and type(self.value) is type(other.value)
            and self.value == other.value
        )

    def __hash__(self) -> int:
        return hash((type(self.value), self.value))


class Constant(_Static):
    """An array that compiles: a function needs its values when it is traced. Compared by value.

    Args:
        value: the array, on the host or on a device, as the user gave it.
        name: of the argument.
    """

    def __init__(self, value: Any, name: str) -> None:
        content = Constant.content_of(value)
        if content is None:
            # A copy: the user may go on to write into his, or pass it elsewhere.
            host = np.array(value)
            value = jnp.asarray(host) if isinstance(value, jax.Array) else host
            content = (type(value), host.dtype.str, host.shape, host.tobytes(), name)
            key = id(value)
            _constants[key] = (weakref.ref(value, lambda _: _constants.pop(key, None)), content)
        for field, what in {"value": value, "name": name, "content": content}.items():
            object.__setattr__(self, field, what)

    @staticmethod
    def content_of(array: Any) -> tuple[Any, ...] | None:
        """What an array is compared by, its name last, if it was bound as a constant."""
        known = _constants.get(id(array))
        return known[1] if known is not None and known[0]() is array else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self.content == other.content  # ty: ignore

    def __hash__(self) -> int:
        return hash(self.content)  # ty: ignore[missing-attribute]

    def __reduce__(self) -> Any:
        return Constant, (self.value, self.name)  # ty: ignore[missing-attribute]


def _is_traced(leaf: Any, what: str) -> bool:
    if isinstance(leaf, bool | int | str | np.bool_ | np.integer):
        return False
    if isinstance(leaf, float | complex | np.generic | np.ndarray | jax.Array):
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind not in "biufcV":
            raise TypeError(
                f"{what}: expected numbers, got an array of type {leaf.dtype}; convert it to numbers (codes by "
                "np.unique(..., return_inverse=True), days since a first one), or bind it with "
                "functools.partial(function, argument)."
            )
        return True
    if callable(leaf):
        return False
    tabular = callable(attribute(leaf, "to_numpy"))
    remedy = (
        "pass its numbers (data.to_numpy()), or each column as an array (data['x'].to_numpy())"
        if tabular
        else "convert it to an array (np.asarray), or bind it with functools.partial(function, argument)"
    )
    raise TypeError(
        f"{what}: expected an array, a number, a string, None or a function, got {type(leaf).__name__}; {remedy}."
    )


def _canonical(leaf: Any) -> Any:
    # A Python float is weakly typed: the same program with an array in its place would recompile.
    # NumPy arrays go to the device once here, not at every call.
    if isinstance(leaf, jax.Array):
        leaf = with_context_axes(leaf, divided=True)
        if not attribute(leaf, "weak_type", False):
            return leaf
        # Through NumPy, since a cast on the device would compile.
        return np.asarray(leaf) if is_concrete(leaf) else lax.convert_element_type(leaf, leaf.dtype)
    if isinstance(leaf, float | complex):
        return np.asarray(leaf, jax.dtypes.canonicalize_dtype(type(leaf)))
    return jnp.asarray(leaf)
