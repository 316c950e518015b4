# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""A loss that is a NumPyro model: its latent sites as one flat unconstrained vector.

Sites that cannot be part of it (discrete ones, parameters of optimizers, supports without a bijection) are
refused, with what to do instead.
"""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.util import (
    compute_log_probs,
    constrain_fn,
    helpful_support_errors,
    potential_energy,
)
from numpyro.primitives import Messenger

from numpyro_regloss._core.pytree import (
    Partition,
    is_concrete,
    pytree_dataclass,
    replace_fields,
    static_field,
)
from numpyro_regloss._core.types import Array
from numpyro_regloss.losses.captured import UserFunction
from numpyro_regloss.losses.constrained import constrained
from numpyro_regloss.losses.one_at_a_time import mapped, needs_one_at_a_time
from numpyro_regloss.losses.packing import pack, unpack
from numpyro_regloss.losses.rows import likelihood_sites, row_sites
from numpyro_regloss.losses.sites import (
    Site,
    check_sites,
    flat_labels,
    kept_values,
    ravel_sites,
)
from numpyro_regloss.losses.source import LossSource
from numpyro_regloss.losses.tilted import WithoutObservations

__all__ = [
    "DENSITIES",
    "GivenParams",
    "ModelSource",
    "bijection",
    "param_remedy",
    "trace_model",
]

DENSITIES = ("joint", "map", "likelihood")
# From so many sites on they leave a program together.
MANY = 32


@pytree_dataclass
class ModelSource(LossSource):
    """Minus the log density of a NumPyro model in unconstrained coordinates, sites sorted by name.

    Attributes:
        model: the model.
        density: one of `DENSITIES`.
        sites: the latent sites.
        rows: names of the sites that follow the rows of a minibatch.
        counted: names of the sites that `density="likelihood"` counts.
        has_observations: whether the density of observed sites, other than factors, is part of the value.
    """

    user: UserFunction  # ty: ignore[incompatible-attribute-override]
    density: str = static_field()  # ty: ignore[incompatible-attribute-override]
    sites: tuple[Site, ...] = static_field()
    rows: tuple[str, ...] = static_field(default=())
    counted: tuple[str, ...] = static_field(default=())
    has_observations: bool = static_field(default=True)

    @property
    def model(self) -> Callable[..., Any]:
        """The user's model as it is now; in a compiled program only `user.call` may run it."""
        return self.user.fn

    @property
    def dim(self) -> int:
        """Number of unconstrained parameters."""
        return sum(math.prod(site.shape) for site in self.sites)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the latent sites."""
        return tuple(site.name for site in self.sites)

    def value(self, x: Array, args: tuple, kwargs: dict, data_scale: float) -> Any:
        """Minus the log density; sites of the rows count `data_scale` times (rows per row of the batch)."""
        body = functools.partial(self._value, data_scale)
        return self.user.call(body, x, Partition((args, kwargs)))

    def _value(self, data_scale: float, model: Callable, x: Array, arguments: Partition) -> Any:
        full: Any = None
        model = model if self.has_observations else WithoutObservations(model)
        if self.density == "joint":
            args, kwargs = arguments.tree
            # Handlers are global: without the block an outer model would count the user's sites again.
            with handlers.block():
                full = potential_energy(handlers.seed(model, 0), args, kwargs, self.unravel(x))
            if data_scale == 1.0:
                return full
        terms, _ = self.terms(model, x, arguments)
        log_probs = {name: jnp.sum(value) for name, value in terms.items()}
        if full is None:
            names = self.counted if self.density == "likelihood" else log_probs
            full = -sum((log_probs[name] for name in names), start=0.0)
        return full - (data_scale - 1.0) * sum((log_probs[name] for name in self.rows), start=0.0)

    def terms(
        self, model: Callable, x: Array, arguments: Partition
    ) -> tuple[dict[str, Array], Any]:
        """Log probabilities of all sample sites, not summed, and the trace of the model."""
        args, kwargs = arguments.tree
        with handlers.block():
            model = handlers.seed(model, 0)
            constrained = constrain_fn(model, args, kwargs, self.unravel(x))
            return compute_log_probs(model, args, kwargs, constrained, sum_log_prob=False)

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

    def keeps_values(self, x: Array, args: tuple, kwargs: dict) -> np.ndarray:
        """Which unconstrained parameters are entries of their constrained sites as well."""
        return kept_values(x, self.constrain(x, args, kwargs), self.sites)

    def taken_names(self, arguments: Partition) -> frozenset[str]:
        """Names of everything in the model: latent, deterministic and observed sites, factors and plates."""
        ((_, names),) = trace_model(self.model, arguments)[1]
        return names

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
        return self.user.call(self._unconstrain, latent, Partition((args, kwargs)))

    def _unconstrain(
        self, model: Callable, latent: dict[str, Array], arguments: Partition
    ) -> tuple[Array, Array]:
        args, kwargs = arguments.tree
        with handlers.block():
            model = handlers.substitute(handlers.seed(model, 0), data=latent)
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
        ((found, _),) = trace_model(self.model, arguments)[1]
        if found != self.sites:
            raise ValueError(
                "Loss: the model has other latent sites with these arguments than with those bound in "
                f"Loss.from_model: expected {_describe(self.sites)}, got {_describe(found)}; build a "
                "new Loss for data of another size."
            )

    def with_data(
        self, arguments: Partition, batch: Partition | None, is_row: tuple[bool, ...]
    ) -> "ModelSource":
        """The same model with the sites that are data.

        Args:
            arguments: the full `(args, kwargs)`.
            batch: shapes of those of a batch, or None for full batches.
            is_row: which of the traced arguments are rows.

        Returns:
            The source with `rows` and `counted`.

        Raises:
            ValueError: if latent sites depend on the rows, observed ones do not, or a site could be either.
        """
        rows: tuple[str, ...] = ()
        if batch is not None:
            self.check(batch)
            rows, observed = row_sites(self, arguments, batch, is_row)
            counted = tuple(sorted({*rows, *observed}))
        elif self.density == "likelihood":
            counted = likelihood_sites(self, arguments)
        else:
            counted = ()
        return replace_fields(self, rows=rows, counted=counted)

    def check_data(
        self, arguments: Partition, batch: Partition | None, is_row: tuple[bool, ...]
    ) -> None:
        """Refuses arguments with which other sites are data.

        Args:
            arguments: the full `(args, kwargs)`.
            batch: shapes of those of a batch, or None for full batches.
            is_row: which of the traced arguments are rows.

        Raises:
            ValueError: if they differ from those at construction.
        """
        found = self.with_data(arguments, batch, is_row)
        if (found.rows, found.counted) != (self.rows, self.counted):
            raise ValueError(
                "Loss: the model has other sites of data with these arguments than with those bound in "
                f"Loss.from_model: expected {self.rows or self.counted}, got {found.rows or found.counted}; build "
                "a new Loss for such data."
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

    def own_settings(self) -> AbstractContextManager[Any]:
        """As the model was built."""
        return self.user.own_settings()

    def as_tree(self, x: Array) -> dict[str, Array]:
        """Unconstrained sites by name."""
        return self.unravel(x)

    def from_tree(self, tree: dict[str, Array]) -> Array:
        """The inverse of `as_tree`."""
        return self.ravel(tree)

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
    leaves, structure = jax.tree.flatten((source, x, arguments))

    def constrain(model: Callable, x: Array, arguments: Partition) -> dict[str, Array]:
        return constrained(model, *arguments.tree, source.unravel(x))

    def sites(leaves: list[Array]) -> dict[str, Array]:
        here, x, arguments = jax.tree.unflatten(structure, leaves)
        return here.user.call(constrain, x, arguments)

    # Python runs the model only once.
    once = jax.jit(sites)
    return (mapped(once) if needs_one_at_a_time(once, leaves) else once)(leaves)


@jax.jit
def _packed(source: ModelSource, x: Array, arguments: Partition) -> dict[str, Array]:
    return pack(_constrain(source, x, arguments))


def trace_model(
    model: Callable, *each: Partition
) -> tuple[UserFunction, list[tuple[tuple[Site, ...], frozenset[str]]]]:
    """Traces a model: its latent sites, and the names of everything in it.

    Args:
        model: a NumPyro model.
        *each: its `(args, kwargs)`, or their shapes, one or several of them.

    Returns:
        The model with what it reads. For each of the arguments the latent sites, sorted by name, and the names of
        latent, deterministic and observed sites, factors and plates.

    Raises:
        ValueError: if there is no latent site.
    """
    return UserFunction.trace(model, _probe, (), *((some,) for some in each))


def _probe(_: Any, model: Callable, arguments: Partition) -> tuple[Any, Any]:
    args, kwargs = arguments.tree
    given = GivenParams()
    with handlers.block(), given:
        start = handlers.substitute(handlers.seed(model, 0), substitute_fn=_zero)
        trace = handlers.trace(start).get_trace(*args, **kwargs)
    fixed = {name for name, site in trace.items() if name in given.names or _is_drawn(site, trace)}
    drawn = [site for name, site in trace.items() if name not in fixed]
    sites = tuple(sorted(filter(None, map(_latent, drawn))))
    if not sites:
        raise ValueError(
            "Loss.from_model: expected a model with latent sample sites, got none; give at least one "
            "numpyro.sample statement without obs."
        )
    terms = {
        name: site["fn"].log_prob(site["value"])
        for name, site in trace.items()
        if site["type"] == "sample"
    }
    # All that the model reads shows in the densities of its sites and in its deterministic values.
    others = [site["value"] for site in trace.values() if site["type"] == "deterministic"]
    return (terms, others), (sites, frozenset(trace))


def _is_drawn(site: dict[str, Any], trace: dict[str, Any]) -> bool:
    # random_eqx_module leaves a param site with the weights of the module that it was given. They do not count
    # where there is a sample site for each.
    module = site["name"].removesuffix("$params")
    if site["type"] != "param" or module == site["name"]:
        return False
    drawn = [
        name for name, s in trace.items() if s["type"] == "sample" and name.startswith(f"{module}/")
    ]
    return len(drawn) == len(jax.tree.leaves(site["value"]))


def _latent(site: dict[str, Any]) -> Site | None:
    kind, name = site["type"], site["name"]
    # random_flax_module leaves a param site behind that holds no array, once all weights are latent.
    if kind in ("param", "mutable") and jax.tree.leaves(site["value"]):
        raise ValueError(
            f"Loss.from_model: expected latent sample sites only, got the {kind} site {name!r}, which "
            f"would stay fixed at its start; {param_remedy(kind, name)}."
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
    shape = bijection(site).inverse_shape(jnp.shape(site["value"]))
    return Site(name, tuple(shape))


def _zero(site: dict[str, Any]) -> Array | None:
    if site["type"] != "sample" or site["is_observed"] or site["fn"].support.is_discrete:
        return None
    transform = bijection(site)
    shape = site["kwargs"].get("sample_shape", ()) + site["fn"].shape()
    return transform(jnp.zeros(transform.inverse_shape(shape)))


def _describe(sites: tuple[Site, ...]) -> str:
    return ", ".join(f"{site.name}{list(site.shape)}" for site in sites)


class GivenParams(Messenger):
    """Names of the `param` sites whose values come from `handlers.substitute` within the model."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def process_message(self, msg: dict[str, Any]) -> None:
        """For NumPyro: handlers within the model have seen the site before."""
        if msg["type"] == "param" and msg["value"] is not None:
            self.names.add(msg["name"])


def param_remedy(kind: str, name: str) -> str:
    """What to do about a site that NumPyro would optimize rather than sample.

    Args:
        kind: `"param"` or `"mutable"`.
        name: of the site.

    Returns:
        The end of an error message.
    """
    if kind == "mutable":
        return (
            "run the layer in evaluation mode, or write the loss as a function and use "
            "Loss.from_function"
        )
    substitute = f"handlers.substitute(model, data={{{name!r}: ...}})"
    if name.endswith("_centered"):
        return (
            "give LocScaleReparam a number, LocScaleReparam(0.2), or make it latent: "
            f"handlers.lift(model, prior={{{name!r}: dist.Uniform(0.0, 1.0)}})"
        )
    if name.endswith("$params"):
        return (
            "random_flax_module (random_nnx_module, random_eqx_module) makes those weights latent for which it "
            f"has a prior, so give it one for all; {substitute} fixes them"
        )
    return (
        "write it as a sample site, make it latent with handlers.lift(model, "
        f"prior={{{name!r}: dist.Normal(...)}}), or fix it with {substitute}"
    )


def bijection(site: dict[str, Any]) -> Any:
    """The transform from unconstrained values to the support of a sample site.

    Args:
        site: of a trace.

    Returns:
        The transform.

    Raises:
        ValueError: if there is none; it names NumPyro's reparametrizer where one is known.
    """
    name, support = site["name"], site["fn"].support
    try:
        with helpful_support_errors(site):
            return biject_to(support)
    except (NotImplementedError, ValueError) as error:
        remedy = str(error) or (
            f"Its support, {support}, has no bijection from real numbers; reparametrize it with "
            "handlers.reparam, or register one with numpyro.distributions.biject_to."
        )
        raise ValueError(
            f"Loss.from_model: expected sites that can be made unconstrained, got {name!r} with "
            f"{type(site['fn']).__name__}. {remedy}"
        ) from error
