# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Functions of one point at all draws, on the host: so many draws at once as a bounded part of memory holds."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_regloss._core.pytree import Partition
from numpyro_regloss._core.types import Array
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.packing import pack, unpack

__all__ = ["per_draw"]

# Results that are on the device at once: 64 megabytes of float32.
CHUNK_NUMBERS = 2**24


def per_draw(
    fn: Callable[..., dict[str, Array]],
    names: tuple[str, ...],
    loss: Loss,
    arguments: Partition,
    x: np.ndarray,
    rng_key: Any = None,
) -> dict[str, np.ndarray]:
    """Values of a function at all draws.

    Args:
        fn: `(names, loss, arguments, x[, key])` -> arrays by name; of a module, since another function is another
            program.
        names: what `fn` looks for.
        loss: handed on.
        arguments: handed on.
        x: `(chain, draw, dim)`.
        rng_key: split among the draws, if `fn` takes a key.

    Returns:
        `(chain, draw, *shape)` by name.
    """
    lead, rows = x.shape[:-1], x.reshape(-1, x.shape[-1])
    keys = () if rng_key is None else (jax.random.split(rng_key, len(rows)),)
    shapes = _one.eval_shape(
        fn, names, loss, arguments, jnp.asarray(rows[0]), *(key[0] for key in keys)
    )
    largest = max(1, CHUNK_NUMBERS // max(1, sum(a.size for a in shapes.values())))
    size = -(-len(rows) // -(-len(rows) // largest))
    parts = []
    for start in range(0, len(rows), size):
        # Chunks of one size are one program: the last one repeats its last draw.
        index = np.minimum(np.arange(start, start + size), len(rows) - 1)
        some = jnp.asarray(rows[index]), *(key[index] for key in keys)
        packed = jax.device_get(_many(fn, names, loss, arguments, *some))
        parts.append({dtype: a[: len(rows) - start] for dtype, a in packed.items()})
    whole = {dtype: np.concatenate([part[dtype] for part in parts]) for dtype in parts[0]}
    return {
        name: array.reshape(*lead, *array.shape[1:])
        for name, array in unpack(whole, shapes).items()
    }


@partial(jax.jit, static_argnums=(0, 1))
def _one(fn: Any, names: Any, loss: Loss, arguments: Partition, *point: Array) -> dict[str, Array]:
    return fn(names, loss, arguments, *point)


@partial(jax.jit, static_argnums=(0, 1))
def _many(
    fn: Any, names: Any, loss: Loss, arguments: Partition, *points: Array
) -> dict[str, Array]:
    return jax.vmap(lambda *point: pack(_one(fn, names, loss, arguments, *point)))(*points)
