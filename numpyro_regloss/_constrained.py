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

from numpyro_regloss._pytree import is_concrete
from numpyro_regloss._typing import Array

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
            supports[site["name"]] = getattr(site["fn"], "support", None)

    # Handlers are global: without the block an outer model would count the user's sites again.
    with handlers.block():
        seen = handlers.substitute(handlers.seed(model, 0), substitute_fn=note)
        values = constrain_fn(seen, args, kwargs, unconstrained, return_deterministic=True)
    groups: dict[Any, list[str]] = {}
    for name, array in unconstrained.items():
        kind = _kind(supports.get(name))
        if kind is not None and jnp.shape(values[name]) == jnp.shape(array):
            groups.setdefault((kind, jnp.result_type(array)), []).append(name)
    for names in groups.values():
        if len(names) > 1:
            values |= _together(supports[names[0]], {name: unconstrained[name] for name in names})
    return values


def _kind(support: Any) -> Any:
    # Bounds that are arrays, or follow other sites, are the site's own.
    leaves = jax.tree.leaves(support)
    if support is None or support.event_dim or not is_concrete(leaves):
        return None
    if any(np.size(leaf) != 1 for leaf in leaves):
        return None
    return jax.tree.structure(support), tuple(float(np.reshape(leaf, ())) for leaf in leaves)


def _together(support: Any, arrays: dict[str, Array]) -> dict[str, Array]:
    transform = biject_to(support)
    flat = transform(jnp.concatenate([jnp.reshape(a, -1) for a in arrays.values()]))
    found, start = {}, 0
    for name, array in arrays.items():
        stop = start + jnp.size(array)
        found[name] = flat[start:stop].reshape(jnp.shape(array))
        start = stop
    return found
