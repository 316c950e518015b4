# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Shape aliases. `dim` is the number of flat unconstrained parameters everywhere."""

from jax import Array
from jaxtyping import Float

__all__ = ["Array", "Key", "Scalar", "Vector"]

Scalar = Float[Array, ""]
Vector = Float[Array, " dim"]
Key = Array
