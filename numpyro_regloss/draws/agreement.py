# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Whether the chains that a user gives agree: split R-hat, and a sentence that says what else it may be.

Reference: Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021), "Rank-normalization, folding, and localization: an
improved R-hat for assessing convergence of MCMC".
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import fdtri

from numpyro_regloss._core.settings import own_settings
from numpyro_regloss._core.stats import effective_sample_size, split_rhat
from numpyro_regloss._core.types import Array
from numpyro_regloss.draws.base import Draws

__all__ = ["chains_rhat", "disagreement"]

LEAST_DRAWS = 4
# R-hat of good runs is 1.03 in the median when effective draws are few; one chain of four that is off by a
# standard deviation gives 1.1.
MAX_RHAT = 1.1
# Probability that chains which agree are reported, over all coordinates.
FALSE_ALARM = 1e-3
# Effective draws below which moments say little, whether or not chains differ by more than chance.
FEW_DRAWS = 10
# Draws of half a chain that count, were there no other half, from which on it has a place of its own.
LEAST_WITHIN = 5
# Coordinates that a warning names.
MOST_NAMES = 5


@jax.jit
@own_settings
def chains_rhat(draws: Draws) -> Array:
    """Split R-hat of every coordinate.

    Args:
        draws: any.

    Returns:
        `(dim,)`; NaN where it does not apply: of weighted or independent draws, and of fewer than four per chain.
    """
    shape = jax.eval_shape(lambda: draws.x)
    if draws.block_size is not None or shape.shape[1] < LEAST_DRAWS:
        return jnp.full(shape.shape[-1:], jnp.nan, shape.dtype)
    unweighted = jnp.all(draws.log_weight == draws.log_weight[0, 0])
    return jnp.where(unweighted, split_rhat(draws.x), jnp.nan)


def disagreement(x: Any, rhat: Any, ess: np.ndarray, names: tuple[str, ...] | None) -> str | None:
    """Says where chains do not agree, or hardly move.

    Args:
        x: draws, `(chain, draw, dim)`.
        rhat: from `chains_rhat`.
        ess: effective draws of each coordinate, `(dim,)`, as far as they are known.
        names: of the coordinates, or None.

    Returns:
        Some sentences, or None where nothing is wrong or nothing can be told.
    """
    values = np.asarray(rhat)
    if np.isnan(values).any():
        return None
    suspects = np.flatnonzero(values > MAX_RHAT)
    count = x.shape[0] * x.shape[1]
    wandering = (np.asarray(ess) < FEW_DRAWS) & (count > 10 * FEW_DRAWS)
    if not (len(suspects) or wandering.any()):
        return None
    apart, size = _apart(np.asarray(x)[..., suspects], values[suspects], len(values))
    # Few draws count where chains are in different modes too, but each has then seen its own.
    settled = apart & (size >= LEAST_WITHIN)
    wandering[suspects] = (wandering[suspects] | apart) & ~settled
    modes, lost = suspects[settled], np.flatnonzero(wandering)
    parts = "chains" if len(x) > 1 else "halves of the chain"
    found = []
    if len(modes):
        found.append(
            f"the {parts} do not agree, with a split R-hat above {MAX_RHAT} at "
            f"{_list(modes, values, names)}: they are in different modes, or labels that can be exchanged are in "
            "different orders, and the Gaussian is fitted to their mixture. Look at the draws of each chain; "
            "order the labels in the model, or run longer."
        )
    if len(lost):
        found.append(
            f"the draws wander at {_list(lost, values, names)}, with split R-hat in brackets: fewer than "
            f"{FEW_DRAWS} of the {count} are effective, so that their moments say little. Perhaps the density "
            "does not fall off along these parameters: give them a proper prior or a reference, or leave them "
            "out. Or the chains mix slowly: run longer, or reparametrize."
        )
    return " And ".join(found) or None


def _list(which: np.ndarray, rhat: np.ndarray, names: tuple[str, ...] | None) -> str:
    which = which[np.argsort(-rhat[which], kind="stable")]
    rest = len(which) - MOST_NAMES
    listed = ", ".join(f"{names[i] if names else i} ({rhat[i]:.2f})" for i in which[:MOST_NAMES])
    return listed + (f" and {rest} more" if rest > 0 else "")


def _apart(x: np.ndarray, rhat: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    # Whether the differences of half chains are more than chance, given how correlated draws within them are; and
    # how many draws of half a chain count, were there only the correlations within.
    if not x.shape[-1]:
        return np.zeros(0, bool), np.zeros(0)
    half = x.shape[1] // 2
    halves = np.concatenate([x[:, :half], x[:, -half:]])
    count = len(halves)
    within = np.asarray(effective_sample_size(halves - halves.mean(1, keepdims=True)))
    size = np.clip(within / count, 1.0, half)
    # By chance, size (R-hat² - 1) is a ratio of variances, F-distributed but for 1 / half.
    quantile = fdtri(count - 1, np.maximum(count * (size - 1), 1.0), 1.0 - FALSE_ALARM / dim)
    return rhat > np.sqrt(1.0 + quantile / size), size
