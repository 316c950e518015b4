# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""The diagonal plus factors of least Fisher divergence, from draws that need not span the space.

    minimize   E |s + C⁻¹ (x - m)|²_C   over   C = diag(d) + F Fᵀ,   m = E x + C E s

by quasi-Newton steps in the logarithm of d and in F, in units of the diagonal solution. The sum of squares itself
is minimized, and not its expansion into traces. If q is a Gaussian of the family, the sum falls to zero, and a few
more draws than factors determine the solution. An evaluation costs O(draws · dim · rank).

The starting point is found by alternation. For a Gaussian of the family x - m + d s = F z has low rank, with the
left singular vectors z, and the residual of x after regression on z is -d times that of s. Batch, match, and patch
(Modi et al.) instead takes the Gaussian of the family that is nearest to the dense solution. If draws do not span
the space, that Gaussian hardly differs from the previous one.

Reference: Modi, Cai, Margossian, Blei, Gower & Saul (2025), "Batch, Match, and Patch: Low-Rank Approximations for
Score-Based Variational Inference".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from numpyro_regloss._core.linalg import after
from numpyro_regloss._core.quasi_newton import Trial, minimize
from numpyro_regloss._core.types import Array
from numpyro_regloss.fit.score_matching.regression import Standard, solve
from numpyro_regloss.gaussians.low_rank import LowRankGaussian

__all__ = ["Factors", "factors_of_least_divergence"]

# Draws that the start of the factors is found from.
FEW_DRAWS = 128
# Alternations of diagonal and factors there, and the range of the diagonal in units of the diagonal solution.
REFINEMENTS, LEAST_SHARE, MOST_SHARE = 20, 1e-3, 2.0
MOST_TRIALS = 500
# The least decrease worth a step, as a share of the value.
GAIN = 1e-6


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
            tolerance=jnp.asarray(eps**2),
            gain=GAIN * value + eps**2,
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
    step = -(-len(x) // FEW_DRAWS)
    x, score = x[::step] * step**0.5, score[::step] * step**0.5

    def latent(diagonal: Array) -> tuple[Array, Array]:
        # In units of the diagonal.
        along = (x + diagonal * score) / jnp.sqrt(diagonal)
        return jnp.linalg.eigh(along @ along.T)[1][:, -rank:], along

    def refine(_: int, diagonal: Array) -> Array:
        z = latent(diagonal)[0]
        # What z leaves of a draw is -d times what it leaves of the score.
        of_draws, of_scores = (jnp.sum((a - z @ (z.T @ a)) ** 2, 0) for a in (x, score))
        ratio = jnp.sqrt(of_draws / jnp.where(of_scores > 0, of_scores, 1.0))
        return jnp.clip(ratio, LEAST_SHARE, MOST_SHARE)

    diagonal = lax.fori_loop(0, REFINEMENTS, refine, jnp.ones_like(x[0]))
    z, along = latent(diagonal)
    root = jnp.sqrt(diagonal)
    basis = jnp.linalg.qr(after(z[0, 0], along.T @ z))[0]
    # Within the span of the factors the solution is dense, and beside it the diagonal's.
    zero = jnp.zeros(rank, x.dtype)
    ones = jnp.ones(len(x), x.dtype)
    data = Standard(ones, (x / root) @ basis, (score * root) @ basis, zero)
    within = solve(data, "dense", 1.0 + zero).scale
    value, vector = jnp.linalg.eigh(within @ within.T)
    # Of a factor that is zero the gradient is zero.
    factor = root[:, None] * (basis @ vector) * jnp.sqrt(jnp.maximum(value - 1.0, LEAST_SHARE))
    return jnp.log(diagonal), factor
