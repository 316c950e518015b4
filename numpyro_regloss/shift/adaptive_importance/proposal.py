# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""The Gaussian that adaptive importance sampling draws from, and how scores and weights move it.

With U = -log q up to a constant, in coordinates where the reference is N(0, I), and g = ∇U at weighted draws e,

    C = Cov(g)⁻¹ Cov(g, e),   m = E e - C E g

are the covariance and the mean of q where q is Gaussian, whatever law the draws have: g is then affine in e. So a
proposal that is far off finds q as well. This is the regression of `draws.control_variates`, and m the mean that
it corrects.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from numpyro_regloss._core.linalg import after, inverse_root, lower_of_root
from numpyro_regloss._core.types import Array
from numpyro_regloss.gaussians.gaussian import AnyGaussian

__all__ = ["Proposal", "from_moments", "from_scores", "start"]

# Of the covariance over the reference's. Wider than the reference is q only where the loss is concave.
NARROWEST, WIDEST = 1e-12, 16.0
# Of eigenvalues over the largest, where a covariance was not positive.
LEAST_RATIO = 1e-6
# A step of the mean, in lengths of a draw's noise, sqrt(dim).
FARTHEST = 2.0
# Of the draws over the fitted covariance, in units of dim^(-1/2).
WIDER = 0.4
# Of the mean second moment of the scores: keeps directions as they were that the scores say nothing of.
RIDGE = 1e-5


class Proposal(NamedTuple):
    """A Gaussian in coordinates where the reference is N(0, I).

    Attributes:
        mean: `(dim,)`.
        scale: lower Cholesky factor of the covariance `(dim, dim)`, or standard deviations `(dim,)`.
    """

    mean: Array
    scale: Array

    @property
    def variance(self) -> Array:
        """Of each coordinate, `(dim,)`."""
        return jnp.sum(self.scale**2, -1) if self.scale.ndim == 2 else self.scale**2

    def widened(self) -> "Proposal":
        """A little wider: too narrow a proposal has weights without a variance, too wide a one costs draws."""
        # The share of effective draws that it costs is the same in all dimensions, WIDER² / 2.
        factor = jnp.sqrt(1.0 + WIDER / math.sqrt(self.mean.size))
        return Proposal(self.mean, factor * self.scale)

    def scaled(self, noise: Array) -> Array:
        """What standard normal noise becomes about the mean, `(..., dim)` -> `(..., dim)`."""
        return noise @ self.scale.T if self.scale.ndim == 2 else noise * self.scale

    def whitened(self, e: Array) -> Array:
        """The noise that leads to draws, `(draw, dim)` -> `(draw, dim)`."""
        gap = e - self.mean
        if self.scale.ndim == 1:
            return gap / self.scale
        return lax.linalg.triangular_solve(
            self.scale, gap, left_side=False, lower=True, transpose_a=True
        )

    def square(self, e: Array) -> Array:
        """Squared length of the noise that leads to draws, `(draw, dim)` -> `(draw,)`."""
        return jnp.sum(self.whitened(e) ** 2, -1)

    def times(self, vector: Array) -> Array:
        """The covariance times vectors, `(..., dim)` -> `(..., dim)`."""
        if self.scale.ndim == 1:
            return self.scale**2 * vector
        return (vector @ self.scale) @ self.scale.T

    def log_density(self, square: Array) -> Array:
        """Up to (2 pi)^(-dim / 2), of draws with such noise, `(draw,)` -> `(draw,)`."""
        diagonal = jnp.diagonal(self.scale) if self.scale.ndim == 2 else self.scale
        return -0.5 * square - jnp.sum(jnp.log(diagonal))

    def moved(self, old: AnyGaussian, new: AnyGaussian) -> "Proposal":
        """The same for another reference, as a Gaussian q would move with it.

        Args:
            old: the reference of the coordinates.
            new: the next one.

        Returns:
            The proposal in the coordinates of the next one.
        """
        # In the new coordinates e' = A⁻¹ (e - d), with A = S⁻¹ S' of the scales and d = S⁻¹ (c' - c).
        shift = old.whiten(new.mean)
        mean = self.mean + self.times(shift) - shift
        if self.scale.ndim == 1:
            ratio = jnp.sqrt(new.variance / old.variance)
            curvature = (self.scale**-2 - 1.0) * ratio**2
            variance = 1.0 / jnp.clip(1.0 + curvature, 1.0 / WIDEST, 1.0 / NARROWEST)
            # The pull of the loss, (C⁻¹ - I) e at the old mean of q, is that at the new one.
            return Proposal(variance * (mean / self.scale**2 * ratio), jnp.sqrt(variance))
        return self._moved_dense(mean, old, new)

    def _moved_dense(self, mean: Array, old: AnyGaussian, new: AnyGaussian) -> "Proposal":
        identity = jnp.eye(mean.size, dtype=mean.dtype)
        ratio = old.whiten_columns(new.scaled(identity).T)
        same = jnp.all(jnp.abs(ratio - identity) <= 8.0 * jnp.finfo(mean.dtype).eps)

        def rescaled() -> Proposal:
            root = lax.linalg.triangular_solve(self.scale, identity, left_side=True, lower=True)
            precision = root.T @ root
            changed = identity + ratio.T @ (precision - identity) @ ratio
            inverse = _inverse(0.5 * (changed + changed.T))
            covariance = 0.5 * (inverse + inverse.T)
            scale = root_within(covariance)
            pull = ratio.T @ (precision @ mean)
            return Proposal(scale @ (scale.T @ pull), scale)

        return lax.cond(same, lambda: Proposal(mean, self.scale), rescaled)


def start(reference: AnyGaussian, *, dense: bool) -> Proposal:
    """The reference itself.

    Args:
        reference: of the first target.
        dense: whether correlations are kept.

    Returns:
        The proposal.
    """
    one = jnp.ones_like(reference.mean)
    return Proposal(jnp.zeros_like(one), jnp.diag(one) if dense else one)


def from_scores(old: Proposal, e: Array, gradient: Array, weight: Array) -> Proposal:
    """The Gaussian whose scores fit those of the draws best, as the old one is where they say nothing.

    Args:
        old: the proposal before.
        e: draws, `(draw, dim)`.
        gradient: of -log q, like `e`.
        weight: adding to one, `(draw,)`.

    Returns:
        The next proposal.
    """
    mean, slope = weight @ e, weight @ gradient
    centered, offset = gradient - slope, e - mean
    if old.scale.ndim == 1:
        second = weight @ centered**2
        ridge = RIDGE * jnp.mean(second) + jnp.finfo(second.dtype).tiny
        cross = weight @ (centered * offset) + ridge * old.scale**2
        variance = jnp.clip(cross / (second + ridge), NARROWEST, WIDEST)
        return _near(old, Proposal(mean - variance * slope, jnp.sqrt(variance)))
    before = old.scale @ old.scale.T
    weighted = weight[:, None] * centered
    gram = weighted.T @ centered
    ridge = RIDGE * jnp.trace(gram) / mean.size + jnp.finfo(gram.dtype).tiny
    rest = weighted.T @ (offset - centered @ before)
    change = _inverse(gram + ridge * jnp.eye(mean.size, dtype=gram.dtype)) @ rest
    scale = root_within(before + 0.5 * (change + change.T))
    return _near(old, Proposal(mean - scale @ (scale.T @ slope), scale))


def from_moments(old: Proposal, e: Array, weight: Array) -> Proposal:
    """The Gaussian of the draws' own mean and covariance, for losses without a gradient.

    Args:
        old: the proposal before, whose family is kept.
        e: draws, `(draw, dim)`.
        weight: adding to one, `(draw,)`.

    Returns:
        The next proposal.
    """
    mean = weight @ e
    offset = e - mean
    if old.scale.ndim == 1:
        return Proposal(mean, jnp.sqrt(jnp.clip(weight @ offset**2, NARROWEST, WIDEST)))
    # Few draws know few directions: the rest stays as it was.
    share = jnp.minimum(1.0, mean.size * jnp.sum(weight**2))
    covariance = (weight[:, None] * offset).T @ offset
    before = old.scale @ old.scale.T
    return Proposal(mean, root_within((1.0 - share) * covariance + share * before))


def root_within(covariance: Array) -> Array:
    """The lower Cholesky factor, of the nearest matrix that is positive definite and not wider than `WIDEST`.

    Args:
        covariance: symmetric, `(dim, dim)`.

    Returns:
        `(dim, dim)`; NaN where the matrix is not finite.
    """
    identity = jnp.eye(len(covariance), dtype=covariance.dtype)
    finite = jnp.all(jnp.isfinite(covariance))
    matrix = jnp.where(finite, covariance, identity)
    lower = jnp.linalg.cholesky(matrix)
    upper = jnp.linalg.cholesky(after(lower[0, 0], WIDEST * identity - matrix))
    within = jnp.all(jnp.isfinite(lower)) & jnp.all(jnp.isfinite(upper))

    def clipped() -> Array:
        value, vector = jnp.linalg.eigh(jnp.where(within, identity, matrix))
        value = jnp.clip(value, None, WIDEST)
        value = jnp.maximum(value, jnp.maximum(LEAST_RATIO * jnp.max(value), NARROWEST))
        return lower_of_root(jnp.sqrt(value)[:, None] * vector.T)

    return jnp.where(finite, lax.cond(within, lambda: lower, clipped), jnp.nan)


def _near(old: Proposal, new: Proposal) -> Proposal:
    # Where the loss is steep and straight, a step by the curvature at the draws leads far beyond the minimum.
    length = jnp.sqrt(old.square(new.mean[None])[0])
    most = FARTHEST * math.sqrt(new.mean.size)
    part = jnp.minimum(1.0, most / jnp.maximum(length, most))
    return new._replace(mean=old.mean + part * (new.mean - old.mean))


def _inverse(matrix: Array) -> Array:
    root = inverse_root(matrix)
    return root.T @ root
