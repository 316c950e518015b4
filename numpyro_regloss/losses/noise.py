# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Random keys among the arguments of a loss, for dropout and other noise: fresh ones wherever a batch would be."""

from typing import Any

import jax

from numpyro_regloss._core.checks import check_key
from numpyro_regloss._core.pytree import Partition
from numpyro_regloss._core.types import Key

__all__ = ["STREAMS", "bind_keys", "renew_keys"]

# The argument that seeds the streams of random numbers that a module has of its own.
STREAMS = "rngs"
# Tells the keys of the loss's own noise from those of its rows.
NOISE = 0x6E6F6973


def bind_keys(
    rng_argname: str | None, kwargs: dict, what: str, *, has_streams: bool
) -> tuple[tuple[str, ...], dict]:
    """The arguments that are keys, and all keyword arguments with keys among them.

    Args:
        rng_argname: the user's name of one, or None.
        kwargs: keyword arguments, which may have keys already.
        what: begins error messages.
        has_streams: whether a module has streams of its own to be seeded.

    Returns:
        Names and keyword arguments.

    Raises:
        TypeError: if the name is no string, or what has it no key.
        ValueError: if the name is that of the streams.
    """
    if not isinstance(rng_argname, str | None):
        raise TypeError(
            f"{what}: expected rng_argname as the name of an argument of the function, got "
            f"{type(rng_argname).__name__}; a key itself is passed by that name."
        )
    names = () if rng_argname is None else (rng_argname,)
    if has_streams and STREAMS in names:
        raise ValueError(
            f"{what}: expected another rng_argname than {STREAMS!r}, which seeds the module's own streams of "
            "random numbers; rename the argument of the function."
        )
    names += (STREAMS,) if has_streams else ()
    for name in names:
        key = kwargs.get(name)
        key = jax.random.key(0) if key is None else check_key(key, f"{what}: {name}")
        kwargs = {**kwargs, name: key}
    return names, kwargs


def renew_keys(names: tuple[str, ...], rng_key: Key, arguments: Partition) -> Partition:
    """The arguments with fresh keys.

    Args:
        names: of the arguments that are keys.
        rng_key: a random key, which may draw rows too.
        arguments: the loss's `(args, kwargs)`.

    Returns:
        The arguments.
    """
    if not names:
        return arguments
    args, kwargs = arguments.tree
    key = jax.random.fold_in(rng_key, NOISE)
    keys: dict[str, Any] = {n: jax.random.fold_in(key, i) for i, n in enumerate(names)}
    return Partition((args, {**kwargs, **keys}))
