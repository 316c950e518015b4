# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""A look at the loss around the last centre of a run, for engines that follow gradients.

Gradients are compared with differences of values, and the direction in which the loss bends down most is looked
for: Lanczos iterations with differences of gradients, averaged over points of the reference, and a second set of
points that tells whether the direction they found is one.

References: Lanczos (1950), "An Iteration Method for the Solution of the Eigenvalue Problem of Linear Differential
and Integral Operators".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from numpyro_regloss._core.pytree import with_context_axes
from numpyro_regloss._core.settings import own_settings
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.diagnostics.arrival import Finding
from numpyro_regloss.losses.probe import STEP, Probe, probe
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.two_step.outer_step import TwoStepInfo

__all__ = ["Look", "look_around"]

# Points whose gradients are compared with differences.
NUM_PROBES = 8
# Where a loss differs so many times more from point to point than gradients at these points say, it has steps.
BLIND = 100.0
# Pairs of points, for the direction and again for what is said of it.
NUM_PAIRS = 4
NUM_ITERATIONS = 20
# Gradients are subtracted over so many standard deviations of the reference to either side.
REACH = 0.25
# How far below zero a curvature must be: in its standard errors, and as a share of the greatest one. Trained
# networks have small negative ones.
SIGMAS, LEAST_SHARE = 4.0, 0.1
# Values of one point and one program differ by rounding; those of other data by more.
SAME = 1e-2


class Look(NamedTuple):
    """What was seen.

    Attributes:
        findings: what is wrong.
        checked: what was compared.
        unchecked: what could not be, and why.
        wall: whether the loss is infinite at some point near the centre: paths of NUTS that end there are called
            divergent, and are right.
    """

    findings: tuple[Finding, ...] = ()
    checked: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    wall: bool = False


def look_around(
    optimizer: Any, reference: Any, history: TwoStepInfo, *, curvature: bool = True
) -> Look:
    """Evaluates the loss around the last centre, at the arguments that are bound to it.

    Args:
        optimizer: of the run.
        reference: the last one.
        history: of the run.
        curvature: whether to look for a direction in which the loss bends down.

    Returns:
        What was seen; nothing for engines without gradients.
    """
    shift, fit, loss = optimizer.shift, optimizer.fit, optimizer.loss
    if not (shift.uses_gradient or fit.uses_gradient):
        return Look()
    reference, history = with_context_axes((reference, history))
    # A report is the same each time it is asked for.
    keys = random.split(random.key(0), 3)
    target = RegularizedLoss.unchecked(loss, reference, loss.arguments, optimizer.temperature)
    target = target.on_batch(keys[0])
    # Without the centre of the last step nothing tells whether the loss is still that of the run.
    known = history.motion is None
    center = history.reference.mean[-1] if known else reference.mean
    seen = jax.device_get(_seen(keys[1], target, center))
    then, now = float(seen[1]), float(history.loss[-1])
    same = abs(then - now) <= SAME * max(abs(now), 1e-30)
    if known and not loss.is_random and not same:
        what = (
            "the loss around the centre: the run had other arguments than those bound to the loss"
        )
        return Look(unchecked=(what,))
    wall = bool(np.isinf(seen[0].values).any())
    text = _of_gradients(seen[0])
    checked = ["gradients against differences"] if text or seen[0].comparable.any() else []
    unchecked = () if checked else ("gradients against differences, which are rounding here",)
    if not known:
        unchecked += ("whether the run had the arguments that are bound to the loss (no centres)",)
    findings = [Finding("gradient", text)] if text else []
    if curvature and not text:
        checked.append("curvature at the centre")
        text = _of_curvature(keys[2], target, uses_draws=fit.uses_draws)
        findings += [Finding("curvature", text)] if text else []
    return Look(tuple(findings), tuple(checked), unchecked, wall)


@jax.jit
@own_settings
def _seen(rng_key: Key, target: RegularizedLoss, x: Array) -> tuple[Probe, Array]:
    return probe(rng_key, target, NUM_PROBES), target.value(x)


def _of_gradients(seen: Probe) -> str:
    remedy = 'use shift.Importance, or for a heat step fit.RobbinsMonro(gradient="score").'
    if seen.num_silent == seen.dim:
        if seen.varies:
            return f"the gradient is zero around the centre, though the loss varies: {remedy}"
        return (
            "neither the loss nor its gradient changes around the centre: check whether the loss depends on its "
            "parameters, or use a larger tau."
        )
    if seen.gradient_fails:
        return f"the gradient is not finite around the centre, though the loss is: {remedy}"
    if seen.gradient_is_wrong:
        worst = int(np.argmax(np.where(seen.disagrees, np.abs(seen.difference - seen.slope), -1.0)))
        return (
            f"gradients do not agree with the loss: by gradients it changes by {seen.slope[worst]:.3g} between "
            f"two points near the centre, and in fact by {seen.difference[worst]:.3g}; {remedy}"
        )
    values = seen.value[np.isfinite(seen.value)]
    steepest = np.abs(seen.slope[np.isfinite(seen.slope)]).max(initial=0.0) / (2 * STEP)
    if len(values) and np.ptp(values) > BLIND * steepest + seen.rounding:
        return (
            f"the loss changes by {np.ptp(values):.3g} between points around the centre, but by gradients by "
            f"{steepest:.3g} at most: it has jumps; {remedy}"
        )
    if seen.some_gradient_is_zero:
        return (
            f"the gradient of {int(seen.num_silent)} of {int(seen.dim)} parameters is zero around the centre, "
            f"though the loss depends on them: {remedy}"
        )
    return ""


def _of_curvature(rng_key: Key, target: RegularizedLoss, *, uses_draws: bool) -> str:
    points = np.asarray(random.normal(rng_key, (2, NUM_PAIRS, target.dim)))
    points = np.concatenate([points, -points], 1).astype(target.reference.mean.dtype)
    if uses_draws:
        # Those of q are nearer where the loss is steep: it rises by T / 2 per parameter at most.
        rise = float(_rise(target, points[0]))
        points *= min(1.0, np.sqrt(0.5 * target.dim / max(rise, 0.5 * target.dim)))
    if not np.isfinite(points).all():
        return ""
    rng = np.random.default_rng(0)
    direction, largest = _lanczos(
        lambda v: _curvature(target, points[0], v)[0], rng.normal(size=target.dim)
    )
    if direction is None:
        return ""
    quotients = np.asarray(_curvature(target, points[1], direction)[1], float)
    pairs = quotients.reshape(2, NUM_PAIRS).mean(0)
    lowest, error = pairs.mean(), pairs.std(ddof=1) / np.sqrt(NUM_PAIRS)
    if not lowest < -max(SIGMAS * error, LEAST_SHARE * largest):
        return ""
    return (
        f"the loss bends down at the centre in some direction, by {-lowest / 2:.2g} T at a distance of one sd of "
        "the reference: the centre rests on a saddle or a ridge; start elsewhere, such as at random parameters, "
        "or use a larger tau."
    )


@jax.jit
@own_settings
def _rise(target: RegularizedLoss, points: Array) -> Array:
    energy = lax.map(lambda point: target.energy(target.reference.unwhiten(point)), points)
    return jnp.mean(energy) - target.energy(target.reference.mean)


@jax.jit
@own_settings
def _curvature(target: RegularizedLoss, points: Array, direction: Array) -> tuple[Array, Array]:
    # In units of the reference and of T: the mean product of Hessian and direction, and every quotient.
    slope = jax.grad(lambda noise: target.energy(target.reference.unwhiten(noise)))
    direction = jnp.asarray(direction, points.dtype)

    def add(total: Array, point: Array) -> tuple[Array, Array]:
        ahead, behind = slope(point + REACH * direction), slope(point - REACH * direction)
        product = (ahead - behind) / (2 * REACH)
        return total + product, product @ direction

    total, quotients = lax.scan(add, jnp.zeros_like(direction), points)
    return total / len(points), quotients


def _lanczos(multiply: Any, start: np.ndarray) -> tuple[np.ndarray | None, float]:
    # Lowest eigenvector and largest eigenvalue of a symmetric matrix, in double precision.
    basis, products = [], []
    vector = start / np.linalg.norm(start)
    for _ in range(min(NUM_ITERATIONS, len(start))):
        product = np.asarray(multiply(vector), float)
        if not np.isfinite(product).all():
            return None, 0.0
        basis.append(vector)
        products.append(product)
        rows = np.array(basis)
        rest = product - rows.T @ (rows @ product)
        rest -= rows.T @ (rows @ rest)
        length = np.linalg.norm(rest)
        if length <= 1e-6 * np.linalg.norm(product):
            break
        vector = rest / length
    small = np.array(basis) @ np.array(products).T
    values, vectors = np.linalg.eigh((small + small.T) / 2)
    return np.array(basis).T @ vectors[:, 0], float(values[-1])
