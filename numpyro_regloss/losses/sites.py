# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Sites by name as one flat vector, in a given order, and the labels of its entries."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from numpyro_regloss._core.types import Array

__all__ = [
    "UNCONSTRAINED",
    "Site",
    "check_sites",
    "flat_labels",
    "kept_values",
    "ravel_sites",
    "unconstrained_labels",
    "unique_names",
]

# Ends the label of a flat parameter whose site has other values.
UNCONSTRAINED = " (unconstrained)"
# Where values are compared: off the fixed points of transforms, which lie at round numbers.
OFF_CENTER = 0.3125


class Site(NamedTuple):
    """Name and (unconstrained) shape of one site."""

    name: str
    shape: tuple[int, ...]


def check_sites(sites: dict[str, Any], needed: set[str], known: set[str]) -> None:
    """Refuses sites that are missing or that nobody knows.

    Args:
        sites: values by name.
        needed: names that must be there.
        known: names that may be there.

    Raises:
        ValueError: if they do not fit.
    """
    missing, unknown = needed - set(sites), set(sites) - known
    if missing or unknown:
        raise ValueError(
            f"Loss: expected values of the sites {sorted(needed)}, got {sorted(sites)}"
            + (f"; missing {sorted(missing)}" if missing else "")
            + (f"; unknown {sorted(unknown)}" if unknown else "")
            + "."
        )


def ravel_sites(sites: dict[str, Any], order: tuple[Any, ...]) -> Array:
    """One flat vector of sites by name.

    Args:
        sites: values by name.
        order: name and shape of every site, in order.

    Returns:
        `(dim,)`.

    Raises:
        ValueError: if a shape is another one.
    """
    for site in order:
        if np.shape(sites[site.name]) != site.shape:
            raise ValueError(
                f"Loss: expected the site {site.name!r} of shape {site.shape}, got "
                f"{np.shape(sites[site.name])}."
            )
    return jnp.concatenate([jnp.asarray(sites[s.name], float).reshape(-1) for s in order])


def flat_labels(order: tuple[Any, ...]) -> tuple[str, ...]:
    """One label per flat parameter: `site`, or `site[i,j]`, from names and shapes; all of them different."""
    labels = []
    for site in order:
        indices = [f"[{','.join(map(str, index))}]" for index in np.ndindex(*site.shape)]
        labels += [site.name + index if site.shape else site.name for index in indices]
    return unique_names(labels)


def unconstrained_labels(loss: Any) -> tuple[str, ...]:
    """The labels `flat_names` of a loss, which say so where a model's sites have other values.

    Args:
        loss: a `Loss`.

    Returns:
        Labels, such as `tau (unconstrained)` for the logarithm of `tau`.
    """
    kept = loss.source.keeps_values(loss.x0 + OFF_CENTER, *loss.arguments.tree)
    return tuple(
        name if same else f"{name}{UNCONSTRAINED}"
        for name, same in zip(loss.flat_names, kept, strict=True)
    )


def kept_values(x: Array, sites: dict[str, Any], order: tuple[Site, ...]) -> np.ndarray:
    """Which flat parameters have the values that constrained sites have under the same label.

    Args:
        x: `(dim,)`, unconstrained.
        sites: constrained values by name.
        order: name and unconstrained shape of every site, in order.

    Returns:
        `(dim,)` booleans.
    """
    constrained = tuple(Site(site.name, jnp.shape(sites[site.name])) for site in order)
    values = np.concatenate([np.ravel(sites[site.name]) for site in order])
    shown = dict(zip(flat_labels(constrained), values, strict=True))
    labels = zip(flat_labels(order), np.asarray(x), strict=True)
    return np.array([shown.get(label) == value for label, value in labels])


def unique_names(names: Sequence[str], longer: Sequence[str] | None = None) -> tuple[str, ...]:
    """The same names, of which those that occur more than once are told apart.

    Args:
        names: in order.
        longer: what each is called if it is not the only one. Default: the same.

    Returns:
        Names that all differ; those that still do not get underscores at the end.
    """
    counts = Counter(names)
    taken = {name for name, count in counts.items() if count == 1}
    unique = []
    for name, other in zip(names, longer or names, strict=True):
        chosen = name
        if counts[name] > 1:
            chosen = other
            while chosen in taken:
                chosen += "_"
            taken.add(chosen)
        unique.append(chosen)
    return tuple(unique)
