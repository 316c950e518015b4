# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""The Gaussian that adaptive importance sampling draws from, and what its families have in common.

With U = -log q up to a constant, in coordinates where the reference is N(0, I), and g = ∇U at weighted draws e,

    C = Cov(g)⁻¹ Cov(g, e),   m = E e - C E g

are the covariance and the mean of q where q is Gaussian, whatever law the draws have: g is then affine in e. So a
proposal that is far off finds q as well. This is the regression of `draws.control_variates`, and m the mean that
it corrects. Each family has a file.
"""

import math
from dataclasses import replace
from typing import Any, Self

import jax.numpy as jnp

from numpyro_regloss._core.pytree import pytree_dataclass
from numpyro_regloss._core.types import Array
from numpyro_regloss.gaussians.gaussian import AnyGaussian

__all__ = ["LEAST_RATIO", "NARROWEST", "NEAREST", "WIDEST", "Proposal"]

# Of the covariance over the reference's. Wider than the reference is q only where the loss is concave.
NARROWEST, WIDEST = 1e-12, 16.0
# Of eigenvalues over the largest, where a covariance was not positive.
LEAST_RATIO = 1e-6
# A step of the mean, in lengths of a draw's noise, sqrt(dim), where nothing speaks for a longer one.
NEAREST = 2.0
# Of the draws over the fitted covariance, in units of dim^(-1/2).
WIDER = 0.4


@pytree_dataclass
class Proposal:
    """A Gaussian N(mean, F Fᵀ) in coordinates where the reference is N(0, I).

    Attributes:
        mean: `(dim,)`.
        scale: F, in the form of the family.
    """

    mean: Array
    scale: Any

    @classmethod
    def start(cls, zero: Array, rank: int) -> Self:
        """The reference itself.

        Args:
            zero: its mean in its own coordinates, `(dim,)`.
            rank: of what is not diagonal, where the family has one.

        Returns:
            The proposal.
        """
        raise NotImplementedError

    @property
    def variance(self) -> Array:
        """Of each coordinate, `(dim,)`."""
        raise NotImplementedError

    @property
    def log_det(self) -> Array:
        """Logarithm of the determinant of F."""
        raise NotImplementedError

    def scaled(self, noise: Array) -> Array:
        """What standard normal noise becomes about the mean, F noise, `(..., dim)` -> `(..., dim)`."""
        raise NotImplementedError

    def scaled_transpose(self, gradient: Array) -> Array:
        """Fᵀ g, the gradient by the noise, `(..., dim)` -> `(..., dim)`."""
        raise NotImplementedError

    def whitened(self, e: Array) -> Array:
        """The noise that leads to draws, `(draw, dim)` -> `(draw, dim)`."""
        raise NotImplementedError

    def stretched(self, factor: Array | float) -> Self:
        """Every coordinate about the mean times a factor, a scalar or `(dim,)`."""
        raise NotImplementedError

    def moved(self, old: AnyGaussian, new: AnyGaussian) -> Self:
        """The same for another reference, as a Gaussian q would move with it.

        Args:
            old: the reference of the coordinates.
            new: the next one.

        Returns:
            The proposal in the coordinates of the next one.
        """
        raise NotImplementedError

    def from_scores(
        self, e: Array, gradient: Array, weight: Array, reach: Array | float = NEAREST
    ) -> Self:
        """The Gaussian whose scores fit those of draws best, like this one where they say nothing.

        Args:
            e: draws, `(draw, dim)`.
            gradient: of -log q, like `e`.
            weight: adding to one, `(draw,)`.
            reach: longest step of the mean, in lengths of a draw's noise, sqrt(dim).

        Returns:
            The next proposal.
        """
        raise NotImplementedError

    def from_moments(self, e: Array, weight: Array) -> Self:
        """The Gaussian of the draws' own mean and covariance, for losses without a gradient.

        Args:
            e: draws, `(draw, dim)`.
            weight: adding to one, `(draw,)`.

        Returns:
            The next proposal.
        """
        raise NotImplementedError

    @property
    def widening(self) -> float:
        """By what factor draws are wider."""
        # The share of effective draws that it costs is the same in all dimensions, WIDER² / 2.
        return math.sqrt(1.0 + WIDER / math.sqrt(self.mean.size))

    def widened(self) -> Self:
        """A little wider: too narrow a proposal has weights without a variance, too wide a one costs draws."""
        return self.stretched(self.widening)

    def square(self, e: Array) -> Array:
        """Squared length of the noise that leads to draws, `(draw, dim)` -> `(draw,)`."""
        return jnp.sum(self.whitened(e) ** 2, -1)

    def times(self, vector: Array) -> Array:
        """The covariance times vectors, `(..., dim)` -> `(..., dim)`."""
        return self.scaled(self.scaled_transpose(vector))

    def log_density(self, square: Array) -> Array:
        """Up to (2 pi)^(-dim / 2), of draws with such noise, `(draw,)` -> `(draw,)`."""
        return -0.5 * square - self.log_det

    def stepped(self, noise: Array, scale: Any, reach: Array | float) -> Self:
        """The next one, by a step of the mean that is not too long and no wider than q can be.

        Args:
            noise: the step of the mean, in units of this proposal's noise, `(dim,)`.
            scale: of the next proposal.
            reach: longest step, in lengths of a draw's noise, sqrt(dim).

        Returns:
            The next proposal.
        """
        # Where the loss is steep and straight, a step by the curvature at the draws leads far beyond the minimum.
        most = reach * math.sqrt(noise.size)
        part = jnp.minimum(1.0, most / jnp.maximum(jnp.sqrt(jnp.sum(noise**2)), most))
        found = replace(self, mean=self.mean + self.scaled(part * noise), scale=scale)
        # A proposal that is much wider than the reference draws where q is nothing.
        return found.stretched(jnp.minimum(1.0, math.sqrt(WIDEST) / jnp.sqrt(found.variance)))

    def mean_for(self, old: AnyGaussian, new: AnyGaussian) -> Array:
        """The mean that a Gaussian q has for another reference of the same covariance, in its coordinates.

        Args:
            old: the reference of the coordinates.
            new: the next one.

        Returns:
            `(dim,)`.
        """
        # In the new coordinates e' = A⁻¹ (e - d), with A = S⁻¹ S' of the scales and d = S⁻¹ (c' - c).
        shift = old.whiten(new.mean)
        return self.mean + self.times(shift) - shift
