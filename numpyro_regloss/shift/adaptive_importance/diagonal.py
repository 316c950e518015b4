# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""A proposal without correlations: O(dim) numbers."""

from typing import Self

import jax.numpy as jnp

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

__all__ = ["DiagonalProposal", "moved_precision"]


@pytree_dataclass
class DiagonalProposal(Proposal):
    """A Gaussian whose `scale` are standard deviations, `(dim,)`."""

    @classmethod
    def start(cls, zero: Array, rank: int) -> Self:
        """See `Proposal`."""
        del rank
        return cls(zero, jnp.ones_like(zero))

    @property
    def variance(self) -> Array:
        """See `Proposal`."""
        return self.scale**2

    @property
    def log_det(self) -> Array:
        """See `Proposal`."""
        return jnp.sum(jnp.log(self.scale))

    def scaled(self, noise: Array) -> Array:
        """See `Proposal`."""
        return noise * self.scale

    def scaled_transpose(self, gradient: Array) -> Array:
        """See `Proposal`."""
        return gradient * self.scale

    def whitened(self, e: Array) -> Array:
        """See `Proposal`."""
        return (e - self.mean) / self.scale

    def stretched(self, factor: Array | float) -> Self:
        """See `Proposal`."""
        return type(self)(self.mean, factor * self.scale)

    def moved(self, old: AnyGaussian, new: AnyGaussian) -> Self:
        """See `Proposal`."""
        mean = self.mean_for(old, new)
        ratio = jnp.sqrt(new.variance / old.variance)
        variance = 1.0 / moved_precision(self.scale**-2, ratio)
        # The pull of the loss, (C⁻¹ - I) e at the old mean of q, is that at the new one.
        return type(self)(variance * (mean / self.scale**2 * ratio), jnp.sqrt(variance))

    def from_scores(
        self, e: Array, gradient: Array, weight: Array, reach: Array | float = NEAREST
    ) -> Self:
        """See `Proposal`."""
        # In units of the old one: precisions of q may differ by more than single precision has digits.
        noise, gradient = self.whitened(e), self.scaled_transpose(gradient)
        mean, slope = weight @ noise, weight @ gradient
        centered = gradient - slope
        second = weight @ centered**2 + jnp.finfo(mean.dtype).tiny
        ratio = jnp.clip(weight @ (centered * (noise - mean)) / second, LEAST_RATIO, WIDEST)
        return self.stepped(mean - ratio * slope, self.scale * jnp.sqrt(ratio), reach)

    def from_moments(self, e: Array, weight: Array) -> Self:
        """See `Proposal`."""
        mean = weight @ e
        variance = weight @ (e - mean) ** 2
        return type(self)(mean, jnp.sqrt(jnp.clip(variance, NARROWEST, WIDEST)))


def moved_precision(precision: Array, ratio: Array) -> Array:
    """That of a Gaussian q for another reference, each in units of its own reference.

    Args:
        precision: for the old one, `(dim,)`.
        ratio: of the new standard deviations over the old ones, `(dim,)`.

    Returns:
        `(dim,)`.
    """
    return jnp.clip(1.0 + (precision - 1.0) * ratio**2, 1.0 / WIDEST, 1.0 / NARROWEST)
