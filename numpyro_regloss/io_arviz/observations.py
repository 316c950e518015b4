# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What draws say of the data, per observed site: log-likelihoods of the observations, and predictions of them.

Factors of a model (`numpyro.factor`) are no observations and are left out.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.infer import log_likelihood
from numpyro.primitives import Messenger

from numpyro_regloss._core.pytree import Partition
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.io_arviz.draws import by_draw, plain
from numpyro_regloss.io_arviz.labels import Labels, SiteLabel, label_sites, observed_values
from numpyro_regloss.io_arviz.per_draw import per_draw
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.numpyro_model import ModelSource
from numpyro_regloss.losses.replicas import single

__all__ = ["label_all", "observation_groups"]

OF_LIKELIHOOD = (
    "log-likelihood of each observation at the draws of the group posterior, which are not of the model's "
    "posterior: what az.loo makes of it is the predictive accuracy of these draws"
)
OF_REPLICAS = "; each replica has its own: select one before az.loo"
OF_HIDDEN = (
    "; some terms of {} are zero at all draws, as where a mask hides an observation: leave them out before az.loo "
    "(isel), which would count them, or refuse them"
)
OF_PREDICTIONS = (
    "new observations at the draws of the group posterior, which are not of the model's posterior"
)


def label_all(
    loss: Loss,
    arguments: Partition,
    what: str,
    *,
    compared: bool,
    observed: bool = False,
    **options: Any,
) -> Labels:
    """Labels what a loss has, and refuses what cannot be compared with data.

    Args:
        loss: the loss.
        arguments: its arguments.
        what: begins error messages.
        compared: whether `observation_groups` needs the labels.
        observed: whether to label observed sites in any case.
        **options: see `label_sites`.

    Returns:
        The labels.

    Raises:
        ValueError: if the loss is a function, or a model without observed sites, and they are needed; if labels do
            not fit.
    """
    needs = f"{what}: expected %s for log_likelihood=True or posterior_predictive=True, got %s"
    is_model = isinstance(single(loss)[0].source, ModelSource)
    if compared and not is_model:
        raise ValueError(
            needs % ("a loss from a NumPyro model", "one from a function, which has no observed")
            + " sites; leave them out, or write the loss as a model and use Loss.from_model."
        )
    labels = label_sites(loss, arguments, what, observed=observed or compared, **options)
    if compared and not _observed(labels):
        raise ValueError(
            needs % ("a model with observed sites", "none (a numpyro.factor is no observation)")
            + "; write the likelihood as numpyro.sample(..., obs=y)."
        )
    return labels


def observation_groups(
    x: np.ndarray,
    loss: Loss,
    arguments: Partition,
    labels: Labels,
    what: str,
    *,
    likelihood: bool,
    rng_key: Key | None,
) -> dict[str, Any]:
    """The groups that ArviZ compares with data.

    Args:
        x: draws, `(chain, draw, dim)`.
        loss: of a model.
        arguments: of the loss: all data, whatever its minibatch.
        labels: of its sites, observed ones too.
        what: begins error messages.
        likelihood: whether to make `log_likelihood`.
        rng_key: for `posterior_predictive`; None to leave it out.

    Returns:
        Datasets by group; `observed_data` among them.

    Raises:
        ValueError: if a distribution of observations cannot be drawn from.
    """
    sites = _observed(labels)
    names = tuple(site.site for site in sites)
    replicas = () if single(loss)[1] is None else ("replica",)
    groups = {}
    if likelihood:
        values = per_draw(_log_likelihoods, names, loss, arguments, x)
        groups["log_likelihood"] = _dataset(values, sites, labels, replicas)
        about = OF_LIKELIHOOD + (OF_REPLICAS if replicas else "")
        hidden = [s.variable for s in sites if np.any(np.all(values[s.site] == 0, axis=(0, 1)))]
        about += OF_HIDDEN.format(", ".join(hidden)) if hidden else ""
        groups["log_likelihood"].attrs["description"] = about
    if rng_key is not None:
        try:
            values = per_draw(_predictions, names, loss, arguments, x, rng_key)
        except NotImplementedError as error:
            raise ValueError(
                f"{what}: expected observed sites whose distributions can be drawn from for "
                f"posterior_predictive=True, got one of {list(names)} that cannot; leave it out."
            ) from error
        groups["posterior_predictive"] = _dataset(values, sites, labels, replicas)
        groups["posterior_predictive"].attrs["description"] = OF_PREDICTIONS
    groups["observed_data"] = _data(loss, arguments, labels, sites)
    return groups


def _observed(labels: Labels) -> list[SiteLabel]:
    return [site for site in labels.sites if site.kind == "observed" and 0 not in site.shape]


def _dataset(
    values: dict[str, np.ndarray],
    sites: list[SiteLabel],
    labels: Labels,
    replicas: tuple[str, ...],
) -> Any:
    variables = {}
    for site in sites:
        array = plain(values[site.site])
        shape = array.shape[2 + len(replicas) :]
        # Likelihoods have no event axes; of an observation that many terms share, no axis has a name.
        fits = shape == site.shape[: len(shape)]
        own = [f"{site.variable}_dim_{axis}" for axis in range(len(shape))]
        variables[site.variable] = (array, (*replicas, *(site.dims if fits else own)[: len(shape)]))
    sizes = {
        dim: size
        for array, dims in variables.values()
        for dim, size in zip(dims, array.shape[2:], strict=True)
    }
    known = labels.coords
    coords = {dim: known[dim] for dim, size in sizes.items() if len(known.get(dim, ())) == size}
    return by_draw(variables, coords)


def _data(loss: Loss, arguments: Partition, labels: Labels, sites: list[SiteLabel]) -> Any:
    import xarray as xr  # noqa: PLC0415

    values = observed_values(loss, arguments)
    variables = {site.variable: (site.dims, plain(values[site.site])) for site in sites}
    return xr.Dataset(variables, coords=labels.coords_of(sites))


def _log_likelihoods(
    names: tuple[str, ...], loss: Loss, arguments: Partition, x: Array
) -> dict[str, Array]:
    args, kwargs = arguments.tree

    def of_one(loss: Loss, x: Array) -> dict[str, Array]:
        with handlers.block():
            model: Any = handlers.seed(loss.source.model, 0)  # ty: ignore
            latent = _latent(loss, arguments, x)
            # The model's own keywords may have the names of those of log_likelihood.
            terms = log_likelihood(lambda: model(*args, **kwargs), latent, batch_ndims=0)
        return {name: terms[name] for name in names}

    return _of_replicas(of_one, loss, x)


def _predictions(
    names: tuple[str, ...], loss: Loss, arguments: Partition, x: Array, rng_key: Key
) -> dict[str, Array]:
    args, kwargs = arguments.tree

    def of_one(loss: Loss, x: Array, rng_key: Key) -> dict[str, Array]:
        with handlers.block():
            model = handlers.uncondition(_AsObserved(loss.source.model))  # ty: ignore
            model = handlers.substitute(model, data=_latent(loss, arguments, x))
            trace = handlers.trace(handlers.seed(model, rng_key)).get_trace(*args, **kwargs)
        return {name: trace[name]["value"] for name in names}

    return _of_replicas(of_one, loss, x, rng_key)


class _AsObserved(Messenger):
    """As many independent terms at an observed site as the data have: NumPyro would draw one for all of them."""

    def process_message(self, msg: dict[str, Any]) -> None:
        """For NumPyro."""
        if msg["type"] != "sample" or not msg["is_observed"] or isinstance(msg["fn"], dist.Unit):
            return
        fn, shape = msg["fn"], jnp.shape(msg["value"])
        terms = jnp.broadcast_shapes(fn.batch_shape, shape[: len(shape) - fn.event_dim])
        if terms != fn.batch_shape:
            msg["fn"] = fn.expand(terms)


def _latent(loss: Loss, arguments: Partition, x: Array) -> dict[str, Array]:
    sites = loss.named_sites(x, arguments)
    return {name: sites[name] for name in loss.names}


def _of_replicas(fn: Any, loss: Loss, x: Array, *keys: Key) -> dict[str, Array]:
    one, num_replicas = single(loss)
    if num_replicas is None:
        return fn(one, x, *keys)
    own = (jax.random.split(key, num_replicas) for key in keys)
    return jax.vmap(lambda *point: fn(one, *point))(x.reshape(num_replicas, -1), *own)
