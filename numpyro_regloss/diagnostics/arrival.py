# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Where a run has come to: whether the centre still moves, and what rules look at."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from numpyro_regloss.diagnostics.columns import Motion
from numpyro_regloss.two_step.until import NEGLIGIBLE, excess, is_steady

__all__ = ["LEAST_STEPS", "SIGMAS", "Finding", "Run", "arrival", "window"]

# The end of a run: its last quarter, and enough steps to tell a trend from a single one.
END, LEAST_STEPS = 0.25, 4
# Chance alone gets so far in one case of a thousand.
SIGMAS = 3.0
# Errors are estimates: they count twice as large in squares, as those of chains and control variates may be.
MARGIN = 2.0
# Without errors: a walk of w independent steps has |sum|^2 = sum |step|^2 on average, a straight one w times that.
STRAIGHT = 3.0
# Fewer steps do not tell whether they become shorter, or what they scatter.
TREND = 10


class Finding(NamedTuple):
    """Something that is wrong.

    Attributes:
        name: of the rule.
        text: what was seen, and what to change.
    """

    name: str
    text: str


class Run(NamedTuple):
    """What rules look at.

    Attributes:
        columns: of the steps.
        history: of the run.
        motion: of the run.
    """

    columns: Mapping[str, np.ndarray]
    history: Any
    motion: Motion

    def often(self, name: str, bad: Callable[[np.ndarray], np.ndarray]) -> bool:
        """Whether a column is bad in most steps, of all or of the end of the run."""
        if name not in self.columns:
            return False
        values = bad(np.asarray(self.columns[name], float))
        return max(values.mean(), values[-window(len(values)) :].mean()) > 0.5

    def median(self, name: str) -> float:
        """Of a column."""
        return float(np.nanmedian(self.columns[name]))


def window(num_steps: int) -> int:
    """How many steps are the end of a run."""
    return min(num_steps, max(LEAST_STEPS, int(END * num_steps)))


def arrival(motion: Motion) -> tuple[bool | None, str]:
    """Whether the centre has arrived: in the last steps fitted means pull it nowhere, beyond their noise.

    Args:
        motion: of the run.

    Returns:
        The answer, None where it cannot be told, and a sentence.
    """
    if motion.stopped:
        return True, f"Arrived: the run stopped by itself, after {len(motion.step)} steps."
    count = window(len(motion.step))
    if count < LEAST_STEPS:
        return None, f"Arrived? Fewer than {LEAST_STEPS} steps were taken: too few to tell."
    pull, step = (np.asarray(a[-count:], float) for a in (motion.pull, motion.step))
    way = np.sum(step.sum(0) ** 2)
    if not (np.isfinite(way) and np.isfinite(pull).all()):
        return None, "Arrived? The lengths of the last steps are not finite: see below."
    # Anchors with momentum step where the pull has gone, and ties between replicas pull where no step goes.
    went = min(way, np.sum(pull.sum(0) ** 2))
    where = f"in the last {count} steps the centre moved by {np.sqrt(way):.2g} sd of the reference"
    error = None if motion.error is None else np.asarray(motion.error[-count:], float)
    if error is None or not np.isfinite(error).all():
        limit, noise = STRAIGHT * np.sum(pull**2), None
    else:
        squares = np.sum(error**2, 0)
        if count >= TREND:
            squares = squares / excess(pull, squares / count, biased=motion.biased)
        noise = squares.sum()
        dimension = max(noise**2 / max(np.sum(squares**2), np.finfo(float).tiny), 1.0)
        limit = MARGIN * noise * (1 + SIGMAS * np.sqrt(2 / dimension))
    if went / count < NEGLIGIBLE:
        if went > limit and _is_steady(pull, np.asarray(motion.pull, float)):
            return None, f"Arrived? {where.capitalize()}, steadily in one direction. {FASTER}"
        return True, f"Arrived: {where}, which hardly changes the loss."
    if noise is None:
        if went > limit:
            return False, f"Still moving: {where}, in one direction. {CONTINUE}"
        return None, f"Arrived? {where.capitalize()}; the fit states no error to compare that with."
    of = f"noise alone moves it by {np.sqrt(noise):.2g}"
    if went > limit:
        return False, f"Still moving: {where}, and {of}. {CONTINUE}"
    return True, f"Arrived, as far as these draws tell: {where}, and {of}."


def _is_steady(pull: np.ndarray, all_pulls: np.ndarray) -> bool:
    # Few steps do not tell a trend from noise: then the whole run does.
    return is_steady(pull if len(pull) >= TREND else all_pulls)


CONTINUE = "Run more steps, with init_state=result.state."
FASTER = (
    "If the loss should fall further, use a larger tau or a lower temperature: steps are tau / T times "
    "the slope."
)
