# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""JAX's default random numbers, bit for bit, without a loop.

On CPUs JAX rolls the rounds of Threefry into a loop, whose few iterations cost more than their arithmetic where
draws are small, as in a sampler. Unrolled, they are elementwise operations that XLA fuses into whatever uses
the numbers and repeats in every such place. So this is for numbers that a loop of its own draws or that few
operations use, and not for noise that goes into a loss directly, where it is several times slower.

Reference: Salmon, Moraes, Dror & Shaw (2011), "Parallel Random Numbers: As Easy as 1, 2, 3".
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import define_prng_impl

from numpyro_regloss._core.types import Array, Key

__all__ = ["from_position", "unrolled"]

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = np.uint32(0x1BD11BDA)
DEFAULT = "threefry2x32"


def unrolled(rng_key: Key) -> Key:
    """The same key, whose numbers come from unrolled rounds.

    Args:
        rng_key: a typed key of any shape.

    Returns:
        A key that gives the same bits; keys of other generators than JAX's default as they are.
    """
    if str(jax.random.key_impl(rng_key)) != DEFAULT:
        return rng_key
    return jax.random.wrap_key_data(jax.random.key_data(rng_key), impl=_IMPLEMENTATION)


def from_position(rng_key: Key, position: Array) -> Key | None:
    """A key whose numbers are those of an array of `rng_key` from some position on.

    Of numbers with one draw of bits each, such as `jax.random.normal` and `jax.random.uniform`.

    Args:
        rng_key: a typed key, also one of `unrolled`.
        position: how many numbers of the array come before, of `2**32` at most.

    Returns:
        The key; None of other generators than JAX's default, which do not count.
    """
    if str(jax.random.key_impl(rng_key)) not in (DEFAULT, str(_IMPLEMENTATION)):
        return None
    data = jax.random.key_data(rng_key)
    position = jnp.asarray(position).astype(np.uint32)
    return jax.random.wrap_key_data(jnp.stack([*data, position]), impl=_FROM_POSITION)


def _hash(key: Array, high: Array, low: Array) -> tuple[Array, Array]:
    # Fused with the rounds that made the key, these would be a chain of 40. LLVM, as of JAX 0.12, follows both
    # uses of every round anew, and does not get through that.
    key = lax.optimization_barrier(key)
    schedule = (key[0], key[1], key[0] ^ key[1] ^ PARITY)
    x, y = high + schedule[0], low + schedule[1]
    for i in range(5):
        for rotation in ROTATIONS[i % 2]:
            x = x + y
            y = (y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))
            y = x ^ y
        x = x + schedule[(i + 1) % 3]
        y = y + schedule[(i + 2) % 3] + np.uint32(i + 1)
    return x, y


def _hash_positions(
    key: Array, shape: tuple[int, ...], first: Array | None = None
) -> tuple[Array, Array]:
    if math.prod(shape) >= 2**32:
        raise ValueError(
            f"numpyro_regloss: expected fewer than 2**32 random numbers at once, got shape {shape}; use fewer "
            "draws, or a smaller chunk_size."
        )
    low = lax.iota(np.uint32, math.prod(shape)).reshape(shape)
    low = low if first is None else low + first
    return _hash(key, jnp.zeros_like(low), low)


def _seed(seed: Array) -> Array:
    return jax.random.key_data(jax.random.key(seed, impl=DEFAULT))


def _split(key: Array, shape: tuple[int, ...]) -> Array:
    return jnp.stack(_hash_positions(key, shape), -1)


def _fold_in(key: Array, data: Any) -> Array:
    data = jnp.asarray(data, np.uint32)
    return jnp.stack(_hash(key, jnp.zeros_like(data), data))


def _random_bits(
    key: Array, bit_width: int, shape: tuple[int, ...], first: Array | None = None
) -> Array:
    high, low = _hash_positions(key, shape, first)
    if bit_width == 64:
        return high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
    return (high ^ low).astype(f"uint{bit_width}")


_IMPLEMENTATION = define_prng_impl(
    key_shape=(2,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="threefry2x32_unrolled",
    tag="fryu",
)


def _random_bits_from(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    return _random_bits(key[:2], bit_width, shape, key[2])


def _no_other(*args: Any) -> Any:
    raise NotImplementedError("a key that begins at a position of an array only draws numbers.")


_FROM_POSITION = define_prng_impl(
    key_shape=(3,),
    seed=_no_other,
    split=_no_other,
    random_bits=_random_bits_from,
    fold_in=_no_other,
    name="threefry2x32_from_position",
    tag="frfp",
)
