# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Draws as labelled datasets: constrained by site, flat, and the statistics of each draw."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

from numpyro_regloss._core.pytree import Partition
from numpyro_regloss._core.types import Array
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.draws.resampling import equal_weights
from numpyro_regloss.io_arviz.labels import Labels
from numpyro_regloss.io_arviz.per_draw import per_draw
from numpyro_regloss.losses.function import FunctionSource
from numpyro_regloss.losses.loss import Loss

__all__ = ["by_draw", "check_draws", "draw_groups", "flat_dataset", "plain", "position_groups"]


def plain(values: Any) -> np.ndarray:
    """An array of a type that files have: floats of fewer than 32 bits become single precision."""
    array = np.asarray(values)
    if jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4:
        array = array.astype(np.float32)
    return array


def check_draws(draws: Any, loss: Loss) -> None:
    """Refuses what cannot be shown as draws.

    Args:
        draws: of an engine.
        loss: whose parameters they should be.

    Raises:
        TypeError: if they are of the wrong kind.
        ValueError: if they are means of draws, or of another loss.
    """
    if not isinstance(draws, Draws):
        raise TypeError(
            f"to_arviz: expected draws as an engine makes them, got {type(draws).__name__}; use "
            "optimizer.draw(rng_key, result.state)."
        )
    if draws.spread is not None:
        raise ValueError(
            "to_arviz: expected draws, got means of batches of them, which are too narrow to be shown in their "
            'place; run with shift.SGLD(..., keep="draws"), or give draws=... of another engine at '
            "result.state.reference, or use gaussian_to_arviz."
        )
    if jnp.shape(draws.x) != (*np.shape(draws.log_weight), loss.dim):
        raise ValueError(
            f"to_arviz: expected draws of {loss.dim} parameters, got x of shape {jnp.shape(draws.x)}."
        )


def draw_groups(
    draws: Draws, loss: Loss, arguments: Partition, labels: Labels
) -> tuple[dict[str, Any], bool]:
    """The groups that show draws: `posterior`, `unconstrained_posterior`, `sample_stats`.

    Args:
        draws: as an engine made them.
        loss: whose parameters they are.
        arguments: of the loss.
        labels: of its sites.

    Returns:
        Datasets by group, and whether draws were resampled to equal weights.
    """
    log_weight = np.asarray(draws.log_weight)
    index, resampled = equal_weights(log_weight)
    x, losses = np.asarray(draws.x), np.asarray(draws.loss)

    def pick(values: Any) -> np.ndarray:
        values = np.asarray(values)
        return values.reshape(-1, *values.shape[2:])[index]

    stats = {name: pick(a) for name, a in (draws.stats or {}).items()}
    stats["loss"] = pick(losses)
    if resampled:
        stats["log_weight"] = pick(log_weight - logsumexp(log_weight.astype(float))).astype(x.dtype)
        stats["draw_index"] = index
    groups = position_groups(pick(x), loss, arguments, labels)
    groups["sample_stats"] = by_draw({name: (a, ()) for name, a in stats.items()}, {})
    return groups, resampled


def position_groups(
    x: np.ndarray, loss: Loss, arguments: Partition, labels: Labels
) -> dict[str, Any]:
    """Flat positions as `posterior`, constrained and by site, and as `unconstrained_posterior`.

    Args:
        x: `(chain, draw, dim)`.
        loss: whose parameters they are.
        arguments: of the loss.
        labels: of its sites.

    Returns:
        Datasets by group.
    """
    values = _sites_of(x, loss, arguments, labels)
    drawn = {site.variable: (plain(values[site.site]), site.dims) for site in labels.drawn}
    posterior = by_draw(drawn, labels.coords_of(labels.drawn))
    for site in labels.drawn:
        # Of the dataset itself, every look at one variable goes through all dimensions.
        posterior.variables[site.variable].attrs.update(site=site.site, kind=site.kind)
    return {"posterior": posterior, "unconstrained_posterior": flat_dataset(x, labels)}


def flat_dataset(x: np.ndarray, labels: Labels, **lead: Any) -> Any:
    """Flat positions `x` with one coordinate value per parameter.

    Args:
        x: `(*lead, chain, draw, dim)`.
        labels: of the parameters.
        **lead: coordinates of the leading axes, in order.

    Returns:
        A dataset of one variable.
    """
    return by_draw({"x": (plain(x), ("param",))}, {"param": labels.flat}, tuple(lead), lead)


def by_draw(
    variables: dict[str, tuple[np.ndarray, tuple[str, ...]]],
    coords: dict[str, np.ndarray],
    lead: tuple[str, ...] = (),
    lead_coords: dict[str, Any] | None = None,
) -> Any:
    """Variables with the axes chain and draw.

    Args:
        variables: `(*lead, chain, draw, ...)` and the names of the axes after draw, by name.
        coords: coordinates of these axes.
        lead: names of the axes before chain.
        lead_coords: their coordinates.

    Returns:
        A dataset.
    """
    import xarray as xr  # noqa: PLC0415

    dims = (*lead, "chain", "draw")
    sizes = next(iter(variables.values()))[0].shape[len(lead) :]
    axes = {"chain": np.arange(sizes[0]), "draw": np.arange(sizes[1])}
    return xr.Dataset(
        {name: ((*dims, *own), values) for name, (values, own) in variables.items()},
        coords={**(lead_coords or {}), **axes, **coords},
    )


def _sites_of(
    x: np.ndarray, loss: Loss, arguments: Partition, labels: Labels
) -> dict[str, np.ndarray]:
    if not isinstance(loss.source, FunctionSource):
        names = tuple(site.site for site in labels.drawn)
        return per_draw(_named, names, loss, arguments, x)
    values, start = {}, 0
    for site in labels.sites:
        stop = start + int(np.prod(site.shape))
        values[site.site] = x[..., start:stop].reshape(*x.shape[:2], *site.shape)
        start = stop
    return values


def _named(names: tuple[str, ...], loss: Loss, arguments: Partition, x: Array) -> dict[str, Array]:
    sites = loss.named_sites(x, arguments)
    return {name: sites[name] for name in names}
