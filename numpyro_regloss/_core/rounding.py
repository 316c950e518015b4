# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Whether NumPy arrays survive the types that JAX keeps: float32 and int32, unless x64 is on.

Days since 4713 BC or seconds since 1970 have more digits than float32, so that `t - t0` in a model would be noise;
identifiers above 2^31 would wrap around.
"""

import warnings
from typing import Any

import jax
import numpy as np
from numpyro.util import find_stack_level

__all__ = ["check_number", "check_rounding"]

# Of the standard deviation of the data.
MOST_LOST = 1e-4
# Of one number, in its own unit.
MOST_LOST_OF_NUMBERS = 1e-2
# Spread in units of the magnitude that is rounding of the data themselves: they are constant.
CONSTANT = 1e-12
# Columns of fewer rows may be close to each other by chance.
LEAST_ROWS = 8


def check_rounding(array: np.ndarray, what: str) -> None:
    """Refuses an array that would not be the same data in the type that JAX keeps.

    Args:
        array: numbers on the host.
        what: begins the error message.

    Raises:
        ValueError: if integers would wrap around, or rounding would lose more than 1e-4 of the spread.
    """
    kept = jax.dtypes.canonicalize_dtype(array.dtype)
    if kept == array.dtype or not array.size:
        return
    if array.dtype.kind in "iu":
        least, most, limits = array.min(), array.max(), np.iinfo(kept)
        if least < limits.min or most > limits.max:
            raise ValueError(
                f"{what}: expected integers that fit into {kept}, got {array.dtype} from {least} to {most}, "
                "which would wrap around; use smaller codes (np.unique(ids, return_inverse=True)[1]), or "
                'jax.config.update("jax_enable_x64", True) first.'
            )
        return
    if array.dtype.kind == "c":
        check_rounding(array.real, what)
        check_rounding(array.imag, what)
        return
    if array.dtype.kind != "f":
        return
    lost, spread = _worst(array, kept)
    if lost > MOST_LOST * spread:
        got = "values that it cannot hold" if lost == np.inf else f"a spread of {spread:.3g}"
        raise ValueError(
            f"{what}: expected data that {kept} can hold, got {array.dtype} data with {got}, of which "
            f"rounding would lose {lost:.3g}; subtract an offset first (t - t[0], in NumPy), change the unit, "
            'or use jax.config.update("jax_enable_x64", True).'
        )


def check_number(number: Any, what: str) -> None:
    """Warns of a number that loses digits which may matter in the type that JAX keeps.

    What it is compared with is not known: a population may be rounded, an origin of time may not.

    Args:
        number: on the host, real.
        what: begins the message.

    Raises:
        ValueError: if it would become infinite.
    """
    kept, value = jax.dtypes.canonicalize_dtype(float), float(number)
    with np.errstate(over="ignore"):
        rounded = float(np.asarray(value, kept))
    if np.isinf(rounded) and np.isfinite(value):
        raise ValueError(
            f"{what}: expected a number that {kept} can hold, got {value}; change the unit, or use "
            'jax.config.update("jax_enable_x64", True).'
        )
    if abs(rounded - value) > MOST_LOST_OF_NUMBERS:
        warnings.warn(
            f"{what}: {value!r} becomes {rounded!r} in {kept}, so that small differences from it are lost; if "
            "they matter, subtract an offset first (in Python or NumPy), or bind the number with "
            "functools.partial(function, argument), which keeps its digits.",
            stacklevel=find_stack_level(),
        )


def _worst(array: np.ndarray, kept: Any) -> tuple[float, float]:
    """What rounding loses at most, and the spread, of the column that loses most in units of its spread."""
    columns = array.reshape(-1, 1) if array.ndim < 2 else array.reshape(len(array), -1)
    views = [columns] if len(columns) >= LEAST_ROWS else []
    # A series in each row is the longer axis.
    if array.ndim > 1 and array.shape[-1] >= max(LEAST_ROWS, len(array)):
        views.append(array.reshape(-1, array.shape[-1]).T)
    losses = [_loss(view, kept) for view in views or [array.reshape(-1, 1)]]
    return max(losses, key=lambda loss: loss[0] / loss[1] if loss[1] else loss[0])


def _loss(columns: np.ndarray, kept: Any) -> tuple[float, float]:
    limits = jax.numpy.finfo(kept)
    if _is_wide(columns, limits):
        return 0.0, 0.0
    finite = np.isfinite(columns)
    count = np.maximum(finite.sum(0), 1)
    with np.errstate(all="ignore"):
        size = np.where(finite, np.abs(columns), 0.0).max(0)
        mean = np.where(finite, columns, 0.0).sum(0) / count
        spread = np.sqrt((np.where(finite, columns - mean, 0.0) ** 2).sum(0) / count)
        if size.max() > float(limits.max):
            return np.inf, 0.0
        # Rounding loses half a unit in the last place at most: only where that might matter it is looked at.
        close = float(limits.eps) / 2 * size + float(limits.tiny) > MOST_LOST * spread
        close &= spread > CONSTANT * size
        if not close.any():
            return 0.0, 0.0
        some = columns[:, close]
        lost = np.where(finite[:, close], np.abs(some.astype(kept) - some), 0.0).max(0)
    worst = int(np.argmax(lost / spread[close]))
    return float(lost[worst]), float(spread[close][worst])


def _is_wide(columns: np.ndarray, limits: Any) -> bool:
    # Two passes and some of the rows say of nearly all data that rounding does not matter.
    some = columns[:: max(1, len(columns) // 1000)]
    with np.errstate(all="ignore"):
        size = np.maximum(columns.max(0), -columns.min(0))
        spread = some.std(0)
        enough = float(limits.eps) * size + float(limits.tiny) < MOST_LOST * spread
    # With NaN it is false.
    return bool((enough & (size <= float(limits.max))).all())
