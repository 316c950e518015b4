# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""The error of a stochastic root: what running sums over the iterates say about their average.

With drifts d_j = H (u_j - u*) + ε_j and weights w_j ∝ j the averages obey, exactly where H is constant,

    ū - u* = H⁻¹ (d̄ - ε̄):

d̄ is known, and is the bias of a start that is not forgotten; ε̄ has the covariance Var(d) Σ w_j². The
curvature H - I of the smoothed loss follows from the same evaluations by Stein's identities

    K = E[∇f(u + ξ) ξᵀ] = E[f(u + ξ) (ξ ξᵀ - I)],

as a running least-squares fit, whose noise goes to zero where f is quadratic. Matrices are dense for few
parameters and many steps, and diagonals otherwise.

Few steps know no curvature. The last iterate of u ← u - a_j (g_j + u) is a weighted sum of the gradients met,

    u_M = Π_j (1 - a_j) u_0 - Σ_j c_j g_j,    c_j = a_j Π_{i > j} (1 - a_i),

whose error is Var(g) Σ c_j² and, in flat directions, a share Π_j (1 - a_j) of the way to the root. That way is
u_M / (1 - Π_j (1 - a_j)) and noise, whose square is subtracted: steep directions have no way left.

References: Polyak & Juditsky (1992), "Acceleration of Stochastic Approximation by Averaging"; Stein
(1981), "Estimation of the Mean of a Multivariate Normal Distribution"; Chen, Lee, Tong & Zhang (2020),
"Statistical Inference for Model Parameters in Stochastic Gradient Descent".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_regloss._core.types import Array
from numpyro_regloss.gaussians.gaussian import AnyGaussian, Gaussian

__all__ = [
    "DENSE_DIM",
    "Scatter",
    "Sums",
    "add",
    "error_of_average",
    "error_of_last",
    "in_parameters",
    "start",
]

# A matrix of this size costs less per step than one small loss.
DENSE_DIM = 32
# Eigenvalues of H below are noise, or there is no stable root: the error is at most ten times the drift's.
LEAST_EIGENVALUE = 0.1


_Map = Callable[[Array], Array]


class Sums(NamedTuple):
    """Weighted running averages over the steps so far, whitened.

    Attributes:
        average: of the iterates, `(dim,)`.
        drift: of the drifts, `(dim,)`.
        noise: covariance of the drifts, `(dim, dim)` or its diagonal.
        curvature: K, `(dim, dim)` or its diagonal.
        level: of the even part of the energy, `()`; zero where gradients are at hand.
    """

    average: Array
    drift: Array
    noise: Array
    curvature: Array
    level: Array


class Scatter(NamedTuple):
    """Of the gradients of a few steps, whitened.

    Attributes:
        first: gradient of the first step, `(dim,)`.
        sum: of the gradients less the first one, `(dim,)`.
        squares: of the squares of the same, `(dim,)`.
        share: Σ c_j² so far.
        kept: Π (1 - a_j) so far.
        loss: of the first step.
    """

    first: Array
    sum: Array
    squares: Array
    share: Array
    kept: Array
    loss: Array

    @classmethod
    def zero(cls, like: Array) -> "Scatter":
        """Before the first step, of vectors like this one."""
        zero, none = jnp.zeros_like(like), jnp.zeros((), like.dtype)
        return cls(zero, zero, zero, none, none + 1.0, none)

    def add(self, j: Array, size: Array, gradient: Array, loss: Array) -> "Scatter":
        """The scatter with one step more.

        Args:
            j: the step, from 0.
            size: a_j.
            gradient: g_j, `(dim,)`.
            loss: that came with it.

        Returns:
            The scatter.
        """
        first = jnp.where(j == 0, gradient, self.first)
        offset, left = gradient - first, 1.0 - size
        return Scatter(
            first,
            self.sum + offset,
            self.squares + offset**2,
            left**2 * self.share + size**2,
            left * self.kept,
            jnp.where(j == 0, loss, self.loss),
        )

    def moment(self, u: Array, num_steps: int) -> Array:
        """Second moments of the error of the last iterate, as if the loss were flat.

        Args:
            u: the iterate, `(dim,)`.
            num_steps: steps done.

        Returns:
            `(dim,)`; infinite after one step, which shows no noise.
        """
        if num_steps == 1:
            return jnp.full_like(u, jnp.inf)
        variance = (self.squares - self.sum**2 / num_steps) / (num_steps - 1)
        noise = self.share * jnp.maximum(variance, 0.0)
        left = self.kept / (1.0 - self.kept)
        return noise + left**2 * jnp.maximum(u**2 - noise, 0.0)


def start(zero: Array, *, dense: bool) -> Sums:
    """The sums before the first step.

    Args:
        zero: zeros, `(dim,)`.
        dense: whether matrices are dense, else diagonals.

    Returns:
        Zeros.
    """
    matrix = jnp.zeros(zero.shape * 2 if dense else zero.shape, zero.dtype)
    return Sums(zero, zero, matrix, matrix, jnp.zeros((), zero.dtype))


def add(
    sums: Sums, j: Array, iterate: Array, drift: Array, noise: Array, response: Array, *, even: bool
) -> Sums:
    """One step more.

    Args:
        sums: the sums so far.
        j: the step, from 0.
        iterate: u after the step, `(dim,)`.
        drift: gradient + u before the step, `(dim,)`.
        noise: ξ, `(pair, dim)`.
        response: odd parts of the gradient, `(pair, dim)`, or even parts of the energy, `(pair,)`.
        even: whether they are even parts of the energy.

    Returns:
        The sums.
    """
    # Weights 1, 2, …, n have the running average  ū ← ū + 2 (u - ū) / (n + 1).
    weight = 2.0 / (j + 2.0)
    average = sums.average + weight * (iterate - sums.average)
    change = drift - sums.drift
    dense = sums.noise.ndim == 2
    spread = (1.0 - weight) * (sums.noise + weight * _outer(change, change, dense))
    sums = sums._replace(average=average, drift=sums.drift + weight * change, noise=spread)
    fit = _fit_even if even else _fit_odd
    return fit(sums, weight, noise, response, dense)


def error_of_average(sums: Sums, num_steps: Array) -> Array:
    """Second moment of the error of the average, whitened.

    Args:
        sums: the sums.
        num_steps: steps done.

    Returns:
        `(dim, dim)` or its diagonal; infinite after one step, which shows no noise.
    """
    values, rotate, restore = _spectrum(sums)
    dense = sums.noise.ndim == 2
    share = _sum_of_squares(jnp.asarray(num_steps, sums.drift.dtype))
    moment = share * _variance(sums, share) + _outer(sums.drift, sums.drift, dense)
    return restore(rotate(moment) / _outer(values, values, dense))


def error_of_last(sums: Sums, num_steps: int, step_size: Callable[[Array], Array]) -> Array:
    """Second moment of the error of the last iterate, whitened.

    Args:
        sums: the sums.
        num_steps: steps done.
        step_size: a_j of the step j.

    Returns:
        `(dim, dim)` or its diagonal.
    """
    values, rotate, restore = _spectrum(sums)
    dense = sums.noise.ndim == 2

    def body(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        gain, bias = carry
        size = step_size(j)
        kept = 1.0 - size * values
        return gain * _outer(kept, kept, dense) + size**2, bias * kept

    gain = jnp.zeros_like(sums.noise)
    gain, bias = lax.fori_loop(0, num_steps, body, (gain, jnp.ones_like(values)))
    lag = rotate(_outer(sums.drift, sums.drift, dense)) / _outer(values, values, dense)
    way = rotate(_outer(sums.average, sums.average, dense)) + lag
    share = _sum_of_squares(jnp.asarray(num_steps, sums.drift.dtype))
    noise = rotate(_variance(sums, share))
    return restore(gain * noise + _outer(bias, bias, dense) * way)


def in_parameters(moment: Array, reference: AnyGaussian) -> Array:
    """Standard errors in units of the parameters.

    Args:
        moment: whitened second moments, `(dim, dim)` or their diagonal.
        reference: the Gaussian that whitens.

    Returns:
        `(dim,)`.
    """
    if moment.ndim == 2:
        scaled = jax.vmap(reference.scaled)
        return jnp.sqrt(jnp.maximum(jnp.diagonal(scaled(scaled(moment).T)), 0.0))
    if isinstance(reference, Gaussian) and reference.structure == "dense":
        return jnp.sqrt(reference.scale**2 @ moment)
    return jnp.sqrt(reference.variance * moment)


def _sum_of_squares(count: Array) -> Array:
    return 2.0 * (2.0 * count + 1.0) / (3.0 * count * (count + 1.0))


def _variance(sums: Sums, share: Array) -> Array:
    # The usual correction for a mean from the same numbers; one step has no variance to show.
    return jnp.where(share < 1, sums.noise / jnp.where(share < 1, 1.0 - share, 1.0), jnp.inf)


def _outer(a: Array, b: Array, dense: bool) -> Array:  # noqa: FBT001
    return a[..., :, None] * b[..., None, :] if dense else a * b


def _spectrum(sums: Sums) -> tuple[Array, _Map, _Map]:
    # Eigenvalues of H, and the maps of a second moment to its eigenvectors and back.
    if sums.curvature.ndim == 1:
        return jnp.maximum(1.0 + sums.curvature, LEAST_EIGENVALUE), lambda m: m, lambda m: m
    values, vectors = jnp.linalg.eigh(0.5 * (sums.curvature + sums.curvature.T))
    values = jnp.maximum(1.0 + values, LEAST_EIGENVALUE)
    return values, lambda m: vectors.T @ m @ vectors, lambda m: vectors @ m @ vectors.T


def _fit_odd(sums: Sums, weight: Array, noise: Array, odd: Array, dense: bool) -> Sums:  # noqa: FBT001
    fitted = noise @ sums.curvature.T if dense else noise * sums.curvature
    size = jnp.mean(jnp.sum(noise**2, -1) if dense else noise**2, 0)
    # Not more than the whole residual of the pairs at hand, or early steps would overshoot.
    gain = weight / (1.0 + weight * size)
    change = jnp.mean(_outer(odd - fitted, noise, dense), 0)
    return sums._replace(curvature=sums.curvature + gain * change)


def _fit_even(sums: Sums, weight: Array, noise: Array, even: Array, dense: bool) -> Sums:  # noqa: FBT001
    identity = jnp.eye(noise.shape[-1], dtype=noise.dtype) if dense else 1.0
    feature = _outer(noise, noise, dense) - identity
    axes = tuple(range(1, feature.ndim))
    rest = even - 0.5 * jnp.sum(feature * sums.curvature, axes)
    residual = rest - jnp.where(weight < 1, sums.level, jnp.mean(rest))
    size = jnp.mean(0.5 * jnp.sum(feature**2, axes))
    gain = weight / (1.0 + weight * size)
    change = jnp.mean(residual[(...,) + (None,) * len(axes)] * feature, 0)
    return sums._replace(
        curvature=sums.curvature + gain * change,
        level=sums.level + weight * (jnp.mean(rest) - sums.level),
    )
