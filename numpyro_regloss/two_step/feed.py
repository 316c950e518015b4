# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Batches that a loader of the host hands out, one for each outer step; the next is on its way meanwhile."""

from collections.abc import Iterable
from typing import Any

import jax

from numpyro_regloss._core.pytree import Partition
from numpyro_regloss.losses.loss import Loss

__all__ = ["Feed"]

WHAT = "TwoStep.run: batches"


class Feed:
    """The arguments of the steps of a run.

    Args:
        loss: of the run.
        batches: items are positional arguments of the loss as tuples, single arrays, or keyword arguments as
            dicts.
        kwargs: keyword arguments of all steps.
        num_steps: of the run.

    Attributes:
        item: positional and keyword arguments of the first step.
        arguments: of the next step.
        is_empty: whether there is no next one.

    Raises:
        TypeError: if there is nothing to iterate over.
        ValueError: if there is no item.
    """

    def __init__(self, loss: Loss, batches: Iterable[Any], kwargs: dict, num_steps: int) -> None:
        if not isinstance(batches, Iterable):
            raise TypeError(
                f"{WHAT}: expected an iterable of arguments of the loss, got {type(batches).__name__}."
            )
        self._items, self._kwargs, self._left = iter(batches), kwargs, num_steps
        first = next(self._items, None)
        if first is None:
            raise ValueError(f"{WHAT}: expected an item for each step, got none.")
        self.item = self._split(first)
        self.arguments = loss.bind(*self.item)
        if self.arguments.constants:
            raise ValueError(
                f"{WHAT}: expected a loss that can be traced with its data, got one that needs the values of "
                f"{sorted(self.arguments.constants)}."
            )
        self._bound, self._kind = loss.arguments.tree, _kind(self.arguments)
        self.is_empty = False

    def advance(self) -> None:
        """Fetches the arguments of the next step, while that of the last ones is running.

        Raises:
            ValueError: if they are of other shapes or types.
        """
        self._left -= 1
        # What no step needs is left to whoever goes on with the same iterator.
        item = next(self._items, None) if self._left else None
        self.is_empty = item is None
        if item is None:
            return
        args, kwargs = self._split(item)
        arguments = Partition((args or self._bound[0], {**self._bound[1], **kwargs}))
        if _kind(arguments) != self._kind:
            raise ValueError(
                f"{WHAT}: expected items of the same shapes and types, {self.arguments}, got {arguments}; leave "
                "out a last one that is smaller (drop_last or drop_remainder of loaders)."
            )
        self.arguments = arguments

    def _split(self, item: Any) -> tuple[tuple, dict]:
        if isinstance(item, dict):
            return (), {**self._kwargs, **item}
        return tuple(item) if isinstance(item, tuple | list) else (item,), self._kwargs


def _kind(arguments: Partition) -> Any:
    leaves, structure = jax.tree.flatten(arguments)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
