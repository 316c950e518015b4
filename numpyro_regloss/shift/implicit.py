# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""No draws: the fit works from the density itself, as the heat step does."""

from typing import ClassVar, NamedTuple

import jax.numpy as jnp

from numpyro_regloss._core.pytree import pytree_dataclass
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.draws.base import StoredDraws
from numpyro_regloss.losses.regularized import RegularizedLoss
from numpyro_regloss.shift.base import Shift

__all__ = ["Implicit", "ImplicitInfo"]


class ImplicitInfo(NamedTuple):
    """Nothing was done, so nothing went wrong.

    Attributes:
        ok: true.
        num_loss: zero.
        num_grad: zero.
    """

    ok: Array
    num_loss: Array
    num_grad: Array


@pytree_dataclass
class Implicit(Shift):
    """Leaves the shifted density as it is, unnormalized, for fits that need no draws.

    Example:
        >>> Implicit()
        Implicit()
    """

    makes_draws: ClassVar[bool] = False

    def init(self, rng_key: Key, target: RegularizedLoss) -> tuple[()]:
        """No state."""
        del rng_key, target
        return ()

    def step(
        self, rng_key: Key, state: tuple[()], target: RegularizedLoss
    ) -> tuple[tuple[()], StoredDraws, ImplicitInfo]:
        """Returns zero draws.

        Args:
            rng_key: unused.
            state: `()`.
            target: the target.

        Returns:
            `()`, draws of shape `(1, 0, dim)` and an info that is always ok.
        """
        del rng_key
        empty = jnp.zeros((1, 0))
        draws = StoredDraws(jnp.zeros((1, 0, target.dim)), empty, empty, target.temperature)
        return state, draws, ImplicitInfo(jnp.asarray(True), jnp.asarray(0), jnp.asarray(0))
