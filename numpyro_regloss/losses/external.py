# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Losses that JAX cannot trace: a Python function of the user's parameters as NumPy arrays.

A compiled program hands a whole batch of draws to the host in one callback, where the calls are shared out among
the workers of an executor.
"""

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from numpyro_regloss._core.checks import (
    check_choice,
    check_count,
    check_flag,
    check_own_names,
    check_positive,
)
from numpyro_regloss._core.pytree import Partition, is_concrete, pytree_dataclass, static_field
from numpyro_regloss._core.types import Array
from numpyro_regloss.losses.caller import WHAT, Call, Caller, Watch, as_kept, check_executor
from numpyro_regloss.losses.function import FunctionSource, Leaf, flatten_params

__all__ = ["ExternalSource", "external_source"]


@pytree_dataclass
class ExternalSource(FunctionSource):
    """`fn(params, *args, **kwargs)` of NumPy arrays, called on the host.

    Attributes:
        user: the function and how it is called.
        kinds: of each leaf the type in which the function gets it.
        walls: whether a rejected draw is a wall, a loss of infinity, and not NaN.
    """

    user: Caller = static_field()  # ty: ignore[incompatible-attribute-override]
    layout: Any = static_field()
    sites: tuple[Any, ...] = static_field()
    kinds: tuple[Any, ...] = static_field(default=())
    walls: bool = static_field(default=False)

    @property
    def is_external(self) -> bool:
        """JAX sees no more than the numbers."""
        return True

    def own_settings(self) -> AbstractContextManager[Any]:
        """What runs on the host has none."""
        return nullcontext()

    def watch(self) -> AbstractContextManager[Watch]:
        """Listens to the calls."""
        return self.user.watch()

    def value(self, x: Array, args: tuple, kwargs: dict, data_scale: float) -> Any:
        """What the function returns; of a batch of draws that `jax.vmap` makes, all at once."""
        del data_scale
        leaves, structure = Partition((args, kwargs)).tree_flatten()
        on_host = partial(self._on_host, structure)
        if is_concrete((x, leaves)):
            return jnp.asarray(on_host(x, *leaves))
        out = jax.ShapeDtypeStruct((), x.dtype)

        @jax.custom_jvp
        def call(x: Array, *leaves: Array) -> Array:
            return jax.pure_callback(on_host, out, x, *leaves, vmap_method="expand_dims")

        call.defjvp(_refuse)
        return call(x, *leaves)

    def _on_host(self, structure: Any, x: Any, *leaves: Any) -> np.ndarray:
        x = np.asarray(x)
        lead, flat = x.shape[:-1], x.reshape(-1, x.shape[-1])
        num_lead = len(lead)
        data = [np.asarray(leaf) for leaf in leaves]
        shared = all(math.prod(leaf.shape[:num_lead]) == 1 for leaf in data)
        columns = self._columns(flat)

        def arguments(i: int) -> tuple[tuple, dict]:
            # Of draws that have arguments of their own, those of one draw.
            some = [leaf.reshape(-1, *leaf.shape[num_lead:])[i][()] for leaf in spread]
            return Partition.tree_unflatten(structure, some).tree

        def rows(index: Any) -> Any:
            return self.layout.build([column(index) for column in columns])

        if shared:
            spread = data
            args, kwargs = arguments(0)
            each = [(args, kwargs)] * len(flat)
        else:
            spread = [np.broadcast_to(leaf, lead + leaf.shape[num_lead:]) for leaf in data]
            each = [arguments(i) for i in range(len(flat))]
        if self.user.batch:
            size = (self.user.chunk_size or len(flat)) if shared else 1
            calls = []
            for start in range(0, len(flat), size):
                part = slice(start, min(start + size, len(flat)))
                args, kwargs = each[start]
                calls.append(Call((rows(part), *args), kwargs, part.stop - start))
        else:
            calls = [Call((rows(i), *args), kwargs, 0) for i, (args, kwargs) in enumerate(each)]
        losses = as_kept(self.user.evaluate(calls), x.dtype).reshape(lead)
        return np.where(np.isnan(losses), np.inf, losses).astype(x.dtype) if self.walls else losses

    def _columns(self, flat: np.ndarray) -> list[Callable[[Any], Any]]:
        columns, start = [], 0
        for site, kind in zip(self.sites, self.kinds, strict=True):
            if not isinstance(site, Leaf):
                # A function or a setting of a module is the same for all draws.
                columns.append(partial(_constant, kind))
                continue
            stop = start + math.prod(site.shape)
            dtype = np.dtype(float) if kind is float else kind
            array = flat[:, start:stop].astype(dtype).reshape(-1, *site.shape)
            columns.append(partial(_entry, array, kind is float))
            start = stop
        return columns


def _constant(value: Any, index: Any) -> Any:
    del index
    return value


def _entry(array: np.ndarray, is_number: bool, index: Any) -> Any:  # noqa: FBT001
    found = array[index]
    return float(found) if is_number and not isinstance(index, slice) else found


def _refuse(primals: Any, tangents: Any) -> NoReturn:
    del primals, tangents
    raise TypeError(
        f"{WHAT}: JAX cannot differentiate a loss that it cannot trace; use engines that need no gradient, such "
        "as shift.Importance, or shift.Kernel with the kernels AIES or ESS of NumPyro."
    )


def _kinds_of(params: Any, sites: tuple[Any, ...]) -> tuple[Any, ...]:
    """In which types the function gets its parameters: those in which the user wrote them.

    Args:
        params: as the user wrote them.
        sites: from `flatten_params`.

    Returns:
        Per leaf `float`, a type of NumPy, or what is no parameter.
    """
    kinds = []
    for leaf, site in zip(jax.tree.leaves(params), sites, strict=True):
        if not isinstance(site, Leaf):
            kinds.append(leaf)
        elif isinstance(leaf, float) and not isinstance(leaf, np.generic):
            kinds.append(float)
        else:
            kinds.append(site.dtype if isinstance(leaf, Tracer) else np.dtype(leaf.dtype))
    return tuple(kinds)


def external_source(
    fn: Any, params: Any, args: tuple, kwargs: dict, settings: dict[str, Any]
) -> tuple[Array, ExternalSource]:
    """What `Loss.from_external` is made of.

    Args:
        fn: the user's function, or None.
        params: starting values.
        args: of the function.
        kwargs: of the function.
        settings: how it is called, by the names of `Loss.from_external`.

    Returns:
        The start `(dim,)` and the source.

    Raises:
        TypeError: see `Loss.from_external`.
        ValueError: likewise.
    """
    what = "Loss.from_external"
    on_error = settings["on_error"]
    defaults = {
        "batch": settings["batch"] or None,
        "on_error": None if on_error == "reject" else on_error,
    }
    check_own_names(fn, {**settings, **defaults}, 1 + len(args), what)
    _check_call(fn, params, args, kwargs)
    check_flag(settings["batch"], f"{what}: batch")
    check_choice(on_error, f"{what}: on_error", ("reject", "raise"))
    if settings["timeout"] is not None:
        check_positive(settings["timeout"], f"{what}: timeout")
    if settings["chunk_size"] is not None:
        check_count(settings["chunk_size"], f"{what}: chunk_size")
    executor = settings["executor"]
    check_executor(fn, executor)
    x0, layout, sites = flatten_params(params, what)
    how = {name: value for name, value in settings.items() if name != "executor"}
    caller = Caller.of(fn, executor, **how)
    return x0, ExternalSource(caller, layout, sites, kinds=_kinds_of(params, sites))


def _check_call(fn: Any, params: Any, args: tuple, kwargs: dict) -> None:
    """Refuses a function that does not take its arguments, without calling it.

    Args:
        fn: the function, or None.
        params: its first argument.
        args: more of them.
        kwargs: the same, by name.

    Raises:
        TypeError: if it cannot be called, or not so.
    """
    if fn is None:
        return
    if not callable(fn):
        raise TypeError(
            f"{WHAT}: expected a function of (params, *args), or None for losses that you evaluate by hand, got "
            f"{type(fn).__name__}."
        )
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # of a function in C
        return
    try:
        signature.bind(params, *args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{WHAT}: expected a function of the parameters and arguments that were passed with it, got one that "
            f"does not take them: {error}."
        ) from error
