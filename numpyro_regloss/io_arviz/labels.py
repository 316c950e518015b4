# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Names, dimensions and coordinates of a loss's parameters, as labelled datasets want them.

Dimensions of a NumPyro model's sites are its plates, and what `infer={"event_dims": [...]}` names; whatever
else has none, or could be two plates, is called `<variable>_dim_<axis>`. Replicas are the dimension `replica`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro import handlers

from numpyro_regloss._core.pytree import Partition
from numpyro_regloss._core.settings import own_settings
from numpyro_regloss._core.types import Array
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.numpyro_model import ModelSource
from numpyro_regloss.losses.replicas import single
from numpyro_regloss.losses.sites import Site, flat_labels

__all__ = ["RESERVED", "Labels", "SiteLabel", "label_sites", "observed_values"]

# Dimensions of ArviZ's, which no variable may have as its name.
RESERVED = ("chain", "draw", "sample")


class SiteLabel(NamedTuple):
    """One parameter, or one site of a model.

    Attributes:
        site: its name in the model, or its path in the pytree.
        variable: its name in datasets.
        kind: `"parameter"`, `"latent"`, `"deterministic"` or `"observed"`.
        shape: of one draw, constrained.
        dims: one name per axis.
    """

    site: str
    variable: str
    kind: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]


class Labels(NamedTuple):
    """All of them, checked against one another.

    Attributes:
        sites: in the order of the flat vector, latent ones first; those without elements too.
        coords: of every dimension.
        flat: one label per flat parameter, the coordinate values of `param`.
    """

    sites: tuple[SiteLabel, ...]
    coords: dict[str, np.ndarray]
    flat: np.ndarray

    @property
    def drawn(self) -> tuple[SiteLabel, ...]:
        """What draws have values of. Sites without elements are left out: no statistic is defined for them."""
        return tuple(s for s in self.sites if s.kind != "observed" and 0 not in s.shape)

    @property
    def table(self) -> str:
        """The sites as JSON, for attributes."""
        return json.dumps({
            s.site: {"variable": s.variable, "kind": s.kind, "shape": s.shape, "dims": s.dims}
            for s in self.sites
        })

    def coords_of(self, sites: Iterable[SiteLabel]) -> dict[str, np.ndarray]:
        """Coordinates of the dimensions that these sites have."""
        used = {dim for site in sites for dim in site.dims}
        return {dim: values for dim, values in self.coords.items() if dim in used}


class _Found(NamedTuple):
    site: str
    kind: str
    shape: tuple[int, ...]
    named: dict[int, str]


def label_sites(
    loss: Loss,
    arguments: Partition,
    what: str,
    *,
    deterministic: bool = False,
    observed: bool = False,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    rename: Mapping[str, str] | None = None,
) -> Labels:
    """Labels what a loss has.

    Args:
        loss: the loss.
        arguments: its arguments.
        what: begins error messages.
        deterministic: whether to label the deterministic sites of a model.
        observed: whether to label its observed sites.
        dims: names of the axes of some sites, over those that were found.
        coords: coordinate values of some dimensions.
        rename: names of variables in place of names of sites.

    Returns:
        The labels.

    Raises:
        ValueError: if names clash or do not fit.
    """
    one, num_replicas = single(loss)
    if (deterministic or observed) and not isinstance(one.source, ModelSource):
        raise ValueError(
            f"{what}: expected a loss from a NumPyro model for deterministic=True or observed=True, got one from "
            "a function, which has no such sites; leave them out."
        )
    kinds = {"parameter", "latent"}
    kinds |= {"deterministic"} if deterministic else set()
    kinds |= {"observed"} if observed else set()
    found = _find(one, arguments, kinds, what)
    if num_replicas is not None:
        found = [_replicated(site, num_replicas) for site in found]
    dims, coords, rename = (_mapping(m, what) for m in (dims, coords, rename))
    names = [site.site for site in found]
    for option, given in (("dims", dims), ("rename", rename)):
        unknown = set(given) - set(names)
        if unknown:
            raise ValueError(
                f"{what}: expected {option} of the sites {names}, got {sorted(unknown)} too; "
                "deterministic and observed sites need deterministic=True and observed=True."
            )
    sites = tuple(
        _labelled(site, dims.get(site.site), rename.get(site.site), what) for site in found
    )
    _check_names(sites, what)
    arrays = [site for site in one.source.sites if hasattr(site, "shape")]
    flat = flat_labels(tuple(Site(rename.get(a.name, a.name), a.shape) for a in arrays))
    if num_replicas is not None:
        flat = tuple(f"{label}@{replica}" for replica in range(num_replicas) for label in flat)
    if len(set(flat)) < len(flat):
        raise ValueError(
            f"{what}: expected parameters of different names, got {_repeated(flat)} more than once; "
            "name them apart in the pytree."
        )
    return Labels(sites, _coordinates(sites, coords, what), _strings(flat))


def observed_values(loss: Loss, arguments: Partition) -> dict[str, np.ndarray]:
    """Values of the observed sites of a model, by name."""
    return jax.tree.map(np.asarray, _observed(single(loss)[0], arguments))


def _find(loss: Loss, arguments: Partition, kinds: set[str], what: str) -> list[_Found]:
    source = loss.source
    if not isinstance(source, ModelSource):
        leaves = [site for site in source.sites if hasattr(site, "shape")]
        return [_Found(leaf.name, "parameter", tuple(leaf.shape), {}) for leaf in leaves]
    found: dict[str, _Found] = {}

    def record(x: Array, arguments: Partition) -> None:
        for name, site in _trace(loss, x, arguments).items():
            kind = _kind(site)
            if kind in kinds:
                shape = tuple(jnp.shape(site["value"]))
                found[name] = _Found(name, kind, shape, _named_axes(site, shape, what))

    jax.eval_shape(record, loss.x0, arguments)
    latent = [found.pop(name) for name in source.names]
    return latent + list(found.values())


def _replicated(site: _Found, num_replicas: int) -> _Found:
    # Data are the same for all.
    if site.kind == "observed":
        return site
    named = {axis + 1: name for axis, name in site.named.items()}
    return site._replace(shape=(num_replicas, *site.shape), named={0: "replica", **named})


def _trace(loss: Loss, x: Array, arguments: Partition) -> dict[str, Any]:
    return _trace_of(loss.source.model, loss, x, arguments)  # ty: ignore[missing-union-attribute]


def _trace_of(model: Any, loss: Loss, x: Array, arguments: Partition) -> dict[str, Any]:
    args, kwargs = arguments.tree
    values = loss.named_sites(x, arguments)
    latent = {name: values[name] for name in loss.names}
    with handlers.block():
        model = handlers.substitute(handlers.seed(model, 0), data=latent)
        return handlers.trace(model).get_trace(*args, **kwargs)


@jax.jit
@own_settings
def _observed(loss: Loss, arguments: Partition) -> dict[str, Array]:
    def observed(model: Any, x: Array, arguments: Partition) -> dict[str, Array]:
        return {
            name: jnp.asarray(site["value"])
            for name, site in _trace_of(model, loss, x, arguments).items()
            if _kind(site) == "observed"
        }

    return loss.source.user.call(observed, loss.x0, arguments)


def _kind(site: dict[str, Any]) -> str | None:
    if site["type"] == "deterministic":
        return "deterministic"
    # A factor has no value.
    if site["type"] != "sample" or isinstance(site["fn"], dist.Unit):
        return None
    return "observed" if site["is_observed"] else "latent"


def _named_axes(site: dict[str, Any], shape: tuple[int, ...], what: str) -> dict[int, str]:
    frames = site["cond_indep_stack"]
    if site["type"] == "deterministic":
        return _plates_of_value(frames, shape)
    named = _plates(frames, shape, site["fn"].event_dim)
    event_dims = list((site["infer"] or {}).get("event_dims", []))
    free = [axis for axis in range(len(shape)) if axis not in named]
    if event_dims and len(event_dims) != len(free):
        raise ValueError(
            f"{what}: expected {len(free)} event_dims of the site {site['name']!r} of shape {shape}, got "
            f"{event_dims}; one for each axis that is no plate."
        )
    return named | dict(zip(free, event_dims, strict=False))


def _plates(frames: Any, shape: tuple[int, ...], event_dim: int) -> dict[int, str]:
    axes = {len(shape) - event_dim + frame.dim: frame for frame in frames}
    return {
        axis: frame.name for axis, frame in axes.items() if axis >= 0 and shape[axis] == frame.size
    }


def _plates_of_value(frames: Any, shape: tuple[int, ...]) -> dict[int, str]:
    # How many axes on the right are no plates is not known: only what fits in one way has names.
    fits = []
    for event_dim in range(len(shape) + 1):
        axes = [len(shape) - event_dim + frame.dim for frame in frames]
        named = _plates(frames, shape, event_dim)
        if len(named) == sum(axis >= 0 for axis in axes):
            fits.append(named)
    most = max(map(len, fits), default=0)
    best = [named for named in fits if len(named) == most]
    return best[0] if len(best) == 1 else {}


def _labelled(
    site: _Found, dims: Sequence[str] | None, variable: str | None, what: str
) -> SiteLabel:
    if variable is None:
        # Groups of files are paths.
        variable = site.site.replace("/", ".")
    if not isinstance(variable, str) or "/" in variable or variable in ("", ".", ".."):
        raise ValueError(
            f"{what}: expected a name that files allow, without '/', got {variable!r} for {site.site!r}; give it "
            "another one with rename."
        )
    if dims is None:
        dims = [site.named.get(axis, f"{variable}_dim_{axis}") for axis in range(len(site.shape))]
    usable = not isinstance(dims, str) and all(isinstance(dim, str) for dim in dims)
    named = tuple(dim.replace("/", ".") for dim in dims) if usable else ()
    if not usable or len(named) != len(site.shape) or len(set(named)) < len(named):
        raise ValueError(
            f"{what}: expected dims of {site.site!r} of shape {site.shape} as {len(site.shape)} different names, "
            f"got {dims!r}; give it others with dims."
        )
    return SiteLabel(site.site, variable, site.kind, site.shape, named)


def _check_names(sites: tuple[SiteLabel, ...], what: str) -> None:
    variables = [site.variable for site in sites]
    if len(set(variables)) < len(variables):
        raise ValueError(
            f"{what}: expected different names of variables, got {_repeated(variables)} more than once; "
            'give them other names with rename={"site": "name"}.'
        )
    dims = {dim: site for site in sites for dim in site.dims}
    for site in sites:
        if site.variable in RESERVED or site.variable in dims:
            why = "a dimension" if site.variable in dims else "a dimension of ArviZ's"
            raise ValueError(
                f"{what}: the site {site.site!r} has the name of {why}; give it another one, such as "
                f'rename={{"{site.site}": "{site.variable}_"}}.'
            )
    for dim in set(RESERVED) & set(dims):
        raise ValueError(
            f"{what}: the site {dims[dim].site!r} has a dimension {dim!r}, which is ArviZ's own; give it others "
            f'with dims={{"{dims[dim].site}": [...]}}.'
        )


def _coordinates(
    sites: tuple[SiteLabel, ...], given: dict[str, Any], what: str
) -> dict[str, np.ndarray]:
    sizes: dict[str, int] = {}
    for site in sites:
        for dim, size in zip(site.dims, site.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                raise ValueError(
                    f"{what}: expected one size of the dimension {dim!r}, got {sizes[dim]} and {size} (of "
                    f"{site.site!r}); give one of them another name with dims."
                )
    if set(given) - set(sizes):
        raise ValueError(
            f"{what}: expected coords of the dimensions {sorted(sizes)}, got {sorted(set(given) - set(sizes))} "
            "too; name dimensions with dims."
        )
    coords = {dim: _strings(given.get(dim, np.arange(size))) for dim, size in sizes.items()}
    for dim, values in coords.items():
        if values.shape != (sizes[dim],):
            raise ValueError(
                f"{what}: expected {sizes[dim]} coords of the dimension {dim!r}, got shape {values.shape}."
            )
    return coords


def _strings(values: Any) -> np.ndarray:
    # Zarr's format has no strings of fixed length.
    array = np.asarray(values)
    return array.astype(object) if array.dtype.kind == "U" else array


def _mapping(given: Any, what: str) -> dict[str, Any]:
    if not isinstance(given, Mapping | None):
        raise TypeError(
            f"{what}: expected dims, coords and rename as dictionaries, got {type(given).__name__}."
        )
    return dict(given or {})


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)
