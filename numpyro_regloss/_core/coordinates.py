# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Linear coordinates z = F y of dense, diagonal or low-rank form, as mass matrices and proposals use them.

    F = D (I + Q (A - I) Qᵀ),

D diagonal, Q orthonormal, `(dim, rank)`, or the identity, A `(rank, rank)`; products take some dim x rank numbers.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp

from numpyro_regloss._core.types import Array

__all__ = ["Coordinates"]


class Coordinates(NamedTuple):
    """The map y ↦ z = F y.

    Attributes:
        scale: D, `(dim,)`.
        basis: Q, `(dim, rank)`, or None for the identity.
        inner: A, `(rank, rank)`, or None for the identity.
        inner_inverse: its inverse.
    """

    scale: Array
    basis: Array | None
    inner: Array | None
    inner_inverse: Array | None

    def forth(self, y: Array) -> Array:
        """F y, `(*batch, dim)`."""
        return self.scale * self._multiply(y, self.inner)

    def back(self, z: Array) -> Array:
        """F⁻¹ z, `(*batch, dim)`."""
        return self._multiply(z / self.scale, self.inner_inverse)

    def gradient_back(self, gradient: Array) -> Array:
        """Fᵀ g, the gradient by y of a function of z."""
        return self._multiply(self.scale * gradient, _transposed(self.inner))

    def gradient_forth(self, gradient: Array) -> Array:
        """F⁻ᵀ g, the gradient by z of a function of y."""
        return self._multiply(gradient, _transposed(self.inner_inverse)) / self.scale

    def _multiply(self, vector: Array, inner: Array | None) -> Array:
        if inner is None:
            return vector
        # Accelerators round factors to fewer digits unless told: there and back would be another place.
        times = partial(jnp.matmul, precision="highest")
        if self.basis is None:
            return times(vector, inner.T)
        part = times(vector, self.basis)
        return vector + times(times(part, inner.T) - part, self.basis.T)


def _transposed(inner: Array | None) -> Array | None:
    return None if inner is None else inner.T
