# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Targets that have no finite Gaussian: directions along which a density does not fall off.

Where a Gaussian N is stationary, integration by parts gives for every direction u of its whitened coordinates

    E_N[ z_u h_u ] = 1,      h = Sᵀ ∇energy

This curvature is zero along a direction that the energy does not know, however wide N is, so that nothing ends its
growth. Along a wide but proper one it is small at first and grows with the square of the width. So a direction
is given up once it is far wider than the start and its curvature is still not different from zero. Then a weak
quadratic, the guard, holds it there: the other coordinates are fitted as before, and rounding of what has become
huge does not spoil them.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from numpyro.util import find_stack_level

from numpyro_regloss._core.types import Array
from numpyro_regloss.gaussians.gaussian import AnyGaussian

__all__ = [
    "Guard",
    "flat_directions",
    "guarded",
    "endless_rays",
    "most_growth",
    "ray_points",
    "outgrown",
    "still_growing",
    "unused_coordinates",
    "warn_improper",
]

# Where a curvature that should be one is below this the variance would grow by a tenth at least.
LEAST_CURVATURE = 0.9
# Growth that no posterior needs, in units of the first limit.
MOST_GROWTH = 1e5
# What has become this many times wider than the start is looked at from afar: at these distances, in standard
# deviations, along a ray, between which an energy that has an integral grows by more than the logarithm.
SOME_GROWTH, RAY = 10.0, (1e2, 1e4)
# Standard errors of a curvature. That of a quadratic is 8 or more with 128 pairs of draws.
SIGMAS = 4.0
# Rounding of an eigenvalue in units of the last digit of the largest.
ROUNDING = 100.0
# Coordinates are named where this share of their variance comes from directions that were given up.
LEAST_SHARE = 0.5
# Coordinates that a warning names.
MOST_NAMES = 5


class Guard(NamedTuple):
    """What holds directions that nothing else holds: (x - center)ᵀ precision (x - center) / 2.

    Attributes:
        center: `(dim,)`.
        precision: `(dim, dim)`, or `(dim,)` of coordinates; zero where there is nothing to hold.
        variance: what the directions that it holds add to the variance of each coordinate, `(dim,)`.
    """

    center: Array
    precision: Array
    variance: Array

    @classmethod
    def none(cls, center: Array, *, dense: bool) -> "Guard":
        """A guard that holds nothing."""
        zero = jnp.zeros_like(center)
        return cls(center, jnp.zeros((center.size, center.size)) + zero if dense else zero, zero)

    def pull(self, x: Array) -> tuple[Array, Array]:
        """Energy `(draw,)` and gradient `(draw, dim)` at draws."""
        off = x - self.center
        gradient = off @ self.precision if self.precision.ndim == 2 else off * self.precision
        return 0.5 * jnp.sum(off * gradient, -1), gradient


def guarded(evaluate: Callable[[Array], Any], guard: Guard | None) -> Callable[[Array], Any]:
    """The energies and gradients of `evaluate`, with those of a guard added."""
    if guard is None:
        return evaluate

    def both(x: Array) -> Any:
        evaluation = evaluate(x)
        energy, gradient = guard.pull(x)
        return evaluation._replace(
            energy=evaluation.energy + energy, gradient=evaluation.gradient + gradient
        )

    return both


def most_growth(dtype: Any) -> float:
    """How many times wider than the start a direction becomes before its curvature decides.

    Rounding of a direction so wide must leave narrow ones that are correlated with it as they are.

    Args:
        dtype: of the parameters.

    Returns:
        A factor: 7e4 in single, 9e10 in double precision.
    """
    return float(jnp.finfo(dtype).eps) ** -0.7


def outgrown(
    gaussian: AnyGaussian,
    start: AnyGaussian,
    noise: Array,
    slopes: Array,
    curvature: Array,
    limit: Array,
) -> Array:
    """Whether a coordinate has grown or moved much and has not met a curvature.

    Args:
        gaussian: dense.
        start: from where.
        noise: its whitened draws, `(draw, dim)`.
        slopes: gradients at them, whitened, `(draw, dim)`.
        curvature: E z hᵀ, symmetric, `(dim, dim)`.
        limit: standard deviations from which on a coordinate has grown much, `(dim,)`.

    Returns:
        A boolean scalar.
    """
    sd, directions, values = _along_coordinates(gaussian, curvature)
    error = _curvature_error(curvature, slopes, noise, directions)
    far = jnp.maximum(sd, jnp.abs(gaussian.mean - start.mean)) > limit
    flat = far & (values <= jnp.minimum(error, LEAST_CURVATURE))
    return jnp.any(flat | ((sd > MOST_GROWTH * limit) & (values < LEAST_CURVATURE)))


def flat_directions(
    gaussian: Any, noise: Array, gradient: Array, limit: Array, guard: Guard, rays: Any = None
) -> Guard:
    """Adds directions to a guard that have outgrown a limit without meeting a curvature.

    Args:
        gaussian: dense.
        noise: its whitened draws, `(draw, dim)`.
        gradient: of the guarded energy at the draws, `(draw, dim)`.
        limit: standard deviations, or distances from the start, that are much, `(dim,)`.
        guard: what is held already, about the start.
        rays: from `endless_rays` once the search is over: then they count too, and what has grown much and still
            does, and coordinates that have little part in all that is held are not counted as held.

    Returns:
        The guard.
    """
    slopes, curvature = _curvature(gaussian, noise, gradient)
    finite = jnp.isfinite(curvature).all()
    values, vectors = jnp.linalg.eigh(jnp.where(finite, curvature, jnp.eye(len(limit))))
    least = _curvature_error(curvature, slopes, noise, vectors)
    if rays is not None:
        least = jnp.maximum(least, LEAST_CURVATURE)
    directions = gaussian.scale @ vectors
    # Columns S⁻ᵀ v, so that the quadratic is that of the whitened coordinates along what is flat.
    pulls = solve_triangular(gaussian.scale, vectors, lower=True, trans="T")
    moved = jnp.abs((gaussian.mean - guard.center) @ pulls)
    growth = jnp.max(jnp.abs(directions) / limit[:, None], 0) * jnp.maximum(moved, 1.0)
    # Among equal curvatures eigenvectors are mixed, and their growth with them.
    grown = growth > 0.5 * len(limit) ** -0.5
    flat = grown & finite & (values <= jnp.minimum(least, LEAST_CURVATURE))
    pulls = jnp.where(flat, pulls, 0.0)
    precision = guard.precision + pulls @ pulls.T
    held = guard.variance + jnp.sum(jnp.where(flat, directions, 0.0) ** 2, 1)
    if rays is not None:
        variance = gaussian.variance
        held = jnp.where(held > LEAST_SHARE * variance, held, 0.0)
        precision = precision + jnp.diag(jnp.where(rays, 1.0 / variance, 0.0))
        held = jnp.where(rays, variance, held)
    return Guard(guard.center, precision, held)


def ray_points(gaussian: Any) -> Array:
    """Points far out along the directions that move each coordinate most, to both sides.

    Args:
        gaussian: dense.

    Returns:
        `(2, 2, dim, dim)`: of either side, distance and coordinate.
    """
    _, directions, _ = _along_coordinates(gaussian, jnp.zeros_like(gaussian.scale))
    steps = (gaussian.scale @ directions).T
    distances = jnp.asarray([RAY, [-distance for distance in RAY]], steps.dtype)
    return gaussian.mean + distances[:, :, None, None] * steps


def endless_rays(gaussian: AnyGaussian, energy: Array, limit: Array) -> Array:
    """Coordinates along whose ray, to one side at least, a density has no integral.

    Args:
        gaussian: dense.
        energy: at `ray_points`, `(2, 2, dim)`.
        limit: standard deviations from which on a coordinate has grown much, `(dim,)`.

    Returns:
        `(dim,)`, booleans; True only of what has grown by some.
    """
    grown = jnp.sqrt(gaussian.variance) > SOME_GROWTH / most_growth(limit.dtype) * limit
    rise = energy[:, 1] - energy[:, 0]
    # A NaN is no evidence.
    return grown & jnp.any(rise < math.log(RAY[1] / RAY[0]), 0)


def unused_coordinates(gaussian: AnyGaussian, gradient: Array, growth: float) -> Guard:
    """A guard of the coordinates whose gradient is exactly zero at all draws.

    Args:
        gaussian: the start.
        gradient: of the energy at its draws, `(draw, dim)`.
        growth: how many times the start's width they may have.

    Returns:
        The guard.
    """
    held = jnp.where(jnp.all(gradient == 0.0, 0), growth**2 * gaussian.variance, 0.0)
    precision = jnp.where(held > 0, 1.0 / jnp.where(held > 0, held, 1.0), 0.0)
    return Guard(gaussian.mean, precision, held)


def still_growing(
    gaussian: AnyGaussian,
    noise: Array,
    x: Array,
    gradient: Array,
    guard: Guard | None,
    limit: Array,
) -> Array:
    """Coordinates that a guard alone holds, or that have grown much and would go on.

    Args:
        gaussian: where the fit ended.
        noise: of the draws, whitened where the Gaussian is dense.
        x: draws of it, `(draw, dim)`.
        gradient: of the guarded energy at the draws, `(draw, dim)`.
        guard: or None.
        limit: standard deviations from which on a coordinate has grown much, `(dim,)`.

    Returns:
        `(dim,)`, booleans.
    """
    if gaussian.structure == "dense":
        # Not coordinate by coordinate, where rounding does not cancel between what is correlated.
        _, curvature = _curvature(gaussian, noise, gradient)
        _, _, values = _along_coordinates(gaussian, curvature)
    else:
        values = jnp.mean((x - gaussian.mean) * gradient, 0)
    growing = (jnp.sqrt(gaussian.variance) > limit) & ~(values >= LEAST_CURVATURE)
    if guard is None:
        return growing
    if guard.precision.ndim == 2:
        return growing | (guard.variance > 0)
    own = jnp.mean(jnp.abs(gradient - guard.pull(x)[1]), 0)
    alone = own <= 0.5 * jnp.mean(jnp.abs(gradient), 0)
    return growing | ((guard.variance > 0) & alone)


def warn_improper(improper: Array, names: tuple[str, ...], *, settled: bool) -> None:
    """Names the coordinates in which a target has no finite Gaussian.

    Args:
        improper: which, booleans `(dim,)`, one at least.
        names: of all coordinates.
        settled: whether the fit of the others is stationary.
    """
    which = np.flatnonzero(np.asarray(improper))
    rest = len(which) - MOST_NAMES
    listed = ", ".join(names[i] for i in which[:MOST_NAMES])
    listed += f" and {rest} more" if rest > 0 else ""
    others = ""
    if len(which) < len(names) and settled:
        others = " The other coordinates can be used, unless the density even grows along that direction."
    elif len(which) < len(names):
        others = " The fit of the other coordinates had not settled: allow more num_steps for them."
    warnings.warn(
        "reverse_kl: the target has no finite Gaussian. Its density does not fall off along some direction of "
        f"{listed}, where the variance would grow without end. Mean and variance of these coordinates, and the "
        f"bound, have no meaning, and info.ok is False.{others} Give the target a reference, such as "
        "RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau)), give these parameters a proper prior, or leave "
        "them out of the model.",
        stacklevel=find_stack_level(),
    )


def _curvature_error(curvature: Array, slopes: Array, noise: Array, directions: Array) -> Array:
    # What a curvature along directions, one per column, must exceed to differ from zero. Both draws of a pair have
    # the same product where the slopes are odd.
    products = (noise @ directions) * (slopes @ directions)
    error = jnp.std(products, 0) / jnp.sqrt(len(noise) / 2)
    eps = jnp.finfo(curvature.dtype).eps
    return SIGMAS * error + ROUNDING * eps * jnp.max(jnp.abs(curvature))


def _curvature(gaussian: Any, noise: Array, gradient: Array) -> tuple[Array, Array]:
    slopes = gradient @ gaussian.scale
    lower = jnp.tril(slopes.T @ noise / len(noise))
    return slopes, lower + jnp.tril(lower, -1).T


def _along_coordinates(gaussian: Any, curvature: Array) -> tuple[Array, Array, Array]:
    # Standard deviations, the whitened directions that move each coordinate most, and curvatures along them.
    sd = jnp.sqrt(gaussian.variance)
    directions = (gaussian.scale / sd[:, None]).T
    return sd, directions, jnp.sum(directions * (curvature @ directions), 0)
