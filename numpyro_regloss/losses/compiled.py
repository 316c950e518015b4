# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What a source computes, compiled once for all losses that differ in their numbers alone."""

import functools
from typing import Any

import jax

from numpyro_regloss._core.types import Array
from numpyro_regloss.losses.one_at_a_time import needs_one_at_a_time

__all__ = ["aux_of", "factorizes", "raw_value", "shape_of"]


@jax.jit
def raw_value(source: Any, x: Array, arguments: Any) -> Any:
    """What the user's function returns; its trace is remembered under `source.own_settings()`."""
    return source.value(x, *arguments.tree, 1.0)


def shape_of(source: Any, x: Array, arguments: Any) -> Any:
    """Shape and type of the same."""
    with source.own_settings():
        return raw_value.eval_shape(source, x, arguments)


@jax.jit
def aux_of(source: Any, x: Array, arguments: Any) -> Any:
    """What the user's function returns beside the loss."""
    return source.aux(x, *arguments.tree)


@functools.lru_cache(maxsize=256)
def factorizes(structure: Any, shapes: tuple[Any, ...], num_calls: int) -> bool:
    """Whether a loss is evaluated one draw at a time, since it factorizes matrices.

    Args:
        structure: of `(source, x, arguments)`.
        shapes: of their leaves.
        num_calls: how many factorizations it takes.

    Returns:
        Whether it is.
    """

    def value(leaves: list[Array]) -> Any:
        source, x, arguments = jax.tree.unflatten(structure, leaves)
        with source.own_settings():
            return raw_value(source, x, arguments)

    return needs_one_at_a_time(value, shapes, num_calls)
