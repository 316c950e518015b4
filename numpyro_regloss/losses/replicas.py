# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Several replicas of a loss's parameters as one loss, and the pull that ties them to their mean.

The loss of replicas is the sum of their losses, so that the shifted density of all is the product of theirs. Each
has rows of its own in every minibatch.
"""

from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_regloss._core.pytree import Partition, pytree_dataclass, replace_fields, static_field
from numpyro_regloss._core.types import Array
from numpyro_regloss.losses.caller import Watch
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.minibatch import Minibatch
from numpyro_regloss.losses.source import LossSource

__all__ = ["Tied", "replicate", "single"]


@pytree_dataclass
class ReplicaSource(LossSource):
    """Turns one flat vector into parameters with a leading axis of replicas, and into the sum of their losses.

    Attributes:
        base: the source of one replica.
        num_replicas: how many.
        minibatch: of all replicas together, or None.
    """

    base: Any
    num_replicas: int = static_field()
    minibatch: Minibatch | None = static_field()

    @property
    def user(self) -> Any:  # ty: ignore[incompatible-property-override]
        """The user's function."""
        return self.base.user

    @property
    def density(self) -> Any:  # ty: ignore[incompatible-property-override]
        """As of one replica."""
        return self.base.density

    @property
    def held(self) -> tuple[Any, ...]:
        """As of one replica."""
        return self.base.held

    @property
    def is_module(self) -> bool:
        """As of one replica."""
        return self.base.is_module

    @property
    def num_first(self) -> int:
        """As of one replica."""
        return self.base.num_first

    @property
    def is_external(self) -> bool:
        """As one replica is."""
        return self.base.is_external

    def digits(self) -> Any:
        """As of one replica."""
        digits = self.base.digits()
        return np.tile(digits, self.num_replicas) if np.ndim(digits) else digits

    def watch(self) -> AbstractContextManager[Watch]:
        """Listens to the calls for all replicas."""
        return self.base.watch()

    @property
    def dim(self) -> int:
        """Number of parameters of all replicas."""
        return self.num_replicas * self.base.dim

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, the same as of one replica."""
        return self.base.names

    @property
    def flat_names(self) -> tuple[str, ...]:
        """One label per flat parameter, with the number of its replica."""
        return tuple(
            f"{name}@{a}" for a in range(self.num_replicas) for name in self.base.flat_names
        )

    def keeps_values(self, x: Array, args: tuple, kwargs: dict) -> np.ndarray:
        """As of one replica."""
        rows = [self.base.keeps_values(row, args, kwargs) for row in self._rows(x)]
        return np.concatenate(rows)

    def value(self, x: Array, args: tuple, kwargs: dict, data_scale: float) -> Array:
        """The sum of the losses; of a batch each replica sees its own rows."""
        arguments = Partition((args, kwargs))
        axes = jax.tree.map(lambda _: None, arguments)
        # A batch of as many rows as the data needs no parting to be unbiased.
        if self.minibatch is not None and data_scale != 1.0:
            arguments, axes = self.minibatch.part(arguments, self.num_replicas)
            data_scale = data_scale * self.num_replicas

        def single(x: Array, arguments: Partition) -> Array:
            return self.base.value(x, *arguments.tree, data_scale)

        return jnp.sum(jax.vmap(single, in_axes=(0, axes))(self._rows(x), arguments))

    def constrain(self, x: Array, args: tuple, kwargs: dict) -> Any:
        """The parameters as the user wrote them, with a leading axis of replicas."""
        return _stack([self.base.constrain(row, args, kwargs) for row in self._rows(x)])

    def named(self, x: Array, args: tuple, kwargs: dict) -> dict[str, Array]:
        """The same as a flat dictionary of sites."""
        return _stack([self.base.named(row, args, kwargs) for row in self._rows(x)])

    def tangent(self, x: Array) -> Any:
        """A gradient in the structure of `constrain`."""
        return _stack([self.base.tangent(row) for row in self._rows(x)])

    def unconstrain(self, params: Any, args: tuple, kwargs: dict) -> Array:
        """The inverse of `constrain`."""
        rows = [
            self.base.unconstrain(_pick(params, a), args, kwargs) for a in range(self.num_replicas)
        ]
        return jnp.concatenate(rows)

    def ravel(self, sites: dict[str, Array]) -> Array:
        """Unconstrained sites with a leading axis of replicas as the flat vector."""
        return jnp.concatenate([self.base.ravel(_pick(sites, a)) for a in range(self.num_replicas)])

    def own_settings(self) -> AbstractContextManager[Any]:
        """As one replica was built."""
        return self.base.own_settings()

    def as_tree(self, x: Array) -> Any:
        """That of one replica, with a leading axis."""
        return jax.vmap(self.base.as_tree)(self._rows(x))

    def from_tree(self, tree: Any) -> Array:
        """The inverse of `as_tree`."""
        return jax.vmap(self.base.from_tree)(tree).reshape(-1)

    def expand(self, tree: Any) -> Array:
        """One value per flat parameter from what one replica takes."""
        return jnp.tile(self.base.expand(tree), self.num_replicas)

    def taken_names(self, arguments: Partition) -> frozenset[str]:
        """As of one replica."""
        return self.base.taken_names(arguments)

    def check(self, arguments: Partition) -> None:
        """As one replica does."""
        self.base.check(arguments)

    def check_data(
        self, arguments: Partition, batch: Partition | None, is_row: tuple[bool, ...]
    ) -> None:
        """As one replica does."""
        self.base.check_data(arguments, batch, is_row)

    def _rows(self, x: Array) -> Array:
        return x.reshape(self.num_replicas, -1)


def replicate(loss: Loss, num_replicas: int) -> Loss:
    """The summed loss of several replicas of the parameters, all at the loss's start.

    Args:
        loss: of one.
        num_replicas: how many.

    Returns:
        The loss of all; its minibatch has as many rows for each replica as that of `loss`.

    Raises:
        ValueError: if there are fewer rows of data than all replicas take at once.
    """
    minibatch = loss.minibatch
    if minibatch is not None:
        rows = minibatch.num_rows(loss.arguments)
        minibatch = minibatch.times(num_replicas)
        if rows < minibatch.batch_size:
            raise ValueError(
                "schemes.parle: expected num_replicas x batch_size rows of data at least, that is "
                f"{minibatch.batch_size}, got {rows}; use fewer replicas, smaller batches or no minibatch."
            )
    return replace_fields(
        loss,
        x0=jnp.tile(loss.x0, num_replicas),
        source=ReplicaSource(loss.source, num_replicas, minibatch),
        minibatch=minibatch,
    )


def single(loss: Loss) -> tuple[Loss, int | None]:
    """The loss of one replica, without a minibatch, and how many there are; of others, the loss and None."""
    source = loss.source
    if not isinstance(source, ReplicaSource):
        return loss, None
    one = replace_fields(loss, x0=loss.x0[: source.base.dim], source=source.base, minibatch=None)
    return one, source.num_replicas


@pytree_dataclass
class Tied:
    """An Optax optimizer whose gradients have the replicas' distances from their mean added.

    Attributes:
        optimizer: the optimizer.
        coupling: how much of them.
    """

    optimizer: Partition
    coupling: Any

    def init(self, params: Any) -> Any:
        """The optimizer's state at the start."""
        return self.optimizer.tree.init(params)

    def update(self, gradient: Any, state: Any, params: Any) -> tuple[Any, Any]:
        """The update of all replicas, whose axis is the first of every array."""
        tied = jax.tree.map(lambda g, x: g + self.coupling * (x - jnp.mean(x, 0)), gradient, params)
        return self.optimizer.tree.update(tied, state, params)


def _stack(trees: list[Any]) -> Any:
    # Functions and settings among the parameters are no arrays, and the same in all replicas.
    return jax.tree.map(lambda *a: jnp.stack(a) if hasattr(a[0], "shape") else a[0], *trees)


def _pick(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda a: a[index] if hasattr(a, "shape") else a, tree)
