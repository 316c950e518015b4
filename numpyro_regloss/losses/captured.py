# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""A user's function, with the data that it reads besides its arguments taken out of the compiled program.

A function that reads its data from an object, a closure or a global would be compiled with the data of that
day. Here it is traced once when a loss is built. The arrays that the trace found (the constants of its jaxpr)
travel as leaves, so that new values of equal shape neither recompile nor go stale. What was baked into the trace
(a mean that NumPy took) is part of the key of the program. Whether a loss still is what its function reads now
is checked wherever work with it begins.
"""

import types
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer, eval_jaxpr

from numpyro_regloss._core.foreign import attribute
from numpyro_regloss._core.pytree import Partition, is_concrete, pytree_dataclass, static_field
from numpyro_regloss.losses.environment import Environment, digest

__all__ = ["AsRead", "UserFunction", "handle"]

MOST_REMEMBERED = 32


class _Key:
    """What compiles: programs with the same key are the same but for the arrays that they read."""

    def __init__(self) -> None:
        # Whether there are programs with constants that are no leaves, which are for these data alone.
        self.is_private = False


_keys: WeakValueDictionary[Any, _Key] = WeakValueDictionary()
_remembered: OrderedDict[Any, tuple["_Program", Any]] = OrderedDict()


class _Program:
    """A traced function: the static half of `UserFunction`."""

    def __init__(
        self, fn: Any, probe: Callable[..., Any], operands: Any, settings: Any, precision: Any
    ) -> None:
        self.fn, self.probe, self.operands, self.settings = fn, probe, operands, settings
        # Of matrix products, as the user chose when he built the loss.
        self.precision = precision
        with jax.default_matmul_precision(precision):
            self._trace()
        parts = (self.name, settings, self.fingerprint)
        key = _keys.get(parts)
        if key is None or key.is_private:
            key = _keys[parts] = _Key()
        self.key = key

    def _trace(self) -> None:
        fn = _unjitted(self.fn)
        environment = Environment(fn)
        self.results = []

        def run(bound: Partition, *operands: Any) -> Any:
            arrays, result = self.probe(self.settings, _live(fn, bound), *operands)
            self.results.append(result)
            return arrays

        jaxprs = [jax.make_jaxpr(run)(*operands) for operands in self.operands]
        environment.without(environment.changed())
        slots: dict[Any, int] = {}
        arrays = []
        for const in (const for jaxpr in jaxprs for const in jaxpr.consts):
            if slots.setdefault(digest(const), len(slots)) == len(arrays):
                arrays.append(
                    const if isinstance(const, jax.Array) else jnp.asarray(np.asarray(const))
                )
        self.slots, self.arrays = slots, tuple(arrays)
        self.fingerprint = tuple(_fingerprint(jaxpr, slots) for jaxpr in jaxprs)
        self.name = environment.tokens if environment.complete else handle(self.fn)
        # Tracers must not outlive their trace.
        kept = is_concrete(self.arrays) and not environment.has_tracers
        self.environment = environment if kept else None

    @property
    def has_changed(self) -> bool:
        """Whether what the function reads may be something else now."""
        return self.environment is not None and not self.environment.unchanged

    def check(self, *, thorough: bool) -> None:
        """Refuses to go on with data that the function no longer reads."""
        environment = self.environment
        if environment is None or environment.unchanged:
            return
        if not thorough and not environment.changed():
            return
        now = self._anew()
        same = now.slots == self.slots
        if same and now.fingerprint != self.fingerprint:
            # Unless two traces that follow each other differ as well: then they say nothing.
            again = self._anew()
            same = again.fingerprint != now.fingerprint
        if not same:
            raise ValueError(
                f"Loss: the data that {_name(self.fn)} reads besides its arguments (from an object, a closure or "
                "a global) have changed since the Loss was built; build the Loss anew, or pass such data as "
                "arguments of the function."
            )
        self.environment = now.environment

    def _anew(self) -> "_Program":
        return _Program(self.fn, self.probe, self.operands, self.settings, self.precision)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Program) and self.key is other.key

    def __hash__(self) -> int:
        return id(self.key)

    def __repr__(self) -> str:
        return _name(self.fn)

    def __reduce__(self) -> Any:
        return _Program, (self.fn, self.probe, self.operands, self.settings, self.precision)


@pytree_dataclass
class UserFunction:
    """A function of a user, and the arrays that it reads besides its arguments.

    Attributes:
        bound: the function itself if it is a pytree of arrays, such as a network object.
        captured: the arrays that it reads.
        program: how it was traced.
    """

    bound: Partition
    captured: tuple[Any, ...]
    program: _Program = static_field()

    @classmethod
    def trace(
        cls, fn: Any, probe: Callable[..., Any], settings: Hashable, *operands: tuple
    ) -> tuple[Any, Any]:
        """Traces a function, or remembers that it was, if nothing that it reads has changed.

        Args:
            fn: the function.
            probe: `(settings, fn, *operands) -> (arrays, result)`, which runs it; a function of a module.
            settings: what else the result depends on.
            *operands: one tuple of operands for each trace; shapes are enough.

        Returns:
            The function with what it reads, and the result of each trace.
        """
        is_tree = not jax.tree_util.all_leaves([fn])
        bound = Partition(fn if is_tree else (), "fn")
        shapes = _shapes([(bound, *some) for some in operands])
        fn = _Tree(fn) if is_tree else fn
        leaves, structure = jax.tree.flatten(shapes)
        # Said at every product, or its derivative would have that of the code around it.
        precision = attribute(jax.config, "jax_default_matmul_precision") or "default"
        kinds = tuple((s.shape, s.dtype) for s in leaves)
        name = (handle(fn), probe, settings, structure, kinds, precision)
        program, results = _remembered.get(name, (None, None))
        if program is None or program.has_changed:
            program = _Program(fn, probe, shapes, settings, precision)
            results = program.results
            _remembered.pop(name, None)
            if program.environment is not None:
                _remembered[name] = (program, results)
                if len(_remembered) > MOST_REMEMBERED:
                    _remembered.popitem(last=False)
        return cls(bound, program.arrays, program), results

    @property
    def fn(self) -> Callable[..., Any]:
        """The function as it is now."""
        return _live(self.program.fn, self.bound)

    def check(self, *, thorough: bool = True) -> None:
        """Refuses to go on with data that the function no longer reads.

        Args:
            thorough: whether to trace the function anew where not all that it reads can be seen.

        Raises:
            ValueError: if they have changed since the function was traced.
        """
        self.program.check(thorough=thorough)

    def own_settings(self) -> AbstractContextManager[Any]:
        """JAX's settings as the user chose them when he built the loss."""
        return jax.default_matmul_precision(self.program.precision)

    def call(self, body: Callable[..., Any], *operands: Any) -> Any:
        """Runs the function with the arrays that this object holds in the place of those that it reads.

        Args:
            body: `(fn, *operands) -> arrays`, which runs it.
            *operands: pytrees of arrays.

        Returns:
            What `body` returns.
        """
        with self.own_settings():
            return self._call(body, *operands)

    def _call(self, body: Callable[..., Any], *operands: Any) -> Any:
        same = all(a is b for a, b in zip(self.captured, self.program.arrays, strict=True))
        if not self.captured or same and is_concrete((self.captured, self.bound, operands)):
            return body(self.fn, *operands)

        def run(bound: Partition, *operands: Any) -> Any:
            return body(_live(_unjitted(self.program.fn), bound), *operands)

        closed, shape = jax.make_jaxpr(run, return_shape=True)(self.bound, *operands)
        consts = [self._held(const) for const in closed.consts]
        leaves = jax.tree.leaves((self.bound, operands))
        out = eval_jaxpr(closed.jaxpr, consts, *leaves)
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    def _held(self, const: Any) -> Any:
        slot = self.program.slots.get(digest(const))
        if slot is not None:
            return self.captured[slot]
        if not isinstance(const, Tracer):
            # Such as the numbers of the rows, which depend on the shapes that it is traced with.
            self.check()
            self.program.key.is_private = True
        return const


class AsRead:
    """A function as a static argument of a program: another one if it, or what it reads, is another one.

    Args:
        fn: the function.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self._key = (handle(fn), Environment(fn, by_value=True).tokens)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self.fn(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AsRead) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


class _Tree:
    """A function that is a pytree: its leaves are held elsewhere, its functions and its class are here."""

    def __init__(self, fn: Any) -> None:
        static = [v.value for v in Partition(fn).static if v is not Partition.TRACED]
        self.parts = (type(fn), *static)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tree) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)


def _live(fn: Any, bound: Partition) -> Any:
    return bound.tree if isinstance(fn, _Tree) else fn


def _unjitted(fn: Any) -> Any:
    # A function that the user compiled remembers data by itself.
    is_jitted = type(fn).__name__ == "PjitFunction" and callable(attribute(fn, "__wrapped__"))
    return fn.__wrapped__ if is_jitted else fn


def _name(fn: Any) -> str:
    if isinstance(fn, _Tree):
        return fn.parts[0].__name__
    return attribute(fn, "__qualname__") or type(fn).__name__


def handle(fn: Any) -> Any:
    """The function as something to compare: which one it is, or what a method is bound to."""
    if isinstance(fn, _Tree):
        return fn
    if isinstance(fn, types.MethodType):
        return (_Same(fn.__self__), fn.__func__)
    return _Same(fn)


class _Same:
    """An object that is equal to itself alone, with a hash whatever it is."""

    def __init__(self, obj: Any) -> None:
        self.obj = obj

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.obj is other.obj

    def __hash__(self) -> int:
        return id(self.obj)


def _shapes(tree: Any) -> Any:
    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        known = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
        return jax.ShapeDtypeStruct(known.shape, known.dtype)

    return jax.tree.map(shape, tree)


def _fingerprint(closed: Any, slots: dict[Any, int]) -> tuple[Any, ...]:
    """All of a jaxpr but the values of its constants, as something to compare."""
    parts: list[Any] = []
    _write(closed.jaxpr, [("slot", slots[digest(const)]) for const in closed.consts], parts)
    return tuple(parts)


def _write(jaxpr: Any, consts: list[Any], parts: list[Any]) -> None:
    numbers: dict[Any, int] = {}

    def number(variable: Any) -> Any:
        if hasattr(variable, "val"):
            return digest(variable.val)
        return numbers.setdefault(variable, len(numbers))

    parts.append((*consts, *map(number, jaxpr.constvars), *map(number, jaxpr.invars)))
    for equation in jaxpr.eqns:
        parts.append(equation.primitive)
        parts.append(tuple(map(number, equation.invars)))
        parts.append(tuple(map(number, equation.outvars)))
        parts.extend(
            (v.aval.shape, v.aval.dtype) for v in equation.outvars if hasattr(v.aval, "dtype")
        )
        for key in sorted(equation.params):
            _write_param(equation.params[key], parts, key)
    parts.append(tuple(map(number, jaxpr.outvars)))


def _write_param(value: Any, parts: list[Any], key: str) -> None:
    if hasattr(value, "eqns"):
        inner = attribute(value, "jaxpr", value)
        _write(inner, [digest(const) for const in attribute(value, "consts", ())], parts)
    elif isinstance(value, dict):
        parts.extend(value)
        for item in value.values():
            _write_param(item, parts, key)
    elif isinstance(value, tuple | list):
        parts.append((type(value), len(value)))
        for item in value:
            _write_param(item, parts, key)
    elif isinstance(value, np.ndarray | jax.Array):
        parts.append(digest(value))
    elif not callable(value):
        parts.append(_hashable(value))
    elif key == "callback":
        parts.append(_callback(attribute(value, "callback_func", value)))


def _callback(fn: Any) -> Any:
    # It runs when the program does and then reads what is there; only what it holds was fixed by the trace.
    if isinstance(fn, partial):
        return _callback(fn.func), *map(_callback, (*fn.args, *fn.keywords.values()))
    if isinstance(fn, types.FunctionType):
        held = [cell.cell_contents for cell in fn.__closure__ or ()]
        return fn.__code__, *map(_callback, (*held, *(fn.__defaults__ or ())))
    if isinstance(fn, bool | int | str | jax.tree_util.PyTreeDef):
        return _hashable(fn)
    return tuple(map(_callback, fn)) if isinstance(fn, tuple | list) else handle(fn)


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value
