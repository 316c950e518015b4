# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""The Gaussian whose scores are nearest to those of the draws: least Fisher divergence, the third direction.

    minimize   E |s(x) - ∇ log N(x)|²_C   over   N = N(mean, C)   of a family

The expectation is over the draws, whatever their distribution. For a Gaussian q the result is q itself, from dim +
2 draws on. With draws from q the mean is an estimate of E_q[x], as in `ForwardKL`, since E_q[s] = 0. With the
covariance of the reference kept, it is reference.mean - (tau / T) E ∇loss: a step of gradient descent with the
average gradient over the draws.

References: those of `regression` and `low_rank`.
"""

from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from numpyro_regloss._core.pytree import all_finite, pytree_dataclass, static_field
from numpyro_regloss._core.stats import normalize_log_weight
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.draws.control_variates import Chains
from numpyro_regloss.draws.moments import DOMINANT_WEIGHT, standardized, with_rounding
from numpyro_regloss.fit.base import Fit
from numpyro_regloss.fit.score_matching.low_rank import factors_of_least_divergence
from numpyro_regloss.fit.score_matching.regression import (
    LEAST_LEFT,
    Standard,
    errors_of,
    mean_alone,
    solve,
)
from numpyro_regloss.gaussians.families import check_family
from numpyro_regloss.gaussians.gaussian import AnyGaussian, Gaussian
from numpyro_regloss.gaussians.low_rank import LowRankGaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["ScoreMatching", "ScoreMatchingInfo", "fit_draws"]

WITH_SCORES = "shift.NUTS, HMC or AdaptiveImportance, or SMC or Kernel with gradients"


class ScoreMatchingInfo(NamedTuple):
    """Diagnostics of one fit.

    Attributes:
        ok: the Gaussian is finite, and not one weighted draw alone.
        num_loss: zero.
        num_grad: gradient evaluations of the fit's own; zero where scores come with the draws.
        mean_error: standard error of the mean given the distribution of the draws, `(dim,)`; infinite when one
            draw carries all weight.
        covariance_error: standard errors of the covariance: `(dim, dim)` for a dense one, `(dim,)` of the
            variances for a diagonal or low-rank one, `()` for an isotropic one; None with that of the reference.
        divergence: the Fisher divergence per dimension that is left: zero, up to rounding, where q is a Gaussian
            of the family; one and more where scores have nothing to do with their draws.
        floored: whether draws and scores did not determine the covariance: there were fewer draws than dim + 2, or
            coordinates or scores that do not vary.
        converged: whether factors converged and batches had settled; True where there are none.
        num_steps: batches that were drawn for a target; zero with draws.
        names: of the coordinates, where the samples had names; None within compiled code.
        coordinate_divergence: of `score_matching`: what the Gaussian leaves of each coordinate, mean square of
            x - mean + covariance @ score in units of its variance, `(dim,)`. Zero where q is a Gaussian of the
            family; `divergence`, a mean, hardly shows one skewed coordinate of many. None in a scheme.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    mean_error: Array
    covariance_error: Any
    divergence: Array
    floored: Array
    converged: Array
    num_steps: Array
    names: Any = None
    coordinate_divergence: Any = None


@pytree_dataclass
class ScoreMatching(Fit):
    """Least Fisher divergence between draws with scores and a Gaussian.

    Needs draws that have scores: those of `shift.NUTS`, `HMC` and `AdaptiveImportance`, of `SMC` and `Kernel`
    where they use gradients. They need not be draws of q: for a Gaussian q any points are enough. If q is skewed,
    the result depends on the distribution of the draws; with draws of q the mean is that of q.

    Args:
        covariance: `"reference"`: the mean only, with the covariance of the reference; `"isotropic"`,
            `"diagonal"`, `"dense"`; `"low_rank"`: a diagonal plus `rank` factors, itself of least divergence; no
            matrix is formed.
        rank: number of factors of `"low_rank"`.

    Raises:
        ValueError: if the family is unknown, or the rank does not fit it.

    Example:
        >>> ScoreMatching("dense").covariance
        'dense'
    """

    covariance: str = static_field(default="reference")  # ty: ignore[incompatible-attribute-override]
    rank: int | None = static_field(default=None)

    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_family(self.covariance, self.rank, "ScoreMatching")

    def init(self, rng_key: Key, target: RegularizedLoss) -> tuple[()]:
        """No state."""
        del rng_key, target
        return ()

    def step(
        self, rng_key: Key, state: tuple[()], target: RegularizedLoss, draws: Draws
    ) -> tuple[tuple[()], AnyGaussian, ScoreMatchingInfo]:
        """Fits the scores of the draws.

        Args:
            rng_key: unused.
            state: `()`.
            target: the target.
            draws: from the shift, with scores.

        Returns:
            `()`, the Gaussian and the info.

        Raises:
            ValueError: if the draws have no scores.
        """
        del rng_key
        return state, *fit_draws(self, draws, target.reference)


def fit_draws(
    method: ScoreMatching,
    draws: Draws,
    reference: AnyGaussian | None,
    near: LowRankGaussian | None = None,
) -> tuple[AnyGaussian, ScoreMatchingInfo]:
    """The Gaussian of least Fisher divergence to draws with scores.

    Args:
        method: family and rank.
        draws: with scores.
        reference: of the target, whose covariance may be kept; or None.
        near: where a search for factors may start, of the same rank; or None.

    Returns:
        The Gaussian and the info.

    Raises:
        ValueError: if there are no scores, or the draws are means that know no correlations.
    """
    score, family = draws.score, method.covariance
    if score is None:
        raise ValueError(
            "ScoreMatching: expected draws with scores, the gradients of log q, got none. They come with those of "
            f"{WITH_SCORES}; with other shifts use fit.ForwardKL."
        )
    dim, num = draws.x.shape[-1], draws.log_weight.size
    if method.rank is not None and method.rank >= dim:
        raise ValueError(
            f"ScoreMatching: expected a rank below the dimension {dim}, got {method.rank}; use "
            'covariance="dense".'
        )
    weight = normalize_log_weight(draws.log_weight).reshape(-1)
    x, score = draws.x.reshape(num, dim), score.reshape(num, dim)
    center, unit, z = standardized(x, weight)
    # Of a draw without weight the score may be anything.
    score = jnp.where((weight > 0)[:, None], score, score[jnp.argmax(weight)])
    mean_score = weight @ score
    data = Standard(weight, z, (score - mean_score) * unit, mean_score * unit)
    converged = jnp.asarray(True)
    if family == "reference":
        assert reference is not None
        solution = mean_alone(data, _in_units(reference, unit))
        gaussian: AnyGaussian = reference._replace(mean=center + unit * solution.offset)
    elif method.rank is not None:
        first = solve(data, "diagonal", unit)
        if near is not None:
            near = LowRankGaussian(
                0.0 * center, near.diagonal / unit**2, near.factor / unit[:, None]
            )
        found = factors_of_least_divergence(data, first.scale, method.rank, near)
        converged = found.converged
        solution = mean_alone(data, found.gaussian)
        # As for a dense one, whose regression has slopes near one.
        moved = solution.influence - z
        # A mean, a slope and the factors are the coefficients of every coordinate.
        left = jnp.maximum(1.0 - (2.0 + method.rank) * weight, LEAST_LEFT)
        solution = solution._replace(
            variances=0.5 * (z**2 - moved**2), left=left, floored=first.floored
        )
        gaussian = found.gaussian._replace(
            mean=center + unit * solution.offset,
            diagonal=unit**2 * found.gaussian.diagonal,
            factor=unit[:, None] * found.gaussian.factor,
        )
    else:
        solution = solve(data, family, unit)
        scale = solution.scale
        if family != "isotropic":
            scale = (unit[:, None] if family == "dense" else unit) * scale
        gaussian = Gaussian(center + unit * solution.offset, scale)
    chains = Chains(draws.x.shape[0], weight, z, data.g, None, draws.block_size)
    error, covariance_error = errors_of(solution, chains)
    alone = jnp.max(weight) > DOMINANT_WEIGHT
    error = with_rounding(unit * error, gaussian.mean, unit)
    if covariance_error is not None:
        scales = {0: 1.0, 1: unit**2, 2: unit[:, None] * unit}[covariance_error.ndim]
        covariance_error = jnp.where(alone, jnp.inf, scales * covariance_error)
    info = ScoreMatchingInfo(
        ok=all_finite(gaussian) & ~alone,
        num_loss=jnp.asarray(0),
        num_grad=jnp.asarray(0),
        mean_error=jnp.where(alone, jnp.inf, error),
        covariance_error=covariance_error,
        divergence=solution.divergence,
        floored=solution.floored,
        converged=converged,
        num_steps=jnp.asarray(0),
    )
    return gaussian, info


def _in_units(gaussian: AnyGaussian, unit: Array) -> AnyGaussian:
    # About zero.
    zero = jnp.zeros_like(unit)
    if isinstance(gaussian, LowRankGaussian):
        return LowRankGaussian(zero, gaussian.diagonal / unit**2, gaussian.factor / unit[:, None])
    scale = gaussian.scale / (unit[:, None] if gaussian.scale.ndim == 2 else unit)
    return Gaussian(zero, scale)
