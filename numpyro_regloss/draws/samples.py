# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What users call samples, arrays, dicts of sites, a run MCMC or draws, as one flat cloud of draws."""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.infer import MCMC
from numpyro.util import find_stack_level

from numpyro_regloss._core.checks import check_choice
from numpyro_regloss._core.foreign import attribute
from numpyro_regloss._core.pytree import is_concrete, with_context_axes
from numpyro_regloss.draws.base import Draws, StoredDraws
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.regularized import RegularizedLoss, latent_name, model, x_name
from numpyro_regloss.losses.sites import Site, flat_labels

__all__ = ["as_draws"]

# Coordinates that a message names.
MOST_NAMES = 5
Names = tuple[str, ...] | None


def as_draws(
    samples: Any,
    *,
    log_weight: Any,
    score: Any,
    log_density: Any,
    loss: Loss | None,
    space: str,
    group_by_chain: bool,
    what: str = "forward_kl",
) -> tuple[Draws, Names, Array | None]:
    """Checks samples and what comes with them.

    Args:
        samples: see `forward_kl`.
        log_weight: or None.
        score: or None.
        log_density: or None.
        loss: whose flat space is meant, or None.
        space: of the sites of a dict.
        group_by_chain: whether a dict's sites start with an axis of chains.
        what: begins the error messages.

    Returns:
        The draws, the names of their coordinates if they have any, and the log density.

    Raises:
        TypeError: if something is of the wrong kind.
        ValueError: if shapes do not fit or values are not finite.
    """
    check_choice(space, f"{what}: space", ("constrained", "unconstrained"))
    if not isinstance(loss, Loss | None):
        raise TypeError(f"{what}: expected loss as a Loss or None, got {type(loss).__name__}.")
    names = None
    if isinstance(samples, MCMC):
        samples, names, score, log_density = _of_mcmc(samples, loss, score, log_density, what)
    elif isinstance(samples, Draws):
        if log_weight is not None or score is not None:
            raise ValueError(
                f"{what}: expected no log_weight or score beside Draws, which have their own, got some; to "
                "replace them, pass arrays: samples=draws.x."
            )
        log_density = _with_shape(log_density, samples.log_weight.shape, "log_density", what)
        return _checked_draws(with_context_axes(samples), loss, what), None, log_density
    elif isinstance(samples, dict):
        samples, names = _of_sites(samples, loss, space, what, group_by_chain=group_by_chain)
        _refuse_score_of_sites(score, what)
    x = _array(samples, "samples", what)
    if x.ndim not in (2, 3):
        raise ValueError(
            f"{what}: expected samples of shape (draw, dim) or (chain, draw, dim), got {x.shape}; for one "
            "parameter write samples[:, None]."
        )
    lead = x.shape[:-1]
    log_weight = _with_shape(log_weight, lead, "log_weight", what)
    score = _with_shape(score, x.shape, "score", what)
    log_density = _with_shape(log_density, lead, "log_density", what)
    if loss is not None and x.shape[-1] != loss.dim:
        raise ValueError(
            f"{what}: expected samples of the loss's {loss.dim} flat unconstrained parameters, got "
            f"{x.shape[-1]}."
        )
    if x.shape[-1] == 0 or np.prod(lead) < 2:
        raise ValueError(
            f"{what}: expected at least two draws of at least one parameter, got samples of shape {x.shape}."
        )
    if log_weight is None:
        log_weight = jnp.zeros(lead, x.dtype)
    if x.ndim == 2:
        x, log_weight = x[None], log_weight[None]
        score, log_density = (None if a is None else a[None] for a in (score, log_density))
    if is_concrete((x, log_weight, score)):
        _check_values(x, log_weight, score, names, what)
    zero = jnp.zeros(x.shape[:-1], x.dtype)
    draws = StoredDraws(x, log_weight, zero, jnp.ones((), x.dtype), score)
    return draws, names, log_density


def target_of(mcmc: MCMC) -> RegularizedLoss | None:
    """The target of a run on `regloss.model`, or None for another model."""
    if attribute(mcmc.sampler, "model", None) is not model:
        return None
    given = [
        *(attribute(mcmc, "_args", None) or ()),
        *(attribute(mcmc, "_kwargs", None) or {}).values(),
    ]
    return next((value for value in given if isinstance(value, RegularizedLoss)), None)


def _of_mcmc(
    mcmc: MCMC, loss: Loss | None, score: Any, log_density: Any, what: str
) -> tuple[Any, Names, Any, Any]:
    if mcmc.last_state is None:
        raise ValueError(f"{what}: expected an MCMC that has run, got one that has not; call run.")
    sites = mcmc.get_samples(group_by_chain=True)
    target = target_of(mcmc)
    if target is not None:
        x = sites[x_name(target)]
        gradient = mcmc.get_extra_fields(group_by_chain=True).get("z_grad")
        if gradient is not None and score is None:
            if target.reference is None:
                score = -gradient[x_name(target)]
            else:
                score = -target.reference.unscale_transpose(gradient[latent_name(target)])
        return x, target.loss.flat_names, score, log_density
    _refuse_score_of_sites(score, what)
    latent = mcmc.last_state.z
    if not isinstance(latent, dict):
        # A kernel of a potential: its samples are arrays already.
        return sites, None, None, log_density
    kept = {name: sites[name] for name in latent if name in sites}
    discrete = [name for name, value in kept.items() if _is_discrete(value)]
    if kept and len(discrete) == len(kept):
        raise ValueError(
            f"{what}: expected a run with continuous latent sites, got only discrete ones, {discrete}; a Gaussian "
            "cannot stand for them. Count their values instead."
        )
    if discrete:
        kept = {name: value for name, value in kept.items() if name not in discrete}
        warnings.warn(
            f"{what}: the discrete sites {discrete} were left out, since a Gaussian cannot stand for them; the "
            f"others, {sorted(kept)}, are fitted, averaged over these.",
            stacklevel=find_stack_level(),
        )
    flat, names = _of_sites(kept, loss, "constrained", what, group_by_chain=True)
    return flat, names, None, log_density


def _of_sites(
    sites: dict, loss: Loss | None, space: str, what: str, *, group_by_chain: bool
) -> tuple[Array, Names]:
    num_leading = 2 if group_by_chain else 1
    discrete = [str(name) for name, value in sites.items() if _is_discrete(value)]
    if discrete:
        raise TypeError(
            f"{what}: expected sites of floating-point numbers, got integers or booleans in {discrete}; a "
            "Gaussian cannot stand for discrete sites. Leave them out of the dict, or pass the MCMC itself, where "
            "they are left out; convert integers that stand for something continuous by astype(float)."
        )
    arrays = {str(name): _array(value, f"site {name!r}", what) for name, value in sites.items()}
    if not arrays:
        raise ValueError(f"{what}: expected at least one site, got an empty dict.")
    leads = {name: array.shape[:num_leading] for name, array in arrays.items()}
    if len(set(leads.values())) > 1 or min(map(len, leads.values())) < num_leading:
        wanted = "(chain, draw)" if group_by_chain else "(draw,)"
        raise ValueError(
            f"{what}: expected sites whose shapes all start with the same {wanted}, got {leads}; "
            "group_by_chain says whether there is an axis of chains."
        )
    lead = next(iter(leads.values()))
    if loss is None:
        if space == "unconstrained":
            raise ValueError(
                f'{what}: expected a loss with space="unconstrained", got none; without one, sites are '
                "fitted in the space in which they are given."
            )
        order = [Site(n, arrays[n].shape[num_leading:]) for n in sorted(arrays)]
        # No -1 among the shapes: a site may be of size zero.
        flat = [arrays[site.name].reshape(*lead, math.prod(site.shape)) for site in order]
        return jnp.concatenate(flat, -1), flat_labels(tuple(order))
    flatten = loss.unconstrain if space == "constrained" else loss.source.ravel
    count = math.prod(lead)
    rows = {name: a.reshape(count, *a.shape[num_leading:]) for name, a in arrays.items()}
    flat = jax.vmap(flatten)(rows).reshape(*lead, loss.dim)
    if space == "constrained" and is_concrete((flat, rows)):
        _check_supports(flat, arrays, loss, what)
    return flat, loss.flat_names


def _check_supports(flat: Array, arrays: dict[str, Array], loss: Loss, what: str) -> None:
    bad = ~np.isfinite(np.asarray(flat))
    given = all(np.isfinite(np.asarray(array)).all() for array in arrays.values())
    if given and bad.any():
        places = np.flatnonzero(bad.reshape(-1, loss.dim).any(0))
        names = sorted({loss.flat_names[place].partition("[")[0] for place in places})
        raise ValueError(
            f"{what}: expected draws of the sites {names} within their supports, got {bad.any(-1).sum()} of "
            f"{bad.any(-1).size} draws outside or on the boundary. If the draws are unconstrained, write "
            'space="unconstrained".'
        )


def _is_discrete(value: Any) -> bool:
    dtype = attribute(value, "dtype")
    dtype = np.asarray(value).dtype if dtype is None else dtype
    return np.dtype(dtype).kind in "biu"


def _refuse_score_of_sites(score: Any, what: str) -> None:
    if score is not None:
        raise ValueError(
            f"{what}: expected score only with an array of samples, got one with sites; sites may be "
            "constrained, and their scores would be others. Fit the flat array of your loss's parameters."
        )


def _array(value: Any, name: str, what: str) -> Array:
    try:
        array = jnp.asarray(with_context_axes(value))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{what}: expected {name} as an array, a dict of sites, an MCMC that has run or Draws, got "
            f"{type(value).__name__}."
        ) from error
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{what}: expected {name} to be real numbers, got {array.dtype}.")
    floating = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize >= 4
    return array if floating else array.astype(float)


def _with_shape(value: Any, shape: tuple[int, ...], name: str, what: str) -> Array | None:
    if value is None:
        return None
    array = _array(value, name, what)
    if array.shape != shape:
        raise ValueError(
            f"{what}: expected {name} of shape {shape}, like the samples, got {array.shape}."
        )
    return array


def _checked_draws(draws: Draws, loss: Loss | None, what: str) -> Draws:
    if draws.log_weight.size < 2:
        raise ValueError(f"{what}: expected at least two draws, got {draws.log_weight.size}.")
    dim = jax.eval_shape(lambda: draws.x).shape[-1]
    if loss is not None and dim != loss.dim:
        raise ValueError(
            f"{what}: expected draws of the loss's {loss.dim} flat unconstrained parameters, got {dim}."
        )
    if is_concrete(draws.log_weight):
        _check_weights(np.asarray(draws.log_weight), what)
        if isinstance(draws, StoredDraws):
            _check_values(draws.x, draws.log_weight, draws.score, None, what)
    return draws


def _check_values(
    x: Array, log_weight: Array, score: Array | None, names: Names, what: str
) -> None:
    for name, value in (("samples", x), ("score", score)):
        if value is None:
            continue
        finite = np.isfinite(np.asarray(value))
        bad = ~finite.all(-1)
        if bad.any():
            which = np.flatnonzero(~finite.reshape(-1, finite.shape[-1]).all(0))
            listed = ", ".join(str(names[i] if names else i) for i in which[:MOST_NAMES])
            listed += ", ..." if len(which) > MOST_NAMES else ""
            raise ValueError(
                f"{what}: expected finite {name}, got NaN or infinity in {bad.sum()} of {bad.size} draws, at the "
                f"coordinates {listed}; drop them, or give them log_weight -inf and any finite value. If draws of "
                "a parameter run off to infinity, the density does not fall off: give it a proper prior or a "
                "reference."
            )
    _check_weights(np.asarray(log_weight), what)
    used = np.asarray(x)[np.asarray(log_weight) > -np.inf]
    if (used == used[0]).all():
        raise ValueError(
            f"{what}: expected draws that differ, got {len(used)} equal ones: the chain did not move, or too "
            "few draws carry weight. Run a longer chain from another start, or draw nearer to the target."
        )


def _check_weights(log_weight: np.ndarray, what: str) -> None:
    if np.isnan(log_weight).any() or (log_weight == np.inf).any():
        raise ValueError(
            f"{what}: expected log weights that are finite or -inf, got NaN or +inf in "
            f"{(~(log_weight < np.inf)).sum()} of {log_weight.size}; write -inf for draws without weight."
        )
    if not (log_weight > -np.inf).any():
        raise ValueError(
            f"{what}: expected some positive weight, got log weights of -inf only; draw nearer to the target."
        )
    weight = np.exp(log_weight - log_weight.max())
    if weight.max() / weight.sum() > 0.999:
        raise ValueError(
            f"{what}: expected weights on several draws, got one that carries "
            f"{weight.max() / weight.sum():.2%} of the total; draw from a distribution nearer to the target, or "
            "temper the weights."
        )
