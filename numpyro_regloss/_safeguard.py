# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Whether to go farther than the plain step, before and after.

The plain step, from the centre x to the mean m of q, never increases F_tau but for sampling errors. Going farther has no
such guarantee, so it is judged twice, in units of the reference and of T, with p the step, e = m - x and C = Cov_q:

    - before, as one half of the draws would go and the other half sees it, both ways: by
      log E_q[φ_{x + p} / φ_x] where the draws tell that, else to second order, p·e - pᵀ(I - C)p / 2;
    - after, by the trapezoid rule between the gradients at both ends: (e_before + e_after)·p / 2. Where F_tau rose
      by more than the error of this, the centre goes back, to where the plain step would have led.

References: Caffo, Jank & Jones (2005), "Ascent-Based Monte Carlo Expectation-Maximization"; Conn, Gould & Toint
(2000), "Trust-Region Methods".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_regloss._descent import half_masks, decrease, masked
from numpyro_regloss._typing import Array
from numpyro_regloss.anchor.base import REASONS, AcceleratedInfo
from numpyro_regloss.draws import Draws
from numpyro_regloss.gaussian import AnyGaussian
from numpyro_regloss.regularized import RegularizedLoss

__all__ = [
    "Last",
    "check_uses_draws",
    "compare",
    "first",
    "remember",
    "report",
    "rise",
    "whitened_error",
]

# Variance of log φ_{x + p} / φ_x up to which a hundred draws tell the mean of its exponential.
MOST_VARIANCE = 2.0
# Standard errors by which F_tau must have risen for the centre to go back.
SIGNIFICANT = 2.0


class Last(NamedTuple):
    """What the next step needs to judge this one.

    Attributes:
        mean: the centre before, `(dim,)`.
        gradient: -∇F_tau / T there, `(dim,)`.
        error: of the gradient, `(dim,)`.
        plain: where the plain step would have led, `(dim,)`.
        accelerated: whether the step went farther.
    """

    mean: Array
    gradient: Array
    error: Array
    plain: Array
    accelerated: Array


def first(target: RegularizedLoss) -> Last:
    """Nothing to judge yet."""
    zero = jnp.zeros_like(target.reference.mean)
    return Last(zero, zero, zero, zero, jnp.asarray(False))


def remember(
    reference: AnyGaussian, plain: Array, error: Array, mean: Array, accelerated: Array
) -> Last:
    """The step that is being taken.

    Args:
        reference: so far.
        plain: the plain step, whitened.
        error: its standard errors, whitened.
        mean: where it leads.
        accelerated: whether another step is taken.

    Returns:
        The step.
    """
    gradient, error = (reference.unscale_transpose(v) for v in (plain, error))
    return Last(reference.mean, gradient, jnp.abs(error), mean, accelerated)


def rise(last: Last, reference: AnyGaussian, plain: Array, error: Array) -> tuple[Array, Array]:
    """By how much F_tau / T rose since the last step, by the trapezoid rule.

    Args:
        last: the last step.
        reference: where it led.
        plain: the plain step from there, whitened.
        error: its standard errors, whitened.

    Returns:
        The rise, and whether it is an accelerated step's and significant.
    """
    way = reference.mean - last.mean
    gradient, now = (reference.unscale_transpose(v) for v in (plain, error))
    value = -0.5 * (last.gradient + gradient) @ way
    deviation = 0.5 * jnp.sqrt(jnp.sum((last.error**2 + now**2) * way**2))
    return value, last.accelerated & (value > SIGNIFICANT * deviation)


def check_uses_draws(fit: Any, what: str, remedy: str) -> None:
    """Refuses fits that do not work from draws.

    Args:
        fit: of the optimizer under construction.
        what: begins the error message.
        remedy: ends it.

    Raises:
        ValueError: if the fit makes no use of draws.
    """
    if not getattr(fit, "uses_draws", True):
        raise ValueError(
            f"{what}: expected a fit that matches the moments of draws, such as fit.ForwardKL, got "
            f"{type(fit).__name__}; {remedy}."
        )


def compare(
    target: RegularizedLoss,
    draws: Draws,
    mean_of: Callable[[Draws], Array],
    steps: Callable[[Array], Array],
    covariance: Callable[[Array], Array],
    scores: Array,
) -> Array:
    """Decreases of F_tau by several steps, cross-fitted, in the units of the loss.

    Args:
        target: the target of the draws.
        draws: from q, with weights.
        mean_of: the whitened mean of draws, some of them without weight.
        steps: the whitened steps that follow from such a mean, `(dim,)` -> `(step, dim)`.
        covariance: the product of the whitened covariance of q with a vector.
        scores: whether scores, if there are any, may be used.

    Returns:
        One decrease per step, `(step,)`; -infinity where it is not finite.
    """
    masks = half_masks(draws)
    means = jax.vmap(lambda mask: mean_of(masked(draws, mask)))(masks)

    def judge(step: Array, mean: Array, mask: Array) -> Array:
        spread = covariance(step)
        variance = step @ spread
        model = target.temperature * (step @ mean - 0.5 * (step @ step - variance))
        judges, others = masked(draws, ~mask), masked(draws, mask)
        there = target.reference.unwhiten(step)
        seen = decrease(target, judges, there, regress_on=others, scores=scores).value
        value = jnp.where(variance < MOST_VARIANCE, seen, model)
        return jnp.where(jnp.isfinite(value), value, -jnp.inf)

    def of_half(mean: Array, other: Array, mask: Array) -> Array:
        return jax.vmap(lambda step: judge(step, other, mask))(steps(mean))

    return jnp.mean(jax.vmap(of_half)(means, means[::-1], masks), 0)


def whitened_error(target: RegularizedLoss, fit_info: Any) -> Array:
    """Standard errors of the fitted mean in whitened coordinates, without their correlations, `(dim,)`."""
    error = getattr(fit_info, "mean_error", None)
    if error is None:
        return jnp.zeros_like(target.reference.mean)
    return error * jnp.sqrt(target.reference.precision_diagonal)


def report(reason: Array, plain: Array, step: Array, decreases: Array) -> AcceleratedInfo:
    """The info of an accelerated anchor.

    Args:
        reason: index into `anchor.base.REASONS`.
        plain: the plain step, whitened.
        step: the accelerated step.
        decreases: of F_tau by both, `(2,)`.

    Returns:
        The info.
    """
    length = jnp.linalg.norm(plain)
    return AcceleratedInfo(
        ok=jnp.asarray(True),
        num_loss=jnp.asarray(0),
        num_grad=jnp.asarray(0),
        accelerated=reason == REASONS.index("accelerated"),
        reason=reason,
        decrease=decreases[1],
        plain_decrease=decreases[0],
        lengthening=jnp.linalg.norm(step) / jnp.where(length > 0, length, 1.0),
    )
