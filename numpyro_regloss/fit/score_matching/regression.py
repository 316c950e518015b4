# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""The Gaussian whose scores are nearest to given ones, in closed form, with its standard errors.

For draws x with weights and scores s, N(m, C) minimizes the Fisher divergence E |s + C⁻¹ (x - m)|²_C, a number
that linear maps of the parameters do not change. With X = Cov(x) and S = Cov(s)

    m = E x + C E s,   C S C = X (dense),   C_i = sqrt(X_ii / S_ii) (diagonal),   c = sqrt(tr X / tr S) (isotropic)

The first is the geometric mean of X and S⁻¹. For a Gaussian, s is affine in x, so both are exact with any dim + 1
points that span the space, whatever their distribution. X and S enter only through the triangular factors of QR
decompositions, X = RᵀR and S = QᵀQ: with the singular values R Qᵀ = U σ Vᵀ it is C = (Rᵀ U) σ⁻¹ (Rᵀ U)ᵀ, and no
condition number is squared.

A Gaussian N(m₀, C₀) is kept where draws say nothing, by the proximal term of batch and match:
C S C + ρ C = X + ρ C₀.

References: Hyvärinen (2005), "Estimation of Non-Normalized Statistical Models by Score Matching"; Cai, Modi,
Pillaud-Vivien, Margossian, Gower, Blei & Saul (2024), "Batch and Match: Black-Box Variational Inference with a
Score-Based Divergence"; Seyboldt, Carlson & Carpenter (2026), "Preconditioning Hamiltonian Monte Carlo by
Minimizing Fisher Divergence".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_regloss._core.linalg import after, lower_of_root
from numpyro_regloss._core.types import Array
from numpyro_regloss.draws.control_variates import Chains, series_error
from numpyro_regloss.gaussians.gaussian import AnyGaussian, Gaussian

__all__ = ["LEAST_LEFT", "Anchored", "Solution", "Standard", "errors_of", "mean_alone", "solve"]

# Least variance of a coordinate in which no draw differs, in units of the mean of the others.
LEAST_VARIANCE = 1e-6
# Least share that is left of a draw's influence: a regression that passes through all draws cannot tell its error.
LEAST_LEFT = 1e-3


class Standard(NamedTuple):
    """Draws and scores in the units of the draws.

    Attributes:
        weight: adding to one, `(draw,)`.
        z: draws about their mean, `(draw, dim)`.
        g: scores about their mean, `(draw, dim)`.
        mean_score: their mean, `(dim,)`.
    """

    weight: Array
    z: Array
    g: Array
    mean_score: Array


class Anchored(NamedTuple):
    """A Gaussian that is kept where draws say nothing.

    Attributes:
        offset: its mean from that of the draws, `(dim,)`.
        root: a matrix such that rootᵀ root is its covariance, `(row, dim)`.
        strength: ρ, in units of the weight of all draws together.
        share: of its mean, ρ / (1 + ρ), or zero where draws determine all.
    """

    offset: Array
    root: Array
    strength: Array
    share: Array


class Solution(NamedTuple):
    """A Gaussian, in the units of the draws, and what every draw contributes to it.

    Attributes:
        offset: its mean from that of the draws, `(dim,)`.
        scale: `()`, `(dim,)`, or a lower triangle `(dim, dim)`; None for that of the reference.
        influence: of every draw on the mean, `(draw, dim)`.
        variances: of every draw on the variances, `(draw, dim)`, of an isotropic one `(draw, 1)`, or None.
        products: of every draw on a dense covariance, (p pᵀ - q qᵀ) / 2, as the pair p, q, `(draw, dim)` each; or
            None.
        left: share of a draw's influence that its own pull on the regression leaves, `(draw,)`.
        divergence: the Fisher divergence per dimension: zero for a Gaussian.
        floored: whether draws and scores leave the covariance open somewhere.
    """

    offset: Array
    scale: Any
    influence: Array
    variances: Any
    products: Any
    left: Array
    divergence: Array
    floored: Array


def solve(
    data: Standard, structure: str, unit: Array, anchored: Anchored | None = None
) -> Solution:
    """The Gaussian of least Fisher divergence.

    Args:
        data: draws and scores.
        structure: `"isotropic"`, `"diagonal"` or `"dense"`.
        unit: what the draws were divided by, `(dim,)`: isotropic covariances are so in other units.
        anchored: of a dense covariance, what is kept where draws say nothing; default: the diagonal solution, for
            fewer draws than dim + 2 with the strength 1 / (draws · dim), else at rounding.

    Returns:
        The solution.
    """
    if structure == "isotropic":
        return _isotropic(data, unit)
    diagonal = _diagonal(data)
    if structure == "diagonal":
        return diagonal
    if anchored is None:
        anchored = _by_diagonal(data, diagonal)
    return _dense(data, anchored, diagonal.floored)


def mean_alone(data: Standard, width: AnyGaussian) -> Solution:
    """The mean of least Fisher divergence with a given covariance.

    Args:
        data: draws and scores.
        width: a Gaussian with that covariance, in the units of the draws, and the mean zero.

    Returns:
        The solution, without a covariance.
    """

    def moved(score: Array) -> Array:
        return width.scaled(width.scaled_transpose(score))

    influence = data.z + moved(data.g)
    divergence = data.weight @ jnp.mean(width.whiten(influence) ** 2, -1)
    left, never = jnp.ones_like(data.weight), jnp.asarray(False)
    return Solution(moved(data.mean_score), None, influence, None, None, left, divergence, never)


def errors_of(solution: Solution, chains: Chains) -> tuple[Array, Any]:
    """Standard errors of mean and covariance, from the influences of all draws.

    Args:
        solution: from `solve`.
        chains: how draws depend on each other; of it counts, weights and blocks are read.

    Returns:
        `(dim,)`, and `(dim, dim)`, `(dim,)`, `()`, or None without a covariance, in the units of the draws.
    """
    left, dim = solution.left[:, None], solution.offset.size
    influence = solution.influence / left
    if solution.variances is None:
        return series_error(chains, influence), None
    # One call for both, since every one would be compiled.
    errors = series_error(chains, jnp.concatenate([influence, solution.variances / left], -1))
    mean, own = errors[:dim], errors[dim:]
    if solution.products is None:
        return mean, own if own.size == dim else own[0]
    # Σ w² (p pᵀ - q qᵀ)² / 4, entry by entry, is that of independent draws; entries take the autocorrelation times
    # of the variances on their row and column, in the geometric mean.
    p, q = solution.products
    weight = (chains.weight / solution.left)[:, None]
    p, cross, q = weight * p**2, weight * p * q, weight * q**2
    square = jnp.maximum(0.25 * (p.T @ p + q.T @ q - 2.0 * cross.T @ cross), 0.0)
    diagonal = jnp.diagonal(square)
    time = own**2 / jnp.where(diagonal > 0, diagonal, 1.0)
    error = jnp.sqrt(square * jnp.sqrt(time[:, None] * time))
    return mean, jnp.where(jnp.eye(dim, dtype=bool), own, error)


def _isotropic(data: Standard, unit: Array) -> Solution:
    # In units of the largest coordinate, since squares of others may overflow.
    largest = jnp.max(unit)
    relative = unit / largest
    of_draws = jnp.sum((relative * data.z) ** 2, -1, keepdims=True)
    of_scores = jnp.sum((data.g / relative) ** 2, -1, keepdims=True)
    variance, by_draw, floored = _ratio(data.weight, of_draws, of_scores)
    fixed = mean_alone(data, _wide(jnp.sqrt(variance) / relative))
    influence = fixed.influence + by_draw / relative**2 * data.mean_score
    solution = fixed._replace(
        scale=largest * jnp.sqrt(variance[0]),
        influence=influence,
        variances=largest**2 * by_draw,
        floored=floored,
    )
    return solution._replace(left=_left(data.weight))


def _diagonal(data: Standard) -> Solution:
    variance, by_draw, floored = _ratio(data.weight, data.z**2, data.g**2)
    fixed = mean_alone(data, _wide(jnp.sqrt(variance)))
    return fixed._replace(
        scale=jnp.sqrt(variance),
        influence=fixed.influence + by_draw * data.mean_score,
        variances=by_draw,
        left=_left(data.weight),
        floored=floored,
    )


def _wide(scale: Array) -> Gaussian:
    return Gaussian(jnp.zeros_like(scale), scale)


def _ratio(weight: Array, of_draws: Array, of_scores: Array) -> tuple[Array, Array, Array]:
    # sqrt(X / S), what every draw contributes to it, and whether some of it is open.
    x, s = weight @ of_draws, weight @ of_scores
    known = (x > 0) & (s > 0)
    x_known, s_known = jnp.where(known, x, 1.0), jnp.where(known, s, 1.0)
    ratio = jnp.sqrt(x_known / s_known)
    by_draw = 0.5 * ratio * (of_draws / x_known - of_scores / s_known)
    # Where the score is constant the draws' own variance is all there is.
    ratio = jnp.where(known, ratio, jnp.where(x > 0, x, LEAST_VARIANCE))
    return ratio, jnp.where(known, by_draw, of_draws - x), jnp.any(~known)


def _left(weight: Array) -> Array:
    # One coefficient for a mean, one for a slope.
    return jnp.maximum(1.0 - 2.0 * weight, LEAST_LEFT)


def _by_diagonal(data: Standard, diagonal: Solution) -> Anchored:
    dim, dtype = diagonal.offset.size, data.z.dtype
    count = jnp.sum(data.weight > 0)
    enough = count >= dim + 2
    few = 1.0 / (dim * jnp.maximum(count, 1).astype(dtype))
    strength = jnp.where(enough, jnp.finfo(dtype).eps, few)
    share = jnp.where(enough, 0.0, strength / (1.0 + strength))
    return Anchored(diagonal.offset, jnp.diag(diagonal.scale), strength, share)


def _dense(data: Standard, anchored: Anchored, floored: Array) -> Solution:
    dim, root = anchored.offset.size, jnp.sqrt(data.weight)[:, None]
    strength, share = anchored.strength, anchored.share
    pull = jnp.sqrt(share)
    rows = [root * data.z, pull * anchored.offset[None], jnp.sqrt(strength) * anchored.root]
    upper = jnp.linalg.qr(jnp.concatenate(rows), mode="r")
    rows = [root * data.g, pull * data.mean_score[None]]
    rows.append(jnp.zeros((max(dim - 1 - len(data.weight), 0), dim), root.dtype))
    of_scores = jnp.linalg.qr(after(upper[0, 0], jnp.concatenate(rows)), mode="r")
    product = upper @ of_scores.T
    vector, value, _ = jnp.linalg.svd(product, full_matrices=True)
    # Of κ σ² κ + ρ κ = 1 the root that is positive.
    kappa = 2.0 / (strength + jnp.sqrt(strength**2 + 4.0 * value**2))
    basis = (upper.T @ vector) * jnp.sqrt(kappa)
    offset = (1.0 - share) * basis @ (basis.T @ data.mean_score) + share * anchored.offset
    # Coordinates along the basis, of which the covariance is the identity.
    solved = jax.scipy.linalg.solve_triangular(
        after(kappa[0], upper), data.z.T, trans=1, lower=False
    )
    u, v = (solved.T @ vector) / jnp.sqrt(kappa), data.g @ basis
    along = value**2 * kappa
    half = along + 0.5 * strength
    pulled = (data.mean_score @ basis) / (half[:, None] + half)
    influence = v + u * (u @ pulled.T) - v * (v @ pulled.T)
    p, q = (u / jnp.sqrt(half)) @ basis.T, (v / jnp.sqrt(half)) @ basis.T
    tiny = jnp.finfo(root.dtype).tiny
    leverage = 0.5 * (u**2 @ kappa + v**2 @ (1.0 / jnp.maximum(along, tiny)))
    left = jnp.maximum(1.0 - data.weight * (1.0 + leverage), LEAST_LEFT)
    scale = lower_of_root(after(leverage[0], basis.T))
    return Solution(
        offset,
        scale,
        data.z + influence @ basis.T,
        0.5 * (p**2 - q**2),
        (p, q),
        left,
        data.weight @ jnp.mean((u + v) ** 2, -1),
        floored | ~(value[-1] > jnp.finfo(root.dtype).eps * value[0]),
    )
