# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""A loss that is a NumPyro model: its latent sites as one flat unconstrained vector."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.util import compute_log_probs, constrain_fn, potential_energy

from numpyro_regloss._constrained import constrained
from numpyro_regloss._packing import pack, unpack
from numpyro_regloss._pytree import Partition, is_concrete, pytree_dataclass, static_field
from numpyro_regloss._sites import Site, check_sites, flat_labels, ravel_sites
from numpyro_regloss._typing import Array

__all__ = ["DENSITIES", "ModelSource", "latent_sites", "observed_sizes"]

DENSITIES = ("joint", "map", "likelihood")
# From so many sites on they leave a program together.
MANY = 32


@pytree_dataclass
class ModelSource:
    """Minus the log density of a NumPyro model in unconstrained coordinates, sites sorted by name."""

    model: Callable = static_field()
    density: str = static_field()
    sites: tuple[Site, ...] = static_field()

    @property
    def dim(self) -> int:
        """Number of unconstrained parameters."""
        return sum(math.prod(site.shape) for site in self.sites)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the latent sites."""
        return tuple(site.name for site in self.sites)

    def value(self, x: Array, args: tuple, kwargs: dict, data_scale: float) -> Any:
        """Minus the log density; observed sites count `data_scale` times (rows per row of the batch)."""
        unconstrained = self.unravel(x)
        # Handlers are global: without the block an outer model would count the user's sites again.
        with handlers.block():
            model = handlers.seed(self.model, 0)
            joint = self.density == "joint"
            value = potential_energy(model, args, kwargs, unconstrained) if joint else 0.0
            if joint and data_scale == 1.0:
                return value
            constrained = constrain_fn(model, args, kwargs, unconstrained)
            log_probs, trace = compute_log_probs(model, args, kwargs, constrained)
        observed = sum((v for k, v in log_probs.items() if trace[k]["is_observed"]), start=0.0)
        latent = sum((v for k, v in log_probs.items() if not trace[k]["is_observed"]), start=0.0)
        if joint:
            return value - (data_scale - 1.0) * observed
        return -data_scale * observed - (latent if self.density == "map" else 0.0)

    def constrain(self, x: Array, args: tuple, kwargs: dict) -> dict[str, Array]:
        """Latent sites in their supports, and the model's deterministic sites, by name."""
        arguments = Partition((args, kwargs))
        if len(self.sites) < MANY or not is_concrete((x, arguments)):
            return _constrain(self, x, arguments)
        shapes = _constrain.eval_shape(self, x, arguments)
        sites = unpack(_packed(self, x, arguments), shapes)
        return jax.tree.map(jnp.asarray, sites)

    def named(self, x: Array, args: tuple, kwargs: dict) -> dict[str, Array]:
        """The same as `constrain`: a model's parameters already have names."""
        return self.constrain(x, args, kwargs)

    def unconstrain(self, sites: dict[str, Array], args: tuple, kwargs: dict) -> Array:
        """The inverse of `constrain`: latent sites in their supports as the flat vector."""
        known = set(jax.eval_shape(lambda x: self.constrain(x, args, kwargs), jnp.zeros(self.dim)))
        check_sites(sites, set(self.names), known)
        return self.unconstrain_with_jacobian(sites, args, kwargs)[0]

    def unconstrain_with_jacobian(
        self, sites: dict[str, Array], args: tuple, kwargs: dict
    ) -> tuple[Array, Array]:
        """The flat vector of latent sites, and the log Jacobian determinant of constraining it.

        Args:
            sites: values of all latent sites by name; others are passed over.
            args: the model's arguments.
            kwargs: its keyword arguments.

        Returns:
            `(dim,)` and a scalar.

        Raises:
            ValueError: if a site is of another shape.
        """
        latent = {name: jnp.asarray(sites[name], float) for name in self.names}
        with handlers.block():
            model = handlers.substitute(handlers.seed(self.model, 0), data=latent)
            trace = handlers.trace(model).get_trace(*args, **kwargs)
        unconstrained, log_jacobian = {}, jnp.zeros(())
        for name, value in latent.items():
            transform = biject_to(trace[name]["fn"].support)
            unconstrained[name] = transform.inv(value)
            jacobian = transform.log_abs_det_jacobian(unconstrained[name], value)
            log_jacobian = log_jacobian + jnp.sum(jacobian)
        return self.ravel(unconstrained), log_jacobian

    def ravel(self, sites: dict[str, Array]) -> Array:
        """The inverse of `unravel`: unconstrained sites by name as the flat vector."""
        check_sites(sites, set(self.names), set(self.names))
        return ravel_sites(sites, self.sites)

    @property
    def flat_names(self) -> tuple[str, ...]:
        """One label per flat parameter: `site` or `site[i,j]`."""
        return flat_labels(self.sites)

    def check(self, arguments: Partition) -> None:
        """Refuses arguments with which the model has other latent sites.

        Args:
            arguments: the model's `(args, kwargs)`.

        Raises:
            ValueError: if the latent sites differ from those at construction.
        """
        found = latent_sites(self.model, arguments)
        if found != self.sites:
            raise ValueError(
                "Loss: the model has other latent sites with these arguments than with those bound in "
                f"Loss.from_model: expected {_describe(self.sites)}, got {_describe(found)}; build a "
                "new Loss for data of another size."
            )

    def check_batch(self, arguments: Partition, batch: Partition) -> None:
        """Refuses models whose latent or observed sites do not follow the rows of a batch.

        Args:
            arguments: the full `(args, kwargs)`.
            batch: shapes of those of a batch.

        Raises:
            ValueError: if latent sites depend on the rows, or observed ones do not.
        """
        self.check(batch)
        full, part = (observed_sizes(self.model, a) for a in (arguments, batch))
        ratios = {name: (part[name], size) for name, size in full.items() if size}
        rows = {size / count for count, size in ratios.values()}
        if len(rows) > 1 or rows == {1.0}:
            raise ValueError(
                "Loss.from_model: expected observed sites whose size follows the rows of the minibatch, got "
                f"{ratios} (of the batch, of all); take plate sizes from the data (len(y)), and name the "
                "data with argnums."
            )

    def expand(self, tree: Any) -> Array:
        """One value per flat parameter from a number or a dict of them by site name.

        Args:
            tree: a number, or a dict with one for every latent site.

        Returns:
            `(dim,)`.

        Raises:
            ValueError: if the names are not those of the latent sites.
        """
        if not isinstance(tree, dict):
            return jnp.broadcast_to(jnp.asarray(tree, float), (self.dim,))
        if set(tree) != set(self.names):
            raise ValueError(
                f"expected one value for each latent site {sorted(self.names)}, got {sorted(tree)}."
            )
        return jnp.concatenate([
            jnp.broadcast_to(jnp.asarray(tree[site.name], float), site.shape).reshape(-1)
            for site in self.sites
        ])

    def unravel(self, x: Array) -> dict[str, Array]:
        """The flat vector as unconstrained sites by name."""
        arrays, start = {}, 0
        for site in self.sites:
            stop = start + math.prod(site.shape)
            arrays[site.name] = x[start:stop].reshape(site.shape)
            start = stop
        return arrays


@jax.jit
def _constrain(source: ModelSource, x: Array, arguments: Partition) -> dict[str, Array]:
    return constrained(source.model, *arguments.tree, source.unravel(x))


@jax.jit
def _packed(source: ModelSource, x: Array, arguments: Partition) -> dict[str, Array]:
    return pack(_constrain(source, x, arguments))


def latent_sites(model: Callable, arguments: Partition) -> tuple[Site, ...]:
    """The latent sites of a model, from one abstract run that is remembered per shape of arguments.

    Args:
        model: a NumPyro model.
        arguments: its `(args, kwargs)`.

    Returns:
        The latent sites, sorted by name.
    """
    return _sites(model, *_shapes(arguments))[0]


def observed_sizes(model: Callable, arguments: Partition) -> dict[str, int]:
    """Number of log-probability terms of each observed site; zero for factors, which have no rows.

    Args:
        model: a NumPyro model.
        arguments: its `(args, kwargs)`, or their shapes.

    Returns:
        The sizes by name.
    """
    return dict(_sites(model, *_shapes(arguments))[1])


def _shapes(arguments: Partition) -> tuple[Any, tuple[Any, ...]]:
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)


@functools.lru_cache(maxsize=256)
def _sites(
    model: Callable, structure: Any, shapes: tuple[Any, ...]
) -> tuple[tuple[Site, ...], tuple[tuple[str, int], ...]]:
    sites: tuple[Site, ...] = ()
    observed: tuple[tuple[str, int], ...] = ()

    def record(leaves: list[Any]) -> None:
        nonlocal sites, observed
        args, kwargs = jax.tree.unflatten(structure, leaves).tree
        with handlers.block():
            start = handlers.substitute(handlers.seed(model, 0), substitute_fn=_zero)
            trace = handlers.trace(start).get_trace(*args, **kwargs)
        sites = tuple(sorted(filter(None, map(_latent, trace.values()))))
        observed = tuple(
            (name, _num_terms(site))
            for name, site in trace.items()
            if site["type"] == "sample" and site["is_observed"]
        )

    jax.eval_shape(record, list(shapes))
    if not sites:
        raise ValueError(
            "Loss.from_model: expected a model with latent sample sites, got none; give at least one "
            "numpyro.sample statement without obs."
        )
    return sites, observed


def _latent(site: dict[str, Any]) -> Site | None:
    kind, name = site["type"], site["name"]
    # random_flax_module leaves a param site behind that holds no array, once all weights are latent.
    if kind in ("param", "mutable") and jax.tree.leaves(site["value"]):
        raise ValueError(
            f"Loss.from_model: expected latent sample sites only, got the {kind} site {name!r}, which "
            "would stay fixed; write it as a sample site (random_flax_module makes a network's weights "
            "latent), or write the loss as a function and use Loss.from_function."
        )
    if kind == "plate" and site["args"][1] not in (None, site["args"][0]):
        raise ValueError(
            f"Loss.from_model: expected full plates, got the plate {name!r} with subsample_size="
            f"{site['args'][1]} of {site['args'][0]}; pass the data as arguments and use "
            "minibatch=Minibatch(batch_size) instead."
        )
    if kind != "sample" or site["is_observed"]:
        return None
    distribution = site["fn"]
    if isinstance(distribution, dist.Delta):
        raise ValueError(  # noqa: TRY004
            f"Loss.from_model: the latent site {name!r} has a Delta distribution; use "
            "numpyro.deterministic to name its value."
        )
    if distribution.support.is_discrete:
        raise ValueError(
            f"Loss.from_model: expected continuous latent sites, got the discrete site {name!r}; "
            "marginalize it (numpyro.distributions.MixtureSameFamily, or a sum in numpyro.factor), or "
            "use Loss.from_function with a gradient-free engine."
        )
    shape = biject_to(distribution.support).inverse_shape(jnp.shape(site["value"]))
    return Site(name, tuple(shape))


def _num_terms(site: dict[str, Any]) -> int:
    if isinstance(site["fn"], dist.Unit):
        return 0
    return math.prod(jnp.shape(site["fn"].log_prob(site["value"])))


def _zero(site: dict[str, Any]) -> Array | None:
    if site["type"] != "sample" or site["is_observed"] or site["fn"].support.is_discrete:
        return None
    transform = biject_to(site["fn"].support)
    shape = site["kwargs"].get("sample_shape", ()) + site["fn"].shape()
    return transform(jnp.zeros(transform.inverse_shape(shape)))


def _describe(sites: tuple[Site, ...]) -> str:
    return ", ".join(f"{site.name}{list(site.shape)}" for site in sites)
