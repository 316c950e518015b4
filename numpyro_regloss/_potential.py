# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The potential energy of a NumPyro model of many sites, in a program that they do not make long.

NumPyro adds the log probability of one site after the other. Here sites of one kind (the same distribution,
parameters and values of the same shapes) are one batch, so that XLA compiles one of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.infer.util import _unconstrain_params

from numpyro_regloss._typing import Array

__all__ = ["batched_potential_energy"]


def batched_potential_energy(
    model: Callable[..., Any], args: tuple, kwargs: dict, unconstrained: dict[str, Array]
) -> Array:
    """What `numpyro.infer.util.potential_energy` computes.

    Args:
        model: the model, seeded.
        args: its arguments.
        kwargs: its keyword arguments.
        unconstrained: values of the latent sites by name.

    Returns:
        Minus the log density in unconstrained coordinates.
    """
    # The handler emits the Jacobians of the constraints as factors.
    trace = handlers.trace(_unconstrain_params(model, unconstrained)).get_trace(*args, **kwargs)
    groups: dict[Any, list[Any]] = {}
    total = jnp.zeros(())
    for site in trace.values():
        if site["type"] != "sample":
            continue
        if site["intermediates"] or site["scale"] is not None or not _can_be_stacked(site["fn"]):
            total = total + _log_prob(site)
            continue
        leaves, structure = jax.tree.flatten(site["fn"])
        member = [*leaves, site["value"]]
        shapes = tuple((jnp.shape(a), jnp.result_type(a)) for a in member)
        groups.setdefault((structure, shapes), []).append(member)
    for (structure, _), members in groups.items():

        def of_one(member: list[Array], structure: Any = structure) -> Array:
            *leaves, value = member
            return jnp.sum(jax.tree.unflatten(structure, leaves).log_prob(value))

        stacked = [jnp.stack(parts) for parts in zip(*members, strict=True)]
        total = total + jnp.sum(jax.vmap(of_one)(stacked))
    return -total


def _can_be_stacked(fn: Any) -> bool:
    # Distributions of users may keep more than their leaves, and so may what is made of several.
    while fn is not None:
        own = type(fn).__module__.startswith("numpyro.distributions.")
        if not own or hasattr(fn, "component_distributions"):
            return False
        fn = getattr(fn, "base_dist", None)
    return True


def _log_prob(site: dict[str, Any]) -> Array:
    extra = (site["intermediates"],) if site["intermediates"] else ()
    log_prob = site["fn"].log_prob(site["value"], *extra)
    return jnp.sum(log_prob if site["scale"] is None else site["scale"] * log_prob)
