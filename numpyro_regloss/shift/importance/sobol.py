# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Scrambled Sobol points as standard normal draws, made on the device from a key.

The host gives the direction numbers of the sequence, a table of `dim` rows; every key then has a scramble of its
own: a random lower triangular matrix over the binary digits and a random digital shift. Each draw is standard
normal, averages over all draws of one key are unbiased, and independent keys give independent averages, so that
their scatter is an honest error.

References: Sobol' (1967), "On the Distribution of Points in a Cube and the Approximate Evaluation of
Integrals"; Joe & Kuo (2008), "Constructing Sobol Sequences with Better Two-Dimensional Projections"; Matoušek
(1998), "On the L2-Discrepancy for Anchored Boxes"; Owen (2003), "Variance with Alternative Scramblings of Digital
Nets".
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_regloss._core.types import Array, Key

__all__ = ["MAX_DIM", "sobol_normal"]

# As far as SciPy's table of direction numbers goes.
MAX_DIM = 21_201
# Binary digits of a coordinate, as in SciPy.
BITS = 30


def sobol_normal(rng_key: Key, num_draws: int, dim: int) -> Array:
    """One scrambled net of standard normal draws.

    Args:
        rng_key: a random key: that of the scramble.
        num_draws: a power of two.
        dim: at most `MAX_DIM`.

    Returns:
        `(num_draws, dim)` in the default float; the draws of one key are dependent.
    """
    key_matrix, key_shift = random.split(rng_key)
    num_digits = num_draws.bit_length() - 1
    numbers = jnp.asarray(_direction_numbers(num_digits, dim))
    # Digit j of the plain point adds column j of the matrix to the scrambled one: itself and random lower digits.
    columns = random.bits(key_matrix, (BITS, dim), np.uint32)
    scrambled = jnp.zeros_like(numbers)
    for j in range(BITS):
        column = (columns[j] & np.uint32(2**j - 1)) | np.uint32(2**j)
        scrambled = scrambled ^ jnp.where(numbers >> j & 1 == 1, column, 0)
    points = random.bits(key_shift, (1, dim), np.uint32) >> (32 - BITS)
    for k in range(num_digits):
        points = jnp.concatenate([points, points ^ scrambled[k]])
    return _normal_quantile(points)


def _normal_quantile(points: Array) -> Array:
    # The first digit is the sign and the others are the probability of the tail, so that no digit is lost far out.
    tail = (points & np.uint32(2 ** (BITS - 1) - 1)).astype(float)
    radius = -jax.scipy.special.ndtri((tail + 0.5) / 2**BITS)
    return jnp.where(points >> (BITS - 1) == 1, radius, -radius)


@lru_cache(maxsize=32)
def _direction_numbers(count: int, dim: int) -> np.ndarray:
    # The points of Gray code 2^k, which are numbers 1, 3, 7, ... of the sequence, consist of one of them.
    from scipy.stats import qmc  # noqa: PLC0415  (half a second, which importing the package need not take)

    sequence = qmc.Sobol(dim, scramble=False, bits=BITS)
    numbers = np.zeros((count, dim), np.uint32)
    for k in range(count):
        sequence.fast_forward(2 ** (k + 1) - 1 - sequence.num_generated)
        numbers[k] = np.round(sequence.random(1)[0] * 2.0**BITS)
    return numbers
