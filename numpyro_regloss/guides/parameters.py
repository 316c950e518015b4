# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Gaussian guides read off their parameters, in the order of `Loss`."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np
import numpyro
from numpyro.distributions.util import cholesky_of_inverse
from numpyro.infer import Trace_ELBO, autoguide

from numpyro_regloss._core.foreign import attribute
from numpyro_regloss._core.linalg import lower_of_root
from numpyro_regloss._core.pytree import is_concrete
from numpyro_regloss._core.types import Array
from numpyro_regloss.gaussians.gaussian import AnyGaussian, Gaussian
from numpyro_regloss.gaussians.low_rank import LowRankGaussian
from numpyro_regloss.guides.gaussian_guide import GaussianGuide
from numpyro_regloss.guides.sampling import check_params, param_shapes, sorted_order

__all__ = ["read_gaussian"]

# Entries of a direction count from this part of the largest on, and so many are named.
LEAST_PART, MOST_NAMES = 0.1, 5


def read_gaussian(guide: Any, params: Any, args: tuple, kwargs: dict) -> AnyGaussian | None:
    """The Gaussian of a guide that is one in unconstrained space.

    Args:
        guide: any guide; an automatic one must have its prototype.
        params: from `svi.get_params`.
        args: the model's arguments, or none.
        kwargs: the model's keyword arguments, or none.

    Returns:
        The Gaussian, or None if this kind of guide is not one.
    """
    if isinstance(guide, GaussianGuide):
        if not guide.trainable:
            return guide.gaussian
        starts = {name: jnp.shape(start) for name, (start, _) in guide.parameters.items()}
        check_params(params, starts)
        return _checked(guide.gaussian_at(params))
    if _is_plain(guide, autoguide.AutoNormal, "__call__"):
        return _checked(_read_sites(guide, params))
    for kind, method, read in (
        (autoguide.AutoDiagonalNormal, "_get_posterior", _read_posterior),
        (autoguide.AutoMultivariateNormal, "_get_posterior", _read_posterior),
        (autoguide.AutoLowRankMultivariateNormal, "_get_posterior", _read_low_rank),
        (autoguide.AutoBatchedMultivariateNormal, "_get_batched_posterior", _read_blocks),
        (
            autoguide.AutoBatchedLowRankMultivariateNormal,
            "_get_batched_posterior",
            _read_low_rank_blocks,
        ),
    ):
        if _is_plain(guide, kind, method):
            check_params(params, param_shapes(attribute(guide, method)))
            # What is wrong with the parameters is told by `_checked`.
            with numpyro.validation_enabled(is_validate=False):
                gaussian = read(guide, params)
            return _reordered(_checked(gaussian), sorted_order(guide))
    if _is_plain(guide, autoguide.AutoLaplaceApproximation, "get_transform"):
        check_params(params, param_shapes(guide._get_posterior))  # noqa: SLF001
        return _reordered(_read_laplace(guide, params, args, kwargs), sorted_order(guide))
    return None


def _is_plain(guide: Any, kind: type, method: str) -> bool:
    # A subclass with another distribution is another guide.
    return isinstance(guide, kind) and attribute(type(guide), method) is attribute(kind, method)


def _read_sites(guide: Any, params: Any) -> Gaussian:
    locs = {name: f"{name}_{guide.prefix}_loc" for name in sorted(guide._init_locs)}  # noqa: SLF001
    scales = {name: f"{name}_{guide.prefix}_scale" for name in locs}
    shapes = {name: jnp.shape(value) for name, value in guide._init_locs.items()}  # noqa: SLF001
    check_params(params, {names[n]: shapes[n] for names in (locs, scales) for n in locs})
    mean, scale = (
        jnp.concatenate([jnp.ravel(params[name]) for name in names.values()])
        for names in (locs, scales)
    )
    return Gaussian(mean, scale)


def _read_posterior(guide: Any, params: Any) -> Gaussian:
    return Gaussian.from_distribution(guide.get_posterior(params))


def _read_low_rank(guide: Any, params: Any) -> LowRankGaussian:
    return LowRankGaussian.from_distribution(guide.get_posterior(params))


def _read_blocks(guide: Any, params: Any) -> Gaussian:
    # The posterior of a batched guide is a transformed distribution, whose moments NumPyro does not have.
    return Gaussian(
        jnp.ravel(_get(guide, params, "loc")), _block_diagonal(_get(guide, params, "scale_tril"))
    )


def _read_low_rank_blocks(guide: Any, params: Any) -> LowRankGaussian:
    # NumPyro's factors are in units of the diagonal part.
    scale = _get(guide, params, "scale")
    factor = _get(guide, params, "cov_factor") * scale[..., None]
    return LowRankGaussian(
        jnp.ravel(_get(guide, params, "loc")), jnp.ravel(scale) ** 2, _block_diagonal(factor)
    )


def _get(guide: Any, params: Any, name: str) -> Array:
    return jnp.asarray(params[f"{guide.prefix}_{name}"])


def _block_diagonal(blocks: Array) -> Array:
    # Of batched guides, whose vector lists one batch element after the other.
    return jax.scipy.linalg.block_diag(*blocks.reshape(-1, *blocks.shape[-2:]))


def _read_laplace(guide: Any, params: Any, args: tuple, kwargs: dict) -> Gaussian:
    name = f"{guide.prefix}_loc"
    loc = jnp.asarray(params[name])

    def negative_log_density(x: Array) -> Any:
        at = {**params, name: x}
        if not (args or kwargs):
            return guide._loss_fn(at)  # noqa: SLF001
        # The guide itself would use the arguments that it was initialized with.
        key = jax.random.key(0)
        return Trace_ELBO().loss(key, at, guide.model, guide, *args, **kwargs)

    try:
        # One program instead of one for each of some hundred operations.
        precision = jax.jit(lambda x: guide._hessian_fn(negative_log_density, x))(loc)  # noqa: SLF001
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(
            "from_guide: expected an AutoLaplaceApproximation that was initialized outside of jax.jit, or the "
            "model's arguments, got neither: the guide remembers arguments of a finished trace; pass "
            "from_guide(guide, params, *args)."
        ) from error
    if is_concrete(precision):
        _check_precision(np.asarray(precision), name)
    return Gaussian(loc, cholesky_of_inverse(precision))


def _check_precision(precision: np.ndarray, name: str) -> None:
    # In units of the diagonal, so that the scales of parameters do not matter.
    diagonal = np.diagonal(precision)
    smallest, flat = -np.inf, ~(diagonal > 0) | ~np.isfinite(precision).all(1)
    if not flat.any():
        unit = np.sqrt(diagonal)
        values, vectors = np.linalg.eigh(precision / unit[:, None] / unit)
        smallest, direction = values[0], np.abs(vectors[:, 0])
        flat = direction > LEAST_PART * direction.max()
    least = 10 * len(precision) * np.finfo(precision.dtype).eps
    if not smallest > least:
        raise ValueError(
            "from_guide: expected a positive definite Hessian for AutoLaplaceApproximation, got one that is "
            f"singular, indefinite or not finite at params[{name!r}], along a direction of its entries "
            f"{np.flatnonzero(flat)[:MOST_NAMES].tolist()}. The params are not at a mode, or the density does not "
            "fall off: train until the loss settles, give proper priors, add a ridge with "
            "hessian_fn=lambda f, x: jax.hessian(f)(x) + 1e-3 * jnp.eye(x.size), or use AutoMultivariateNormal."
        )


def _checked(gaussian: AnyGaussian) -> AnyGaussian:
    positive = gaussian[1]
    if positive.ndim == 2:
        positive = jnp.diagonal(positive)
    if is_concrete(positive) and not (np.asarray(positive) > 0).all():
        raise ValueError(
            "from_guide: expected positive scales among the params, got others; pass the constrained params of "
            "svi.get_params(state), not those of the optimizer."
        )
    if is_concrete(gaussian):
        with np.errstate(over="ignore", invalid="ignore"):
            finite = np.isfinite(np.asarray(gaussian.variance)) & np.isfinite(gaussian.mean)
        if not finite.all():
            raise ValueError(
                "from_guide: expected params with a finite mean and variance, got none at the entries "
                f"{np.flatnonzero(~finite)[:MOST_NAMES].tolist()} of the guide's vector. If the density does not "
                "fall off along a parameter, the width of a guide grows without end: give it a proper prior, or "
                "leave it out."
            )
    return gaussian


def _reordered(gaussian: AnyGaussian, order: np.ndarray) -> AnyGaussian:
    if (order == np.arange(len(order))).all():
        return gaussian
    mean, spread, *rest = (part[order] for part in gaussian)
    if rest:
        return LowRankGaussian(mean, spread, *rest)
    if spread.ndim == 2:
        # The rows of a triangle in another order: QR of the transpose makes a triangle again.
        spread = lower_of_root(spread.T)
    return Gaussian(mean, spread)
