# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Batches that a loader of the host hands out, one for each outer step; the next is on its way meanwhile."""

from collections.abc import Iterable
from typing import Any

import jax

from numpyro_regloss._core.pytree import Partition
from numpyro_regloss.losses.items import split_item
from numpyro_regloss.losses.loss import Loss

__all__ = ["Feed", "NoFeed", "feed_of"]

WHAT = "TwoStep.run: batches"


class Feed:
    """The arguments of the steps of a run.

    Args:
        loss: of the run.
        batches: items are arguments of the loss, see `split_item`.
        kwargs: keyword arguments of all steps.
        num_steps: of the run.

    Attributes:
        item: positional and keyword arguments of the first step.
        arguments: of the next step.
        is_empty: whether there is no next one.
        limit: steps that can be dispatched together, or zero for any number.

    Raises:
        TypeError: if there is nothing to iterate over.
        ValueError: if there is no item.
    """

    limit = 1

    def __init__(self, loss: Loss, batches: Iterable[Any], kwargs: dict, num_steps: int) -> None:
        if not isinstance(batches, Iterable):
            raise TypeError(
                f"{WHAT}: expected an iterable of arguments of the loss, got {type(batches).__name__}."
            )
        self._items, self._kwargs, self._left = iter(batches), kwargs, num_steps
        self._loss = loss
        first = next(self._items, None)
        if first is None:
            raise ValueError(
                f"{WHAT}: expected an item for each step, got none; an iterator that was used up has none."
            )
        self.item = self._split(first)
        self.arguments = loss.bind(*self.item)
        if self.arguments.constants:
            raise ValueError(
                f"{WHAT}: expected a loss that can be traced with its data, got one that needs the values of "
                f"{sorted(self.arguments.constants)}; compute what needs them before, and pass that in the items."
            )
        self._bound, self._kind = loss.arguments.tree, _kind(self.arguments)
        self.is_empty = False

    def of_step(self, arguments: Partition) -> Partition:
        """Arguments of the next step, whatever those of the run."""
        del arguments
        return self.arguments

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
                "out a smaller last item (drop_last or drop_remainder of loaders)."
            )
        self.arguments = arguments

    def _split(self, item: Any) -> tuple[tuple, dict]:
        args, kwargs = split_item(self._loss, item, WHAT)
        return args, {**self._kwargs, **kwargs}


class NoFeed:
    """All steps have the same arguments."""

    limit, is_empty = 0, False

    def of_step(self, arguments: Partition) -> Partition:
        """Those of the run."""
        return arguments

    def advance(self) -> None:
        """Nothing is fetched."""


def feed_of(
    optimizer: Any, batches: Any, num_steps: int, checkpoint: Any, args: tuple, kwargs: dict
) -> tuple[Feed | NoFeed, tuple, dict]:
    """The feed of a run, and the arguments of its first step.

    Args:
        optimizer: of the run.
        batches: an iterable, or None.
        num_steps: of the run.
        checkpoint: of the run.
        args: positional arguments of the run's loss.
        kwargs: keyword arguments.

    Returns:
        The feed, positional and keyword arguments.

    Raises:
        TypeError: if there are positional arguments beside batches.
        ValueError: if there are checkpoints or a mesh beside batches.
    """
    if batches is None:
        return NoFeed(), args, kwargs
    if args:
        raise TypeError(
            f"TwoStep.run: expected either batches or positional arguments of the loss, got {len(args)} beside "
            "batches; what is the same in all steps is bound to the loss, or passed by name."
        )
    if checkpoint is not None:
        raise ValueError(
            "TwoStep.run: expected no checkpoint with batches, since an iterable cannot be set back to where a "
            "run was; save result.state, and go on with init_state=."
        )
    if optimizer.mesh is not None:
        raise ValueError(
            "TwoStep.run: expected no mesh with batches; put the data on the devices and pass them as arguments."
        )
    feed = Feed(optimizer.loss, batches, kwargs, num_steps)
    return feed, *feed.item


def _kind(arguments: Partition) -> Any:
    leaves, structure = jax.tree.flatten(arguments)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
