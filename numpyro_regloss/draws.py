# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Draws from the shifted density: a weighted cloud, in memory or regenerated from keys."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp

from numpyro_regloss._pytree import pytree_dataclass, static_field
from numpyro_regloss._typing import Array

__all__ = ["Chunk", "Draws", "StoredDraws"]

Carry = TypeVar("Carry")


class Chunk(NamedTuple):
    """Some of the draws, flattened over chains.

    Attributes:
        x: `(n, dim)`.
        log_weight: `(n,)`, unnormalized.
        score: `(n, dim)`, the gradient of log q, or None.
    """

    x: Array
    log_weight: Array
    score: Array | None


@runtime_checkable
class Draws(Protocol):
    """What a shift hands to a fit.

    Attributes:
        log_weight: `(chain, draw)`, unnormalized; zeros for MCMC.
        loss: `(chain, draw)`, raw loss values.
        temperature: scalar, the one that was used.
        block_size: draws of a chunk are independent from one block of this many consecutive ones to
            the next (2 for antithetic pairs); None for Markov chains.
        x: `(chain, draw, dim)`, materialized on request.
        score: `(chain, draw, dim)`, or None where gradients were not computed.
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

    def fold(self, fn: Callable[[Carry, Chunk], Carry], init: Carry) -> Carry:
        """Reduces over chunks of draws: all that a fit may use when draws do not fit in memory."""
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
    """

    x: Array
    log_weight: Array
    loss: Array
    temperature: Array
    score: Array | None = None
    block_size: int | None = static_field(default=None)

    def fold(self, fn: Callable[[Carry, Chunk], Carry], init: Carry) -> Carry:
        """Hands all draws over at once."""
        flat: Any = jax.tree.map(
            lambda a: jnp.reshape(a, (-1, *a.shape[2:])), (self.x, self.log_weight, self.score)
        )
        return fn(init, Chunk(*flat))
