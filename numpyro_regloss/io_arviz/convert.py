# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Runs and fitted Gaussians as what ArviZ works with: `DataTree` under ArviZ 1.x, `InferenceData` under 0.23.

Groups of a run:

- `posterior`: constrained draws of the shifted density q at the last reference, by site. This is the posterior
  *times a Gaussian*, which is not the model's posterior.
- `unconstrained_posterior`: the same draws, flat, as the engines see them: `x` (chain, draw, param).
- `sample_stats`: the loss of each draw, the statistics of a sampler by ArviZ's names, and of weighted draws,
  which are resampled, their log weights.
- `shift_posterior`: `x` (iteration, chain, draw, param) at a few steps, so that `az.ess` and `az.rhat` of it
  have one value per step.
- `optimization`: the history, by (iteration[, param]).
- `constant_data`: the start, tau, and the observed values if asked for.
- `log_likelihood`, `posterior_predictive`, `observed_data`, if asked for: per observed site of a NumPyro model.

References: Kumar, Carroll, Hartikainen & Martin (2019), "ArviZ: a unified library for exploratory analysis of
Bayesian models in Python".
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import jax
import numpy as np
import numpyro

from numpyro_regloss._core.checks import check_count, check_key
from numpyro_regloss._core.pytree import Partition, fields_of, with_context_axes
from numpyro_regloss._core.types import Key
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.gaussians.gaussian import AnyGaussian, check_gaussian
from numpyro_regloss.io_arviz.draws import check_draws, draw_groups, plain, position_groups
from numpyro_regloss.io_arviz.history import history_dataset, iterations
from numpyro_regloss.io_arviz.labels import Labels, observed_values
from numpyro_regloss.io_arviz.observations import label_all, observation_groups
from numpyro_regloss.io_arviz.steps import choose_steps, step_dataset
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.numpyro_model import ModelSource
from numpyro_regloss.losses.replicas import single
from numpyro_regloss.two_step import outer_step
from numpyro_regloss.two_step.optimizer import TwoStep
from numpyro_regloss.two_step.result import TwoStepResult

__all__ = ["gaussian_to_arviz", "to_arviz", "wrap"]

OF_RUN = (
    "posterior holds draws of the shifted density q, which is proportional to exp(-loss / temperature) times the "
    "reference, a Gaussian about the last centre: not the model's posterior"
)
OF_GAUSSIAN = (
    "posterior holds independent draws of a fitted Gaussian, constrained: not the model's posterior"
)
OF_NOTHING = (
    "there are no draws: this engine makes none; gaussian_to_arviz shows the fitted Gaussian, and draws=... those "
    "of another engine"
)


def to_arviz(
    result: TwoStepResult,
    optimizer: TwoStep,
    *args: Any,
    draws: Draws | None = None,
    step_draws: bool | Sequence[int] | None = None,
    rng_key: Key | None = None,
    deterministic: bool = False,
    observed: bool = False,
    log_likelihood: bool = False,
    posterior_predictive: bool = False,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    rename: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> Any:
    """A run as labelled datasets, for `az.summary`, `az.plot_trace` and the rest of ArviZ.

    Sites have the names, plates and coordinates of the NumPyro model, parameters of a function the paths of
    their pytree, with "." for "/" (which files do not allow in names). Sites without elements are left out of
    the draws. Weighted draws are resampled to equal weights, with copies next to each other. Draws of one chain
    have no R-hat, and the chains of an ensemble kernel are batches of time. For an engine without draws
    (`shift.Implicit`) there are only the groups `optimization` and `constant_data`.

    Args:
        result: of `optimizer.run`.
        optimizer: what ran.
        *args: arguments of the loss in place of the bound ones, as they were given to `run`.
        draws: draws to show, such as those of `optimizer.draw`. Default: new ones at the last reference.
        step_draws: steps for which the group `shift_posterior` shows draws, which are made anew: numbers of steps
            (from 0); True for ten of them; False for none. Each takes as long as the draws of an outer step,
            including the warm-up of an engine that has one. Default: ten, but none where `draws` are given or
            where they would be more than two million numbers.
        rng_key: for the default of `draws`, and for `posterior_predictive`; default: that of the step which the
            run would do next.
        deterministic: whether to show the model's deterministic sites.
        observed: whether to put its observed values into `constant_data`.
        log_likelihood: whether to show the log-likelihood of each observation at each draw, per observed site and
            on all data, as `az.loo` needs it. The draws are those of q, and so is the estimate of `az.loo`. A
            `numpyro.factor` is not an observation. Temperature, scale handlers and minibatches have no effect.
            Terms that a mask hides are zero, as in NumPyro. `az.loo` would count them or refuse them: leave them
            out first, as in `data["log_likelihood"]["y"].isel(row=seen)`.
        posterior_predictive: whether to show new observations, one set per draw, as `az.plot_ppc` (ArviZ 0.23) and
            `az.plot_ppc_dist` (1.x) want them: the model runs with its observed sites drawn, not observed.
            Quantities that the model computes from data arguments (the last value of a series) still come from the
            data.
        dims: names of all axes of a site, by site, over those that were found.
        coords: coordinate values by dimension; default: 0, 1, 2, ...
        rename: names of variables by site, for example if a site has the name of a dimension.
        **kwargs: keyword arguments of the loss over the bound ones.

    Returns:
        `xarray.DataTree` (ArviZ 1.x) or `arviz.InferenceData` (0.23).

    Raises:
        TypeError: if result, optimizer or draws are of the wrong kind.
        ValueError: if names clash, labels or draws do not fit, the engine kept means of draws instead of
            draws, or the loss has no observed sites, or no draws, where they are needed.

    Example:
        >>> import arviz as az
        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_regloss import schemes, shift
        >>> loss = Loss.from_function(lambda p: jnp.sum(p["weight"] ** 2), {"weight": jnp.ones(2)})
        >>> optimizer = schemes.local_entropy(loss, tau=0.5, shift=shift.Importance(200))
        >>> result = optimizer.run(random.key(0), 5, progress_bar=False)
        >>> data = to_arviz(result, optimizer, coords={"weight_dim_0": ["left", "right"]})
        >>> data["optimization"]["center"].dims
        ('iteration', 'param')
        >>> data["posterior"]["weight"].sel(weight_dim_0="left").dims
        ('chain', 'draw')
    """
    _check_run(result, optimizer)
    optimizer = outer_step.successor(optimizer, result.state)
    loss = optimizer.loss
    arguments = loss.bind(args, kwargs)
    labels = label_all(
        loss,
        arguments,
        "to_arviz",
        compared=log_likelihood or posterior_predictive,
        deterministic=deterministic,
        observed=observed,
        dims=dims,
        coords=coords,
        rename=rename,
    )
    given = draws is not None
    makes_draws = optimizer.shift.makes_draws
    if not makes_draws and step_draws is not None and step_draws is not False:
        raise ValueError(
            f"to_arviz: expected no step_draws of {type(optimizer.shift).__name__}, which makes no draws, got "
            f"{step_draws!r}; leave it out."
        )
    if (log_likelihood or posterior_predictive) and not (given or makes_draws):
        raise ValueError(
            f"to_arviz: expected draws for log_likelihood=True or posterior_predictive=True, got none of "
            f"{type(optimizer.shift).__name__}, which makes none; give draws=... of another engine at "
            "result.state.reference, or use gaussian_to_arviz."
        )
    key = outer_step.draw_key(result.state.rng_key, result.state.step)
    key = key if rng_key is None else check_key(rng_key, "to_arviz: rng_key")
    if not given and makes_draws:
        draws = optimizer.draw(None if rng_key is None else key, result.state, *args, **kwargs)
    attrs = _attributes(loss, labels) | _of_run(result, optimizer)
    groups: dict[str, Any] = {}
    if draws is not None:
        draws = with_context_axes(draws)
        check_draws(draws, loss)
        shown, resampled = draw_groups(draws, loss, arguments, labels)
        groups |= shown
        if log_likelihood or posterior_predictive:
            groups |= observation_groups(
                shown["unconstrained_posterior"]["x"].values,
                loss,
                arguments,
                labels,
                "to_arviz",
                likelihood=log_likelihood,
                rng_key=_predictive_key(key) if posterior_predictive else None,
            )
        attrs |= {"description": OF_RUN, "resampled": int(resampled)}
        if step_draws is None and given:
            step_draws = False
        steps = choose_steps(result, np.size(draws.log_weight) * loss.dim, step_draws)
        if steps:
            groups["shift_posterior"] = step_dataset(steps, result, optimizer, arguments, labels)
    else:
        attrs["description"] = OF_NOTHING
    groups["optimization"] = history_dataset(result, labels)
    groups["constant_data"] = _constant_data(result, loss, arguments, labels, observed=observed)
    return wrap(_with_attributes(groups, attrs), attrs)


def gaussian_to_arviz(
    rng_key: Key,
    gaussian: AnyGaussian,
    loss: Loss,
    num_samples: int = 1000,
    *,
    args: tuple = (),
    kwargs: dict | None = None,
    deterministic: bool = False,
    log_likelihood: bool = False,
    posterior_predictive: bool = False,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    rename: Mapping[str, str] | None = None,
) -> Any:
    """A fitted Gaussian as labelled datasets: independent draws, constrained, in one chain.

    Args:
        rng_key: a random key.
        gaussian: over the flat parameters of the loss, such as that of `forward_kl` or `reverse_kl`.
        loss: whose parameters these are.
        num_samples: draws.
        args: arguments of the loss in place of the bound ones.
        kwargs: keyword arguments over the bound ones.
        deterministic: see `to_arviz`.
        log_likelihood: see `to_arviz`.
        posterior_predictive: see `to_arviz`.
        dims: see `to_arviz`.
        coords: see `to_arviz`.
        rename: see `to_arviz`.

    Returns:
        `xarray.DataTree` (ArviZ 1.x) or `arviz.InferenceData` (0.23) with the groups `posterior` and
        `unconstrained_posterior`, and what was asked for. Its attribute `description` says that these are not
        draws of the posterior.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if the Gaussian is of another dimension, names clash, or the loss has no observed sites where
            they are needed.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_regloss import Gaussian
        >>> loss = Loss.from_function(lambda p: jnp.sum(p["weight"] ** 2), {"weight": jnp.ones(2)})
        >>> data = gaussian_to_arviz(random.key(0), Gaussian.isotropic(jnp.zeros(2), 0.5), loss)
        >>> data["posterior"]["weight"].shape
        (1, 1000, 2)
    """
    if not isinstance(loss, Loss):
        raise TypeError(
            f"gaussian_to_arviz: expected a Loss as third argument, got {type(loss).__name__}; it knows the names "
            "of the parameters."
        )
    rng_key = check_key(rng_key, "gaussian_to_arviz")
    gaussian = check_gaussian(gaussian, loss.dim, "gaussian_to_arviz")
    check_count(num_samples, "gaussian_to_arviz: num_samples")
    arguments = loss.bind(args, kwargs)
    labels = label_all(
        loss,
        arguments,
        "gaussian_to_arviz",
        compared=log_likelihood or posterior_predictive,
        deterministic=deterministic,
        dims=dims,
        coords=coords,
        rename=rename,
    )
    x = np.asarray(gaussian.sample(rng_key, (1, num_samples)))
    groups = position_groups(x, loss, arguments, labels)
    if log_likelihood or posterior_predictive:
        groups |= observation_groups(
            x,
            loss,
            arguments,
            labels,
            "gaussian_to_arviz",
            likelihood=log_likelihood,
            rng_key=_predictive_key(rng_key) if posterior_predictive else None,
        )
    attrs = _attributes(loss, labels) | {"description": OF_GAUSSIAN}
    return wrap(_with_attributes(groups, attrs), attrs)


def _predictive_key(rng_key: Key) -> Key:
    # Draws have the key itself.
    return jax.random.fold_in(rng_key, 1)


def _with_attributes(groups: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Any]:
    for dataset in groups.values():
        dataset.attrs = attrs | dataset.attrs
    return groups


def _check_run(result: Any, optimizer: Any) -> None:
    if not isinstance(optimizer, TwoStep):
        raise TypeError(
            f"to_arviz: expected the TwoStep that ran as second argument, got {type(optimizer).__name__}."
        )
    if not isinstance(result, TwoStepResult):
        raise TypeError(
            f"to_arviz: expected the result of TwoStep.run, got {type(result).__name__}; of TwoStep.scan make "
            "TwoStepResult(optimizer.get_params(state), state, history)."
        )
    if np.ndim(result.history.ok) != 1:
        raise ValueError(
            f"to_arviz: expected the history of one run, got an axis of runs before that of steps: shape "
            f"{np.shape(result.history.ok)}; convert one at a time, jax.tree.map(lambda a: a[0], result)."
        )
    if np.shape(result.state.reference.mean) != (optimizer.loss.dim,):
        raise ValueError(
            f"to_arviz: expected a result of {optimizer.loss.dim} parameters, got "
            f"{np.shape(result.state.reference.mean)}; it belongs to another optimizer."
        )


def _attributes(loss: Loss, labels: Labels) -> dict[str, Any]:
    source = single(loss)[0].source
    return {
        "inference_library": "numpyro_regloss",
        "inference_library_version": metadata.version("numpyro_regloss"),
        "numpyro_version": numpyro.__version__,
        "jax_version": jax.__version__,
        "created_at": datetime.now(UTC).isoformat(),
        "loss": "NumPyro model" if isinstance(source, ModelSource) else "function",
        "density": source.density if isinstance(source, ModelSource) else "",
        "sites": labels.table,
    }


def _of_run(result: TwoStepResult, optimizer: TwoStep) -> dict[str, Any]:
    key, temperature = result.state.rng_key, float(optimizer.temperature)
    used = _temperatures(result.history.shift)
    is_set = any(np.any(values != np.asarray(temperature, values.dtype)) for values in used)
    return {
        "shift": type(optimizer.shift).__name__,
        "fit": type(optimizer.fit).__name__,
        "anchor": type(optimizer.anchor).__name__,
        "num_steps": int(result.state.step),
        "tau": _tau(optimizer),
        "temperature": temperature,
        "temperature_mode": "set by the effective sample size" if is_set else "fixed",
        "seed": np.asarray(jax.random.key_data(key)).astype(np.int64).tolist(),
        "seed_implementation": str(jax.random.key_impl(key)),
    }


def _tau(optimizer: TwoStep) -> float | str:
    # What is no number is in constant_data.
    if optimizer.anchor.owns_scale:
        return "set by the anchor"
    if callable(optimizer.tau):
        return "schedule"
    return "per parameter" if np.ndim(optimizer.tau) else float(optimizer.tau)


def _temperatures(info: Any) -> list[np.ndarray]:
    known = fields_of(info)
    found = [np.asarray(known["temperature"])] if "temperature" in known else []
    return found + (_temperatures(known["engine"]) if "engine" in known else [])


def _constant_data(
    result: TwoStepResult, loss: Loss, arguments: Partition, labels: Labels, *, observed: bool
) -> Any:
    import xarray as xr  # noqa: PLC0415

    known = labels.sites if observed else ()
    sites = [site for site in known if site.kind == "observed" and 0 not in site.shape]
    values = observed_values(loss, arguments) if sites else {}
    tau = plain(result.history.tau)
    variables = {
        "x0": ("param", plain(loss.x0)),
        "tau": (("iteration", "param")[: tau.ndim], tau),
    }
    names = {name for site in sites for name in (site.variable, *site.dims)}
    clash = {"x0", "tau", "param", "iteration"} & names
    if clash:
        raise ValueError(
            "to_arviz: observed sites, or their dimensions, have names that to_arviz uses itself in "
            f"constant_data, {sorted(clash)}; give them other names with rename and dims."
        )
    variables |= {site.variable: (site.dims, plain(values[site.site])) for site in sites}
    return xr.Dataset(
        variables,
        coords={
            "param": labels.flat,
            "iteration": iterations(result),
            **labels.coords_of(sites),
        },
    )


def wrap(groups: dict[str, Any], attrs: dict[str, Any]) -> Any:
    """Labelled datasets as what ArviZ works with.

    Args:
        groups: an `xarray.Dataset` per group.
        attrs: attributes of the whole.

    Returns:
        An `xarray.DataTree` under ArviZ 1.x, an `arviz.InferenceData` under 0.23.
    """
    import arviz as az  # noqa: PLC0415
    import xarray as xr  # noqa: PLC0415

    if hasattr(az, "convert_to_datatree"):
        tree = xr.DataTree.from_dict(groups)
        tree.attrs.update(attrs)
        return tree
    return az.InferenceData(attrs=attrs, **groups)
