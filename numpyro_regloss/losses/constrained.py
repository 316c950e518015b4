# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The sites of a NumPyro model at a point, constrained, in programs that many sites do not make long."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.util import constrain_fn

from numpyro_regloss._core.foreign import attribute
from numpyro_regloss._core.pytree import is_concrete
from numpyro_regloss._core.types import Array

__all__ = ["constrained"]


def constrained(
    model: Callable[..., Any], args: tuple, kwargs: dict, unconstrained: dict[str, Array]
) -> dict[str, Array]:
    """Latent sites in their supports, and the model's deterministic sites.

    Sites that are transformed element by element and in the same way, whatever the other sites, are
    transformed together: compilation takes as long for one of them as for all.

    Args:
        model: the model.
        args: its arguments.
        kwargs: its keyword arguments.
        unconstrained: values of the latent sites by name.

    Returns:
        Values by name.
    """
    supports: dict[str, Any] = {}

    def note(site: dict[str, Any]) -> None:
        # A site within a scan is met once, with the support of one step.
        if site["type"] == "sample" and "_scan_current_index" not in (site["infer"] or {}):
            supports[site["name"]] = attribute(site["fn"], "support")

    # Handlers are global: without the block an outer model would count the user's sites again.
    with handlers.block():
        seen = handlers.substitute(handlers.seed(model, 0), substitute_fn=note)
        values = constrain_fn(seen, args, kwargs, unconstrained, return_deterministic=True)
    kinds: dict[Any, list[str]] = {}
    for name, array in unconstrained.items():
        kind = _kind(supports.get(name))
        if kind is not None and jnp.shape(values[name]) == jnp.shape(array):
            kinds.setdefault(kind, []).append(name)
    groups = [names for names in kinds.values() if len(names) > 1]
    return values | _together(supports, groups, unconstrained) if groups else values


def _kind(support: Any) -> Any:
    # Bounds that are arrays, or follow other sites, are the site's own.
    leaves = jax.tree.leaves(support)
    if support is None or support.event_dim or not is_concrete(leaves):
        return None
    if any(np.size(leaf) != 1 for leaf in leaves):
        return None
    return jax.tree.structure(support), tuple(float(np.reshape(leaf, ())) for leaf in leaves)


def _together(
    supports: dict[str, Any], groups: list[list[str]], arrays: dict[str, Array]
) -> dict[str, Array]:
    # Picked and put back by their places: XLA would compile a slice of each site into all that follows.
    ends = np.cumsum([np.size(array) for array in arrays.values()])
    places = {
        name: np.arange(end - np.size(array), end)
        for (name, array), end in zip(arrays.items(), ends, strict=True)
    }
    flat = jnp.concatenate([jnp.reshape(array, -1) for array in arrays.values()])
    for names in groups:
        index = np.concatenate([places[name] for name in names])
        flat = flat.at[index].set(biject_to(supports[names[0]])(flat[index]))
    return {
        name: flat[places[name][0] : places[name][-1] + 1].reshape(jnp.shape(arrays[name]))
        for names in groups
        for name in names
        if places[name].size
    }
