# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What a Python function can read besides its arguments: closures, globals, attributes, bound objects.

JAX compiles a function once, with the data that it read then. To know whether a compiled program still answers
for a function, one must know whether anything that the function reads has changed.
"""

import builtins
import hashlib
import sys
import types
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from numpyro_regloss._core.foreign import attribute

__all__ = ["Environment", "digest"]

# More than that is not worth to be looked at before every run: the function is traced instead.
MOST_OBJECTS = 20_000
# Functions of these libraries are what they are; what they were given by a user is looked at.
LIBRARIES = {
    "blackjax", "equinox", "flax", "jax", "jaxlib", "ml_dtypes", "numpy", "numpyro", "numpyro_regloss",
    "optax", "pandas", "scipy", "tqdm", *sys.stdlib_module_names,
} - {"__main__"}  # fmt: skip
CHECKERS = ("beartype", "jaxtyping")
# What a function reads through these cannot be seen.
BLIND = {
    "__import__", "eval", "exec", "genfromtxt", "getattr", "globals", "import_module", "load", "loadtxt",
    "locals", "open", "read_csv", "read_parquet", "vars",
}  # fmt: skip
CONSTANTS = (bool, int, str, bytes, type(None), type(...), np.dtype, range)
# NaN is equal to nothing, slices and structures of trees may have no hash.
NUMBERS = (float, complex, np.generic, slice, jax.tree_util.PyTreeDef)
MISSING = object()

_digests: dict[int, tuple[weakref.ref, Any]] = {}


def digest(array: Any) -> Any:
    """Type, shape and contents of an array as something to compare; of a tracer, which one it is."""
    if isinstance(array, Tracer):
        return ("tracer", id(array))
    if not isinstance(array, jax.Array):
        return _content(np.asarray(array))
    known = _digests.get(id(array))
    if known is not None and known[0]() is array:
        return known[1]
    key = id(array)
    if not array.is_fully_addressable:
        found = ("array", key)
    elif jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
        found = (str(array.dtype), *_content(np.asarray(jax.random.key_data(array))))
    else:
        found = (*_content(np.asarray(array)), attribute(array, "weak_type", False))
    # JAX's arrays do not change, so that each is read once.
    _digests[key] = (weakref.ref(array, lambda _: _digests.pop(key, None)), found)
    return found


def _content(array: np.ndarray) -> tuple[Any, ...]:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return array.dtype.str, array.shape, hashlib.blake2b(data.data, digest_size=16).digest()


class Environment:
    """All that a function reads besides its arguments, as it is now.

    Attributes:
        complete: whether all of it could be seen.
        has_tracers: whether there are tracers in it, which must not be kept.
    """

    def __init__(self, function: Any, *, by_value: bool = False) -> None:
        self.complete = True
        self.has_tracers = False
        self._tokens: list[Any] = []
        # (kind, container, key, what was found, number of the first token of it, of the last)
        self._reads: list[tuple[str, Any, Any, Any, int, int]] = []
        self._seen: dict[Any, Any] = {}
        self._left_out: list[tuple[int, int]] = []
        self._by_value = by_value
        self._visit(function)

    def changed(self) -> list[int]:
        """Numbers of the reads that find something else now."""
        return [i for i, read in enumerate(self._reads) if _is_other(*read[:4])]

    @property
    def unchanged(self) -> bool:
        """Whether all that was read is certainly the same."""
        return self.complete and not any(_is_other(*read[:4]) for read in self._reads)

    def without(self, changed: list[int]) -> None:
        """Leaves out what the function itself changes as it runs: a counter, a log, a cache.

        Args:
            changed: from `changed`, after the function ran.
        """
        spans = [self._reads[i][4:] for i in changed]

        def is_inside(first: int, last: int) -> bool:
            return any(start <= first and last <= stop for start, stop in spans)

        self._reads = [read for read in self._reads if not is_inside(*read[4:])]
        self._left_out += spans

    @property
    def tokens(self) -> tuple[Any, ...]:
        """What compiles, hashable: code, settings, types, and of arrays shape and type."""
        kept = dict(enumerate(self._tokens))
        for start, stop in self._left_out:
            kept = {i: token for i, token in kept.items() if not start <= i < stop}
        return tuple(kept.values())

    def _read(self, kind: str, container: Any, key: Any, value: Any, visit: Any) -> None:
        first = len(self._tokens)
        self._tokens.append(key if isinstance(key, str) else kind)
        visit()
        self._reads.append((kind, container, key, value, first, len(self._tokens)))

    def _visit(self, obj: Any) -> None:
        if isinstance(obj, CONSTANTS):
            self._tokens.append((type(obj), obj))
            return
        if isinstance(obj, NUMBERS):
            self._tokens.append((type(obj), repr(obj)))
            return
        if id(obj) in self._seen:
            self._tokens.append(("again", type(obj)))
            return
        # The object is kept, so that its number is nobody else's.
        self._seen[id(obj)] = obj
        if len(self._tokens) > MOST_OBJECTS:
            self.complete = False
            return
        if isinstance(obj, jax.Array):
            self.has_tracers |= isinstance(obj, Tracer)
            self._tokens.append(digest(obj) if self._by_value else (obj.shape, obj.dtype))
        elif isinstance(obj, np.ndarray):
            self._visit_array(obj)
        elif isinstance(obj, types.ModuleType) or _is_of_library(obj):
            self._tokens.append(obj)
        elif isinstance(obj, types.FunctionType):
            self._visit_function(obj)
        elif isinstance(obj, types.MethodType | partial):
            self._tokens.append(type(obj))
            method = isinstance(obj, types.MethodType)
            parts = (obj.__func__, obj.__self__) if method else (obj.func, obj.args, obj.keywords)
            for part in parts:
                self._visit(part)
        elif isinstance(obj, types.BuiltinFunctionType):
            self._tokens.append((type(obj), obj.__name__))
            self._visit(obj.__self__)
        elif isinstance(obj, dict | list | tuple | set | frozenset):
            self._visit_container(obj)
        elif isinstance(obj, type):
            self._visit_class(obj)
        else:
            self._visit_object(obj)

    def _visit_array(self, array: np.ndarray) -> None:
        if array.dtype.hasobject:
            self.complete = False
            self._tokens.append(id(array))
            return
        found = digest(array)
        token = found if self._by_value else (np.ndarray, array.shape, array.dtype)
        self._read("array", array, None, found, lambda: self._tokens.append(token))

    def _visit_function(self, function: types.FunctionType) -> None:
        wrapped = attribute(function, "__wrapped__", None)
        # Checkers of types keep objects of their own around a function.
        if wrapped is not None and any(c in function.__code__.co_filename for c in CHECKERS):
            self._visit(wrapped)
            return
        self._tokens.append(function.__code__)
        for part in (function.__defaults__, function.__kwdefaults__, vars(function)):
            self._visit(part or None)
        for cell in function.__closure__ or ():
            value = _content_of(cell)
            visit = partial(self._visit, value)
            self._read("cell", cell, None, value, visit)
        if _package(function) in LIBRARIES:
            return
        names = sorted(_names(function.__code__))
        self.complete &= BLIND.isdisjoint(names)
        self._visit_names(function.__globals__, names)

    def _visit_names(self, scope: dict[str, Any], names: list[str]) -> None:
        for name in names:
            value = scope.get(name, MISSING)
            if value is MISSING and not hasattr(builtins, name):
                value = sys.modules.get(name, MISSING)  # imported inside the function
            if value is MISSING:
                continue
            visit = partial(self._visit, value)
            self._read("item", scope if name in scope else sys.modules, name, value, visit)
            is_module = isinstance(value, types.ModuleType)
            if is_module and value.__name__.split(".")[0] not in LIBRARIES:
                key = (id(value), "names", tuple(names))
                if key not in self._seen:
                    self._seen[key] = value
                    self._visit_names(vars(value), names)

    def _visit_container(self, container: Any) -> None:
        items = list(container.items()) if isinstance(container, dict) else list(container)
        if isinstance(container, set | frozenset):
            items.sort(key=repr)

        def visit() -> None:
            self._tokens.append((type(container), len(items)))
            for item in items:
                for part in item if isinstance(container, dict) else (item,):
                    self._visit(part)

        if isinstance(container, tuple | frozenset):
            visit()
        else:
            self._read("items", container, None, _flat(container), visit)

    def _visit_class(self, cls: type) -> None:
        self._tokens.append(cls)
        for base in cls.__mro__:
            if not _is_of_library(base):
                self._visit_attributes(vars(base), skip_dunder=True)

    def _visit_object(self, obj: Any) -> None:
        self._tokens.append(type(obj))
        of_jax, before = _package(type(obj)) in {"jax", "jaxlib"}, self._by_value
        # What JAX wraps (jit, custom rules) keeps its constants inside, where they compile.
        self._by_value = before or of_jax
        wrapped = attribute(obj, "__wrapped__", None)
        if of_jax and callable(wrapped):
            self._visit(wrapped)
        elif isinstance(obj, classmethod | staticmethod):
            self._visit(obj.__func__)
        elif isinstance(obj, property):
            self._visit((obj.fget,))
        elif hasattr(obj, "__dict__"):
            self._visit(type(obj))
            self._visit_attributes(vars(obj))
        else:
            self.complete = False
            self._tokens.append(id(obj))
        self._by_value = before

    def _visit_attributes(self, attributes: Any, *, skip_dunder: bool = False) -> None:
        for name, value in list(attributes.items()):
            if skip_dunder and name.startswith("__") and name != "__call__":
                continue
            visit = partial(self._visit, value)
            self._read("item", attributes, name, value, visit)


def _is_other(kind: str, container: Any, key: Any, value: Any) -> bool:
    if kind == "item":
        found = container.get(key, MISSING)
        return found is not value and not _same_constant(found, value)
    if kind == "cell":
        found = _content_of(container)
        return found is not value and not _same_constant(found, value)
    if kind == "array":
        return digest(container) != value
    items = _flat(container)
    return len(items) != len(value) or any(
        a is not b and not _same_constant(a, b) for a, b in zip(items, value, strict=True)
    )


def _same_constant(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, types.MethodType):  # made anew at every access
        return a == b
    return isinstance(a, CONSTANTS) and a == b or isinstance(a, NUMBERS) and repr(a) == repr(b)


def _flat(container: Any) -> list[Any]:
    if isinstance(container, dict):
        return [part for item in container.items() for part in item]
    return sorted(container, key=repr) if isinstance(container, set) else list(container)


def _content_of(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that has no value yet
        return MISSING


def _package(obj: Any) -> str:
    return str(attribute(obj, "__module__", None) or "").split(".")[0]


def _is_of_library(obj: Any) -> bool:
    """Whether it is a function or class of a library, and not one that a library made for a user."""
    if not isinstance(obj, type | Callable) or isinstance(obj, types.MethodType | partial):
        return False
    if not isinstance(attribute(obj, "__qualname__", None), str):
        return False
    if isinstance(obj, types.BuiltinFunctionType):
        return isinstance(obj.__self__, types.ModuleType | type(None))
    return _package(obj) in LIBRARIES and "<locals>" not in obj.__qualname__


def _names(code: Any) -> set[str]:
    inner = (_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)
