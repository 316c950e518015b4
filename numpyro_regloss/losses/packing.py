# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Many small arrays as few large ones: XLA takes some 20 milliseconds for each output of a program."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from numpyro_regloss._core.types import Array

__all__ = ["pack", "unpack"]


def pack(arrays: dict[str, Array]) -> dict[str, Array]:
    """All entries as one vector per type.

    Args:
        arrays: by name.

    Returns:
        Vectors by the name of their type, entries in the order of the dictionary.
    """
    parts: dict[str, list[Array]] = {}
    for array in arrays.values():
        parts.setdefault(str(jnp.result_type(array)), []).append(jnp.reshape(array, -1))
    return {dtype: jnp.concatenate(vectors) for dtype, vectors in parts.items()}


def unpack(packed: dict[str, Any], shapes: dict[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `pack` on the host, with the leading axes that the vectors have got since.

    Args:
        packed: `(*lead, entry)` by the name of their type.
        shapes: shape and type of each array, by name, in the order in which they were packed.

    Returns:
        `(*lead, *shape)` by name, without copies.
    """
    host = {dtype: np.asarray(vector) for dtype, vector in packed.items()}
    used = dict.fromkeys(host, 0)
    arrays = {}
    for name, like in shapes.items():
        dtype = str(like.dtype)
        start, vector = used[dtype], host[dtype]
        used[dtype] = start + like.size
        arrays[name] = vector[..., start : used[dtype]].reshape(vector.shape[:-1] + like.shape)
    return arrays
