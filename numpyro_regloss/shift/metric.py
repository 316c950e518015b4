# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Mass matrices, as linear coordinates in which the kernels run with unit mass, and their estimates from draws.

A path of mass M in z is one of unit mass in y = F⁻¹ z, where F Fᵀ = M⁻¹, with F of the form of `Coordinates`.

Scores s = ∇ log q of a Gaussian are -P (z - mean): draws and scores determine its precision P as soon as there are
more draws than parameters, whether the chains have converged or not. The inverse mass matrix is the geometric mean
of the covariance of the draws and the inverse of that of the scores,

    G Cov(s) G = Cov(z),   which P⁻¹ solves,

the minimizer of the Fisher divergence from the standard normal in y; for a diagonal one G = sd(z) / sd(s). With
Cov(z) = L Lᵀ, Cov(s) = Rᵀ R and R L = U S Vᵀ, a root of G is F = L V S^-1/2, and S^-1/2 Uᵀ R is its inverse.

Scores of q have mean zero. Draws that have not yet reached q have another mean, which is left out. Where a wall
cuts q off, the mean of the scores is a slope of 1 / w for draws within a width w, and their variance says nothing
about w. So the part of the mean beyond `MOST_MEAN` standard deviations counts as a variance of the coordinate.

A reference of another scale changes the precision. In its units z' = C⁻¹ z, up to a shift, that of a Gaussian q is
P' = I + Cᵀ (P - I) C: the loss keeps its curvature, and the regularizer is white again. With P = F⁻ᵀ F⁻¹ and
Fᵀ (C⁻ᵀ C⁻¹ - I) F + I = V E Vᵀ, a root of its inverse is C⁻¹ F V E^-1/2.

References: Seyboldt, Carlson & Carpenter (2026), "Preconditioning Hamiltonian Monte Carlo by Minimizing Fisher
Divergence"; Stan Development Team, "Stan Reference Manual", chapter on HMC algorithm parameters.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from numpyro_regloss._core.coordinates import Coordinates
from numpyro_regloss._core.linalg import after, inverse_of_lower, lower_of_root
from numpyro_regloss._core.pytree import all_finite, strip_weak_types
from numpyro_regloss._core.types import Array
from numpyro_regloss.gaussians.gaussian import Gaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = ["METRICS", "Metric", "unit_of"]

METRICS = ("variance", "scores", "low_rank")
# Up to so many parameters a metric of low rank is dense; beyond, half as many directions are those in which q is
# widest and half those in which it is narrowest.
SMALL = 64
RANK = 32
# More draws than these, of a longer window only the last, say little more of a metric.
MOST_DRAWS = 512
# Draws of the diagonal metric are added to the n there are, n min(1, (rank / n)^4) of them: too few to hide a
# correlation where draws span every direction several times, and enough where they hardly do that no direction is
# left to draws or scores alone. At least this share, for the sake of rounding.
LEAST_PRIOR = 1e-5
# Mean of scores, in their standard deviations, that may be that of draws on their way.
MOST_MEAN = 3.0
# Of the precision in the old units of mass: a reference that grows widens q no further than to twice its width.
LEAST_SHARE = 0.25
# Draws of a known metric, as which it is brought to a form with fewer numbers.
KNOWN = 1e6
# Stan's, of variances.
STAN_DRAWS, STAN_VARIANCE = 5, 1e-3


class Metric(NamedTuple):
    """Which mass matrix is estimated, and how.

    Attributes:
        kind: one of `METRICS`.
        dense: whether it is dense in any dimension.
    """

    kind: str
    dense: bool

    @property
    def from_scores(self) -> bool:
        """Whether scores are used."""
        return self.kind != "variance"

    def identity(self, dim: int, dtype: jnp.dtype) -> Coordinates:
        """Unit mass.

        Args:
            dim: number of parameters.
            dtype: of the coordinates.

        Returns:
            The coordinates z themselves.
        """
        rank = self._rank(dim)
        inner = jnp.eye(rank, dtype=dtype) if rank else None
        basis = jnp.zeros((dim, rank), dtype) if 0 < rank < dim else None
        return Coordinates(jnp.ones(dim, dtype), basis, inner, inner)

    def num_draws(self, dim: int) -> int:
        """How many draws an estimate takes at most."""
        if self.dense:
            return max(MOST_DRAWS, 8 * dim)
        return MOST_DRAWS if self._rank(dim) in (0, dim) else 4 * RANK

    def estimate(self, old: Coordinates, z: Array, score: Array, used: Array) -> Coordinates:
        """The metric of draws.

        Args:
            old: the one in force, which stays where draws do not tell of another.
            z: draws, `(draw, dim)`.
            score: gradients of the log density there.
            used: which of them count, `(draw,)`.

        Returns:
            The next one.
        """
        new, usable = self.found(z, score, used)
        return jax.tree.map(partial(jnp.where, usable), new, old)

    def found(self, z: Array, score: Array, used: Array) -> tuple[Coordinates, Array]:
        """The metric of draws, and whether they tell of one; arguments as of `estimate`."""
        (z, _), (score, slope) = _centered(z, used), _centered(score, used)
        count, rank = jnp.sum(used), self._rank(z.shape[1])
        if self.from_scores:
            spread = MOST_MEAN * jnp.linalg.norm(score, axis=0)
            slope = jnp.maximum(jnp.sqrt(count) * jnp.abs(slope) - spread, 0)
            new = _from_scores(z, score, slope, count, rank)
        else:
            new = _from_variance(z, count, rank)
        return new, all_finite(new) & jnp.all(new.scale > 0)

    def first(self, z: Array, score: Array, used: Array) -> Coordinates:
        """A diagonal metric from a few points, which need be no draws, in the coordinates of this one.

        Args:
            z: points near each other, `(point, dim)`.
            score: gradients of the log density there.
            used: which of them count, `(point,)`.

        Returns:
            Coordinates to start from.
        """
        (z, _), (score, _) = _centered(z, used), _centered(score, used)
        scale = _diagonal(z, score)
        usable = jnp.isfinite(scale) & (scale > 0)
        unit = self.identity(z.shape[1], z.dtype)
        return unit._replace(scale=jnp.where(usable, scale, unit.scale))

    def moved(self, old: Coordinates, before: Array, now: Array) -> Coordinates:
        """The metric in units of another reference, of the same loss.

        Args:
            old: the metric in units of the last reference.
            before: `unit_of` that one's target.
            now: the same of the next one.

        Returns:
            The next one; where units are the same, the old one.
        """
        dense = now.ndim == 2
        change = solve_triangular(before, now, lower=True) if dense else now / before
        # A loop, since vmap makes a conditional run both of its branches at every step.
        count = jnp.any(before != now).astype(int)
        return lax.fori_loop(0, count, lambda _, metric: self._in_units(metric, change), old)

    def _in_units(self, old: Coordinates, change: Array) -> Coordinates:
        dim = len(old.scale)
        rank = self._rank(dim)
        if change.ndim < 2 and rank < dim:
            return _of_diagonal_change(old, jnp.broadcast_to(change, (dim,)))
        identity = jnp.eye(dim, dtype=old.scale.dtype)
        change = change if change.ndim == 2 else change * identity
        forth = inverse_of_lower(change) @ old.forth(identity).T
        back = old.back(identity).T @ change
        root, inverse = _root(forth, back, identity - change.T @ change)
        if rank == dim:
            return Coordinates(jnp.ones_like(old.scale), None, root, inverse)
        size = jnp.asarray(KNOWN, root.dtype)
        rows = jnp.sqrt(size / dim)
        return _from_scores(rows * root.T, rows * inverse, jnp.zeros(dim, root.dtype), size, rank)

    def _rank(self, dim: int) -> int:
        if self.dense:
            return dim
        if self.kind != "low_rank":
            return 0
        return dim if dim <= SMALL else RANK


def unit_of(target: RegularizedLoss) -> Array:
    """What a metric depends on beside the loss: scale / T^1/2, where T is the temperature.

    Args:
        target: the target.

    Returns:
        `()`, `(dim,)` or lower triangular, `(dim, dim)`.
    """
    reference = target.reference
    # No anchor makes references of low rank, so that their scale stays.
    one = jnp.ones((), reference.mean.dtype)
    scale = reference.scale if isinstance(reference, Gaussian) else one
    return strip_weak_types(scale / jnp.sqrt(jnp.asarray(target.temperature, scale.dtype)))


def _root(forth: Array, back: Array, rest: Array) -> tuple[Array, Array]:
    # Of the inverse of  backᵀ back + rest,  and its inverse; `forth` is that of `back`.
    values, vectors = jnp.linalg.eigh(forth.T @ rest @ forth)
    roots = jnp.sqrt(jnp.maximum(1.0 + values, LEAST_SHARE))
    return forth @ (vectors / roots), (vectors * roots).T @ back


def _of_diagonal_change(old: Coordinates, change: Array) -> Coordinates:
    ratio = change / old.scale
    precision = jnp.maximum(1.0 - change**2 + ratio**2, LEAST_SHARE * ratio**2)
    scale = 1.0 / jnp.sqrt(precision)
    if old.basis is None or old.inner is None or old.inner_inverse is None:
        return Coordinates(scale, None, None, None)
    # Directions in the new units of the diagonal, and the precision in them, `upper M upperᵀ` beside the identity.
    basis, upper = jnp.linalg.qr((scale * ratio)[:, None] * old.basis)
    forth = inverse_of_lower(upper.T) @ old.inner
    back = old.inner_inverse @ upper.T
    rest = jnp.eye(len(upper), dtype=upper.dtype) - upper @ upper.T
    return Coordinates(scale, basis, *_root(forth, back, rest))


def _centered(rows: Array, used: Array) -> tuple[Array, Array]:
    used = used[:, None]
    mean = jnp.sum(jnp.where(used, rows, 0), 0) / jnp.sum(used)
    return jnp.where(used, rows - mean, 0), mean


def _from_variance(z: Array, count: Array, rank: int) -> Coordinates:
    weight = count / (count + STAN_DRAWS)
    least = STAN_VARIANCE * (1 - weight)
    if not rank:
        variance = weight * jnp.sum(z**2, 0) / (count - 1) + least
        return Coordinates(jnp.sqrt(variance), None, None, None)
    identity = jnp.eye(rank, dtype=z.dtype)
    rows = [jnp.sqrt(weight / (count - 1)) * z, jnp.sqrt(least) * identity]
    lower = lower_of_root(jnp.concatenate(rows))
    return Coordinates(jnp.ones(rank, z.dtype), None, lower, inverse_of_lower(lower))


def _from_scores(z: Array, score: Array, slope: Array, count: Array, rank: int) -> Coordinates:
    scale = _diagonal(z, jnp.concatenate([score, slope[None]]))
    if not rank:
        return Coordinates(scale, None, None, None)
    z, score, basis = z / scale, score * scale, None
    size = jnp.sqrt(count * jnp.clip((rank / count) ** 4, LEAST_PRIOR, 1)).astype(z.dtype)
    if rank < len(scale):
        basis = _leading(z, score, rank // 2)
        prior = size**2 * (len(scale) - rank)

        def split(rows: Array) -> tuple[Array, Array]:
            part = rows @ basis
            return part, jnp.sqrt(jnp.sum((rows - part @ basis.T) ** 2) + prior)

        # What is left beside these directions has another scale than all of them together.
        (z, rest), (score, score_rest) = split(z), split(score)
        ratio = jnp.sqrt(rest / score_rest)
        scale, z, score = scale * ratio, z / ratio, score * ratio
    slopes = jnp.diag(slope * scale) if basis is None else (slope * scale)[:, None] * basis
    prior = size * jnp.eye(rank, dtype=z.dtype)
    lower = lower_of_root(jnp.concatenate([z, prior]))
    rows = jnp.concatenate([score, slopes, after(lower[0, 0], prior)])
    upper = jnp.linalg.qr(rows, mode="r")
    left, values, right = jnp.linalg.svd(upper @ lower)
    roots = jnp.sqrt(values)
    return Coordinates(scale, basis, lower @ (right.T / roots), (left / roots).T @ upper)


def _diagonal(z: Array, score: Array) -> Array:
    # Roots before the ratio: squares of scores in units of a wide reference can be beyond single precision.
    return jnp.sqrt(jnp.linalg.norm(z, axis=0) / jnp.linalg.norm(score, axis=0))


def _leading(z: Array, score: Array, number: int) -> Array:
    """An orthonormal basis of the directions in which draws vary most and of those in which scores do."""

    def directions(rows: Array) -> Array:
        # Of the smaller Gram matrix: draws are fewer than parameters where it pays.
        rows = jnp.pad(rows, ((0, max(0, number - len(rows))), (0, 0)))
        _, vectors = jnp.linalg.eigh(rows @ rows.T)
        found = rows.T @ vectors[:, -number:]
        norm = jnp.linalg.norm(found, axis=0)
        return found / jnp.where(norm > 0, norm, 1)

    wide = directions(z)
    narrow = directions(after(wide[0, 0], score))
    basis, _ = jnp.linalg.qr(jnp.concatenate([wide, narrow], 1))
    return basis
