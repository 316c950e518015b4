# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Draws from the shifted density: a weighted cloud, in memory or regenerated from keys."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp

from numpyro_regloss._core.pytree import pytree_dataclass, static_field
from numpyro_regloss._core.types import Array

__all__ = ["BatchMeans", "Chunk", "Draws", "Mergeable", "Shared", "StoredDraws", "merge"]

Carry = TypeVar("Carry")


class Chunk(NamedTuple):
    """Some of the draws, flattened over chains: center + offset, or the pairs center ± offset.

    Attributes:
        center: `(dim,)`, a point amid the draws, the same in all chunks.
        offset: `(n, dim)`.
        pair_log_weight: `(n, 1)`, or `(n, 2)` for pairs, unnormalized.
        score: `(n, dim)`, the gradient of log q, or None.
    """

    center: Array
    offset: Array
    pair_log_weight: Array
    score: Array | None

    @classmethod
    def of(cls, x: Array, log_weight: Array, score: Array | None = None) -> "Chunk":
        """Draws that are not pairs: `x` `(n, dim)`, `log_weight` `(n,)`, `score` like `x`."""
        center = jnp.sum(x[:1], 0)  # zero for no draws
        return cls(center, x - center, log_weight[:, None], score)

    @property
    def log_weight(self) -> Array:
        """In the order of `x`, `(n,)` or `(2 n,)`."""
        return self.pair_log_weight.reshape(-1)

    @property
    def sign(self) -> Array:
        """The multiples of the offset that are draws, `[1]`, or `[1, -1]` for pairs."""
        return jnp.asarray([1.0, -1.0], self.offset.dtype)[: self.pair_log_weight.shape[1]]

    @property
    def x(self) -> Array:
        """The draws, `(n, dim)` or `(2 n, dim)`."""
        x = self.center + self.sign[:, None] * self.offset[:, None]
        return x.reshape(-1, x.shape[-1])


@runtime_checkable
class Mergeable(Protocol):
    """A part of a carry of `Draws.fold` that is no plain sum."""

    def merged(self, other: Any) -> Any:
        """That of the draws of both, `other` being of later ones."""
        ...


class Shared(NamedTuple):
    """A part of a carry that is the same after any chunk.

    Attributes:
        value: an array.
        known: whether there was a chunk.
    """

    value: Array
    known: Array

    def merged(self, other: "Shared") -> "Shared":
        """That of draws that there are."""
        value = jnp.where(self.known, self.value, other.value)
        return Shared(value, self.known | other.known)


def merge(first: Carry, second: Carry) -> Carry:
    """Carries of two parts of the draws as one: their numbers are added, but for what is `Mergeable`."""

    def add(a: Any, b: Any) -> Any:
        return a.merged(b) if isinstance(a, Mergeable) else a + b

    return jax.tree.map(add, first, second, is_leaf=lambda node: isinstance(node, Mergeable))


@runtime_checkable
class Draws(Protocol):
    """The draws that a shift passes to a fit.

    Attributes:
        log_weight: `(chain, draw)`, unnormalized; zeros for MCMC.
        loss: `(chain, draw)`, raw loss values.
        temperature: scalar, the one that was used.
        block_size: draws of a chunk are independent from one block of this many consecutive ones to
            the next (2 for antithetic pairs); None for Markov chains.
        x: `(chain, draw, dim)`, materialized on request.
        score: `(chain, draw, dim)`, or None where gradients were not computed.
        spread: where `x` are means of batches of draws, the variances within the batches, like `x`; else None.
        stats: `(chain, draw)` each, by ArviZ's names of the statistics of a sampler, or None.
    """

    @property
    def log_weight(self) -> Array: ...  # noqa: D102
    @property
    def loss(self) -> Array: ...  # noqa: D102
    @property
    def temperature(self) -> Array: ...  # noqa: D102
    @property
    def block_size(self) -> int | None: ...  # noqa: D102
    @property
    def x(self) -> Array: ...  # noqa: D102
    @property
    def score(self) -> Array | None: ...  # noqa: D102
    @property
    def spread(self) -> Array | None: ...  # noqa: D102
    @property
    def stats(self) -> dict[str, Array] | None: ...  # noqa: D102

    def fold(self, fn: Callable[[Carry, Chunk], Carry], init: Carry) -> Carry:
        """Reduces over chunks of draws; the only access for a fit when draws do not fit in memory.

        On a mesh each device begins with `init` and sees its own draws, and `merge` combines the carries. So
        `init` must be the carry of no draws, and `fn` must add to it, except for parts that are `Mergeable`.
        """
        ...


@pytree_dataclass
class StoredDraws:
    """Draws held in memory.

    Attributes:
        x: `(chain, draw, dim)`.
        log_weight: `(chain, draw)`.
        loss: `(chain, draw)`.
        temperature: scalar.
        score: `(chain, draw, dim)` or None.
        block_size: see `Draws`; None (Markov chains) by default.
        stats: `(chain, draw)` each, by ArviZ's names of the statistics of a sampler, or None; for views of the
            draws, never for a fit.
        center_loss: at the reference's mean, if it was evaluated with the draws, else None.
    """

    x: Array
    log_weight: Array
    loss: Array
    temperature: Array
    score: Array | None = None
    block_size: int | None = static_field(default=None)
    stats: dict[str, Array] | None = None
    center_loss: Array | None = None

    spread: ClassVar[Array | None] = None

    def fold(self, fn: Callable[[Carry, Chunk], Carry], init: Carry) -> Carry:
        """Passes all draws at once."""
        flat = jax.tree.map(
            lambda a: jnp.reshape(a, (-1, *a.shape[2:])), (self.x, self.log_weight, self.score)
        )
        return fn(init, Chunk.of(*flat))


@pytree_dataclass
class BatchMeans(StoredDraws):
    """Means of batches of consecutive draws, for chains that are too long to be stored.

    They give the mean of the draws and, used as a shorter chain, its error. With the variances within the batches
    they also give the variances of the draws. Correlations between parameters are lost.

    Attributes:
        x: means of the batches, `(chain, batch, dim)`.
        log_weight: of the batches, `(chain, batch)`.
        loss: means of the batches, `(chain, batch)`.
        temperature: scalar.
        spread: variances within the batches, like `x`.
        center_loss: at the reference's mean, if it was evaluated with the draws, else None.
    """

    spread: Any = None  # ty: ignore
