# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""What a Langevin step is made of: noise, preconditioners, the limit of its step size, averages.

A step z ← z - η P ∇U(z) + sqrt(2 η T P) ξ of a quadratic U with Hessian A is stable if and only if no eigenvalue
of η P A reaches 2. The largest is found by a power iteration on differences of gradients of one batch.

References: Li, Chen, Carlson & Carin (2016), "Preconditioned Stochastic Gradient Langevin Dynamics for Deep Neural
Networks"; Milstein & Tretyakov (2004), "Stochastic Numerics for Mathematical Physics", on weak schemes with
two-point noise.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax, random

from numpyro_regloss._checks import check_positive
from numpyro_regloss._pytree import is_concrete, pytree_dataclass
from numpyro_regloss._stats import normalize_log_weight
from numpyro_regloss._typing import Array, Key

__all__ = ["NOISES", "RMSprop", "SecondMoment", "draw_noise", "growth", "series_ess", "steepest"]

NOISES = ("normal", "two_point")
# Batches whose means tell how fast a chain mixes.
NUM_BATCHES = 32


class SecondMoment(NamedTuple):
    """Running average of squared gradients.

    Attributes:
        sum: weighted sum of the squares, `(dim,)`.
        weight: sum of the weights, from 0 to 1.
    """

    sum: Array
    weight: Array


@pytree_dataclass
class RMSprop:
    """A diagonal preconditioner 1 / (damping + sqrt(V)) with V a running mean of squared gradients.

    It moves with the chain, and the correction for that is left out, as in the paper: unlike with a fixed
    preconditioner, the bias of averages does not vanish with the step size.

    Args:
        decay: of the running mean per inner step, between 0 and 1.
        damping: in units of the gradient of the loss.

    Raises:
        TypeError: if a setting is no number.
        ValueError: if a setting is out of range.

    Example:
        >>> RMSprop(decay=0.5)
        RMSprop(decay=array(0.5, dtype=float32), damping=array(1.e-05, dtype=float32))
    """

    decay: Any = 0.99
    damping: Any = 1e-5

    def __post_init__(self) -> None:
        for name in ("decay", "damping"):
            number = check_positive(getattr(self, name), f"RMSprop: {name}")
            object.__setattr__(self, name, number)
        if is_concrete(self.decay) and self.decay >= 1:
            raise ValueError(f"RMSprop: expected decay between 0 and 1, got {self.decay}.")

    def init(self, like: Array) -> SecondMoment:
        """No gradients yet, for parameters `like`, `(dim,)`."""
        return SecondMoment(jnp.zeros_like(like), jnp.zeros((), like.dtype))

    def update(self, moment: SecondMoment, gradient: Array) -> SecondMoment:
        """Counts one more gradient of every chain, `(chain, dim)`."""
        share = jnp.asarray(1.0 - self.decay, gradient.dtype)
        square = jnp.mean(gradient**2, 0)
        return SecondMoment(
            moment.sum + share * (square - moment.sum),
            moment.weight + share * (1.0 - moment.weight),
        )

    def diagonal(self, moment: SecondMoment) -> Array:
        """The preconditioner, `(dim,)`."""
        weight = jnp.where(moment.weight > 0, moment.weight, 1.0)
        return 1.0 / (self.damping + jnp.sqrt(moment.sum / weight))


def draw_noise(kind: str, rng_key: Key, shape: tuple[int, ...], dtype: Any) -> Array:
    """Numbers of mean zero and variance one.

    Args:
        kind: `"normal"`, or `"two_point"` for -1 and 1, of which one random word makes 32.
        rng_key: a random key.
        shape: of the numbers.
        dtype: of the numbers.

    Returns:
        The numbers.
    """
    if kind == "normal":
        return random.normal(rng_key, shape, dtype)
    count = math.prod(shape)
    words = random.bits(rng_key, (-(-count // 32),), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[:, None]) & jnp.uint32(1)
    return (2.0 * bits.reshape(-1)[:count].astype(dtype) - 1.0).reshape(shape)


def steepest(
    direction: Array, num_iterations: Array, multiply: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """Power iteration for the largest eigenvalue of a symmetric matrix.

    Args:
        direction: a unit vector to start from, `(dim,)`.
        num_iterations: one at least.
        multiply: the product of the matrix with a vector.

    Returns:
        The direction and its Rayleigh quotient, at most the largest eigenvalue up to noise.
    """

    def iterate(_: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        product = multiply(now[0])
        size = jnp.linalg.norm(product)
        usable = jnp.isfinite(size) & (size > 0)
        after = jnp.where(usable, product / jnp.where(usable, size, 1.0), now[0])
        return after, jnp.dot(now[0], product)

    return lax.fori_loop(0, num_iterations, iterate, (direction, jnp.zeros((), direction.dtype)))


def growth(x: Array) -> Array:
    """How much longer the moves of chains are in their second half than in the first.

    Args:
        x: draws or means of successive ones, `(chain, draw, dim)`.

    Returns:
        The ratio of root mean squares; one for fewer than four moves, infinite where a draw is not finite.
    """
    square = jnp.mean(jnp.diff(x, axis=1) ** 2, (0, 2))
    if square.size < 4:
        return jnp.where(jnp.isfinite(x).all(), 1.0, jnp.inf).astype(x.dtype)
    first, second = jnp.mean(square[: square.size // 2]), jnp.mean(square[square.size // 2 :])
    ratio = jnp.sqrt(second / jnp.where(first > 0, first, 1.0))
    return jnp.where(jnp.isfinite(ratio), jnp.where(first > 0, ratio, 1.0), jnp.inf)


def series_ess(x: Array, log_weight: Array, spread: Array | None) -> Array:
    """Effective sample size of the weighted mean, by batch means, over all coordinates together.

    Args:
        x: draws or means of successive ones, `(chain, draw, dim)`.
        log_weight: of them, `(chain, draw)`.
        spread: variances within what the means are of, like `x`, or None.

    Returns:
        Total variance over total squared error of the mean; zero where a draw is not finite.
    """
    weight = normalize_log_weight(log_weight)[..., None]
    deviation = x - jnp.sum(weight * x, (0, 1))
    variance = jnp.sum(weight * (deviation**2 + (0.0 if spread is None else spread)))
    size = -(-x.shape[1] // NUM_BATCHES)

    def batched(values: Array) -> Array:
        values = jnp.pad(values, ((0, 0), (0, -values.shape[1] % size), (0, 0)))
        return jnp.sum(values.reshape(len(values), -1, size, values.shape[-1]), 2)

    share = jnp.sum(batched(weight) ** 2)
    error = jnp.sum(batched(weight * deviation) ** 2) / jnp.maximum(1.0 - share, 1e-3)
    ess = variance / jnp.where(error > 0, error, 1.0)
    return jnp.where(jnp.isfinite(ess), ess, 0.0)
