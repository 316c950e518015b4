# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Items of a loader as arguments of a loss."""

from typing import Any

import jax

from numpyro_regloss.losses.arguments import Arguments

__all__ = ["split_item"]


def split_item(loss: Any, item: Any, what: str) -> tuple[tuple, dict]:
    """Positional and keyword arguments of an item.

    A dict has keyword arguments, a tuple or list positional ones, and anything else is the only argument. If the
    loss was built with a single positional argument of several arrays, as in `fn(params, batch)`, an item of the
    same structure is that argument.

    Args:
        loss: a `Loss`.
        item: of a loader.
        what: begins the error message.

    Returns:
        `(args, kwargs)`.

    Raises:
        ValueError: if a dict names an argument that the loss has by position.
    """
    bound, _ = loss.arguments.tree
    structure = jax.tree.structure(item)
    if len(bound) == 1 and structure == jax.tree.structure(bound[0]):
        return (item,), {}
    if not isinstance(item, dict):
        return tuple(item) if isinstance(item, tuple | list) else (item,), {}
    names = Arguments(loss.source.user.fn, loss.source.num_first).names[: len(bound)]
    twice = [name for name in names if name in item]
    if twice:
        raise ValueError(
            f"{what}: expected the items as tuples, since the loss was built with {' and '.join(twice)} as "
            f"positional arguments, got dicts with these names; build it with {twice[0]}=..., or hand out tuples."
        )
    return (), dict(item)
