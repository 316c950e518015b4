# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""NumPyro guides as Gaussians, and back.

A guide that is Gaussian in unconstrained space is read off its parameters; of any other the moments are
matched from its draws, with importance weights where a loss is given:

    log w(x) = -loss(x) - log guide(x)

Reference: Yao, Vehtari, Simpson & Gelman (2018), "Yes, but did it work?: Evaluating variational inference".
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.infer import autoguide

from numpyro_regloss._core.checks import check_choice, check_count, check_key
from numpyro_regloss._core.pareto import MAX_KHAT, pareto_khat
from numpyro_regloss._core.pytree import Partition, with_context_axes
from numpyro_regloss._core.settings import own_settings
from numpyro_regloss._core.stats import weight_ess
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import StoredDraws
from numpyro_regloss.fit.base import FitResult
from numpyro_regloss.fit.forward_kl import forward_kl
from numpyro_regloss.gaussians.families import check_family, nearest_in_forward_kl
from numpyro_regloss.guides.gaussian_guide import GaussianGuide, to_guide
from numpyro_regloss.guides.parameters import read_gaussian
from numpyro_regloss.guides.sampling import GuideDraws, batch_size, draw_continuous, draw_sites
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.numpyro_model import ModelSource

__all__ = ["GaussianGuide", "GuideInfo", "from_guide", "to_guide"]

COVARIANCES = ("isotropic", "diagonal", "dense", "low_rank")
NOT_GAUSSIAN = {
    autoguide.AutoDelta: "a point has no covariance; use AutoLaplaceApproximation, which adds one",
    autoguide.AutoGuideList: (
        "each part has a Gaussian of its own; call from_guide with each part of guide and the same params, or "
        "use one guide for all sites"
    ),
    autoguide.AutoSemiDAIS: (
        "its local sites depend on the batch; draw from guide.sample_posterior and match those draws with "
        "forward_kl, or use AutoDAIS"
    ),
    autoguide.AutoSurrogateLikelihoodDAIS: (
        "its density is that of another likelihood; draw from guide.sample_posterior and match those draws "
        "with forward_kl, or use AutoDAIS"
    ),
}


class GuideInfo(NamedTuple):
    """What `from_guide` did.

    Attributes:
        exact: whether the Gaussian was read off the guide's parameters, without draws.
        weighted: whether draws had importance weights, so that the Gaussian is that of the loss and
            not that of the guide.
        num_samples: number of draws; zero when exact.
        ess: effective number of draws behind the weights (Kong 1992); infinite when exact.
        khat: Pareto k-hat of the weights: below 0.7 they can be trusted; -inf without weights.
        mean_error: standard error of the mean, `(dim,)`; zeros when exact.
        covariance_error: standard errors of the covariance, or of the variances where the family has no
            more, as `forward_kl` reports them; None when exact.
        num_loss: number of evaluations of the loss.
    """

    exact: bool
    weighted: bool
    num_samples: int
    ess: Array
    khat: Array
    mean_error: Array
    covariance_error: Array | None
    num_loss: int


def from_guide(
    guide: Callable[..., Any],
    params: dict[str, Any],
    *args: Any,
    loss: Loss | None = None,
    rng_key: Key | None = None,
    num_samples: int = 2000,
    covariance: str | None = None,
    rank: int | None = None,
    weighted: bool | None = None,
    **kwargs: Any,
) -> FitResult:
    """The Gaussian of a NumPyro guide, in unconstrained coordinates in the order of `Loss.from_model`.

    Exact and without draws: `AutoNormal`, `AutoDiagonalNormal` (diagonal), `AutoMultivariateNormal`,
    `AutoBatchedMultivariateNormal`, `AutoLaplaceApproximation` (dense), `AutoLowRankMultivariateNormal`,
    `AutoBatchedLowRankMultivariateNormal` (low rank) and guides of `to_guide`. For all other guides
    (`AutoIAFNormal`, `AutoBNAFNormal`, `AutoDAIS`, functions) the moments are estimated from draws.

    Args:
        guide: a guide that was trained, or at least initialized, with `SVI`.
        params: its parameters, constrained, as `svi.get_params(state)` returns them.
        *args: the model's arguments; by default those bound in `loss`. Exact guides need none
            (`AutoLaplaceApproximation` takes those it was initialized with).
        loss: a `Loss.from_model` of the guide's model. Needed if the guide is a function. Otherwise it is
            optional: its sites are compared with those of the guide, and it weights the draws.
        rng_key: a random key, needed for draws.
        num_samples: number of draws.
        covariance: `"isotropic"`, `"diagonal"`, `"dense"` or `"low_rank"`: the Gaussian of this family
            with the least KL(guide || Gaussian). Default: the guide's own structure when exact, dense
            otherwise.
        rank: number of factors for `"low_rank"`.
        weighted: whether draws are weighted by exp(-loss) over the density of the guide, so that the
            moments are those of the loss. Default: where `loss` is given and the density of the guide
            is known and finite; the info says which.
        **kwargs: the model's keyword arguments; those that have a name from above are bound in `loss`.

    Returns:
        The Gaussian and a `GuideInfo`; unpacks as a pair. A k-hat above 0.7 is also a warning.

    Raises:
        TypeError: if an argument is of another kind, the guide has no density, or a key or a loss is
            missing.
        ValueError: if the guide was never run, params or loss do not fit it, the Hessian of
            `AutoLaplaceApproximation` is singular, or draws or losses are not finite.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> def model(y):
        ...     sd = numpyro.sample("sd", dist.HalfNormal(1.0))
        ...     numpyro.sample("y", dist.Normal(0.0, sd), obs=y)
        >>> guide, y = autoguide.AutoNormal(model, init_scale=0.5), jnp.array([0.5, -0.5])
        >>> svi = SVI(model, guide, numpyro.optim.Adam(0.01), Trace_ELBO())
        >>> params = svi.get_params(svi.init(jax.random.key(0), y))
        >>> gaussian, info = from_guide(guide, params)
        >>> gaussian.structure, info.exact, round(float(gaussian.scale[0]), 6)
        ('diagonal', True, 0.5)
    """
    _check(guide, loss, covariance, rank, weighted)
    params = with_context_axes(params)
    gaussian = read_gaussian(guide, params, args, kwargs)
    if gaussian is not None:
        gaussian = nearest_in_forward_kl(gaussian, covariance, rank)
        gaussian = type(gaussian)(*(jnp.asarray(part, float) for part in gaussian))
        none, certain = jnp.full((), -jnp.inf), jnp.full((), jnp.inf)
        error = jnp.zeros_like(gaussian.mean)
        return FitResult(gaussian, GuideInfo(True, False, 0, certain, none, error, None, 0))

    what = type(guide).__name__ if isinstance(guide, autoguide.AutoGuide) else "a function"
    continuous = isinstance(guide, autoguide.AutoContinuous)
    if loss is None and not continuous:
        raise TypeError(
            "from_guide: expected loss with a guide that is a function, to order and unconstrain its sites, got "
            "None; pass loss=Loss.from_model(model, *args)."
        )
    if rng_key is None:
        raise TypeError(
            f"from_guide: expected rng_key with {what} as guide, whose moments are matched from draws, got None; "
            "pass rng_key=jax.random.key(0)."
        )
    rng_key = check_key(rng_key, "from_guide: rng_key")
    num_samples = check_count(num_samples, "from_guide: num_samples", 2)
    arguments = Partition((args, kwargs)) if loss is None else loss.bind(args, kwargs)
    source: Any = None if loss is None else loss.source
    if continuous:
        draws = draw_continuous(guide, params, rng_key, num_samples)
    else:
        draws = draw_sites(guide, params, source, arguments, rng_key, num_samples)
    log_weight = _log_weight(draws, loss, arguments, weighted=weighted)
    khat = jnp.full((), -jnp.inf) if log_weight is None else pareto_khat(log_weight)
    if khat > MAX_KHAT:
        warnings.warn(
            f"from_guide: the importance weights of {num_samples} draws have a Pareto k-hat of {khat:.2f} > "
            f"{MAX_KHAT}, so that moments hang on few draws: the guide is too narrow, or far from the loss; "
            "train it longer, widen it, take more draws, or pass weighted=False for the guide's own moments.",
            stacklevel=2,
        )
    zero = jnp.zeros((1, num_samples), draws.x.dtype)
    cloud = StoredDraws(
        x=draws.x[None],
        log_weight=zero if log_weight is None else log_weight[None],
        loss=zero,
        temperature=jnp.ones((), zero.dtype),
        block_size=1,
    )
    fitted = forward_kl(cloud, covariance=covariance or "dense", rank=rank)
    info = GuideInfo(
        exact=False,
        weighted=log_weight is not None,
        num_samples=num_samples,
        ess=jnp.asarray(num_samples, float) if log_weight is None else weight_ess(log_weight),
        khat=khat,
        mean_error=fitted.info.mean_error,
        covariance_error=fitted.info.covariance_error,
        num_loss=0 if log_weight is None else num_samples,
    )
    return FitResult(fitted.gaussian, info)


def _log_weight(
    draws: GuideDraws, loss: Loss | None, arguments: Partition, *, weighted: bool | None
) -> Array | None:
    if weighted is False or loss is None:
        return None
    known = draws.log_density is not None and bool(jnp.isfinite(draws.log_density).all())
    if not known and weighted is None:
        return None
    if not known:
        raise ValueError(
            "from_guide: expected a guide with a finite density for weighted=True, got one whose density is not "
            "finite, or that has auxiliary sites to integrate out; use weighted=False."
        )
    density = loss.source.density
    if density != "joint":
        raise ValueError(
            f"from_guide: expected a loss with density='joint' to weight draws, got {density!r}; "
            "build it so, or pass weighted=False."
        )
    losses = _losses(loss, draws.x, arguments)
    bad = int(jnp.sum(jnp.isnan(losses) | (losses == -jnp.inf)))
    if bad or not bool(jnp.isfinite(losses).any()):
        raise ValueError(
            f"from_guide: expected finite losses at the draws of the guide, got NaN or -inf at {bad} of "
            f"{losses.size}, and finite ones at {int(jnp.isfinite(losses).sum())}; look at loss.value there, or "
            "use weighted=False."
        )
    return -losses - draws.log_density


@jax.jit
@own_settings
def _losses(loss: Loss, x: Array, arguments: Partition) -> Array:
    return jax.lax.map(lambda x: loss.evaluate(x, arguments), x, batch_size=batch_size(len(x)))


def _check(guide: Any, loss: Any, covariance: Any, rank: Any, weighted: Any) -> None:
    if not callable(guide) or isinstance(guide, type):
        got = guide.__name__ if isinstance(guide, type) else type(guide).__name__
        raise TypeError(
            f"from_guide: expected a NumPyro guide, an object or a function, got {got}; build one, such as "
            "AutoNormal(model), and train it with SVI."
        )
    for kind, remedy in NOT_GAUSSIAN.items():
        if isinstance(guide, kind):
            raise TypeError(
                f"from_guide: expected a guide with a density over all sites, got {kind.__name__}: {remedy}."
            )
    if covariance is not None:
        check_choice(covariance, "from_guide: covariance", COVARIANCES)
    check_family(covariance or "dense", rank, "from_guide")
    if not isinstance(weighted, bool | None):
        raise TypeError(f"from_guide: expected weighted as True, False or None, got {weighted!r}.")
    if isinstance(guide, autoguide.AutoGuide) and guide.prototype_trace is None:
        raise ValueError(
            f"from_guide: expected a guide that was initialized, got {type(guide).__name__} that never ran; call "
            "svi.init or svi.run with this very object first."
        )
    if loss is None:
        if weighted:
            raise ValueError(
                "from_guide: expected loss for weighted=True, got None; pass loss=Loss.from_model(model, *args)."
            )
        return
    if not isinstance(loss, Loss):
        raise TypeError(f"from_guide: expected loss as a Loss, got {type(loss).__name__}.")
    if isinstance(guide, GaussianGuide):
        _check_same(loss.dim, guide.gaussian.dim)
        return
    if not isinstance(loss.source, ModelSource):
        raise TypeError(
            "from_guide: expected a loss of Loss.from_model, whose sites the guide has, got one of "
            "Loss.from_function; leave loss out."
        )
    if isinstance(guide, autoguide.AutoGuide):
        shapes = {name: jnp.shape(value) for name, value in guide._init_locs.items()}  # noqa: SLF001
        _check_same(dict(loss.source.sites), shapes)


def _check_same(expected: Any, found: Any) -> None:
    if expected != found:
        raise ValueError(
            f"from_guide: expected a guide of the loss's parameters {expected}, got one of {found}; use guide "
            "and loss of the same model and data."
        )
