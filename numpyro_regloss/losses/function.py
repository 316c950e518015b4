# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""A loss that is a function of a pytree: how its parameters become one flat vector and return."""

import math
import sys
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
    with_context_axes,
)
from numpyro_regloss._core.rounding import check_rounding
from numpyro_regloss._core.types import Array
from numpyro_regloss.losses.captured import UserFunction
from numpyro_regloss.losses.sites import flat_labels, ravel_sites, unique_names
from numpyro_regloss.losses.source import LossSource

__all__ = ["FunctionSource", "flatten_params"]

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


@pytree_dataclass
class FunctionSource(LossSource):
    """`fn(params, *args, **kwargs)` with the structure of `params`."""

    user: UserFunction  # ty: ignore[incompatible-attribute-override]
    structure: Any = static_field()
    sites: tuple[Leaf | Any, ...] = static_field()

    @classmethod
    def trace(
        cls, fn: Any, settings: tuple[Any, Any], x0: Array, *each: Partition
    ) -> "FunctionSource":
        """Traces a function.

        Args:
            fn: the user's function.
            settings: structure and leaves of its parameters.
            x0: `(dim,)`, the start.
            *each: arguments to trace it with.

        Returns:
            The source.
        """
        user, _ = UserFunction.trace(fn, _probe, settings, *((x0, some) for some in each))
        return cls(user, *settings)

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
        settings = (self.structure, self.sites)
        return self.user.call(partial(_value, settings), x, Partition((args, kwargs)))

    def constrain(self, x: Array, args: tuple, kwargs: dict) -> Any:
        """The parameters in the user's structure and types."""
        del args, kwargs
        return jax.tree.unflatten(self.structure, _arrays(self.sites, x))

    def tangent(self, x: Array) -> Any:
        """A gradient in the user's structure; zero for settings of modules: updates leave them alone."""
        arrays = [
            site.kind() if isinstance(site, Fixed) else array
            for site, array in zip(self.sites, _arrays(self.sites, x), strict=True)
        ]
        return jax.tree.unflatten(self.structure, arrays)

    def named(self, x: Array, args: tuple, kwargs: dict) -> dict[str, Array]:
        """The parameters as a flat dictionary of sites."""
        del args, kwargs
        arrays = [
            a
            for a, s in zip(_arrays(self.sites, x), self.sites, strict=True)
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
        leaves, structure = jax.tree.flatten(params)
        if structure != self.structure:
            raise ValueError(
                f"Loss: expected parameters of the structure {self.structure}, or a dict of "
                f"{sorted(self.names)}, got {structure}."
            )
        arrays = [a for a, site in zip(leaves, self.sites, strict=True) if isinstance(site, Leaf)]
        return ravel_sites(dict(zip(self.names, arrays, strict=True)), self._leaves)

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

    def expand(self, tree: Any) -> Array:
        """One value per flat parameter from a pytree prefix of the parameters."""
        indices = jax.tree.unflatten(self.structure, range(len(self.sites)))
        prefix = jax.tree.broadcast(tree, indices)
        values = [
            jnp.broadcast_to(jnp.asarray(value, float), site.shape).reshape(-1)
            for value, site in zip(jax.tree.leaves(prefix), self.sites, strict=True)
            if isinstance(site, Leaf)
        ]
        return jnp.concatenate(values)


def _value(settings: tuple[Any, Any], fn: Any, x: Array, arguments: Partition) -> Any:
    structure, sites = settings
    args, kwargs = arguments.tree
    params = jax.tree.unflatten(structure, _arrays(sites, x))
    return fn(params, *args, **kwargs)


def _probe(
    settings: tuple[Any, Any], fn: Any, x: Array, arguments: Partition
) -> tuple[list[Any], None]:
    out = jax.tree.leaves(_value(settings, fn, x, arguments))
    # What is no array is refused later, by what it is.
    return [leaf for leaf in out if isinstance(leaf, jax.Array | np.ndarray | np.generic)], None


def _arrays(sites: tuple[Any, ...], x: Array) -> list[Any]:
    arrays, start = [], 0
    for site in sites:
        if not isinstance(site, Leaf):
            arrays.append(site.value if isinstance(site, Fixed) else site)
            continue
        stop = start + math.prod(site.shape)
        arrays.append(x[start:stop].reshape(site.shape).astype(site.dtype))
        start = stop
    return arrays


def flatten_params(
    params: Any, what: str = "Loss.from_function"
) -> tuple[Array, Any, tuple[Any, ...]]:
    """Flattens floating-point parameters into one vector.

    Args:
        params: a pytree of floating-point arrays or floats. Functions among its leaves (the activation
            of a network object) and numbers among the fields of a module are kept as they are.
        what: begins error messages.

    Returns:
        The vector `(dim,)` in JAX's default float, the tree's structure, and one `Leaf`, `Fixed` or
        function per leaf.

    Raises:
        TypeError: if a leaf is not of a floating-point type.
        ValueError: if there is no parameter, or one is not finite.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(with_context_axes(params))
    names = unique_names([_name(path) for path, _ in paths], [_name(p, "~1") for p, _ in paths])
    sites, flat = [], []
    for name, (path, leaf), in_module in zip(names, paths, _in_modules(params), strict=True):
        if callable(leaf):
            sites.append(leaf)
            continue
        # What equinox trains are arrays; its Dropout, for one, holds a rate and a switch.
        if in_module and isinstance(leaf, SETTINGS) and not isinstance(leaf, np.generic):
            sites.append(Fixed(name, type(leaf), leaf))
            continue
        where = f"params{jax.tree_util.keystr(path)}"
        kind = attribute(leaf, "dtype") or (np.dtype(float) if isinstance(leaf, float) else None)
        if kind is None or not jnp.issubdtype(kind, jnp.floating):
            raise TypeError(
                f"{what}: expected floating-point parameters, got {where} of type "
                f"{kind if kind is not None else type(leaf).__name__}; convert it to float, or pass it "
                "as an argument of the loss instead."
            )
        with np.errstate(over="ignore"):
            array = jnp.asarray(leaf)
        sites.append(Leaf(name, array.shape, array.dtype))
        flat.append(array.astype(float).reshape(-1))
        if not isinstance(array, Tracer) and not np.isfinite(flat[-1]).all():
            raise ValueError(
                f"{what}: expected finite starting values, got NaN or infinity in {where}."
            )
        if isinstance(leaf, np.ndarray):
            check_rounding(leaf, f"{what}: {where}")
    if not sum(part.size for part in flat):
        raise ValueError(
            f"{what}: expected at least one parameter, got an empty params; pass the "
            "starting values of the parameters as the second argument (in a module as arrays)."
        )
    return jnp.concatenate(flat), structure, tuple(sites)


def _name(path: tuple[Any, ...], slash: str = "/") -> str:
    # As in JSON pointers: slashes within keys are spelled out where names would be the same otherwise.
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if slash != "/":
        parts = [part.replace("~", "~0").replace("/", slash) for part in parts]
    return "/".join(parts) or "params"


def _in_modules(params: Any) -> list[bool]:
    """For every leaf whether it is a field of a module, or lies below one."""
    nodes = jax.tree.leaves(params, is_leaf=_is_module)
    return [_is_module(node) for node in nodes for _ in jax.tree.leaves(node)]


def _is_module(node: Any) -> bool:
    if isinstance(node, jax.tree_util.Partial) or jax.tree_util.all_leaves([node]):
        return False
    equinox = sys.modules.get("equinox")
    return callable(node) or (equinox is not None and isinstance(node, equinox.Module))
