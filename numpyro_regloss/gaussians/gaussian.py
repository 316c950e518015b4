# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Gaussians of three structures: what regularizes a loss and what is fitted to the shifted density.

The structure is read off the ranks of the two arrays, so a Gaussian survives `vmap` and stacking.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float

from numpyro_regloss._core.checks import usable_range
from numpyro_regloss._core.pytree import is_concrete, with_context_axes
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.gaussians.low_rank import LowRankGaussian

__all__ = ["AnyGaussian", "Gaussian", "check_gaussian", "kl_divergence"]


class Gaussian(NamedTuple):
    """A Gaussian N(mean, scale scaleᵀ) with isotropic, diagonal or dense covariance.

    Attributes:
        mean: `(*batch, dim)`.
        scale: standard deviations, in units of the parameters: `(*batch,)` isotropic,
            `(*batch, dim)` diagonal, `(*batch, dim, dim)` lower Cholesky factor.

    Example:
        >>> gaussian = Gaussian.isotropic(jnp.zeros(3), tau=0.25)
        >>> float(gaussian.scale)
        0.5
        >>> gaussian.covariance.shape
        (3, 3)
    """

    mean: Array
    scale: Array

    @classmethod
    def isotropic(cls, mean: Array, tau: Array | float) -> "Gaussian":
        """N(mean, tau I), or N(mean, diag(tau)) when tau has one value per parameter.

        Args:
            mean: `(*batch, dim)`.
            tau: variance in squared units of the parameters: a scalar, `(*batch,)`, or
                `(*batch, dim)` for one variance per parameter.

        Returns:
            The Gaussian, of isotropic or diagonal structure.
        """
        mean = jnp.asarray(mean)
        if not jnp.issubdtype(mean.dtype, jnp.floating):
            mean = mean.astype(float)
        scale = jnp.sqrt(jnp.asarray(tau, mean.dtype))
        if scale.ndim < mean.ndim:
            scale = jnp.broadcast_to(scale, mean.shape[:-1])
        return cls(mean, scale)

    @classmethod
    def from_distribution(cls, distribution: dist.Distribution) -> "Gaussian":
        """The same Gaussian as a NumPyro distribution.

        Args:
            distribution: `Normal` (its last axis is the dimension, declared as event or not),
                `MultivariateNormal` or `LowRankMultivariateNormal` (turned into a dense one).

        Returns:
            The Gaussian, diagonal for `Normal` and dense otherwise.

        Raises:
            TypeError: if the distribution is of another kind.
        """
        base = distribution
        while isinstance(
            base, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution
        ):
            base = base.base_dist
        shape = distribution.shape()
        if isinstance(base, dist.Normal) and shape:
            return cls(jnp.broadcast_to(base.loc, shape), jnp.broadcast_to(base.scale, shape))
        if isinstance(base, dist.MultivariateNormal):
            return cls(
                jnp.broadcast_to(base.loc, shape),
                jnp.broadcast_to(base.scale_tril, (*shape, shape[-1])),
            )
        if isinstance(base, dist.LowRankMultivariateNormal):
            scale = jnp.linalg.cholesky(base.covariance_matrix)
            return cls(
                jnp.broadcast_to(base.loc, shape), jnp.broadcast_to(scale, (*shape, shape[-1]))
            )
        raise TypeError(
            "Gaussian.from_distribution: expected a Normal over a vector, a MultivariateNormal or a "
            f"LowRankMultivariateNormal, got {type(distribution).__name__} of shape {shape}."
        )

    @property
    def dim(self) -> int:
        """Number of parameters."""
        return self.mean.shape[-1]

    @property
    def structure(self) -> str:
        """Which of the three structures this is.

        Returns:
            `"isotropic"`, `"diagonal"` or `"dense"`.

        Raises:
            ValueError: if the shapes of mean and scale are none of them.
        """
        rank = self.scale.ndim - self.mean.ndim
        if rank not in (-1, 0, 1):
            raise ValueError(
                "Gaussian: expected a scale of shape (*batch,), (*batch, dim) or (*batch, dim, dim) for "
                f"a mean of shape (*batch, dim), got scale {self.scale.shape}, mean {self.mean.shape}."
            )
        return ("isotropic", "diagonal", "dense")[rank + 1]

    @property
    def distribution(self) -> dist.Distribution:
        """The same Gaussian as a NumPyro distribution over vectors of shape `(dim,)`."""
        if self.structure == "dense":
            return dist.MultivariateNormal(self.mean, scale_tril=self.scale)
        return dist.Normal(self.mean, self._per_parameter()).to_event(1)

    @property
    def covariance(self) -> Array:
        """`(*batch, dim, dim)`."""
        if self.structure == "dense":
            # Accelerators round factors to three digits unless told.
            return jnp.matmul(self.scale, self.scale.mT, precision="highest")
        variance = jnp.broadcast_to(self._per_parameter() ** 2, self.mean.shape)
        return variance[..., None] * jnp.eye(self.dim, dtype=variance.dtype)

    @property
    def variance(self) -> Array:
        """Marginal variances, `(*batch, dim)`."""
        if self.structure == "dense":
            return jnp.sum(self.scale**2, -1)
        return jnp.broadcast_to(self._per_parameter() ** 2, self.mean.shape)

    def sample(self, rng_key: Key, shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape `(*shape, *batch, dim)`."""
        noise = jax.random.normal(rng_key, (*shape, *self.mean.shape), self.mean.dtype)
        return self.unwhiten(noise)

    def log_prob(self, x: Float[Array, "... dim"]) -> Float[Array, "..."]:
        """Normalized log density of `x`, `(*shape, *batch, dim)` -> `(*shape, *batch)`."""
        quadratic = jnp.sum(self.whiten(x) ** 2, -1)
        return -0.5 * (quadratic + self.dim * math.log(2 * math.pi)) - self.log_det

    @property
    def log_det(self) -> Array:
        """Log |det scale|, `(*batch,)`, the constant between whitened and plain densities."""
        if self.structure == "dense":
            return jnp.sum(jnp.log(jnp.diagonal(self.scale, axis1=-2, axis2=-1)), -1)
        return jnp.sum(jnp.log(jnp.broadcast_to(self._per_parameter(), self.mean.shape)), -1)

    @property
    def precision_diagonal(self) -> Array:
        """Diagonal of the inverse covariance, `(*batch, dim)`."""
        if self.structure == "dense":
            return jnp.sum(self.whiten_columns(jnp.eye(self.dim, dtype=self.scale.dtype)) ** 2, -2)
        return 1.0 / self.variance

    def unwhiten(self, noise: Array) -> Array:
        """The point mean + scale @ noise for standard normal `noise` of shape `(*shape, *batch, dim)`."""
        return self.mean + self.scaled(noise)

    def scaled(self, noise: Array) -> Array:
        """The product scale @ noise, of the shape of `noise`."""
        if self.structure == "dense":
            return jnp.einsum("...ij,...j->...i", self.scale, noise, precision="highest")
        return self._per_parameter() * noise

    def scaled_transpose(self, gradient: Array) -> Array:
        """The product scaleᵀ @ gradient: the gradient in whitened coordinates."""
        if self.structure == "dense":
            return jnp.einsum("...ji,...j->...i", self.scale, gradient, precision="highest")
        return self._per_parameter() * gradient

    def whiten(self, x: Array) -> Array:
        """The noise scale⁻¹ (x - mean), the inverse of `unwhiten`."""
        if self.structure == "dense":
            return _solve(self.scale, x - self.mean)
        return (x - self.mean) / self._per_parameter()

    def whiten_columns(self, columns: Array) -> Array:
        """The products scale⁻¹ @ columns for `(*batch, dim, k)`, of the same shape."""
        if self.structure == "dense":
            return _solve(self.scale[..., None, :, :], columns.mT).mT
        return columns / jnp.broadcast_to(self._per_parameter(), self.mean.shape)[..., None]

    def unscale_transpose(self, gradient: Array) -> Array:
        """The product scale⁻ᵀ @ gradient, the inverse of `scaled_transpose`."""
        if self.structure == "dense":
            return _solve(self.scale, gradient, transpose=True)
        return gradient / self._per_parameter()

    def _per_parameter(self) -> Array:
        return self.scale[..., None] if self.structure == "isotropic" else self.scale


AnyGaussian = Gaussian | LowRankGaussian


def kl_divergence(p: AnyGaussian, q: AnyGaussian) -> Array:
    """KL(p || q) of two Gaussians of any structure, in nats.

    KL = 1/2 [ |S_q⁻¹ S_p|²_F + |S_q⁻¹ (m_p - m_q)|² - dim ] + log det S_q - log det S_p. For two Gaussians
    of low rank it costs O(dim rank²).

    Args:
        p: the first argument, batch shape `(*batch,)`.
        q: the second argument, of a batch shape that broadcasts with it.

    Returns:
        `(*batch,)`.

    Example:
        >>> p = Gaussian(jnp.array([1.0]), jnp.array(1.0))
        >>> float(kl_divergence(p, Gaussian(jnp.array([0.0]), jnp.array([1.0]))))
        0.5
    """
    p, q = with_context_axes((p, q))
    if isinstance(q, Gaussian) and q.structure != "dense":
        trace = jnp.sum(p.variance / q.variance, -1)
    elif isinstance(p, LowRankGaussian):
        diagonal = jnp.sum(p.diagonal * q.precision_diagonal, -1)
        trace = diagonal + jnp.sum(q.whiten_columns(p.factor) ** 2, (-2, -1))
    elif p.structure == "dense":
        trace = jnp.sum(q.whiten_columns(p.scale) ** 2, (-2, -1))
    else:
        trace = jnp.sum(p.variance * q.precision_diagonal, -1)
    shift = jnp.sum(q.whiten(p.mean) ** 2, -1)
    return 0.5 * (trace + shift - p.dim) + q.log_det - p.log_det


def check_gaussian(gaussian: Any, dim: int, what: str, noun: str = "Gaussian") -> AnyGaussian:
    """Casts a Gaussian to the default float and refuses what is none over so many parameters.

    Args:
        gaussian: a `Gaussian` or `LowRankGaussian`; the values of tracers pass unchecked.
        dim: number of parameters.
        what: begins the error message.
        noun: what it is there for.

    Returns:
        The Gaussian.

    Raises:
        TypeError: if it is something else.
        ValueError: if shapes do not fit, values are not finite, or the scale is not positive.
    """
    if not isinstance(gaussian, AnyGaussian):
        raise TypeError(
            f"{what}: expected a Gaussian or LowRankGaussian, got {type(gaussian).__name__}; use "
            "Gaussian.isotropic(mean, tau), or of a distribution Gaussian.from_distribution."
        )
    gaussian = type(gaussian)(*(jnp.asarray(part, float) for part in with_context_axes(gaussian)))
    if isinstance(gaussian, LowRankGaussian):
        wanted = f"diagonal ({dim},) and factor ({dim}, rank)"
        fits = gaussian.diagonal.shape == gaussian.factor.shape[:-1] == (dim,)
    else:
        wanted = f"scale (), ({dim},) or ({dim}, {dim})"
        fits = gaussian.scale.shape in ((), (dim,), (dim, dim))
    if gaussian.mean.shape != (dim,) or not fits:
        got = ", ".join(f"{name} {part.shape}" for name, part in gaussian._asdict().items())
        raise ValueError(
            f"{what}: expected a {noun} over {dim} parameters, with mean ({dim},) and {wanted}, got {got}."
        )
    if is_concrete(gaussian):
        _check_values(gaussian, what, noun)
    return gaussian


def _check_values(gaussian: AnyGaussian, what: str, noun: str) -> None:
    mean, spread, *rest = (np.asarray(part) for part in gaussian)
    if not np.isfinite(mean).all():
        raise ValueError(f"{what}: expected a finite {noun} mean, got NaN or infinity.")
    if spread.ndim == 2 and np.triu(spread, 1).any():
        raise ValueError(
            f"{what}: expected a lower triangular Cholesky factor as dense {noun} scale, got entries above the "
            "diagonal; of a covariance take jnp.linalg.cholesky first."
        )
    positive = np.diagonal(spread) if spread.ndim == 2 else spread
    finite = all(np.isfinite(part).all() for part in (spread, *rest))
    if not (finite and (positive > 0).all()):
        raise ValueError(
            f"{what}: expected a finite {noun} scale with positive standard deviations (or Cholesky diagonal, or "
            "variances of a low-rank Gaussian); scale is a standard deviation, tau = scale²."
        )
    least, most = usable_range(jax.dtypes.canonicalize_dtype(positive.dtype))
    power = 1 if rest else 0.5
    if (positive < least**power).any() or (positive > most**power).any():
        raise ValueError(
            f"{what}: expected {noun} variances between {least:.3g} and {most:.3g}, got a scale from "
            f"{positive.min():.3g} to {positive.max():.3g}; beyond, in {positive.dtype}, a variance or its "
            "inverse is rounded to zero."
        )


def _solve(lower: Array, x: Array, *, transpose: bool = False) -> Array:
    def single(a: Array, b: Array) -> Array:
        return jax.scipy.linalg.solve_triangular(a, b, trans=1 if transpose else 0, lower=True)

    if lower.ndim == 2:
        # One factorization, many right-hand sides: a single call, not a batch of vectors.
        return single(lower, x.reshape(-1, x.shape[-1]).T).T.reshape(x.shape)
    return jnp.vectorize(single, signature="(d,d),(d)->(d)")(lower, x)
