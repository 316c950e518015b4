# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""A proposal of diagonal and low rank: O(dim · rank) numbers, O(draws · dim · rank) operations in a round.

    F = D (I + Q (A - I) Qᵀ),   so that the precision is   D⁻¹ (I + Q M Qᵀ) D⁻¹

with Q orthonormal, `(dim, rank)`: directions in which q is wider or narrower than the diagonal says.
Where q is such a Gaussian, draws less scores are, in units of D, of the row space of Q,

    e / D - D g = -Q M Qᵀ e / D,

and what their left singular vectors leave of D g is what they leave of e / D. So D and Q are found in turn, once
in a round. The covariance within Q is that of the regression of a dense proposal, in rank dimensions.
"""

from typing import Self

import jax.numpy as jnp
from jax import lax

from numpyro_regloss._core.coordinates import Coordinates
from numpyro_regloss._core.linalg import after, inverse_of_lower, lower_of_root
from numpyro_regloss._core.pytree import pytree_dataclass
from numpyro_regloss._core.types import Array
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.shift.adaptive_importance.dense import root_of_scores
from numpyro_regloss.shift.adaptive_importance.diagonal import moved_precision
from numpyro_regloss.shift.adaptive_importance.proposal import (
    LEAST_RATIO,
    NEAREST,
    WIDEST,
    Proposal,
)

__all__ = ["LowRankProposal"]

# For each direction: of so many draws the small Gram matrix is that D and the first guess of Q are found from.
FEW_DRAWS = 4


@pytree_dataclass
class LowRankProposal(Proposal):
    """A Gaussian whose `scale` are `Coordinates` with a lower triangle A, `(rank, rank)`."""

    @classmethod
    def start(cls, zero: Array, rank: int) -> Self:
        """See `Proposal`."""
        basis = jnp.eye(zero.size, rank, dtype=zero.dtype)
        inner = jnp.eye(rank, dtype=zero.dtype)
        return cls(zero, Coordinates(jnp.ones_like(zero), basis, inner, inner))

    @property
    def variance(self) -> Array:
        """See `Proposal`."""
        scale, basis, inner, _ = self.scale
        return scale**2 * (1.0 + jnp.sum((basis @ inner) ** 2 - basis**2, -1))

    @property
    def log_det(self) -> Array:
        """See `Proposal`."""
        return jnp.sum(jnp.log(self.scale.scale)) + jnp.sum(jnp.log(jnp.diagonal(self.scale.inner)))

    def scaled(self, noise: Array) -> Array:
        """See `Proposal`."""
        return self.scale.forth(noise)

    def scaled_transpose(self, gradient: Array) -> Array:
        """See `Proposal`."""
        return self.scale.gradient_back(gradient)

    def whitened(self, e: Array) -> Array:
        """See `Proposal`."""
        return self.scale.back(e - self.mean)

    def stretched(self, factor: Array | float) -> Self:
        """See `Proposal`."""
        return type(self)(self.mean, self.scale._replace(scale=factor * self.scale.scale))

    def moved(self, old: AnyGaussian, new: AnyGaussian) -> Self:
        """See `Proposal`."""
        mean = self.mean_for(old, new)
        ratio = jnp.sqrt(new.variance / old.variance)
        same = jnp.all(jnp.abs(ratio - 1.0) <= 8.0 * jnp.finfo(mean.dtype).eps)
        identity = jnp.eye(len(self.scale.inner), dtype=mean.dtype)

        def rescaled() -> Self:
            before, basis, _, inverse = self.scale
            scale = moved_precision(before**-2, ratio) ** -0.5
            basis, triangle = jnp.linalg.qr((scale * ratio / before)[:, None] * basis)
            change = triangle @ (inverse.T @ inverse - identity) @ triangle.T
            value, vector = jnp.linalg.eigh(after(triangle[0, 0], 0.5 * (change + change.T)))
            value = jnp.clip(1.0 + value, 1.0 / WIDEST, 1.0 / LEAST_RATIO**2)
            lower = lower_of_root(value[:, None] ** -0.5 * vector.T)
            found = Coordinates(scale, basis, lower, inverse_of_lower(lower))
            pull = ratio * self.scale.gradient_forth(self.scale.back(mean))
            return type(self)(found.forth(found.gradient_back(pull)), found)

        return lax.cond(same, lambda: type(self)(mean, self.scale), rescaled)

    def from_scores(
        self, e: Array, gradient: Array, weight: Array, reach: Array | float = NEAREST
    ) -> Self:
        """See `Proposal`."""
        scale, rank = self.scale.scale, len(self.scale.inner)
        mean, slope = weight @ e, weight @ gradient
        part = jnp.sqrt(weight)[:, None]
        z, g = part * (e - mean) / scale, part * (gradient - slope) * scale
        ratio, basis = _split(z, g, rank)
        z, g = z / ratio, g * ratio
        # The guess was that of a few draws.
        basis, _ = jnp.linalg.qr((z - g).T @ ((z - g) @ basis))
        root = root_of_scores(after(basis[0, 0], z @ basis), g @ basis)
        found = Coordinates(scale * ratio, basis, root, inverse_of_lower(root))
        mean -= found.forth(found.gradient_back(slope))
        return self.stepped(self.whitened(mean[None])[0], found, reach)


def _split(z: Array, g: Array, rank: int) -> tuple[Array, Array]:
    """Standard deviations of the diagonal in those units, `(dim,)`, and an orthonormal basis of the rest."""
    # One of each antithetic pair: where q is Gaussian the other is its mirror.
    step = max(2, len(z) // (FEW_DRAWS * rank))
    z, g = z[::step], g[::step]

    def latent(rest: Array) -> Array:
        return jnp.linalg.eigh(rest @ rest.T)[1][:, -rank:]

    along = latent(z - g)
    of_draws, of_scores = (jnp.sum((a - along @ (along.T @ a)) ** 2, 0) for a in (z, g))
    variance = jnp.sqrt(of_draws / (of_scores + jnp.finfo(z.dtype).tiny))
    ratio = jnp.sqrt(jnp.clip(variance, LEAST_RATIO, WIDEST))
    rest = z / ratio - g * ratio
    along = latent(after(along[0, 0], rest))
    return ratio, jnp.linalg.qr(after(along[0, 0], rest.T @ along))[0]
