# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Variational fits by sample average approximation: fixed draws, a deterministic bound, quasi-Newton steps.

The minimum over fixed draws is not noise to be averaged away but one function's minimum, so it is found to
rounding, and what is left is the error of the draws. After some steps coordinates are renewed about the
Gaussian reached, which brings curvatures near one.

References: Kleywegt, Shapiro & Homem-de-Mello (2002), "The Sample Average Approximation Method for Stochastic
Discrete Optimization"; Giordano, Ingram & Broderick (2024), "Black Box Variational Inference with a
Deterministic Objective: Faster, More Accurate, and Even More Black Box".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from numpyro_regloss._core.pytree import all_finite
from numpyro_regloss._core.quasi_newton import Trial, minimize
from numpyro_regloss._core.types import Array
from numpyro_regloss.fit.reverse_kl.coordinates import (
    Evaluation,
    Solution,
    bound_gradient,
    draw,
    move,
    zero_step,
)
from numpyro_regloss.gaussians.gaussian import AnyGaussian

__all__ = ["sample_average"]

# Largest entry of the gradient, in units in which curvatures are near one: in standard deviations, a hundredth
# of the accuracy that draws leave.
TOLERANCE = 1e-4
# The least decrease worth a step, in nats: that of a mean off by a thousandth of a standard deviation.
GAIN = 5e-7
# Quasi-Newton steps between two renewals of the coordinates.
STEPS_PER_ROUND = 20


class _Round(NamedTuple):
    solution: Solution
    done: Array


def sample_average(
    evaluate: Callable[[Array], Evaluation],
    start: AnyGaussian,
    covariance: str,
    noise: Array,
    reference: AnyGaussian | None,
    num_steps: int,
) -> Solution:
    """Minimizes the bound over a family on fixed draws.

    Args:
        evaluate: energies and gradients of draws.
        start: of the family.
        covariance: the family.
        noise: from `noise_for`.
        reference: the target's.
        num_steps: evaluations of all draws at most.

    Returns:
        The solution; of an evaluation that is not finite if the start's is none.
    """
    template, unravel = ravel_pytree(zero_step(start, covariance))

    def function(base: AnyGaussian, x: Array) -> Trial:
        step = unravel(x)
        evaluation = evaluate(draw(move(base, step), noise))
        value, gradient = bound_gradient(base, step, noise, evaluation, reference)
        eps = jnp.finfo(x.dtype).eps
        slope = jax.vmap(base.scaled_transpose)(evaluation.gradient)
        return Trial(
            value,
            ravel_pytree(gradient)[0],
            rounding=4 * eps * (jnp.mean(jnp.abs(evaluation.energy)) + 1.0),
            gain=jnp.asarray(GAIN, x.dtype),
            tolerance=TOLERANCE + 4 * eps * jnp.max(jnp.mean(jnp.abs(slope), 0)),
            details=evaluation,
        )

    def advance(round_: _Round) -> _Round:
        base = round_.solution.gaussian
        left = num_steps - round_.solution.num_steps
        found = minimize(lambda x: function(base, x), template, left, STEPS_PER_ROUND)
        gaussian = move(base, unravel(found.x))
        finite = all_finite(gaussian)
        gaussian = jax.tree.map(lambda a, b: jnp.where(finite, a, b), gaussian, base)
        solution = Solution(
            gaussian,
            found.trial.details,
            round_.solution.num_steps + found.num_trials,
            round_.solution.num_rejected + found.num_rejected,
        )
        return _Round(solution, found.converged | (found.num_accepted <= 1) | ~finite)

    def unfinished(round_: _Round) -> Array:
        return ~round_.done & (round_.solution.num_steps < num_steps)

    first = _Round(Solution.at(start, evaluate, noise), jnp.asarray(False))
    return lax.while_loop(unfinished, advance, first).solution
