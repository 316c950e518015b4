# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Rank-normalized diagnostics of Markov chains: bulk and tail ESS and R-hat, as ArviZ computes them.

For the draws at the end of a run, on the host; the cheaper ones of every step are in `_core.stats`. Not by ArviZ,
which has no R-hat of a single chain.

Reference: Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021), "Rank-normalization, folding, and localization: an
improved R-hat for assessing convergence of MCMC".
"""

from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from numpyro_regloss._core.stats import effective_sample_size, split_rhat
from numpyro_regloss._core.types import Array

__all__ = ["RankDiagnostics", "rank_diagnostics"]

TAILS = (0.05, 0.95)


class RankDiagnostics(NamedTuple):
    """One value per coordinate.

    Attributes:
        ess_bulk: effective sample size of the middle of the distribution.
        ess_tail: the smaller of those of the 5 % and the 95 % quantile.
        rhat: the greater of R-hat of ranks and of ranks of distances from the median.
    """

    ess_bulk: np.ndarray
    ess_tail: np.ndarray
    rhat: np.ndarray


def rank_diagnostics(x: Array) -> RankDiagnostics:
    """Diagnoses chains.

    Args:
        x: draws, `(chain, draw, dim)`.

    Returns:
        The diagnostics. Effective sample sizes are zero, and R-hat infinite, where a draw is not finite.
    """
    draws = np.asarray(x)
    chains, count, dim = draws.shape
    # An odd draw is left out amid the chain, as halves of chains do, so that ranks are those of what is compared.
    half = count // 2
    halves = np.concatenate([draws[:, :half], draws[:, count - half :]], 1)
    bulk = _normal_scores(halves)
    folded = _normal_scores(np.abs(halves - np.median(halves, (0, 1))))
    tails = np.quantile(draws, TAILS, (0, 1))
    below = np.concatenate([draws <= tail for tail in tails], -1).astype(draws.dtype)
    finite = np.isfinite(draws).all((0, 1))
    tail = np.asarray(effective_sample_size(below)).reshape(len(TAILS), dim).min(0)
    rhat = np.maximum(np.asarray(split_rhat(bulk)), np.asarray(split_rhat(folded)))
    return RankDiagnostics(
        ess_bulk=np.where(finite, effective_sample_size(bulk), 0.0),
        ess_tail=np.where(finite, tail, 0.0),
        rhat=np.where(finite, rhat, np.inf),
    )


def _normal_scores(x: np.ndarray) -> np.ndarray:
    # Normal quantiles of the ranks over all chains; ties share their mean rank.
    def ranks(column: np.ndarray) -> np.ndarray:
        ordered = np.sort(column)
        first = np.searchsorted(ordered, column, "left")
        return 0.5 * (first + np.searchsorted(ordered, column, "right") + 1)

    flat = x.reshape(-1, x.shape[-1])
    rank = np.apply_along_axis(ranks, 0, flat) if flat.size else flat
    return ndtri((rank - 0.375) / (len(flat) + 0.25)).reshape(x.shape).astype(x.dtype)
