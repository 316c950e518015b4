# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Whether to go farther than the plain step, before and after.

The plain step, from the centre x to the mean m of q, never increases F_tau but for sampling errors. Going
farther has no such guarantee, so it is judged twice. In units of the reference and of T, with p the step,
e = m - x, u = p·(X - m) and C = Cov_q:

    - before, as one half of the draws would go and the other half sees it, both ways, by

          log E_q[φ_{x + p} / φ_x] = p·e - p·p / 2 + log(1 + pᵀC p / 2 + E_q[exp(u) - 1 - u - u² / 2])

      with e and C Stein-corrected, or to second order, p·e - pᵀ(I - C)p / 2, where pᵀC p exceeds half the
      logarithm of the number of draws, so that these cannot tell the expectation;
    - after, by the trapezoid rule between the gradients at both ends, (e_before + e_after)·p / 2. Where F_tau
      rose by more than the error of this, the centre goes back, to where the plain step would have led.

References: Caffo, Jank & Jones (2005), "Ascent-Based Monte Carlo Expectation-Maximization"; Conn, Gould & Toint
(2000), "Trust-Region Methods".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_regloss._core.linalg import after
from numpyro_regloss._core.pytree import replace_fields
from numpyro_regloss._core.stats import weight_ess
from numpyro_regloss._core.types import Array
from numpyro_regloss.anchor.regression import Regression, mean_of
from numpyro_regloss.draws.base import Chunk, Draws
from numpyro_regloss.draws.descent import half_masks, is_far, masked
from numpyro_regloss.fit.base import FitInfo
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.losses.regularized import RegularizedLoss

__all__ = [
    "AcceleratedInfo",
    "Last",
    "REASONS",
    "check_uses_draws",
    "compare",
    "first",
    "in_order",
    "remember",
    "report",
    "rise",
    "whitened_error",
]

# Standard errors by which F_tau must have risen for the centre to go back.
SIGNIFICANT = 2.0
# Why an accelerated anchor took the plain step, or went back to where the last plain step would have led since the
# regularized loss had risen; the first means that it did neither.
REASONS = ("accelerated", "no history", "no further decrease", "went back")


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


def in_order(
    target: RegularizedLoss, fitted: AnyGaussian
) -> tuple[AnyGaussian, RegularizedLoss, Array]:
    """The plain step, and references to whiten with: LAPACK calls come one after another.

    Args:
        target: the target of this step.
        fitted: the fitted Gaussian.

    Returns:
        The reference, once the fit is done; the target, once the plain step is known; the plain step, whitened.
    """
    done = jnp.stack([part.reshape(-1)[-1] for part in fitted])
    reference = target.reference._replace(mean=after(jnp.sum(done), target.reference.mean))
    plain = reference.whiten(fitted.mean)
    then = reference._replace(mean=after(plain[-1], reference.mean))
    return reference, replace_fields(target, reference=then), plain


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
    if not fit.uses_draws:
        raise ValueError(
            f"{what}: expected a fit that matches the moments of draws, such as fit.ForwardKL, got "
            f"{type(fit).__name__}; {remedy}."
        )


def compare(
    target: RegularizedLoss,
    draws: Draws,
    regression: Regression,
    steps: Callable[[Array], Array],
) -> Array:
    """Decreases of F_tau by several steps, cross-fitted, in the units of the loss.

    Args:
        target: the target of the draws.
        draws: from q, with weights.
        regression: with the control variate of their mean.
        steps: the whitened steps that follow from the mean of half of the draws, `(dim,)` -> `(step, dim)`.

    Returns:
        One decrease per step, `(step,)`; -infinity where it is not finite.
    """
    masks = half_masks(draws)
    reference, coefficient = target.reference, regression.coefficient
    ess = weight_ess(draws.log_weight)

    def proposed(mask: Array) -> tuple[Array, Array]:
        mean = mean_of(masked(draws, mask), reference, coefficient)
        return mean, steps(mean)

    def judged(mask: Array, mean: Array, step: Array) -> Array:
        along = step @ mean
        variance, rest = _moments(masked(draws, mask), reference, coefficient, step, along)
        seen = jnp.log1p(0.5 * variance + rest)
        log_ratio = (
            along - 0.5 * step @ step + jnp.where(is_far(variance, ess), 0.5 * variance, seen)
        )
        return jnp.where(jnp.isfinite(log_ratio), draws.temperature * log_ratio, -jnp.inf)

    means, both = jax.vmap(proposed)(masks)
    of_steps = jax.vmap(judged, (None, None, 0))
    return jnp.mean(jax.vmap(of_steps)(masks[::-1], means[::-1], both), 0)


def _moments(
    draws: Draws, reference: AnyGaussian, coefficient: Any, step: Array, along: Array
) -> tuple[Array, Array]:
    # Of u = p·ε - p·e: the variance, Stein-corrected, and E[exp(u) - 1 - u - u²/2].
    log_total = jax.nn.logsumexp(draws.log_weight)
    log_total = jnp.where(jnp.isfinite(log_total), log_total, 0.0)
    corrected = jnp.zeros_like(step)
    if coefficient is not None:
        diagonal = coefficient.ndim == 1
        corrected = coefficient * step if diagonal else coefficient.T @ step

    def add(sums: tuple[Array, Array], chunk: Chunk) -> tuple[Array, Array]:
        weight = jnp.exp(chunk.log_weight - log_total)
        u = jnp.where(weight > 0, reference.whiten(chunk.x) @ step - along, 0.0)
        residual = u
        if chunk.score is not None:
            control = reference.scaled_transpose(chunk.score) @ corrected
            residual = u - jnp.where(weight > 0, control, 0.0)
        rest = jnp.exp(u) - 1.0 - u - 0.5 * u**2
        return sums[0] + weight @ (residual * u), sums[1] + weight @ rest

    zero = jnp.zeros_like(along)
    second, rest = draws.fold(add, (zero, zero))
    return second - corrected @ step, rest


def whitened_error(target: RegularizedLoss, fit_info: Any) -> Array:
    """Standard errors of the fitted mean in whitened coordinates, without their correlations, `(dim,)`."""
    error = FitInfo.of(fit_info).mean_error
    if error is None:
        return jnp.zeros_like(target.reference.mean)
    return error * jnp.sqrt(target.reference.precision_diagonal)


class AcceleratedInfo(NamedTuple):
    """Diagnostics of anchors that go beyond the fitted mean.

    Attributes:
        ok: the next reference may be used.
        num_loss: loss evaluations.
        num_grad: gradient evaluations.
        accelerated: whether the reference went beyond the fitted mean; otherwise it moved to that mean, as with
            `Proximal`.
        reason: index into `REASONS`.
        decrease: of F_tau by the accelerated step, cross-fitted, in the units of the loss; NaN if there are no
            draws to estimate it from.
        plain_decrease: the same for the plain step.
        lengthening: length of the proposed step divided by that of the plain step, in units of the reference.
    """

    ok: Array
    num_loss: Array
    num_grad: Array
    accelerated: Array
    reason: Array
    decrease: Array
    plain_decrease: Array
    lengthening: Array


def report(reason: Array, plain: Array, step: Array, decreases: Array) -> AcceleratedInfo:
    """The info of an accelerated anchor.

    Args:
        reason: index into `REASONS`.
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
