# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Points that a user evaluates by hand, and the values that come back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_regloss._core.pytree import Partition
from numpyro_regloss._core.types import Array
from numpyro_regloss.losses.caller import as_kept, as_reals
from numpyro_regloss.losses.loss import Loss

__all__ = ["as_points", "check_points", "checked_values"]


def as_points(loss: Loss, x: Array, arguments: Partition) -> Any:
    """Rows of a flat array as the user's parameters, with a leading axis.

    Args:
        loss: whose parameters they are.
        x: `(point, dim)`.
        arguments: of the loss.

    Returns:
        The user's pytree of NumPy arrays.
    """

    def constrain(row: Array) -> Any:
        return loss.source.constrain(row, *arguments.tree)

    def arrays(row: Array) -> list[Array]:
        return [leaf for leaf in jax.tree.leaves(constrain(row)) if isinstance(leaf, jax.Array)]

    rows = iter(jax.vmap(arrays)(x))

    def place(leaf: Any) -> Any:
        # A function of a module is the same at all points.
        return np.asarray(next(rows)) if isinstance(leaf, jax.Array) else leaf

    return jax.tree.map(place, constrain(x[0]))


def check_points(points: Any, asked: Any) -> None:
    """Refuses points that were asked for another state.

    Args:
        points: what came back; lists in the place of arrays, as JSON has them, are the same points.
        asked: what this state asks for.

    Raises:
        ValueError: if they differ by more than what a text file loses.
    """
    if not _are_same(points, asked):
        raise ValueError(
            "TwoStep.tell: expected the points of TwoStep.ask for this state, got others; pass the state, the "
            "optimizer's settings and the points of one TwoStep.ask together, in its order."
        )


def _are_same(points: Any, asked: Any) -> bool:
    leaves, structure = jax.tree.flatten(asked)
    try:
        pairs = list(zip(structure.flatten_up_to(points), leaves, strict=True))
        return all(
            np.shape(a) == b.shape and np.allclose(a, b, rtol=1e-4, atol=1e-6)
            for a, b in pairs
            if isinstance(b, np.ndarray)
        )
    except (TypeError, ValueError):  # of another structure, of uneven lists, of text
        return False


def checked_values(values: Any, count: int) -> Array:
    """Values that came back.

    Args:
        values: one number per point.
        count: how many points there are.

    Returns:
        `(count,)` in JAX's default float.

    Raises:
        ValueError: if they are something else.
    """
    try:
        found = as_reals(values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"TwoStep.tell: expected {count} real numbers, NaN where an evaluation failed, got "
            f"{type(values).__name__}: {error}."
        ) from error
    if found.shape != (count,):
        raise ValueError(
            f"TwoStep.tell: expected one value per point, of shape ({count},), got {found.shape}; pass NaN where "
            "an evaluation failed."
        )
    return jnp.asarray(as_kept(found, jax.dtypes.canonicalize_dtype(float)))
