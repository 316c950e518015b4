# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""`score_matching`: the fit outside of a two-step scheme, from samples with scores or from a target."""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro.infer import MCMC
from numpyro.util import find_stack_level

from numpyro_regloss._core.checks import (
    check_count,
    check_differentiable,
    check_key,
    differentiating,
)
from numpyro_regloss._core.foreign import attribute
from numpyro_regloss._core.pytree import is_concrete, replace_fields, strip_weak_types
from numpyro_regloss._core.settings import own_settings
from numpyro_regloss._core.stats import normalize_log_weight
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.draws.base_draws import round_up
from numpyro_regloss.draws.first_width import best_width
from numpyro_regloss.draws.samples import as_draws
from numpyro_regloss.fit.base import FitResult
from numpyro_regloss.fit.score_matching.batch_and_match import DENSE_DIM, batch_and_match
from numpyro_regloss.fit.score_matching.engine import ScoreMatching, ScoreMatchingInfo, fit_draws
from numpyro_regloss.gaussians.families import nearest_in_reverse_kl
from numpyro_regloss.gaussians.gaussian import AnyGaussian, Gaussian, check_gaussian
from numpyro_regloss.gaussians.low_rank import LowRankGaussian
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.probe import Probe, check_gradient, probe
from numpyro_regloss.losses.regularized import RegularizedLoss, model

__all__ = ["score_matching"]

DEFAULT_STEPS = 100
# Draws of a batch, per dimension where it spans the space; and factors of a Gaussian that is drawn from.
DEFAULT_DRAWS, DRAWS_PER_DIM, MANY_DRAWS, FACTORS = 64, 4, 128, 8
# Numbers among the draws whose gradients are computed at once.
CHUNK = 2**20
# Of a coordinate's divergence: between those of two gamma variables in tests, whose logarithm is fitted with 0.63
# of its standard deviation, and with nearly all of it.
MOST_DIVERGENCE = 0.5


def score_matching(
    samples_or_target: Any,
    covariance: str = "dense",
    *,
    rank: int | None = None,
    score: Any = None,
    log_weight: Any = None,
    loss: Loss | None = None,
    space: str = "constrained",
    group_by_chain: bool = False,
    rng_key: Key | None = None,
    init: AnyGaussian | None = None,
    num_steps: int | None = None,
    num_draws: int | None = None,
) -> FitResult:
    """The Gaussian whose scores are nearest to those of a density: least Fisher divergence.

    From samples with scores it is a regression in closed form. If the density is Gaussian, the result is exact
    with dim + 2 samples, whatever they were drawn from. For other densities the distribution of the samples
    matters: if they were drawn from the density, the fitted mean is its mean.

    For a target it draws its own samples, by batch and match. It draws each batch from the Gaussian that the last
    batch gave, until that Gaussian has settled. Then it fits the family to the draws of the last batches. If the
    target is nearly Gaussian, this takes fewer gradients than both directions of KL. If the target is strongly
    skewed along a coordinate (`info.coordinate_divergence` about one), the result is too narrow there, and
    `reverse_kl` or `forward_kl` are better. A dense fit warns of that.

    Args:
        samples_or_target: samples as for `forward_kl`: an array `(draw, dim)` or `(chain, draw, dim)` with
            `score`, or with the `loss` whose gradient it is; a dict of sites or an `MCMC` that has run, with the
            `loss`; an `MCMC` of `numpyro_regloss.model` that ran with `extra_fields=("z_grad",)`; `Draws` with
            scores. Or a target: a `RegularizedLoss`, or a `Loss` for exp(-loss).
        covariance: `"isotropic"`, `"diagonal"`, `"dense"` or `"low_rank"`; of a target with a reference also
            `"reference"`, the mean only.
        rank: number of factors of `"low_rank"`.
        score: gradient of the log density at the samples, of their shape.
        log_weight: log importance weights, of the samples' leading shape.
        loss: of the samples' density exp(-loss), in whose flat unconstrained space they are fitted.
        space: see `forward_kl`.
        group_by_chain: see `forward_kl`.
        rng_key: for a target, a random key.
        init: for a target, where to start; default: its reference, or without one the best of some widths about
            the loss's start.
        num_steps: for a target, batches at most; default: 100. Most take 20 to 40, a Gaussian one 6.
        num_draws: for a target, draws of a batch, rounded up to a power of two; default: 64, or four per dimension
            if that is more, and 128 beyond 256 dimensions.

    Returns:
        The Gaussian and the info, with standard errors given the distribution of the samples. Under `jax.jit`
        values are not checked and there are no warnings: look at `info.ok` and `info.converged`.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if samples have no scores, shapes do not fit, values are not finite, or arguments do not go
            together.

    Example:
        >>> from numpyro_regloss import Loss
        >>> precision = jnp.array([[2.0, 1.0], [1.0, 3.0]])
        >>> loss = Loss.from_function(lambda x: 0.5 * (x - 1.0) @ precision @ (x - 1.0), jnp.zeros(2))
        >>> gaussian, info = score_matching(loss, rng_key=random.key(0))
        >>> bool(jnp.allclose(gaussian.mean, 1.0, atol=1e-5)), int(info.num_grad) < 1000
        (True, True)
        >>> x = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
        >>> fitted, _ = score_matching(x, loss=loss)
        >>> bool(jnp.allclose(fitted.covariance, jnp.linalg.inv(precision), atol=1e-5))
        True
    """
    method = ScoreMatching(covariance, rank)
    if isinstance(samples_or_target, Loss | RegularizedLoss):
        given = {"score": score, "log_weight": log_weight, "loss": loss}
        _refuse(given, "a target", "they belong to samples")
        target = samples_or_target
        if isinstance(target, Loss):
            target = RegularizedLoss(target)
        return _of_target(method, target, rng_key, init, num_steps, num_draws)
    given = {"rng_key": rng_key, "init": init, "num_steps": num_steps, "num_draws": num_draws}
    _refuse(given, "samples", "they say how to draw from a target")
    if covariance == "reference":
        raise ValueError(
            'score_matching: expected covariance as "isotropic", "diagonal", "dense" or "low_rank", got '
            '"reference"; samples have no reference.'
        )
    draws, names, _ = as_draws(
        samples_or_target,
        log_weight=log_weight,
        score=score,
        log_density=None,
        loss=loss,
        space=space,
        group_by_chain=group_by_chain,
        what="score_matching",
    )
    own = draws.score is None and not isinstance(samples_or_target, Draws)
    if own:
        draws = _with_scores(draws, samples_or_target, loss)
    gaussian, info = _jitted_fit(method, draws)
    num_grad = draws.log_weight.size if own else 0
    info = info._replace(names=names, num_grad=jnp.asarray(num_grad))
    if is_concrete(info):
        _tell(gaussian, info, "samples")
    return FitResult(gaussian, info)


def _of_target(
    method: ScoreMatching,
    target: RegularizedLoss,
    rng_key: Key | None,
    init: AnyGaussian | None,
    num_steps: int | None,
    num_draws: int | None,
) -> FitResult:
    if rng_key is None:
        raise ValueError(
            "score_matching: expected a random key with a target, from which its samples are drawn, got none; "
            "write rng_key=jax.random.key(0)."
        )
    rng_key = check_key(rng_key, "score_matching")
    if method.covariance == "reference" and target.reference is None:
        raise ValueError(
            'score_matching: expected a target with a reference for covariance="reference", got one without; use '
            'covariance="dense", or RegularizedLoss(loss, Gaussian.isotropic(x, tau)).'
        )
    target.loss.check_captured()
    target.loss.check_precision("score_matching")
    remedy = "shift.Importance and forward_kl"
    check_differentiable(["score_matching"], target.loss, "score_matching", remedy)
    if init is not None:
        init = check_gaussian(init, target.dim, "score_matching: init")
    num_steps = check_count(num_steps or DEFAULT_STEPS, "score_matching: num_steps")
    if num_draws is None:
        many = target.dim > DENSE_DIM
        num_draws = MANY_DRAWS if many else max(DEFAULT_DRAWS, DRAWS_PER_DIM * target.dim)
    num_draws = round_up(check_count(num_draws, "score_matching: num_draws", 2))
    with differentiating(["score_matching"], target.loss, "score_matching", remedy):
        gaussian, info, found = _jitted_iterations(
            method, rng_key, target, init, num_steps, num_draws
        )
    info = info._replace(names=target.loss.flat_names)
    if is_concrete(found):
        check_gradient(jax.device_get(found), ["score_matching"], "score_matching")
        _tell(gaussian, info, "a target")
    return FitResult(gaussian, info)


@jax.jit
@own_settings
def _jitted_fit(method: ScoreMatching, draws: Draws) -> tuple[AnyGaussian, ScoreMatchingInfo]:
    gaussian, info = fit_draws(method, draws, None)
    return gaussian, _by_coordinate(gaussian, info, draws)


@partial(jax.jit, static_argnames=("num_steps", "num_draws"))
@own_settings
def _jitted_iterations(
    method: ScoreMatching,
    rng_key: Key,
    target: RegularizedLoss,
    init: AnyGaussian | None,
    num_steps: int,
    num_draws: int,
) -> tuple[AnyGaussian, ScoreMatchingInfo, Probe]:
    key_width, key_factor, key_draws = random.split(rng_key, 3)
    start, num_loss = init, jnp.asarray(0)
    if start is None:
        start = target.reference
    if start is None:
        start, num_loss = best_width(key_width, target)
    seen = probe(rng_key, target.on_batch(rng_key), around=start)
    family, rank = ("dense", None)
    if target.dim > DENSE_DIM:
        family, rank = ("low_rank", method.rank or FACTORS)
    start = nearest_in_reverse_kl(start, family, rank, key_factor)
    found = batch_and_match(key_draws, target, start, num_steps, num_draws)
    near = None
    if method.covariance == "low_rank" and isinstance(found.gaussian, LowRankGaussian):
        near = found.gaussian
    gaussian, info = fit_draws(method, found.draws, target.reference, near)
    info = info._replace(
        num_loss=num_loss,
        num_grad=found.num_steps * num_draws + seen.values.size,
        num_steps=found.num_steps,
        converged=info.converged & found.settled,
    )
    return gaussian, strip_weak_types(_by_coordinate(gaussian, info, found.draws)), seen


def _by_coordinate(
    gaussian: AnyGaussian, info: ScoreMatchingInfo, draws: Draws
) -> ScoreMatchingInfo:
    assert draws.score is not None
    weight = normalize_log_weight(draws.log_weight)[..., None]
    # Of a draw without weight the score may be anything.
    score = jnp.where(weight > 0, draws.score, 0.0)
    rest = draws.x - gaussian.mean + gaussian.scaled(gaussian.scaled_transpose(score))
    square = jnp.sum(weight * rest**2, (0, 1))
    return info._replace(coordinate_divergence=square / gaussian.variance)


def _with_scores(draws: Any, samples: Any, loss: Loss | None) -> Draws:
    of_model = isinstance(samples, MCMC) and attribute(samples.sampler, "model", None) is model
    if of_model:
        raise ValueError(
            "score_matching: expected an MCMC of numpyro_regloss.model that kept its gradients, got one without; "
            'run it with extra_fields=("z_grad",).'
        )
    if loss is None:
        raise ValueError(
            "score_matching: expected samples with scores, the gradients of the log density, got none; give "
            "score, or the loss whose exp(-loss) is the density, or use forward_kl, which needs no scores."
        )
    check_differentiable(["score_matching"], loss, "score_matching", "forward_kl")
    with differentiating(["score_matching"], loss, "score_matching", "forward_kl"):
        return replace_fields(draws, score=_scores(loss, draws.x))


@jax.jit
@own_settings
def _scores(loss: Loss, x: Array) -> Array:
    flat = x.reshape(-1, x.shape[-1])
    size = max(1, CHUNK // x.shape[-1])
    return -lax.map(jax.grad(loss.value), flat, batch_size=size).reshape(x.shape)


def _refuse(given: dict[str, Any], what: str, why: str) -> None:
    found = [name for name, value in given.items() if value is not None]
    if found:
        raise ValueError(f"score_matching: expected no {found} with {what}, {why}; leave them out.")


def _tell(gaussian: AnyGaussian, info: ScoreMatchingInfo, what: str) -> None:
    level = find_stack_level()
    if not bool(info.ok):
        raise ValueError(
            f"score_matching: expected a finite Gaussian from {what}, got one that is not, or that hangs on one "
            "weight. Look at the loss and its gradient about the start for NaN and infinity, start nearer to "
            "where the density is (init), or draw more samples from a distribution nearer to it."
        )
    if bool(info.floored):
        variance = np.asarray(gaussian.variance)
        names = info.names or [str(i) for i in range(len(variance))]
        warnings.warn(
            "score_matching: the samples and their scores do not determine the covariance (fewer samples than "
            f"dim + 2, or coordinates that do not vary; {names[int(np.argmin(variance))]} varies least), and a "
            "diagonal Gaussian stands in where they say nothing; draw more, or use "
            'covariance="low_rank" or "diagonal".',
            stacklevel=level,
        )
    # In the other families, correlations that the family does not have count as well.
    far = np.asarray(info.coordinate_divergence)
    if isinstance(gaussian, Gaussian) and gaussian.scale.ndim == 2 and far.max() > MOST_DIVERGENCE:
        worst = int(np.argmax(far))
        name = info.names[worst] if info.names else str(worst)
        warnings.warn(
            f"score_matching: along {name} the density is far from Gaussian (info.coordinate_divergence is "
            f"{far[worst]:.2g} there, above {MOST_DIVERGENCE}). The fit is likely too narrow there, and "
            "unless the samples are draws of the density, its mean is off. Compare it with forward_kl of such "
            "draws, or with reverse_kl.",
            stacklevel=level,
        )
    if not bool(info.converged):
        warnings.warn(
            f"score_matching: the Gaussian had not settled after {int(info.num_steps)} batches, or its factors "
            "had not converged: start nearer to where the density is, such as "
            "init=reverse_kl(rng_key, target).gaussian, allow more num_steps, larger num_draws, or fewer factors.",
            stacklevel=level,
        )
