# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Warm-up of vmapped chains as one: a step size and a mass matrix that they share.

The step size follows the mean acceptance of the chains by dual averaging, and the mass matrix is estimated from
the draws of all of them, in Stan's windows. NumPyro's own adapter does this for each chain alone, and vmapped
chains of different step sizes wait for the longest path among them.

Unlike Stan's, dual averaging goes on from the last step size, not from ten times it, when the mass matrix changes:
a short warm-up ends a few iterations later, too soon to come down again.

References: Hoffman & Gelman (2014), "The No-U-Turn Sampler: Adaptively Setting Path Lengths in Hamiltonian
Monte Carlo"; Stan Development Team, "Stan Reference Manual", chapter on HMC algorithm parameters.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from numpyro.infer.hmc_util import build_adaptation_schedule, dual_averaging, welford_covariance

from numpyro_regloss._core.pytree import strip_weak_types
from numpyro_regloss._core.types import Array

__all__ = ["Adaptation", "Tuning", "WarmUp"]

# Dual averaging starts above the first step size: it comes down from one that is too large in fewer gradients
# than it takes on the way up from one that is too small.
HEAD_START = 10.0


class Tuning(NamedTuple):
    """What a kernel is tuned by.

    Attributes:
        step_size: scalar.
        inverse_mass_matrix: `(dim,)` or `(dim, dim)`.
        mass_matrix_sqrt: a square root of its inverse, of the same shape.
    """

    step_size: Array
    inverse_mass_matrix: Array
    mass_matrix_sqrt: Array


class Adaptation(NamedTuple):
    """The running averages behind a tuning: NumPyro's states of dual averaging and Welford's covariance."""

    step_size: Any
    covariance: Any


class WarmUp(NamedTuple):
    """The schedule of one warm-up.

    Attributes:
        num_steps: iterations.
        target_accept_prob: acceptance that the step size is tuned to.
        dense_mass: whether the mass matrix is dense.
    """

    num_steps: int
    target_accept_prob: Array | float
    dense_mass: bool

    def init(self, tuning: Tuning) -> Adaptation:
        """Averages that start from a tuning.

        Args:
            tuning: the first one.

        Returns:
            The state of the adaptation.
        """
        return self._averages(HEAD_START * tuning.step_size, tuning.inverse_mass_matrix)

    def update(
        self, i: Array, accept_prob: Array, x: Array, tuning: Tuning, adaptation: Adaptation
    ) -> tuple[Tuning, Adaptation]:
        """One iteration of all chains.

        Args:
            i: its number, from 0 to `num_steps - 1`.
            accept_prob: mean acceptance probability.
            x: positions, `(chain, dim)`.
            tuning: the one in force.
            adaptation: the averages so far.

        Returns:
            The next tuning and averages.
        """
        _, average_step_size = dual_averaging()
        _, average_covariance, estimate = welford_covariance(diagonal=not self.dense_mass)
        log_steps = average_step_size(self.target_accept_prob - accept_prob, adaptation.step_size)
        log_step_size = jnp.where(i == self.num_steps - 1, log_steps[1], log_steps[0])
        finfo = jnp.finfo(tuning.step_size.dtype)
        tuning = tuning._replace(step_size=jnp.clip(jnp.exp(log_step_size), finfo.tiny, finfo.max))

        def add(chain: Array, covariance: Any) -> Any:
            return average_covariance(x[chain], covariance)

        windows = build_adaptation_schedule(self.num_steps)[1:-1]
        inside = jnp.any(jnp.asarray([(w.start <= i) & (i <= w.end) for w in windows], bool))
        at_end = jnp.any(jnp.asarray([i == w.end for w in windows], bool))
        count = jnp.where(inside, len(x), 0)
        covariance = lax.fori_loop(0, count, add, adaptation.covariance)

        def end_window() -> tuple[Tuning, Adaptation]:
            inverse, root, _ = estimate(covariance, regularize=True)
            averages = self._averages(tuning.step_size, inverse)
            return strip_weak_types(Tuning(tuning.step_size, inverse, root)), averages

        return lax.cond(
            at_end,
            end_window,
            lambda: strip_weak_types((tuning, Adaptation(log_steps, covariance))),
        )

    def _averages(self, step_size: Array, inverse_mass_matrix: Array) -> Adaptation:
        step_size_init, _ = dual_averaging()
        covariance_init, _, _ = welford_covariance(diagonal=not self.dense_mass)
        covariance = covariance_init(inverse_mass_matrix.shape[-1])
        return strip_weak_types(Adaptation(step_size_init(jnp.log(step_size)), covariance))
