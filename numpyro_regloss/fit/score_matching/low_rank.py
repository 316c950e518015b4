# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""The diagonal plus factors of least Fisher divergence, from draws that need not span the space.

    minimize   E |s + C⁻¹ (x - m)|²_C   over   C = diag(d) + F Fᵀ,   m = E x + C E s

by quasi-Newton steps in the logarithm of d and in F, in units of the diagonal solution. The sum of squares
itself is minimized, and not its expansion into traces, since of a Gaussian of the family it falls to zero: then a
few more draws than factors determine it. An evaluation costs O(draws · dim · rank).

Factors start along the directions in which draws spread most and scores least. Batch, match, and patch (Modi et
al.) takes the Gaussian of the family that is nearest to the dense solution; where draws do not span the space that
one is mostly what was there before.

Reference: Modi, Cai, Margossian, Blei, Gower & Saul (2025), "Batch, Match, and Patch: Low-Rank Approximations for
Score-Based Variational Inference".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from numpyro_regloss._core.linalg import after
from numpyro_regloss._core.quasi_newton import Trial, minimize
from numpyro_regloss._core.types import Array
from numpyro_regloss.fit.score_matching.regression import Standard
from numpyro_regloss.gaussians.low_rank import LowRankGaussian

__all__ = ["Factors", "factors_of_least_divergence"]

# Draws that the start of the factors is found from.
FEW_DRAWS = 128
# Least and largest share of a variance that is left to the diagonal at the start.
LEAST_SHARE, MOST_SHARE = 0.05, 1.0
MOST_TRIALS = 500
# The least decrease worth a step: a share of the value, and of the machine epsilon.
GAIN = (1e-6, 1e-5)


class Factors(NamedTuple):
    """The solution.

    Attributes:
        gaussian: about zero.
        divergence: the Fisher divergence per dimension.
        converged: whether steps gained nothing any more, or no more than rounding.
    """

    gaussian: LowRankGaussian
    divergence: Array
    converged: Array


def factors_of_least_divergence(
    data: Standard,
    scale: Array,
    rank: int,
    near: LowRankGaussian | None = None,
    max_trials: int = MOST_TRIALS,
) -> Factors:
    """Fits a diagonal and factors.

    Args:
        data: draws and scores, in any units.
        scale: of the diagonal solution, `(dim,)`.
        rank: number of factors.
        near: another start, for where it is the better one, in the units of the draws.
        max_trials: evaluations at most.

    Returns:
        The Gaussian about zero, in the units of the draws.
    """
    root = jnp.sqrt(data.weight)[:, None]
    x, score = root * data.z / scale, root * data.g * scale
    dim = scale.size
    start, unravel = ravel_pytree(_start(x, score, rank))

    def divergence(flat: Array) -> Array:
        log_diagonal, factor = unravel(flat)
        diagonal = jnp.exp(log_diagonal)
        weighted = factor / diagonal[:, None]
        capacitance = jnp.eye(rank, dtype=x.dtype) + factor.T @ weighted
        along = jax.scipy.linalg.solve(capacitance, (x @ weighted).T, assume_a="pos")
        residual = score + x / diagonal - along.T @ weighted.T
        return (jnp.sum(residual**2 * diagonal) + jnp.sum((residual @ factor) ** 2)) / dim

    def evaluate(flat: Array) -> Trial:
        value, gradient = jax.value_and_grad(divergence)(flat)
        eps = jnp.finfo(flat.dtype).eps
        return Trial(
            value,
            gradient,
            rounding=4.0 * eps * value,
            tolerance=jnp.asarray(eps),
            gain=GAIN[0] * value + GAIN[1] * eps,
            details=None,
        )

    if near is not None:
        diagonal, factor = near.diagonal / scale**2, near.factor / scale[:, None]
        other = ravel_pytree((jnp.log(diagonal), factor))[0]
        start = jnp.where(divergence(other) < divergence(start), other, start)
    found = minimize(evaluate, start, jnp.asarray(max_trials), max_trials)
    log_diagonal, factor = unravel(found.x)
    diagonal = scale**2 * jnp.exp(log_diagonal)
    gaussian = LowRankGaussian(jnp.zeros_like(scale), diagonal, scale[:, None] * factor)
    # A search that ended before it had used up its evaluations was stopped by rounding.
    return Factors(gaussian, found.trial.value, found.num_trials < max_trials)


def _start(x: Array, score: Array, rank: int) -> Any:
    # In the span of some draws and scores.
    step = -(-len(x) // FEW_DRAWS)
    x, score = x[::step] * step**0.5, score[::step] * step**0.5
    basis = jnp.linalg.qr(jnp.concatenate([x, score]).T)[0]
    basis = basis[:, : min(basis.shape)]
    of_draws, of_scores = after(basis[0, 0], x) @ basis, score @ basis
    difference = of_draws.T @ of_draws - of_scores.T @ of_scores
    vector = jnp.linalg.eigh(difference)[1][:, ::-1][:, :rank]
    vector = jnp.pad(vector, ((0, 0), (0, rank - vector.shape[1])))
    spread = jnp.sum((of_draws @ vector) ** 2, 0)
    pull = jnp.sum((of_scores @ vector) ** 2, 0)
    variance = jnp.sqrt(spread / jnp.where(pull > 0, pull, 1.0))
    # Of a factor that is zero the gradient is zero.
    factor = (basis @ vector) * jnp.sqrt(jnp.maximum(variance - MOST_SHARE, LEAST_SHARE))
    diagonal = jnp.clip(1.0 - jnp.sum(factor**2, -1), LEAST_SHARE, MOST_SHARE)
    return jnp.log(diagonal), factor
