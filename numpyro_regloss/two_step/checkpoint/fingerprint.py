# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What a run is, as text by name: all that its numbers depend on, so that it is told from any other.

Arrays go in by their type, shape and a hash of their values, functions by their name, their code and what they
close over, the loss by its program (a jaxpr). Code is compared within one version of Python, programs within one
of JAX: a run may go on after an upgrade.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from numpyro_regloss._core.processes import same_everywhere
from numpyro_regloss._core.pytree import Constant, Partition, fields_of, has_fields
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["fingerprint", "first_difference", "hash_of", "host", "types_of", "versions"]

CODE, PROGRAM = " (its code)", "the loss (its program)"
# Where an object is in memory, as in the printed form of a function.
ADDRESS = re.compile(r" at 0x[0-9a-f]+|0x[0-9a-f]{6,}")


def versions() -> dict[str, str]:
    """Of what code and programs are compared in."""
    return {"python": ".".join(map(str, sys.version_info[:2])), "jax": jax.__version__}


def fingerprint(
    optimizer: Any, arguments: Partition, start: Any, state: Any, row: Any
) -> dict[str, str]:
    """All that a run depends on.

    Args:
        optimizer: the `TwoStep`.
        arguments: of the loss.
        start: the run's key, or the state that it continues.
        state: shapes and types of the state.
        row: shapes and types of one row of the history.

    Returns:
        Text by name, in the order in which differences are told.
    """
    found = settings_text(optimizer, arguments, start)
    last = "rng_key" if "rng_key" in found else "init_state"
    said = found.pop(last)
    found[PROGRAM] = _program(optimizer, state.reference, arguments)
    found[last] = said
    found["history"] = "all" if row.motion is None else "scalars"
    return found | types_of("state", state) | types_of("history", row)


def settings_text(
    optimizer: Any, arguments: Partition, start: Any, asked: dict[str, Any] | None = None
) -> dict[str, str]:
    """The part of `fingerprint` that needs no trace.

    Args:
        optimizer: the `TwoStep`.
        arguments: of the loss.
        start: the run's key, or the state that it continues.
        asked: settings of the run, which a later one may change.

    Returns:
        Text by name.
    """
    loss = optimizer.loss
    found = {name: repr(value) for name, value in (asked or {}).items()}
    found |= {"precision": str(loss.x0.dtype), "number of parameters": str(loss.dim)}
    for name, value in fields_of(optimizer).items():
        # A run goes on where there are more devices, or fewer.
        found |= {} if name == "mesh" else dict(_described(name, value))
    found |= dict(_described("arguments of the loss", arguments.tree))
    found["start (the loss's params)"] = _array(loss.x0)
    found |= dict(_described("loss.minibatch", loss.minibatch))
    found |= dict(_described("loss.rng_names", loss.rng_names))
    if loss.is_external:
        found |= dict(_code_alone("the loss", loss.source.user.fn))
    if loss.source.held:
        found["state of the module"] = hash_of(loss.source.held)[:16]
    is_key = isinstance(start, jax.Array)
    found["rng_key" if is_key else "init_state"] = _array(start) if is_key else hash_of(start)[:16]
    return found


def first_difference(
    there: dict[str, str], here: dict[str, str], versions_there: dict[str, str]
) -> tuple[str, str, str] | None:
    """What tells two runs apart.

    Args:
        there: the fingerprint of one.
        here: that of another, under the versions of now.
        versions_there: of the first.

    Returns:
        The name and both texts of the first difference, or None.
    """
    now, nothing = versions(), "nothing"
    for name in (*here, *(name for name in there if name not in here)):
        old, new = there.get(name, nothing), here.get(name, nothing)
        kind = "python" if name.endswith(CODE) else "jax" if name == PROGRAM else None
        if old != new and (kind is None or versions_there.get(kind) == now[kind]):
            return name, old, new
    return None


def host(leaf: Any) -> np.ndarray:
    """An array on the host; of random keys their data. Of one that processes divide, all of them call this."""
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    leaf = same_everywhere(leaf)
    return np.asarray(jax.device_get(jax.random.key_data(leaf) if is_key else leaf))


def hash_of(tree: Any) -> str:
    """Of all values of a tree, with their types and shapes."""
    digest = hashlib.sha256()
    for leaf in map(host, jax.tree.leaves(tree)):
        digest.update(f"{leaf.dtype}{leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _array(leaf: Any) -> str:
    array = host(leaf)
    value = repr(array.item()) if array.size == 1 and array.dtype.kind in "biufc" else None
    return f"{array.dtype}{list(array.shape)} {value or hash_of(leaf)[:16]}"


def _described(name: str, value: Any, seen: tuple[int, ...] = ()) -> Iterator[tuple[str, str]]:
    # The loss has entries of its own.
    if isinstance(value, Loss) or id(value) in seen:
        return
    seen = (*seen, id(value))
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield name, repr(value)
    elif isinstance(value, np.ndarray | np.generic | jax.Array):
        yield name, _array(value)
    elif isinstance(value, Constant):
        yield name, _array(value.value)
    elif isinstance(value, Partition):
        yield from _described(name, value.tree, seen)
    elif isinstance(value, type | BuiltinFunctionType):
        yield name, f"{value.__module__}.{value.__qualname__}"
    elif isinstance(value, FunctionType):
        yield from _function(name, value, seen)
    elif isinstance(value, MethodType):
        yield from _inside(name, {".": value.__func__, ".self": value.__self__}, seen)
    elif isinstance(value, partial):
        parts = {".func": value.func, ".args": value.args, ".keywords": value.keywords}
        yield from _inside(name, parts, seen)
    else:
        yield name, f"{type(value).__module__}.{type(value).__qualname__}"
        yield from _inside(name, _parts(value), seen)


def _parts(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {f"[{key!r}]": value[key] for key in sorted(value, key=repr)}
    if has_fields(value):
        return {f".{field}": part for field, part in fields_of(value).items()}
    if isinstance(value, list | tuple):
        return {f"[{i}]": part for i, part in enumerate(value)}
    if isinstance(value, set | frozenset):
        return {f"[{i}]": part for i, part in enumerate(sorted(value, key=repr))}
    try:
        return {f".{field}": vars(value)[field] for field in sorted(vars(value))}
    except TypeError:  # of an object in C
        return {" ": ADDRESS.sub("", repr(value))}


def _inside(name: str, parts: dict[str, Any], seen: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    for suffix, part in parts.items():
        yield from _described(name + suffix, part, seen)


def _function(name: str, fn: FunctionType, seen: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    yield name, f"{fn.__module__}.{fn.__qualname__}"
    yield name + CODE, _digest(fn)
    yield from _inside(name, {".defaults": fn.__defaults__, ".kwdefaults": fn.__kwdefaults__}, seen)
    cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
    yield from _inside(name, {f"[{free}]": _content(cell) for free, cell in cells}, seen)


def _code_alone(name: str, fn: Any) -> Iterator[tuple[str, str]]:
    # Objects of a simulator count calls and hold files: what they contain says nothing of the run.
    while isinstance(fn, partial | MethodType):
        fn = fn.func if isinstance(fn, partial) else fn.__func__
    if not isinstance(fn, FunctionType | None):
        fn = type(fn).__call__
    if isinstance(fn, FunctionType):
        yield name + CODE, _digest(fn)


def _digest(fn: FunctionType) -> str:
    return hashlib.sha256(repr(_code(fn.__code__)).encode()).hexdigest()[:16]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _code(code: CodeType) -> tuple[Any, ...]:
    constants = [
        _code(c)
        if isinstance(c, CodeType)
        else sorted(map(repr, c))
        if isinstance(c, frozenset)
        else repr(c)
        for c in code.co_consts
    ]
    return code.co_code, code.co_names, code.co_varnames, constants


def _program(optimizer: Any, reference: Any, arguments: Partition) -> str:
    def value(reference: Any, arguments: Partition, temperature: Any, x: Any) -> Any:
        target = RegularizedLoss.unchecked(optimizer.loss, reference, arguments, temperature)
        return target.value(x)

    x0, temperature = optimizer.loss.x0, optimizer.temperature
    closed = jax.make_jaxpr(value)(_shapes(reference), _shapes(arguments), temperature, x0)
    digest = hashlib.sha256(ADDRESS.sub("", str(closed)).encode())
    digest.update(hash_of(list(_constants(closed))).encode())
    return digest.hexdigest()[:16]


def _constants(jaxpr: Any) -> Iterator[Any]:
    # Also those of programs within the program, which are not printed.
    if isinstance(jaxpr, jax.extend.core.ClosedJaxpr):
        yield from jaxpr.consts
        jaxpr = jaxpr.jaxpr
    for equation in jaxpr.eqns:
        parts = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program)
        for part in filter(_is_program, parts):
            yield from _constants(part)


def _is_program(value: Any) -> bool:
    return isinstance(value, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def types_of(name: str, tree: Any) -> dict[str, str]:
    """Type and shape of every leaf of a tree, by its path behind a name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        name + jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }
