# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""A loss that is a function of a pytree: how its parameters become one flat vector and return."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from numpyro_regloss._core.foreign import attribute
from numpyro_regloss._core.pytree import (
    Partition,
    pytree_dataclass,
    static_field,
    strip_weak_types,
    with_context_axes,
)
from numpyro_regloss._core.rounding import check_rounding
from numpyro_regloss._core.types import Array
from numpyro_regloss.losses.captured import UserFunction
from numpyro_regloss.losses.modules import Layout, Parts, Tree, name_of, refuse_state, take_apart
from numpyro_regloss.losses.noise import STREAMS
from numpyro_regloss.losses.sites import flat_labels, ravel_sites, unique_names
from numpyro_regloss.losses.source import LossSource

__all__ = ["FunctionSource", "flatten_module", "flatten_params"]

SETTINGS = (bool, int, float, complex, str)
FLOAT32 = float(np.finfo(np.float32).eps)


class Leaf(NamedTuple):
    """Shape and type of one array of the parameters."""

    name: str
    shape: tuple[int, ...]
    dtype: Any


class Fixed(NamedTuple):
    """A setting among the fields of a module, with its type: 1, 1.0 and True compile different programs."""

    name: str
    kind: type
    value: Any


class Held(NamedTuple):
    """An array that is no parameter, such as a running average; its values are leaves of the source."""

    name: str


@dataclasses.dataclass(frozen=True)
class Shape:
    """What compiles of a function of parameters.

    Attributes:
        layout: how leaves make what the user wrote.
        sites: of each leaf a `Leaf`, `Fixed` or `Held`, or what it is.
        has_aux: whether the function returns something beside the loss.
    """

    layout: Layout
    sites: tuple[Any, ...]
    has_aux: bool = False

    @property
    def is_trained(self) -> list[bool]:
        """Per leaf."""
        return [isinstance(site, Leaf) for site in self.sites]


@pytree_dataclass
class FunctionSource(LossSource):
    """`fn(params, *args, **kwargs)` with the structure of `params`.

    Attributes:
        user: the function.
        layout: how leaves make what the user wrote.
        sites: of each leaf a `Leaf`, `Fixed` or `Held`, or what it is.
        held: values of what is no parameter.
        has_aux: whether the function returns something beside the loss.
    """

    user: UserFunction  # ty: ignore[incompatible-attribute-override]
    layout: Any = static_field()
    sites: tuple[Leaf | Any, ...] = static_field()
    held: tuple[Any, ...] = ()
    has_aux: bool = static_field(default=False)

    @classmethod
    def trace(
        cls, fn: Any, shape: Shape, x0: Array, held: tuple[Any, ...], *each: Partition
    ) -> "FunctionSource":
        """Traces a function.

        Args:
            fn: the user's function.
            shape: of its parameters.
            x0: `(dim,)`, the start.
            held: values of what is no parameter.
            *each: arguments to trace it with.

        Returns:
            The source.
        """
        user, _ = UserFunction.trace(fn, _probe, shape, *((x0, held, some) for some in each))
        return cls(user, shape.layout, shape.sites, held, shape.has_aux)

    @property
    def is_module(self) -> bool:
        """Whether parameters are those of a framework's module."""
        return self.layout.is_module

    @property
    def num_first(self) -> int:
        """How many arguments of the function come before the data."""
        return self.layout.num_first

    @property
    def dim(self) -> int:
        """Number of parameters."""
        return sum(math.prod(site.shape) for site in self._leaves)

    @property
    def names(self) -> tuple[str, ...]:
        """Names under which the parameters appear as sites of a NumPyro model."""
        return tuple(site.name for site in self._leaves)

    def digits(self) -> Any:
        """Machine epsilon of each parameter whose type has less than 32 bits, `(dim,)`, else 0; or just 0."""
        each = [(math.prod(site.shape), float(jnp.finfo(site.dtype).eps)) for site in self._leaves]
        if all(eps <= FLOAT32 for _, eps in each):
            return 0.0
        return np.concatenate([
            np.full(n, eps if eps > FLOAT32 else 0.0, np.float32) for n, eps in each
        ])

    def value(self, x: Array, args: tuple, kwargs: dict, data_scale: float) -> Any:
        """What the user's function returns; it averages or sums as it likes, so no data scale."""
        del data_scale
        return self._call(_value, x, args, kwargs)

    def aux(self, x: Array, args: tuple, kwargs: dict) -> Any:
        """What the function returns beside the loss."""
        return self._call(_aux, x, args, kwargs)

    def updated(self, x: Array, args: tuple, kwargs: dict) -> tuple[Any, ...]:
        """What is held after a call of the function: state that it changes."""
        return self._call(_updated, x, args, kwargs)

    def _call(self, body: Any, x: Array, args: tuple, kwargs: dict) -> Any:
        body = partial(body, self._shape)
        return self.user.call(body, x, self.held, Partition((args, kwargs)))

    @property
    def _shape(self) -> Shape:
        return Shape(self.layout, self.sites, self.has_aux)

    def constrain(self, x: Array, args: tuple, kwargs: dict) -> Any:
        """The parameters in the user's structure and types."""
        del args, kwargs
        return self.layout.build(_arrays(self.sites, x, self.held))

    def tangent(self, x: Array) -> Any:
        """A gradient in the user's structure; zero for settings of modules: updates leave them alone."""
        arrays = [
            site.kind() if isinstance(site, Fixed) else array
            for site, array in zip(self.sites, _arrays(self.sites, x, self.held), strict=True)
        ]
        return self.layout.trained(arrays, self._shape.is_trained)

    def held_of(self, params: Any) -> tuple[Any, ...]:
        """What is held, of the user's own object, such as the result of a run."""
        leaves = zip(self._leaves_of(params), self.sites, strict=True)
        return tuple(jnp.asarray(a) for a, site in leaves if isinstance(site, Held))

    def named(self, x: Array, args: tuple, kwargs: dict) -> dict[str, Array]:
        """The parameters as a flat dictionary of sites."""
        del args, kwargs
        arrays = [
            a
            for a, s in zip(_arrays(self.sites, x, self.held), self.sites, strict=True)
            if isinstance(s, Leaf)
        ]
        return dict(zip(self.names, arrays, strict=True))

    def unconstrain(self, params: Any, args: tuple, kwargs: dict) -> Array:
        """The inverse of `constrain`, and of `named`: parameters as the flat vector.

        Args:
            params: in the user's structure, or a dict of arrays under their `names`.
            args: unused.
            kwargs: unused.

        Returns:
            `(dim,)`.

        Raises:
            ValueError: if the structure or a shape is another one.
        """
        del args, kwargs
        if isinstance(params, dict) and set(params) == set(self.names):
            return ravel_sites(params, self._leaves)
        leaves = self._leaves_of(params)
        arrays = [a for a, site in zip(leaves, self.sites, strict=True) if isinstance(site, Leaf)]
        return ravel_sites(dict(zip(self.names, arrays, strict=True)), self._leaves)

    def _leaves_of(self, params: Any) -> list[Any]:
        try:
            return self.layout.leaves(params)
        except ValueError as error:
            raise ValueError(
                f"Loss: expected {error}; a dict of {sorted(self.names)} will do too."
            ) from error

    def ravel(self, sites: dict[str, Array]) -> Array:
        """The same as `unconstrain`: parameters of a function are not constrained."""
        return self.unconstrain(sites, (), {})

    @property
    def flat_names(self) -> tuple[str, ...]:
        """One label per flat parameter: `name` or `name[i,j]`."""
        return flat_labels(self._leaves)

    @property
    def fixed_names(self) -> tuple[str, ...]:
        """Paths of the settings of modules, which are no parameters."""
        return tuple(site.name for site in self.sites if isinstance(site, Fixed))

    @property
    def _leaves(self) -> tuple[Leaf, ...]:
        return tuple(site for site in self.sites if isinstance(site, Leaf))

    def taken_names(self, arguments: Partition) -> frozenset[str]:
        """Names that other sites must not have, whatever the arguments."""
        del arguments
        return frozenset(self.names)

    def check(self, arguments: Partition) -> None:
        """Parameters do not depend on the arguments."""

    def check_data(
        self, arguments: Partition, batch: Partition | None, is_row: tuple[bool, ...]
    ) -> None:
        """A function averages or sums its rows as it likes."""

    def own_settings(self) -> AbstractContextManager[Any]:
        """As the function was built."""
        return self.user.own_settings()

    def as_tree(self, x: Array) -> Any:
        """The parameters in the user's structure and JAX's default float, None for all that is no parameter."""
        arrays, start = [], 0
        for site in self.sites:
            size = math.prod(site.shape) if isinstance(site, Leaf) else 0
            part = x[start : start + size]
            arrays.append(part.reshape(site.shape) if isinstance(site, Leaf) else None)
            start += size
        return self.layout.groups(arrays, self._shape.is_trained)

    def from_tree(self, tree: Any) -> Array:
        """The inverse of `as_tree`."""
        places = [i if isinstance(site, Leaf) else None for i, site in enumerate(self.sites)]
        order = jax.tree.leaves(self.layout.groups(places, self._shape.is_trained))
        found = dict(zip(order, jax.tree.leaves(tree), strict=True))
        return jnp.concatenate([found[i].reshape(-1) for i in sorted(found)])

    def expand(self, tree: Any) -> Array:
        """One value per flat parameter from a pytree prefix of the parameters."""
        indices = self.layout.groups(range(len(self.sites)), self._shape.is_trained)
        prefix = jax.tree.broadcast(tree, indices)
        found = dict(zip(jax.tree.leaves(indices), jax.tree.leaves(prefix), strict=True))
        values = [
            jnp.broadcast_to(jnp.asarray(found[i], float), site.shape).reshape(-1)
            for i, site in enumerate(self.sites)
            if isinstance(site, Leaf)
        ]
        return jnp.concatenate(values)


def _call(
    shape: Shape, fn: Any, x: Array, held: tuple[Any, ...], arguments: Partition
) -> tuple[Any, Any, Any]:
    """The loss, what comes beside it, and the parameters as the function has left them."""
    args, kwargs = arguments.tree
    key = kwargs.get(STREAMS) if shape.layout.has_streams else None
    if key is not None:
        kwargs = {name: value for name, value in kwargs.items() if name != STREAMS}
    params = shape.layout.build(_arrays(shape.sites, x, held), key)
    out = shape.layout.called(fn, params, args, kwargs)
    if not shape.has_aux:
        return out, None, params
    if not isinstance(out, tuple) or len(out) != 2:
        got = f"a tuple of {len(out)}" if isinstance(out, tuple) else type(out).__name__
        raise TypeError(
            f"Loss: expected a function with has_aux=True to return a pair (loss, aux), got {got}."
        )
    return *out, params


def _value(shape: Shape, fn: Any, *operands: Any) -> Any:
    return _call(shape, fn, *operands)[0]


def _aux(shape: Shape, fn: Any, *operands: Any) -> Any:
    return _call(shape, fn, *operands)[1]


def _updated(shape: Shape, fn: Any, *operands: Any) -> tuple[Any, ...]:
    _, aux, params = _call(shape, fn, *operands)
    leaves = zip(shape.layout.updated(params, aux), shape.sites, strict=True)
    return tuple(jnp.asarray(a) for a, site in leaves if isinstance(site, Held))


def _probe(shape: Shape, fn: Any, *operands: Any) -> tuple[list[Any], None]:
    loss, aux, _ = _call(shape, fn, *operands)
    # What is no array is refused later, by what it is.
    arrays = (jax.Array, np.ndarray, np.generic)
    return [leaf for leaf in jax.tree.leaves((loss, aux)) if isinstance(leaf, arrays)], None


def _arrays(sites: tuple[Any, ...], x: Array, held: Sequence[Any]) -> list[Any]:
    arrays, start, rest = [], 0, iter(held)
    for site in sites:
        if not isinstance(site, Leaf):
            is_held = isinstance(site, Held)
            arrays.append(
                next(rest) if is_held else site.value if isinstance(site, Fixed) else site
            )
            continue
        stop = start + math.prod(site.shape)
        arrays.append(x[start:stop].reshape(site.shape).astype(site.dtype))
        start = stop
    return arrays


def flatten_params(
    params: Any, what: str = "Loss.from_function"
) -> tuple[Array, Tree, tuple[Any, ...]]:
    """Flattens floating-point parameters into one vector.

    Args:
        params: a pytree of floating-point arrays or floats. Functions among its leaves (the activation
            of a network object) and numbers among the fields of a module are kept as they are.
        what: begins error messages.

    Returns:
        The vector `(dim,)` in JAX's default float, the tree's layout, and one `Leaf`, `Fixed` or
        function per leaf.

    Raises:
        TypeError: if a leaf is not of a floating-point type, or a framework's state is among them.
        ValueError: if there is no parameter, or one is not finite.
    """
    refuse_state(params, what)
    paths, structure = jax.tree_util.tree_flatten_with_path(with_context_axes(params))
    names = _names([path for path, _ in paths])
    sites, flat = [], []
    for name, (path, leaf), in_module in zip(names, paths, _in_modules(params), strict=True):
        if callable(leaf):
            sites.append(leaf)
            continue
        # What equinox trains are arrays; its Dropout, for one, holds a rate and a switch.
        if in_module and isinstance(leaf, SETTINGS) and not isinstance(leaf, np.generic):
            sites.append(Fixed(name, type(leaf), leaf))
            continue
        site, part = _parameter(name, leaf, what, f"params{jax.tree_util.keystr(path)}")
        sites.append(site)
        flat.append(part)
    return _joined(flat, what), Tree(structure), tuple(sites)


def flatten_module(
    module: Any, wrt: Any, what: str
) -> tuple[Array, Layout, tuple[Any, ...], tuple[Any, ...]]:
    """Flattens what is trained of a module into one vector.

    Args:
        module: of a framework, see `take_apart`.
        wrt: what is trained, or None for what the framework trains.
        what: begins error messages.

    Returns:
        The vector `(dim,)` in JAX's default float, the module's layout, one `Leaf`, `Fixed`, `Held` or object per
        leaf, and the values of what is held.

    Raises:
        TypeError: if a parameter is not of a floating-point type, or this is no module.
        ValueError: if there is no parameter, or one is not finite.
    """
    parts: Parts = take_apart(module, wrt)
    names = _names(parts.paths)
    sites, flat, held = [], [], []
    for name, leaf, is_trained in zip(names, parts.leaves, parts.is_trained, strict=True):
        if is_trained:
            site, part = _parameter(name, with_context_axes(leaf), what, f"the parameter {name!r}")
            sites.append(site)
            flat.append(part)
        elif isinstance(leaf, jax.Array | np.ndarray | np.generic):
            sites.append(Held(name))
            held.append(with_context_axes(strip_weak_types(leaf)))
        elif isinstance(leaf, SETTINGS):
            sites.append(Fixed(name, type(leaf), leaf))
        else:
            sites.append(leaf)
    return _joined(flat, what), parts.layout, tuple(sites), tuple(held)


def _parameter(name: str, leaf: Any, what: str, where: str) -> tuple[Leaf, Array]:
    kind = attribute(leaf, "dtype") or (np.dtype(float) if isinstance(leaf, float) else None)
    if kind is None or not jnp.issubdtype(kind, jnp.floating):
        raise TypeError(
            f"{what}: expected floating-point parameters, got {where} of type "
            f"{kind if kind is not None else type(leaf).__name__}; convert it to float, or pass it "
            "as an argument of the loss instead."
        )
    with np.errstate(over="ignore"):
        array = jnp.asarray(leaf)
    flat = array.astype(float).reshape(-1)
    if not isinstance(array, Tracer) and not np.isfinite(flat).all():
        raise ValueError(
            f"{what}: expected finite starting values, got NaN or infinity in {where}."
        )
    if isinstance(leaf, np.ndarray):
        check_rounding(leaf, f"{what}: {where}")
    return Leaf(name, array.shape, array.dtype), flat


def _joined(flat: list[Array], what: str) -> Array:
    if not sum(part.size for part in flat):
        raise ValueError(
            f"{what}: expected at least one parameter, got an empty params; pass the "
            "starting values of the parameters as the second argument (in a module as arrays)."
        )
    return jnp.concatenate(flat)


def _names(paths: list[Any]) -> tuple[str, ...]:
    # Slashes within keys are spelled out where names would be the same otherwise.
    return unique_names([name_of(path) for path in paths], [name_of(p, "~1") for p in paths])


def _in_modules(params: Any) -> list[bool]:
    """For every leaf whether it is a field of a module, or lies below one."""
    nodes = jax.tree.leaves(params, is_leaf=_is_module)
    return [_is_module(node) for node in nodes for _ in jax.tree.leaves(node)]


def _is_module(node: Any) -> bool:
    if isinstance(node, jax.tree_util.Partial) or jax.tree_util.all_leaves([node]):
        return False
    equinox = sys.modules.get("equinox")
    return callable(node) or (equinox is not None and isinstance(node, equinox.Module))
