# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Warm-up of vmapped chains as one: a step size and a mass matrix that they share.

The step size follows the mean acceptance of the chains by dual averaging, and the mass matrix is estimated from
the draws of all of them, in windows. NumPyro's own adapter does this for each chain alone, and vmapped
chains of different step sizes wait for the longest path among them.

Variances want draws of q, as Stan's windows give them. Scores tell of q before the chains have arrived: their
windows begin at once, and each is twice as long as the one before.

Unlike Stan's, dual averaging goes on from the last step size, not from ten times it, when the mass matrix changes:
a short warm-up ends a few iterations later, too soon to come down again.

References: Hoffman & Gelman (2014), "The No-U-Turn Sampler: Adaptively Setting Path Lengths in Hamiltonian
Monte Carlo"; Stan Development Team, "Stan Reference Manual", chapter on HMC algorithm parameters.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from numpyro.infer.hmc_util import AdaptWindow, build_adaptation_schedule, dual_averaging

from numpyro_regloss._core.coordinates import Coordinates
from numpyro_regloss._core.pytree import strip_weak_types
from numpyro_regloss._core.types import Array
from numpyro_regloss.shift.metric import Metric

__all__ = ["Adaptation", "Places", "Tuning", "WarmUp"]

# Dual averaging starts above the first step size: it comes down from one that is too large in fewer gradients
# than it takes on the way up from one that is too small.
HEAD_START = 10.0
# Iterations: of the first window of scores, behind half as many, and for the step size alone at the end.
FIRST_WINDOW, LAST_BUFFER = 10, 50


class Tuning(NamedTuple):
    """What a kernel is tuned by.

    Attributes:
        step_size: scalar.
        coordinates: those in which the kernel runs with unit mass.
    """

    step_size: Array
    coordinates: Coordinates


class Places(NamedTuple):
    """Where chains are, in the coordinates of a tuning.

    Attributes:
        y: positions, `(chain, dim)`.
        gradient: of the potential.
    """

    y: Array
    gradient: Array


class Adaptation(NamedTuple):
    """What a tuning comes from: NumPyro's state of dual averaging, and the last places, `(draw, chain, dim)`."""

    step_size: Any
    places: Places


class WarmUp(NamedTuple):
    """The schedule of one warm-up.

    Attributes:
        num_steps: iterations.
        target_accept_prob: acceptance that the step size is tuned to.
        metric: which mass matrix is estimated.
    """

    num_steps: int
    target_accept_prob: Array | float
    metric: Metric

    @property
    def windows(self) -> list[AdaptWindow]:
        """First and last iteration of each, at the end of which the mass matrix changes."""
        if self.metric.kind == "variance":
            return build_adaptation_schedule(self.num_steps)[1:-1]
        windows, start, length = [], FIRST_WINDOW // 2, FIRST_WINDOW
        stop = self.num_steps - min(self.num_steps // 4, LAST_BUFFER)
        while start + length <= stop:
            # One that could not be followed by a longer one takes what is left.
            end = start + length if start + 3 * length <= stop else stop
            windows.append(AdaptWindow(start, end - 1))
            start, length = end, 2 * length
        return windows

    def init(self, tuning: Tuning, places: Places) -> Adaptation:
        """Averages that start from a tuning.

        Args:
            tuning: the first one.
            places: of the chains, any.

        Returns:
            The state of the adaptation.
        """
        num_chains, dim = places.y.shape
        longest = max((w.end - w.start + 1 for w in self.windows), default=1)
        rows = min(longest, -(-self.metric.num_draws(dim) // num_chains))
        blank = jnp.zeros((rows, num_chains, dim), places.y.dtype)
        step_size = _averages(HEAD_START * tuning.step_size)
        return strip_weak_types(Adaptation(step_size, Places(blank, blank)))

    def update(
        self, i: Array, accept_prob: Array, places: Places, tuning: Tuning, adaptation: Adaptation
    ) -> tuple[Places, Tuning, Adaptation]:
        """One iteration of all chains.

        Args:
            i: its number, from 0 to `num_steps - 1`.
            accept_prob: mean acceptance probability.
            places: where it led to.
            tuning: the one in force.
            adaptation: the averages so far.

        Returns:
            The same places in the coordinates of the next tuning, that tuning, and the averages.
        """
        _, average_step_size = dual_averaging()
        log_steps = average_step_size(self.target_accept_prob - accept_prob, adaptation.step_size)
        log_step_size = jnp.where(i == self.num_steps - 1, log_steps[1], log_steps[0])
        finfo = jnp.finfo(tuning.step_size.dtype)
        tuning = tuning._replace(step_size=jnp.clip(jnp.exp(log_step_size), finfo.tiny, finfo.max))
        now = strip_weak_types((places, tuning, adaptation._replace(step_size=log_steps)))
        if not self.windows:
            return now

        starts, ends = jnp.asarray(self.windows).T
        start = starts[jnp.sum(i > ends).clip(max=len(starts) - 1)]
        rows = len(adaptation.places.y)
        kept = Places(
            *(
                lax.dynamic_update_index_in_dim(a, new, jnp.maximum(i - start, 0) % rows, 0)
                for a, new in zip(adaptation.places, places, strict=True)
            )
        )
        now = (now[0], now[1], now[2]._replace(places=kept))
        # A loop, since vmap makes a conditional run both of its branches at every iteration.
        return lax.fori_loop(
            0,
            jnp.any(i == ends).astype(int),
            lambda _, state: self._end_window(i - start + 1, *state),
            now,
        )

    def _end_window(
        self, length: Array, places: Places, tuning: Tuning, adaptation: Adaptation
    ) -> tuple[Places, Tuning, Adaptation]:
        old, seen = tuning.coordinates, adaptation.places
        rows, num_chains, dim = seen.y.shape
        used = jnp.repeat(jnp.arange(rows) < length, num_chains)
        z = old.forth(seen.y.reshape(-1, dim))
        score = -old.gradient_forth(seen.gradient.reshape(-1, dim))
        new = self.metric.estimate(old, z, score, used)
        places = Places(
            new.back(old.forth(places.y)),
            new.gradient_back(old.gradient_forth(places.gradient)),
        )
        averages = Adaptation(_averages(tuning.step_size), seen)
        return strip_weak_types((places, Tuning(tuning.step_size, new), averages))


def _averages(step_size: Array) -> Any:
    step_size_init, _ = dual_averaging()
    return step_size_init(jnp.log(step_size))
