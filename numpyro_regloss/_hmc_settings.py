# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Settings that NUTS and HMC share, and their checks."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from numpyro_regloss._checks import check_count, check_positive
from numpyro_regloss._pytree import is_concrete
from numpyro_regloss._typing import Array

__all__ = [
    "LEAST_ACCEPTANCE",
    "LEAST_STEP_SIZE",
    "MOST_DIVERGENT",
    "Settings",
    "check_settings",
    "remedy",
]

# A shift is rejected when its chains hardly moved, since their mean is then that of the last shift: at a
# lower acceptance, or with a smaller step in units of the reference.
LEAST_ACCEPTANCE = 0.02
LEAST_STEP_SIZE = 1e-6
# A larger share of divergent transitions needs chains that moved and agree.
MOST_DIVERGENT = 0.5


class Settings(NamedTuple):
    """What NUTS and HMC share; everything but the three last fields compiles."""

    algorithm: str
    num_warmup: int
    num_samples: int
    num_chains: int
    dense_mass: bool
    max_tree_depth: int
    trajectory_length: Array | float | None
    step_size: Array | float
    target_accept_prob: Array | float


def check_settings(engine: Any) -> None:
    """Casts settings that NUTS and HMC share and refuses what is out of range.

    Args:
        engine: the engine under construction.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a setting is out of range.
    """
    name = type(engine).__name__
    check_count(engine.num_warmup, f"{name}: num_warmup", 0)
    check_count(engine.num_samples, f"{name}: num_samples")
    check_count(engine.num_chains, f"{name}: num_chains")
    if not isinstance(engine.dense_mass, bool):
        raise TypeError(f"{name}: expected dense_mass as True or False, got {engine.dense_mass!r}.")
    numbers = ("step_size", "target_accept_prob", "trajectory_length")
    for field in filter(partial(hasattr, engine), numbers):
        # Numbers of one type whatever was given, since another type would be another program.
        number = check_positive(getattr(engine, field), f"{name}: {field}")
        object.__setattr__(engine, field, number)
    if is_concrete(engine.target_accept_prob) and engine.target_accept_prob >= 1:
        raise ValueError(
            f"{name}: expected target_accept_prob between 0 and 1, got {engine.target_accept_prob}."
        )


def remedy(settings: Settings, info: Any, ok: np.ndarray) -> str:
    """What to use where chains were stopped again and again, at walls or by steepness.

    Args:
        settings: of the kernel.
        info: of all steps, as NumPy arrays.
        ok: which steps were taken.

    Returns:
        A sentence, or nothing.
    """
    size = settings.num_samples * settings.num_chains
    stuck = (info.accept_prob < LEAST_ACCEPTANCE) | (info.step_size < LEAST_STEP_SIZE)
    stopped = ~ok & ~info.ok & (stuck | (info.num_divergent > MOST_DIVERGENT * size))
    if not stopped.any():
        return ""
    others = "shift.HMC, " if settings.algorithm == "NUTS" else ""
    return (
        f"{settings.algorithm}: in {stopped.sum()} rejected steps chains hardly moved, or were divergent in more "
        "than half of their transitions and did not agree (split R-hat up to "
        f"{np.max(info.rhat[stopped]):.3g}). Where a wall, at which the loss becomes infinite, cuts through the "
        f"reference, or the loss is very steep there, use {others}shift.SMC or shift.Importance, to which a wall "
        "is a weight of zero."
    )
