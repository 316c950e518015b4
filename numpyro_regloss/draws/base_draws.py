# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Standard normal draws that are spread out evenly and have exact moments.

Every coordinate runs through the same nodes ±r₁ … ±r_n of equal weight, one per stratum of equal probability
and with the second, fourth and sixth moment of the normal distribution; in one dimension that is quadrature.
How coordinates go together is a scrambled Sobol sequence with a random digital shift, in high dimensions a
random permutation (Latin hypercube). Draws come in antithetic pairs, and a last linear map makes their sample
covariance the identity where there are enough of them.

References: Sobol' (1967), "On the Distribution of Points in a Cube and the Approximate Evaluation of
Integrals"; Owen (1995), "Randomly Permuted (t,m,s)-Nets and (t,s)-Sequences"; McKay, Beckman & Conover (1979),
"A Comparison of Three Methods for Selecting Values of Input Variables in the Analysis of Output from a Computer
Code".
"""

from functools import lru_cache

import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_regloss._core.types import Array, Key

__all__ = ["base_draws", "round_up"]

# Beyond, a table of points would be a constant of several MB in every program, and its two-dimensional
# projections are no better than random.
MAX_SOBOL_DIM = 256
MAX_TABLE = 2**19
# With fewer strata the nodes cannot have all three moments.
LEAST_MATCHED = 32


def round_up(num_draws: int) -> int:
    """The number of draws that `base_draws` makes where so many are asked for: a power of two, at least four."""
    return max(4, 1 << (num_draws - 1).bit_length())


def base_draws(rng_key: Key, num_draws: int, num_leading: int, num_trailing: int = 0) -> Array:
    """Antithetic draws z, then -z, of a standard normal vector.

    Where there are twice as many draws as coordinates, the sample covariance is the identity. Otherwise
    variances are one, and so is the covariance of the leading block, uncorrelated to the trailing one, if
    there are enough draws for that.

    Args:
        rng_key: a random key.
        num_draws: from `round_up`.
        num_leading: size of the leading block.
        num_trailing: size of the trailing block.

    Returns:
        `(num_draws, num_leading + num_trailing)` in the default float.
    """
    pairs, dim = num_draws // 2, num_leading + num_trailing
    key_sign, key_shift = random.split(rng_key)
    if dim <= MAX_SOBOL_DIM and pairs * dim <= MAX_TABLE:
        # The first binary digit is the sign, the others the stratum up to its last digit, which is chosen such
        # that of two draws of one stratum of double width and of either sign each has a half of its own.
        digits = jnp.asarray(_sobol_digits(pairs, dim))
        digits = digits ^ random.randint(key_shift, (dim,), 0, pairs)
        half = pairs // 2
        negative, coarse = digits // half, digits % half
        stratum = 2 * coarse + (negative ^ random.randint(key_sign, (dim,), 0, 2))
    else:
        order = jnp.broadcast_to(jnp.arange(pairs)[:, None], (pairs, dim))
        stratum = random.permutation(key_shift, order, 0, independent=True)
        negative = random.randint(key_sign, (pairs, dim), 0, 2)
    radius = jnp.asarray(_nodes(pairs), float)[stratum]
    z = _standardize(jnp.where(negative == 1, -radius, radius), num_leading)
    return jnp.concatenate([z, -z])


@lru_cache(maxsize=32)
def _sobol_digits(count: int, dim: int) -> np.ndarray:
    from scipy.stats import qmc  # noqa: PLC0415  (half a second, which importing the package need not take)

    points = qmc.Sobol(dim, scramble=True, rng=np.random.default_rng(0)).random(count)
    return np.floor(points * count).astype(np.int32)


@lru_cache(maxsize=32)
def _nodes(count: int) -> np.ndarray:
    from scipy import optimize, stats  # noqa: PLC0415

    edges = stats.norm.isf(np.linspace(0.5, 0.0, count + 1))
    mean = -np.diff(stats.norm.pdf(edges)) * 2 * count
    moments = {2: 1.0, 4: 3.0, 6: 15.0} if count >= LEAST_MATCHED else {2: 1.0}

    def nodes(change: np.ndarray) -> np.ndarray:
        return mean * (1.0 + np.polynomial.polynomial.polyval(mean**2, change))

    def excess(change: np.ndarray) -> list[float]:
        return [np.mean(nodes(change) ** order) / moment - 1 for order, moment in moments.items()]

    return nodes(optimize.root(excess, np.zeros(len(moments)), tol=1e-12).x)


def _standardize(z: Array, num_leading: int) -> Array:
    if z.shape[0] >= z.shape[1]:
        return _orthonormal(z)
    if z.shape[0] >= num_leading > 0:
        leading = _orthonormal(z[:, :num_leading])
        trailing = z[:, num_leading:]
        trailing = trailing - leading @ (leading.T @ trailing) / z.shape[0]
        return jnp.concatenate([leading, _unit_variance(trailing)], 1)
    return _unit_variance(z)


def _orthonormal(z: Array) -> Array:
    # Q of Z = Q R is Z times the inverse Cholesky factor of ZᵀZ, up to signs, without squaring rounding errors.
    q, r = jnp.linalg.qr(z)
    return q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0) * jnp.sqrt(1.0 * z.shape[0])


def _unit_variance(z: Array) -> Array:
    second = jnp.mean(z**2, 0)
    return z / jnp.sqrt(jnp.where(second > 0, second, 1.0))
