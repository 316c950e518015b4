# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Where and how often a run is saved."""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpyro_regloss._core.checks import check_count, check_positive

__all__ = ["Checkpoint", "room_of", "settings_of"]


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often `TwoStep.run` saves its state and its history (extra `checkpoint`).

    Args:
        folder: a new or empty folder, or that of an earlier run of the same optimizer, which is then continued.
        every: the interval between saves: an int for steps, a float for seconds. Saves happen at the end of a
            chunk of steps, in the background. The end of a run is always saved.
        keep: how many of the last states are kept. The whole history is kept once.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range.

    Example:
        >>> Checkpoint("runs/first", every=100).keep
        2
    """

    folder: str | os.PathLike
    every: float = 30.0
    keep: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str | os.PathLike) or not str(self.folder):
            raise TypeError(f"Checkpoint: expected the path of a folder, got {self.folder!r}.")
        check = check_positive if isinstance(self.every, float) else check_count
        check(self.every, "Checkpoint: every (an int for steps, a float for seconds)")
        check_count(self.keep, "Checkpoint: keep")


def settings_of(given: Any) -> Checkpoint:
    """What `checkpoint` of a run says.

    Args:
        given: a `Checkpoint`, or a folder.

    Returns:
        The settings, the folder as an absolute path.

    Raises:
        TypeError: if it is something else.
    """
    if isinstance(given, str | os.PathLike):
        given = Checkpoint(given)
    if not isinstance(given, Checkpoint):
        raise TypeError(
            "TwoStep.run: expected checkpoint as a folder or a numpyro_regloss.Checkpoint, got "
            f"{type(given).__name__}; bind an argument of the loss of that name in Loss.from_function or "
            "Loss.from_model."
        )
    return replace(given, folder=Path(given.folder).expanduser().absolute())


def room_of(settings: Checkpoint, done: int) -> float:
    """How many steps there are until the next state is due, where steps are counted.

    Args:
        settings: of a run.
        done: steps that were done.

    Returns:
        A number of steps, or infinity.
    """
    every = settings.every
    return math.inf if isinstance(every, float) else every - done % every
