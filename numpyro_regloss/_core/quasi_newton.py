# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
r"""Minimization of a deterministic function by L-BFGS in one flat loop.

Directions are Optax's; steps satisfy the weak Wolfe conditions, found by bracketing and bisection, which
needs no smoothness. One pass of the loop is one evaluation, so a program holds one copy of the function, and
under `vmap` no run waits within the line search of another. A trial that is not finite is too long a step.

References: Liu & Nocedal (1989), "On the Limited Memory BFGS Method for Large Scale Optimization"; Lewis &
Overton (2013), "Nonsmooth Optimization via Quasi-Newton Methods"; Hager & Zhang (2005), "A New Conjugate
Gradient Method with Guaranteed Descent and an Efficient Line Search".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_regloss._core.optimizers import get_optax
from numpyro_regloss._core.types import Array

__all__ = ["Minimum", "Trial", "minimize"]

MEMORY = 20
SUFFICIENT_DECREASE = 1e-4
CURVATURE = 0.9
# Trials of one direction before the search is given up.
MAX_TRIALS = 20
# Steps in a row that gain next to nothing before the search ends, as it must where a kink keeps the gradient up.
MAX_IDLE = 2


class Trial(NamedTuple):
    """What the function returns.

    Attributes:
        value: scalar.
        gradient: of the shape of the argument.
        rounding: a change of the value below this is not to be believed.
        tolerance: the largest entry of the gradient of a solution.
        gain: the least decrease of the value, as a quadratic predicts it, that is worth a step.
        details: anything, kept for the solution.
    """

    value: Array
    gradient: Array
    rounding: Array
    tolerance: Array
    gain: Array
    details: Any


class Minimum(NamedTuple):
    """Where the search ended.

    Attributes:
        x: the best point.
        trial: the function there.
        num_trials: evaluations.
        num_rejected: those that were not finite.
        num_accepted: steps taken, the start counted as one.
        converged: whether the gradient is within its tolerance, or steps gained nothing any more.
    """

    x: Array
    trial: Trial
    num_trials: Array
    num_rejected: Array
    num_accepted: Array
    converged: Array


class _Search(NamedTuple):
    found: Minimum
    memory: Any
    direction: Array
    step: Array  # of the next trial, with the bracket (short, long) of what is known
    short: Array
    long: Array
    num_on_line: Array
    num_idle: Array
    stuck: Array


def minimize(
    function: Callable[[Array], Trial], start: Array, max_trials: Array, max_accepted: int
) -> Minimum:
    """Minimizes a function from a start where it is finite.

    Args:
        function: value and gradient at a vector.
        start: `(n,)`.
        max_trials: evaluations at most, traced; at least one is made.
        max_accepted: steps at most.

    Returns:
        The best point met; of NaN where the function is not finite at the start.
    """
    lbfgs = get_optax().scale_by_lbfgs(MEMORY)
    zero = jnp.zeros((), start.dtype)
    shapes = jax.eval_shape(function, start)
    blank = jax.tree.map(lambda a: jnp.full(a.shape, jnp.nan, a.dtype), shapes)
    count = jnp.asarray(0)
    found = Minimum(start, blank, count, count, count, jnp.asarray(False))
    memory = jax.tree.map(jnp.asarray, lbfgs.init(start))
    search = _Search(
        found,
        memory,
        jnp.zeros_like(start),
        zero,
        zero,
        zero + jnp.inf,
        count,
        count,
        jnp.asarray(False),
    )

    def unfinished(search: _Search) -> Array:
        found = search.found
        more = (found.num_trials < max_trials) & (found.num_accepted <= max_accepted)
        return more & ~found.converged & ~search.stuck

    def advance(search: _Search) -> _Search:
        found = search.found
        x = found.x + search.step * search.direction
        trial = function(x)
        first = found.num_trials == 0
        finite = jnp.isfinite(trial.value) & jnp.isfinite(trial.gradient).all()
        low, enough = _wolfe(search, trial)
        low = finite & (low | first)
        taken = low & (enough | first)
        tried = found._replace(
            num_trials=found.num_trials + 1, num_rejected=found.num_rejected + ~finite
        )
        slope = jnp.vdot(search.direction, found.trial.gradient)
        idle = ~first & (-0.5 * search.step * slope < trial.gain)
        num_idle = jnp.where(idle, search.num_idle + 1, 0)
        moved = tried._replace(
            x=x,
            trial=trial,
            num_accepted=found.num_accepted + 1,
            converged=(jnp.max(jnp.abs(trial.gradient)) <= trial.tolerance)
            | (num_idle >= MAX_IDLE),
        )
        ascent, memory = lbfgs.update(trial.gradient, search.memory, x)
        fresh = _Search(
            moved,
            memory,
            -jnp.asarray(ascent),
            zero + 1,
            zero,
            zero + jnp.inf,
            count,
            num_idle,
            ~finite,
        )
        short = jnp.where(low, search.step, search.short)
        long = jnp.where(low, search.long, search.step)
        same = search._replace(
            found=tried,
            step=jnp.where(jnp.isinf(long), 2 * short, 0.5 * (short + long)),
            short=short,
            long=long,
            num_on_line=search.num_on_line + 1,
            stuck=first | (search.num_on_line + 1 >= MAX_TRIALS),
        )
        return jax.tree.map(lambda a, b: jnp.where(taken, a, b), fresh, same)

    return lax.while_loop(unfinished, advance, search).found


def _wolfe(search: _Search, trial: Trial) -> tuple[Array, Array]:
    # Near a minimum differences of values are rounding, while slopes still tell: there the decrease is
    # judged by the slope (Hager & Zhang).
    before = search.found.trial
    slope = jnp.vdot(search.direction, before.gradient)
    new_slope = jnp.vdot(search.direction, trial.gradient)
    low = trial.value <= before.value + SUFFICIENT_DECREASE * search.step * slope
    flat = (trial.value <= before.value + before.rounding) & (
        new_slope <= (2 * SUFFICIENT_DECREASE - 1) * slope
    )
    return low | flat, new_slope >= CURVATURE * slope
