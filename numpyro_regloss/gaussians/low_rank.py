# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Gaussians whose covariance is a diagonal plus a few factors, for dimensions where a matrix does not fit.

    covariance = diag(d) + F Fᵀ,   W = diag(d)^(-1/2) F

Nothing costs more than O(dim rank²). The symmetric root and its inverse follow from the eigenvalues λ of the
small matrix WᵀW (Woodbury); both are written without dividing by λ.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from numpyro_regloss._core.types import Array, Key

__all__ = ["LowRankGaussian"]


class LowRankGaussian(NamedTuple):
    """A Gaussian N(mean, diag(diagonal) + factor factorᵀ), with the methods of `Gaussian`.

    Attributes:
        mean: `(*batch, dim)`.
        diagonal: variances of the diagonal part, in squared units of the parameters, `(*batch, dim)`.
        factor: `(*batch, dim, rank)`, in units of the parameters.

    Example:
        >>> gaussian = LowRankGaussian(jnp.zeros(3), jnp.ones(3), jnp.ones((3, 1)))
        >>> gaussian.variance.tolist()
        [2.0, 2.0, 2.0]
    """

    mean: Array
    diagonal: Array
    factor: Array

    @classmethod
    def from_distribution(cls, distribution: dist.Distribution) -> "LowRankGaussian":
        """The same Gaussian as a NumPyro distribution.

        Args:
            distribution: a `LowRankMultivariateNormal`.

        Returns:
            The Gaussian.

        Raises:
            TypeError: if the distribution is of another kind.
        """
        if not isinstance(distribution, dist.LowRankMultivariateNormal):
            raise TypeError(
                "LowRankGaussian.from_distribution: expected a LowRankMultivariateNormal, got "
                f"{type(distribution).__name__}; for other normal distributions use "
                "Gaussian.from_distribution."
            )
        shape = distribution.shape()
        factor = distribution.cov_factor
        return cls(
            jnp.broadcast_to(distribution.loc, shape),
            jnp.broadcast_to(distribution.cov_diag, shape),
            jnp.broadcast_to(factor, (*shape, factor.shape[-1])),
        )

    @property
    def dim(self) -> int:
        """Number of parameters."""
        return self.mean.shape[-1]

    @property
    def rank(self) -> int:
        """Number of factors."""
        return self.factor.shape[-1]

    @property
    def structure(self) -> str:
        """Always `"low_rank"`."""
        return "low_rank"

    @property
    def distribution(self) -> dist.Distribution:
        """The same Gaussian as a NumPyro distribution over vectors of shape `(dim,)`."""
        return dist.LowRankMultivariateNormal(self.mean, self.factor, self.diagonal)

    @property
    def covariance(self) -> Array:
        """`(*batch, dim, dim)`; of dim² elements, unlike all else here."""
        diagonal = self.diagonal[..., None] * jnp.eye(self.dim, dtype=self.diagonal.dtype)
        return diagonal + _matmul(self.factor, self.factor.mT)

    @property
    def variance(self) -> Array:
        """Marginal variances, `(*batch, dim)`."""
        return self.diagonal + jnp.sum(self.factor**2, -1)

    @property
    def log_det(self) -> Array:
        """Half the logarithm of the covariance's determinant, `(*batch,)`."""
        pivots = jnp.diagonal(self._capacitance(), axis1=-2, axis2=-1)
        return 0.5 * jnp.sum(jnp.log(self.diagonal), -1) + jnp.sum(jnp.log(pivots), -1)

    @property
    def precision_diagonal(self) -> Array:
        """Diagonal of the inverse covariance, `(*batch, dim)`."""
        explained = _solve(self._capacitance(), self._weights().mT)
        return (1.0 - jnp.sum(explained**2, -2)) / self.diagonal

    def sample(self, rng_key: Key, shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape `(*shape, *batch, dim)`."""
        key_diagonal, key_factor = jax.random.split(rng_key)
        lead, dtype = (*shape, *self.mean.shape[:-1]), self.mean.dtype
        noise = jax.random.normal(key_diagonal, (*lead, self.dim), dtype)
        factors = jax.random.normal(key_factor, (*lead, self.rank), dtype)
        return self.mean + jnp.sqrt(self.diagonal) * noise + _product(self.factor, factors)

    def log_prob(self, x: Array) -> Array:
        """Normalized log density of `x`, `(*shape, *batch, dim)` -> `(*shape, *batch)`."""
        # Woodbury rather than `whiten`, whose eigenvectors have no usable derivative.
        standard = (x - self.mean) / jnp.sqrt(self.diagonal)
        along = _product(self._weights().mT, standard)
        explained = _solve(self._capacitance(), along[..., None])[..., 0]
        quadratic = jnp.sum(standard**2, -1) - jnp.sum(explained**2, -1)
        return -0.5 * (quadratic + self.dim * math.log(2 * math.pi)) - self.log_det

    def unwhiten(self, noise: Array) -> Array:
        """The point mean + scale @ noise for standard normal `noise` of shape `(*shape, *batch, dim)`."""
        return self.mean + self.scaled(noise)

    def scaled(self, noise: Array) -> Array:
        """The product scale @ noise, with scale = diag(d)^(1/2) (I + W Wᵀ)^(1/2)."""
        return jnp.sqrt(self.diagonal) * self._root(noise)

    def scaled_transpose(self, gradient: Array) -> Array:
        """The product scaleᵀ @ gradient: the gradient in whitened coordinates."""
        return self._root(jnp.sqrt(self.diagonal) * gradient)

    def whiten(self, x: Array) -> Array:
        """The noise scale⁻¹ (x - mean), the inverse of `unwhiten`."""
        return self._root((x - self.mean) / jnp.sqrt(self.diagonal), inverse=True)

    def unscale_transpose(self, gradient: Array) -> Array:
        """The product scale⁻ᵀ @ gradient, the inverse of `scaled_transpose`."""
        return self._root(gradient, inverse=True) / jnp.sqrt(self.diagonal)

    def whiten_columns(self, columns: Array) -> Array:
        """The products scale⁻¹ @ columns for `(*batch, dim, k)`, of the same shape."""
        lead = jnp.broadcast_shapes(self.mean.shape[:-1], columns.shape[:-2])
        moved = jnp.moveaxis(jnp.broadcast_to(columns, (*lead, *columns.shape[-2:])), -1, 0)
        standard = self._root(moved / jnp.sqrt(self.diagonal), inverse=True)
        return jnp.moveaxis(standard, 0, -1)

    def _weights(self) -> Array:
        return self.factor / jnp.sqrt(self.diagonal)[..., None]

    def _capacitance(self) -> Array:
        # Cholesky factor of I + WᵀW.
        weights = self._weights()
        return jnp.linalg.cholesky(
            _matmul(weights.mT, weights) + jnp.eye(self.rank, dtype=weights.dtype)
        )

    def _root(self, x: Array, *, inverse: bool = False) -> Array:
        # (I + W Wᵀ)^(±1/2) = I + W V diag(c) Vᵀ Wᵀ with V, λ of WᵀW and c = ((1 + λ)^(±1/2) - 1) / λ.
        weights = self._weights()
        value, vector = jnp.linalg.eigh(_matmul(weights.mT, weights))
        root = jnp.sqrt(1.0 + jnp.maximum(value, 0.0))
        c = -1.0 / (root * (root + 1.0)) if inverse else 1.0 / (root + 1.0)
        rotated = _matmul(weights, vector)
        return x + _product(rotated, c * _product(rotated.mT, x))


def _matmul(a: Array, b: Array) -> Array:
    # Accelerators round factors to three digits unless told.
    return jnp.matmul(a, b, precision="highest")


def _product(matrix: Array, x: Array) -> Array:
    return jnp.einsum("...ij,...j->...i", matrix, x, precision="highest")


def _solve(lower: Array, columns: Array) -> Array:
    lead = jnp.broadcast_shapes(lower.shape[:-2], columns.shape[:-2])
    lower = jnp.broadcast_to(lower, (*lead, *lower.shape[-2:]))
    columns = jnp.broadcast_to(columns, (*lead, *columns.shape[-2:]))
    return jax.scipy.linalg.solve_triangular(lower, columns, lower=True)
