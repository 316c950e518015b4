# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""A proposal with all correlations: O(dim²) numbers, O(dim³) operations in a round."""

from collections.abc import Callable
from typing import Self

import jax.numpy as jnp
from jax import lax

from numpyro_regloss._core.linalg import after, inverse_of_lower, inverse_root, lower_of_root
from numpyro_regloss._core.pytree import pytree_dataclass
from numpyro_regloss._core.types import Array
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.shift.adaptive_importance.proposal import (
    LEAST_RATIO,
    NARROWEST,
    NEAREST,
    WIDEST,
    Proposal,
)

__all__ = ["DenseProposal", "root_of_scores", "root_within"]

# Of the second moments of the scores: keeps directions as they were that the scores say nothing of.
RIDGE = 1e-5


@pytree_dataclass
class DenseProposal(Proposal):
    """A Gaussian whose `scale` is the lower Cholesky factor of its covariance, `(dim, dim)`."""

    @classmethod
    def start(cls, zero: Array, rank: int) -> Self:
        """See `Proposal`."""
        del rank
        return cls(zero, jnp.eye(zero.size, dtype=zero.dtype))

    @property
    def variance(self) -> Array:
        """See `Proposal`."""
        return jnp.sum(self.scale**2, -1)

    @property
    def log_det(self) -> Array:
        """See `Proposal`."""
        return jnp.sum(jnp.log(jnp.diagonal(self.scale)))

    def scaled(self, noise: Array) -> Array:
        """See `Proposal`."""
        return noise @ self.scale.T

    def scaled_transpose(self, gradient: Array) -> Array:
        """See `Proposal`."""
        return gradient @ self.scale

    def whitened(self, e: Array) -> Array:
        """See `Proposal`."""
        return lax.linalg.triangular_solve(
            self.scale, e - self.mean, left_side=False, lower=True, transpose_a=True
        )

    def stretched(self, factor: Array | float) -> Self:
        """See `Proposal`."""
        return type(self)(self.mean, jnp.asarray(factor)[..., None] * self.scale)

    def moved(self, old: AnyGaussian, new: AnyGaussian) -> Self:
        """See `Proposal`."""
        mean = self.mean_for(old, new)
        identity = jnp.eye(mean.size, dtype=mean.dtype)
        ratio = old.whiten_columns(new.scaled(identity).T)
        same = jnp.all(jnp.abs(ratio - identity) <= 8.0 * jnp.finfo(mean.dtype).eps)

        def rescaled() -> Self:
            root = inverse_of_lower(self.scale)
            precision = root.T @ root
            changed = identity + ratio.T @ (precision - identity) @ ratio
            inverse = _inverse(0.5 * (changed + changed.T))
            covariance = 0.5 * (inverse + inverse.T)
            scale = root_within(covariance)
            pull = ratio.T @ (precision @ mean)
            return type(self)(scale @ (scale.T @ pull), scale)

        return lax.cond(same, lambda: type(self)(mean, self.scale), rescaled)

    def from_scores(
        self, e: Array, gradient: Array, weight: Array, reach: Array | float = NEAREST
    ) -> Self:
        """See `Proposal`."""
        # In units of the old one: precisions of q may differ by more than single precision has digits.
        noise, gradient = self.whitened(e), self.scaled_transpose(gradient)
        mean, slope = weight @ noise, weight @ gradient
        part = jnp.sqrt(weight)[:, None]
        root = root_of_scores(part * (noise - mean), part * (gradient - slope))
        return self.stepped(mean - root @ (root.T @ slope), self.scale @ root, reach)

    def from_moments(self, e: Array, weight: Array) -> Self:
        """See `Proposal`."""
        mean = weight @ e
        offset = e - mean
        # Few draws know few directions: the rest stays as it was.
        share = jnp.minimum(1.0, mean.size * jnp.sum(weight**2))
        covariance = (weight[:, None] * offset).T @ offset
        before = self.scale @ self.scale.T
        return type(self)(mean, root_within((1.0 - share) * covariance + share * before))


def root_within(covariance: Array) -> Array:
    """The lower Cholesky factor, of the nearest matrix that is positive definite and not wider than `WIDEST`.

    Args:
        covariance: symmetric, `(dim, dim)`.

    Returns:
        `(dim, dim)`; NaN where the matrix is not finite.
    """

    def nearest(matrix: Array) -> Array:
        value, vector = jnp.linalg.eigh(matrix)
        value = jnp.clip(value, None, WIDEST)
        value = jnp.maximum(value, jnp.maximum(LEAST_RATIO * jnp.max(value), NARROWEST))
        return lower_of_root(jnp.sqrt(value)[:, None] * vector.T)

    return _root_or(covariance, covariance, nearest)


def root_of_scores(offset: Array, centered: Array) -> Array:
    """A root of the covariance that scores tell of, in units in which the old one is the identity.

    Args:
        offset: draws about their mean, times roots of their weights, `(draw, dim)`.
        centered: gradients of -log q about theirs, likewise.

    Returns:
        Lower Cholesky factor, `(dim, dim)`.
    """
    # Scores of one size in every coordinate: one that is still far too narrow has hardly a score.
    size = jnp.sqrt(jnp.sum(centered**2, 0)) + jnp.finfo(offset.dtype).tiny
    even = centered / size
    identity = jnp.eye(size.size, dtype=size.dtype)
    gram = even.T @ even + RIDGE * identity
    change = (_inverse(gram) @ (even.T @ (offset - centered))) / size[:, None]
    ratio = identity + 0.5 * (change + change.T)

    # Far from a Gaussian the regression may be no covariance, or as wide as chance has it. Then that of the
    # Gaussian of least Fisher divergence, (E g gᵀ)^(-1/2) of standard normal draws, which always is one.
    def divergence(matrix: Array) -> Array:
        value, vector = jnp.linalg.eigh(matrix)
        value = jnp.clip(value, WIDEST**-2, LEAST_RATIO**-2)
        return lower_of_root(value[:, None] ** -0.25 * vector.T)

    return _root_or(ratio, size[:, None] * gram * size, divergence)


def _root_or(covariance: Array, other: Array, root: Callable[[Array], Array]) -> Array:
    # The Cholesky factor of a covariance that is not wider than WIDEST, and a root of another matrix where not.
    identity = jnp.eye(len(covariance), dtype=covariance.dtype)
    finite = jnp.all(jnp.isfinite(covariance)) & jnp.all(jnp.isfinite(other))
    matrix = jnp.where(finite, covariance, identity)
    lower = jnp.linalg.cholesky(matrix)
    upper = jnp.linalg.cholesky(after(lower[0, 0], WIDEST * identity - matrix))
    within = jnp.all(jnp.isfinite(lower)) & jnp.all(jnp.isfinite(upper))
    usable = jnp.where(finite & ~within, other, identity)
    return jnp.where(finite, lax.cond(within, lambda: lower, lambda: root(usable)), jnp.nan)


def _inverse(matrix: Array) -> Array:
    root = inverse_root(matrix)
    return root.T @ root
