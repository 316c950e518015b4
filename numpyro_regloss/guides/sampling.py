# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Draws of NumPyro guides in unconstrained coordinates, in the order of `Loss`, with their log densities."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax
from jax.random import split
from numpyro import handlers
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.util import compute_log_probs

from numpyro_regloss._core.pytree import Partition, is_concrete
from numpyro_regloss._core.settings import own_settings
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.losses.captured import AsRead
from numpyro_regloss.losses.numpyro_model import ModelSource

__all__ = [
    "GuideDraws",
    "batch_size",
    "check_params",
    "draw_continuous",
    "draw_sites",
    "param_shapes",
    "sorted_order",
]

_LATENT = "_regloss_latent"
NO_ARGUMENTS = Partition(((), {}))


class GuideDraws(NamedTuple):
    """Independent draws.

    Attributes:
        x: `(draw, dim)`.
        log_density: of the guide in unconstrained coordinates, `(draw,)`; None where it is not known.
    """

    x: Array
    log_density: Array | None


def draw_continuous(
    guide: AutoContinuous, params: dict, rng_key: Key, num_samples: int
) -> GuideDraws:
    """Draws of the latent vector of one of NumPyro's automatic guides.

    Args:
        guide: a guide whose prototype is set up.
        params: from `svi.get_params`.
        rng_key: a random key.
        num_samples: number of draws.

    Returns:
        The draws.
    """
    check_params(params, param_shapes(_latent_site(guide)))
    return GuideDraws(*_draw_latents(guide, params, rng_key, num_samples))


def draw_sites(
    guide: Callable[..., Any],
    params: dict,
    source: ModelSource,
    arguments: Partition,
    rng_key: Key,
    num_samples: int,
) -> GuideDraws:
    """Draws of any guide, its sites moved to unconstrained coordinates.

    Args:
        guide: a function with the model's arguments.
        params: from `svi.get_params`.
        source: the latent sites.
        arguments: of model and guide.
        rng_key: a random key.
        num_samples: number of draws.

    Returns:
        The draws, without density if the guide has auxiliary sites that must be integrated out.

    Raises:
        ValueError: if draws have no unconstrained coordinates.
    """
    check_params(params, param_shapes(guide, arguments))
    has_density = _check_sites(guide, source, arguments)
    x, log_density = _draw_sites(AsRead(guide), params, source, arguments, rng_key, num_samples)
    finite = np.isfinite(np.asarray(x)).all(-1)
    if not finite.all():
        raise ValueError(
            f"from_guide: expected draws inside the supports of the model's sites, got {(~finite).sum()} of "
            f"{num_samples} on the boundary, outside or not finite; give the guide's sites distributions of the "
            "same supports (LogNormal for positive sites, TransformedDistribution with biject_to(support))."
        )
    return GuideDraws(x, log_density if has_density else None)


def batch_size(num_samples: int, most: int = 256) -> int:
    """How many draws to handle at once: memory for the sites of `most` of them, not of all.

    Args:
        num_samples: number of draws.
        most: the most at once.

    Returns:
        The size of equal batches, so that no remainder needs a program of its own.
    """
    return math.ceil(num_samples / math.ceil(num_samples / most))


def sorted_order(guide: AutoContinuous) -> np.ndarray:
    """Where the coordinates of the flat vector of `Loss` stand in the guide's own latent vector.

    NumPyro orders its vector by the model's sites, or by name if the guide was set up under `jax.jit`.

    Args:
        guide: a guide whose prototype is set up.

    Returns:
        Indices, `(dim,)`.
    """
    # Through NumPy: under a trace jnp.arange would be no constant.
    parts = guide._unpack_latent(np.arange(guide.latent_dim))  # noqa: SLF001
    return np.concatenate([np.ravel(parts[name]) for name in sorted(parts)])


def param_shapes(fn: Callable[..., Any], arguments: Partition = NO_ARGUMENTS) -> dict[str, Any]:
    """Shapes of the `param` sites of a guide at their starting values, from an abstract run.

    Args:
        fn: the guide, or the part of it that has its parameters.
        arguments: `(args, kwargs)`.

    Returns:
        The shapes of the arrays of each site by name.

    Raises:
        ValueError: if the guide has mutable sites.
    """
    trace = _abstract_trace(fn, arguments, lambda site: jax.tree.map(jnp.shape, site["value"]))
    mutable = sorted(name for name, (kind, _) in trace.items() if kind == "mutable")
    if mutable:
        raise ValueError(
            f"from_guide: expected a guide without mutable state, got the mutable sites {mutable}; freeze "
            "them in the guide."
        )
    return {name: shapes for name, (kind, shapes) in trace.items() if kind == "param"}


def check_params(params: Any, shapes: dict[str, Any]) -> None:
    """Refuses params that are not those of the guide.

    Args:
        params: what the user gave.
        shapes: from `param_shapes`.

    Raises:
        TypeError: if they are no dictionary.
        ValueError: if names are missing, shapes differ, or values are not finite.
    """
    remedy = "pass svi.get_params(state), or the params of what svi.run returned, of this guide"
    if not isinstance(params, dict):
        raise TypeError(
            f"from_guide: expected params as a dict, got {type(params).__name__}; {remedy}."
        )
    missing = sorted(set(shapes) - set(params))
    if missing:
        raise ValueError(
            f"from_guide: expected params {sorted(shapes)}, got {sorted(params)}, without {missing}; {remedy}."
        )
    for name, expected in shapes.items():
        found = jax.tree.map(jnp.shape, params[name])
        if _flat_shapes(found) != _flat_shapes(expected):
            raise ValueError(
                f"from_guide: expected params[{name!r}] of shape {expected}, got {found}; {remedy}, and set the "
                "guide up with data of the same size."
            )
        leaves = jax.tree.leaves(params[name])
        if is_concrete(leaves) and not all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves):
            raise ValueError(
                f"from_guide: expected finite params, got NaN or infinity in {name!r}; train again with a "
                "smaller step size, or with SVI.run(..., stable_update=True)."
            )


def _latent_site(guide: AutoContinuous) -> Callable[[], Any]:
    return lambda: numpyro.deterministic(_LATENT, guide._sample_latent())  # noqa: SLF001


@partial(jax.jit, static_argnames=("guide", "num_samples"))
@own_settings
def _draw_latents(
    guide: AutoContinuous, params: dict, rng_key: Key, num_samples: int
) -> tuple[Array, Array]:
    order = sorted_order(guide)

    def draw(key: Key) -> tuple[Array, Array]:
        with handlers.block():
            seeded = handlers.seed(_latent_site(guide), key)
            log_probs, trace = compute_log_probs(seeded, (), {}, params)
        return trace[_LATENT]["value"][order], sum(log_probs.values(), start=jnp.zeros(()))

    return lax.map(draw, split(rng_key, num_samples), batch_size=batch_size(num_samples))


@partial(jax.jit, static_argnames=("guide", "num_samples"))
@own_settings
def _draw_sites(
    guide: Callable[..., Any],
    params: dict,
    source: ModelSource,
    arguments: Partition,
    rng_key: Key,
    num_samples: int,
) -> tuple[Array, Array]:
    args, kwargs = arguments.tree

    def draw(key: Key) -> tuple[Array, Array]:
        with handlers.block():
            log_probs, trace = compute_log_probs(handlers.seed(guide, key), args, kwargs, params)
        values = {name: trace[name]["value"] for name in source.names}
        x, log_jacobian = source.unconstrain_with_jacobian(values, args, kwargs)
        return x, sum(log_probs.values(), start=log_jacobian)

    return lax.map(draw, split(rng_key, num_samples), batch_size=batch_size(num_samples))


def _flat_shapes(tree: Any) -> list[tuple[int, ...]]:
    return jax.tree.leaves(tree, is_leaf=_is_shape)


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(size, int) for size in node)


def _abstract_trace(
    fn: Callable[..., Any], arguments: Partition, describe: Callable[[dict], Any]
) -> dict[str, tuple[str, Any]]:
    found: dict[str, tuple[str, Any]] = {}

    def record(arguments: Partition) -> None:
        args, kwargs = arguments.tree
        with handlers.block():
            trace = handlers.trace(handlers.seed(fn, 0)).get_trace(*args, **kwargs)
        found.update({name: (site["type"], describe(site)) for name, site in trace.items()})

    jax.eval_shape(record, arguments)
    return found


class _Sampled(NamedTuple):
    shape: tuple[int, ...]
    is_observed: bool
    is_delta: bool
    is_discrete: bool


def _describe(site: dict[str, Any]) -> _Sampled | None:
    if site["type"] != "sample":
        return None
    base = site["fn"]
    while isinstance(base, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        base = base.base_dist
    observed = site["is_observed"]
    discrete = not observed and site["fn"].support.is_discrete
    return _Sampled(jnp.shape(site["value"]), observed, isinstance(base, dist.Delta), discrete)


def _check_sites(guide: Callable[..., Any], source: ModelSource, arguments: Partition) -> bool:
    # Whether the product of the sites' densities is the density of the parameters.
    trace = _abstract_trace(guide, arguments, _describe)
    sampled = {name: site for name, (_, site) in trace.items() if site is not None}
    missing = [name for name in source.names if name not in sampled]
    if missing:
        raise ValueError(
            f"from_guide: expected a guide with the latent sites of the loss, {list(source.names)}, got one "
            f"without {missing}; use a guide and a loss of the same model."
        )

    def shape(arguments: Partition) -> Array:
        values = {name: jnp.zeros(sampled[name].shape) for name in source.names}
        return source.unconstrain_with_jacobian(values, *arguments.tree)[0]

    jax.eval_shape(shape, arguments)
    points = [name for name in source.names if sampled[name].is_delta]
    auxiliary = [
        site for name, site in sampled.items() if name not in source.names and not site.is_observed
    ]
    if points and not auxiliary:
        raise TypeError(
            f"from_guide: expected a guide with a density, got points (Delta) at {points}, which have no "
            "covariance; give these sites a distribution, or use AutoLaplaceApproximation."
        )
    if not auxiliary:
        return True
    # A joint draw of which all sites are functions, one to one, as AutoContinuous emits it.
    size = sum(math.prod(site.shape) for site in auxiliary)
    discrete = any(site.is_discrete for site in auxiliary)
    return len(points) == len(source.names) and size == source.dim and not discrete
