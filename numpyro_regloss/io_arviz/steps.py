# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Draws at the references of chosen steps of a run, made anew, for diagnostics of each step.

A run keeps no draws. An engine without a state makes the very draws of a step again, from its key; others begin
anew at the step's reference, warm-up included.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_regloss._core.checks import check_count
from numpyro_regloss._core.pytree import Partition
from numpyro_regloss.draws.resampling import equal_weights
from numpyro_regloss.io_arviz.draws import check_draws, flat_dataset
from numpyro_regloss.io_arviz.history import iterations
from numpyro_regloss.io_arviz.labels import Labels
from numpyro_regloss.two_step import outer_step
from numpyro_regloss.two_step.motion import no_vectors

__all__ = ["choose_steps", "step_dataset"]

# By default so many steps are looked at, the first and the last among them, and none where their draws would be
# more numbers than this.
MOST_STEPS = 10
MOST_NUMBERS = 2_000_000


def choose_steps(result: Any, num_numbers: int, step_draws: Any) -> list[int]:
    """The steps to look at.

    Args:
        result: of the run.
        num_numbers: of the draws of one step.
        step_draws: None for a few of those that were taken, unless they are too large; True for a few in any
            case; False for none; or numbers of steps.

    Returns:
        True numbers of steps, in order, without repetition.

    Raises:
        TypeError: if they are not numbers.
        ValueError: if the history has no such step, or no references to draw at.
    """
    known = iterations(result)
    if result.history.motion is not None:
        if step_draws is None or step_draws is False:
            return []
        raise ValueError(f"{no_vectors('to_arviz: step_draws')}.")
    if step_draws is None or isinstance(step_draws, bool):
        taken = known[np.asarray(result.history.ok)]
        few = np.unique(np.linspace(0, len(taken) - 1, MOST_STEPS).round().astype(int))
        too_large = step_draws is None and len(few) * num_numbers > MOST_NUMBERS
        wanted = step_draws is not False and taken.size and not too_large
        return [int(step) for step in taken[few]] if wanted else []
    if np.ndim(step_draws) != 1:
        raise TypeError(
            "to_arviz: expected step_draws as numbers of steps such as [0, 10], True, False or None, got "
            f"{step_draws!r}."
        )
    steps = sorted({check_count(step, "to_arviz: step_draws", 0) for step in step_draws})
    if not set(steps) <= set(known.tolist()):
        raise ValueError(
            f"to_arviz: expected step_draws among the steps {known[0]} to {known[-1]} of the history, got "
            f"{sorted(set(steps) - set(known.tolist()))}."
        )
    return steps


def step_dataset(
    steps: list[int], result: Any, optimizer: Any, arguments: Partition, labels: Labels
) -> Any:
    """Draws of some steps, flat, with equal weights.

    Args:
        steps: true numbers of steps.
        result: of the run.
        optimizer: of the run.
        arguments: of the loss.
        labels: of the parameters.

    Returns:
        A dataset of `x` (iteration, chain, draw, param). Weighted draws are resampled; all steps have as many
        draws as the one with the fewest, the first ones.
    """
    first = int(iterations(result)[0])
    positions = []
    for step in steps:
        reference = jax.tree.map(
            lambda a, i=step - first: jnp.asarray(a[i]), result.history.reference
        )
        index = jnp.asarray(step, jnp.int32)
        state = outer_step.revisit(optimizer, result.state, index, reference, arguments)
        draws = outer_step.next_draws(optimizer, state, arguments)
        check_draws(draws, optimizer.loss)
        chosen, _ = equal_weights(np.asarray(draws.log_weight))
        x = np.asarray(draws.x)
        positions.append(x.reshape(-1, x.shape[-1])[chosen])
    chains = min(len(x) for x in positions)
    if any(len(x) > chains for x in positions):
        positions = [x.reshape(1, -1, x.shape[-1]) if len(x) > 1 else x for x in positions]
    least = min(x.shape[1] for x in positions)
    stacked = np.stack([x[:, :least] for x in positions])
    return flat_dataset(stacked, labels, iteration=np.asarray(steps))
