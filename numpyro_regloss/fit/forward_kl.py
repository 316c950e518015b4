# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""The Gaussian that minimizes KL(q || Gaussian): moment matching, the local-entropy step.

    mean = E_q[x],   covariance = Cov_q(x)

With the covariance of the reference kept, this is the second step of the paper's local-entropy scheme: the
mean moves by -(tau / T) ∇F_tau, and with the exact mean F_tau decreases.

Reference: García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy
and Heat Regularization in Deep Learning".
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from numpyro_regloss._checks import check_choice
from numpyro_regloss._pytree import pytree_dataclass, static_field
from numpyro_regloss._stats import cholesky_with_floor, monte_carlo_error, normalize_log_weight
from numpyro_regloss._typing import Array, Key
from numpyro_regloss.draws import Chunk, Draws
from numpyro_regloss.fit.base import Fit
from numpyro_regloss.gaussian import Gaussian
from numpyro_regloss.regularized import RegularizedLoss

__all__ = ["ForwardKL", "ForwardKLInfo"]

# A cloud whose mean hangs on one draw cannot tell its own error.
DOMINANT_WEIGHT = 0.999


class ForwardKLInfo(NamedTuple):
    """Diagnostics of one fit.

    Attributes:
        ok: the Gaussian is finite, and not one weighted draw alone.
        num_loss: zero.
        num_grad: zero.
        mean_error: standard error of the mean, `(dim,)`; infinite when one draw carries all weight.
        floored: whether the covariance was singular and had its eigenvalues raised.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    mean_error: Array
    floored: Array


class _Moments(NamedTuple):
    # Sums over draws (or blocks b of dependent draws) about the draws' center, weights w adding to one.
    center: Array
    first: Array  # Σ w d
    square: Array  # Σ c_b S_b², S_b = Σ_{i in b} w_i d_i, c_b the leave-one-out factor
    cross: Array  # Σ c_b W_b S_b
    weight: Array  # Σ c_b W_b²
    second: Any  # Σ w d dᵀ, or None where it is not needed


@pytree_dataclass
class ForwardKL(Fit):
    """Weighted moment matching.

    Args:
        covariance: `"reference"`: fit the mean only and keep the covariance of the reference (the
            paper); `"dense"`: match mean and full covariance.

    Raises:
        ValueError: if the family is unknown.

    Example:
        >>> ForwardKL(covariance="dense")
        ForwardKL(covariance='dense')
    """

    covariance: str = static_field(default="reference")

    def __post_init__(self) -> None:
        check_choice(self.covariance, "ForwardKL: covariance", ("reference", "dense"))

    def init(self, rng_key: Key, target: RegularizedLoss) -> tuple[()]:
        """No state."""
        del rng_key, target
        return ()

    def step(
        self, rng_key: Key, state: tuple[()], target: RegularizedLoss, draws: Draws
    ) -> tuple[tuple[()], Gaussian, ForwardKLInfo]:
        """Matches the moments of the draws.

        Args:
            rng_key: unused.
            state: `()`.
            target: the target.
            draws: from the shift.

        Returns:
            `()`, the Gaussian and the info.
        """
        del rng_key
        reference = target.reference
        dense = self.covariance == "dense"
        moments = _moments(draws, reference.mean, dense=dense)
        shift = moments.first
        mean = moments.center + shift
        alone = jnp.asarray(False)
        if draws.block_size is None:
            error = monte_carlo_error(draws.x)
        else:
            variance = moments.square - 2 * shift * moments.cross + shift**2 * moments.weight
            error = jnp.sqrt(jnp.maximum(variance, 0.0))
            alone = jnp.max(normalize_log_weight(draws.log_weight), initial=0.0) > DOMINANT_WEIGHT
            error = jnp.where(alone, jnp.inf, error)
        scale, floored = reference.scale, jnp.asarray(False)
        if dense:
            scale, floored = _scale(draws, moments)
        info = ForwardKLInfo(
            ok=jnp.isfinite(mean).all() & jnp.isfinite(scale).all() & ~alone,
            num_loss=jnp.asarray(0),
            num_grad=jnp.asarray(0),
            mean_error=error,
            floored=floored,
        )
        return state, Gaussian(mean, scale), info


def _moments(draws: Draws, like: Array, *, dense: bool) -> _Moments:
    # Log weights are scalars, so they are normalized once, before the draws are visited chunk by chunk.
    block_size = draws.block_size or 1
    peak = jnp.max(draws.log_weight, initial=-jnp.inf)
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    total = jnp.sum(jnp.exp(draws.log_weight - peak))

    def add(sums: _Moments, chunk: Chunk) -> _Moments:
        weight = jnp.exp(chunk.pair_log_weight - peak) / total
        # Of a pair only the difference of the weights counts, and draws are never formed.
        signed = weight @ chunk.sign
        offset, coefficient = chunk.offset, signed
        rows = block_size // chunk.sign.size
        if rows > 1:
            offset = jnp.sum((signed[:, None] * offset).reshape(-1, rows, offset.shape[-1]), 1)
            coefficient = jnp.ones_like(offset[:, 0])
        block_weight = jnp.sum(weight.reshape(-1, block_size), 1)
        factor = (1.0 - jnp.minimum(block_weight, DOMINANT_WEIGHT)) ** -2
        first, cross = jnp.stack([coefficient, factor * block_weight * coefficient]) @ offset
        second = sums.second
        if second is not None:
            second = second + (jnp.sum(weight, 1)[:, None] * chunk.offset).T @ chunk.offset
        return _Moments(
            chunk.center,
            sums.first + first,
            sums.square + (factor * coefficient**2) @ offset**2,
            sums.cross + cross,
            sums.weight + jnp.sum(factor * block_weight**2),
            second,
        )

    zero = jnp.zeros_like(like)
    second = jnp.zeros((zero.size, zero.size), zero.dtype) if dense else None
    return draws.fold(add, _Moments(zero, zero, zero, zero, jnp.zeros((), zero.dtype), second))


def _scale(draws: Draws, moments: _Moments) -> tuple[Array, Array]:
    # 1 / (1 - Σ w²) is n / (n - 1) for equal weights: the covariance is about its own mean.
    concentration = jnp.sum(normalize_log_weight(draws.log_weight) ** 2)
    covariance = moments.second - jnp.outer(moments.first, moments.first)
    return cholesky_with_floor(covariance / (1.0 - jnp.minimum(concentration, DOMINANT_WEIGHT)))
