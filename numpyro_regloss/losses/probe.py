# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Do the gradients of a loss tell how its values differ? A look at a few points of the reference.

At points x_i = mean + o_i, the derivative along the offset o_i is compared with the difference of values between
two neighbors on the line through the mean:

    loss(mean + (1 + h) o) - loss(mean + (1 - h) o)   and   the integral of ∇loss · o between them,

by Simpson's rule. The midpoint and the trapezoidal rule differ where three gradients are too few for the
integral; that difference and rounding are the uncertainty of the comparison. Parameters whose derivative is
exactly zero at all of these points are then moved alone.
"""

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro.util import find_stack_level

from numpyro_regloss._core.checks import WITHOUT_GRADIENTS, follow
from numpyro_regloss._core.pytree import is_concrete
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.gaussians.gaussian import AnyGaussian

__all__ = ["Probe", "check_gradient", "probe"]

# Distance of the neighbors, as a share of the offset: rounding asks for a large one, curvature for a small one.
STEP = 0.125
# A sum over rows of data is rounded many times: its error, in units of the last digit of the value.
ROUNDING = 32.0
# Below this relative error a gradient and a difference agree, whatever the uncertainty.
AGREEMENT = 0.2
# Of the difference between two integration rules.
SAFETY = 3.0
# Points at which the parameters without a derivative are moved alone.
NUM_ALONE = 2


def _verdict(fn: Callable[[Any], Any]) -> property:
    # NumPy would warn of differences of infinities and of numbers near overflow.
    return property(np.errstate(all="ignore")(fn))


class Probe(NamedTuple):
    """What a few evaluations around the mean of a Gaussian tell of a loss and its gradient.

    The fields are what was seen at each point, in the order: the mean; per probe the lower neighbor, the probe
    and the upper neighbor; the points where only parameters without a derivative were moved. The properties are
    the verdicts. Points whose loss is not finite, such as those behind a wall, are left out of them. They are
    NumPy values where the fields are concrete and traced ones under `jax.jit`; under `jax.vmap` take them inside.

    Attributes:
        values: the loss, `(point,)`.
        slopes: derivative along the point's offset, `(point,)`, in the units of the loss.
        blurs: by how much a point's own rounding may change its value, `(point,)`.
        gradient_finite: whether the gradient is, `(point,)`.
        still: whether parameters without a derivative before had none there either, `(point,)`.
        num_silent: parameters whose derivative was exactly zero at the mean and all probes.
        dim: number of parameters.
    """

    values: Array
    slopes: Array
    blurs: Array
    gradient_finite: Array
    still: Array
    num_silent: Array
    dim: Array

    @_verdict
    def value(self) -> Any:
        """The loss at the probes, `(probe,)`."""
        return self._of_probes(self.values)[:, 1]

    @_verdict
    def difference(self) -> Any:
        """Of the loss between the two neighbors of each probe, `(probe,)`."""
        value = self._of_probes(self.values)
        return value[:, 2] - value[:, 0]

    @_verdict
    def slope(self) -> Any:
        """What the gradients say of `difference`, `(probe,)`."""
        middle, ends = self._rules
        return (2 * middle + ends) / 3

    @_verdict
    def uncertainty(self) -> Any:
        """By how much `slope` and `difference` may differ, by rounding and by curvature, `(probe,)`."""
        middle, ends = self._rules
        return SAFETY * abs(ends - middle) + self.rounding + 2 * self._of_probes(self.blurs).max(1)

    @_verdict
    def rounding(self) -> Any:
        """The largest difference between two values that may be rounding, a scalar."""
        xp = self._xp
        values = xp.where(xp.isfinite(self.values), self.values, 0.0)
        return ROUNDING * np.finfo(self.values.dtype).eps * abs(values).max()

    @_verdict
    def varies(self) -> Any:
        """Whether values differ by more than rounding."""
        xp = self._xp
        finite = xp.isfinite(self.values)
        highest = xp.where(finite, self.values, -np.inf).max()
        return highest - xp.where(finite, self.values, np.inf).min() > self.rounding

    @_verdict
    def gradient_is_zero(self) -> Any:
        """Whether values differ although all derivatives are exactly zero: gradients tell nothing."""
        return self.varies & (self.num_silent == self.dim)

    @_verdict
    def gradient_fails(self) -> Any:
        """Whether values differ and are finite, but no probe has a finite gradient."""
        finite = self._xp.isfinite(self.value)
        with_gradient = finite & self._of_probes(self.gradient_finite)[:, 1]
        return self.varies & finite.any() & ~with_gradient.any()

    @_verdict
    def some_gradient_is_zero(self) -> Any:
        """Whether values depend on parameters whose derivative is exactly zero, but others have one."""
        xp = self._xp
        change = abs(self.values[-NUM_ALONE:] - self.values[0])
        change = xp.where(xp.isfinite(change), change, 0.0).max()
        some = (self.num_silent > 0) & (self.num_silent < self.dim)
        return some & self.still[-NUM_ALONE:].all() & (change > self.rounding)

    @_verdict
    def comparable(self) -> Any:
        """At which probes slope and difference are finite and one of them exceeds the uncertainty, `(probe,)`."""
        xp = self._xp
        larger = xp.maximum(abs(self.difference), abs(self.slope))
        return xp.isfinite(larger) & (larger > self.uncertainty)

    @_verdict
    def disagrees(self) -> Any:
        """At which probes slope and difference are clearly different, `(probe,)`."""
        difference, slope = self.difference, self.slope
        larger = self._xp.maximum(abs(difference), abs(slope))
        return self.comparable & (abs(difference - slope) > self.uncertainty + AGREEMENT * larger)

    @_verdict
    def gradient_is_wrong(self) -> Any:
        """Whether some derivative is not zero, but at half of the probes or more they clearly disagree."""
        disagrees = self.disagrees
        return (self.num_silent < self.dim) & (2 * disagrees.sum() >= disagrees.size)

    @property
    def _xp(self) -> ModuleType:
        return np if is_concrete(tuple(self)) else jnp

    @_verdict
    def _rules(self) -> tuple[Any, Any]:
        slope = self._of_probes(self.slopes)
        return 2 * STEP * slope[:, 1], STEP * (slope[:, 0] + slope[:, 2])

    def _of_probes(self, points: Any) -> Any:
        return self._xp.asarray(points)[1:-NUM_ALONE].reshape(-1, 3)


def probe(
    rng_key: Key, target: Any, num_probes: int = 4, *, around: AnyGaussian | None = None
) -> Probe:
    """Evaluates a loss and its gradient at a few points of a Gaussian and at their neighbors.

    Pure; one loop whose body holds the loss and its gradient once, point after point, so that it needs no more
    memory than one gradient and compiles as one. Use it

    - at the start of a run, for engines that follow gradients: refuse where `gradient_is_zero`, warn where
      `gradient_is_wrong` or `some_gradient_is_zero`;
    - afterwards, at the last reference, for a report: `varies` says whether the loss differs by more than its
      rounding over the reference, `disagrees` whether gradients say something else than values, and `comparable`
      whether that could be seen.

    The loss is evaluated by `target.value` alone, on all rows; pass `target.on_batch(rng_key)` for one minibatch.

    Args:
        rng_key: a random key.
        target: a `RegularizedLoss`.
        num_probes: points with two neighbors each. The mean takes one evaluation more, and parameters without a
            derivative two.
        around: the Gaussian whose points to look at; default: the target's reference.

    Returns:
        The probe.
    """
    gaussian = target.reference if around is None else around
    mean = gaussian.mean
    eps = np.maximum(np.finfo(mean.dtype).eps, target.loss.source.digits()).astype(mean.dtype)
    evaluate = jax.value_and_grad(target.value)

    def visit(silent: Array, item: Any) -> tuple[Array, tuple]:
        index, factor, alone = item
        offset = gaussian.scaled(_noise(rng_key, index, mean))
        offset = jnp.where(alone & ~silent, 0.0, offset)
        x = mean + factor * offset
        value, gradient = evaluate(x)
        loud = jnp.isfinite(value) & (gradient != 0)
        return silent & (alone | ~loud), (
            value,
            gradient @ offset,
            # A point is rounded before the loss sees it.
            jnp.sqrt(jnp.sum((eps * gradient * x) ** 2)),
            jnp.isfinite(gradient).all(),
            ~jnp.any(loud & silent),
        )

    draws = np.arange(num_probes)
    index = np.concatenate([[0], np.repeat(draws, 3), num_probes + np.arange(NUM_ALONE)])
    lines = np.tile([1.0 - STEP, 1.0, 1.0 + STEP], num_probes)
    factor = np.concatenate([[0.0], lines, np.ones(NUM_ALONE)]).astype(mean.dtype)
    alone = np.arange(index.size) >= index.size - NUM_ALONE
    silent, seen = lax.scan(
        visit, jnp.ones(mean.shape, bool), (index.astype(np.uint32), factor, alone)
    )
    return Probe(*seen, jnp.sum(silent), jnp.asarray(mean.size))


def check_gradient(
    found: Probe, names: list[str], what: str, remedy: str = WITHOUT_GRADIENTS
) -> None:
    """Refuses a loss whose gradient is zero everywhere, and warns of one that values contradict.

    Args:
        found: concrete.
        names: of the engines that follow gradients.
        what: begins messages.
        remedy: what to use instead.

    Raises:
        ValueError: if values differ, but no derivative is other than zero, or none is finite.
    """
    dim = int(found.dim)
    if found.gradient_is_zero:
        change = np.ptp(found.values[np.isfinite(found.values)])
        raise ValueError(
            f"{what}: {follow(names)} gradients, and those of this loss are exactly zero at all of "
            f"{found.values.size} points within the reference's width, where its values differ by up to "
            f"{change:.3g}. The loss is piecewise constant, or something in it stops gradients (floor, round, "
            f"argmax, comparisons, stop_gradient). Use {remedy}."
        )
    if found.gradient_fails:
        raise ValueError(
            f"{what}: {follow(names)} gradients, and those of this loss are NaN or infinite at all of "
            f"{found.value.size} points within the reference's width, where its values are finite. Look for a "
            "square root, a norm or a division that jnp.where hides from the value but not from the gradient, or "
            f"use {remedy}."
        )
    seen = []
    if found.some_gradient_is_zero:
        seen.append(
            f"the gradient is exactly zero for {int(found.num_silent)} of {dim} parameters, though the loss "
            "changes when they alone are moved"
        )
    if found.gradient_is_wrong:
        worst = int(np.argmax(np.where(found.disagrees, abs(found.difference - found.slope), -1)))
        seen.append(
            f"the gradient says that the loss changes by {found.slope[worst]:.3g} between two points near the "
            f"start, where it changes by {found.difference[worst]:.3g} (they disagree at "
            f"{found.disagrees.sum()} of {found.disagrees.size} places)"
        )
    if seen:
        warnings.warn(
            f"{what}: {follow(names)} gradients, but those of this loss are not what its values say: "
            f"{'; and '.join(seen)}. If that is meant (straight-through estimators, custom gradients), ignore "
            f"this; else look for stop_gradient, rounding and comparisons, or use {remedy}.",
            stacklevel=find_stack_level(),
        )


def _noise(rng_key: Key, index: Array, like: Array) -> Array:
    # Uniform numbers of mean zero and variance one, by a hash (the finalizer of MurmurHash3) of key, point and
    # coordinate: JAX's random numbers would take longer to compile than most losses.
    data = random.key_data(rng_key).reshape(-1).astype(jnp.uint32)
    bits = lax.iota(jnp.uint32, like.size)
    for word in (index, data[0], data[-1]):
        bits = (bits ^ word) * np.uint32(0x9E3779B1)
        bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
        bits = bits ^ (bits >> 16)
    uniform = (bits >> 8).astype(like.dtype) * 2.0**-24 + 2.0**-25
    return np.sqrt(12.0).astype(like.dtype) * (uniform - 0.5)
