# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Schedules of tau with numbers as values: new numbers do not recompile, unlike a new function."""

from functools import partial
from typing import Any

import jax.numpy as jnp

from numpyro_regloss._core.checks import cast_fields, check_positive
from numpyro_regloss._core.pytree import is_concrete, pytree_dataclass
from numpyro_regloss._core.types import Array

__all__ = ["Geometric", "Scoping"]


@pytree_dataclass
class Scoping:
    """Geometric scoping: tau_t = max(tau / (1 + rate)^t, least).

    Entropy-SGD's γ_t = γ_0 (1 + rate)^t with γ = T / tau: the loss is regularized less and less.

    Args:
        tau: the first one, in squared units of the parameters; a number, or one for each parameter `(dim,)`.
        rate: > 0, per outer step.
        least: the last one, > 0, in the units of `tau`; by default it is negligible.

    Raises:
        TypeError: if a setting is not a number.
        ValueError: if it is not positive, or `least` exceeds `tau`.

    References:
        Chaudhari et al. (2017), "Entropy-SGD: Biasing Gradient Descent Into Wide Valleys".

    Example:
        >>> schedule = Scoping(tau=0.4, rate=1.0, least=0.1)
        >>> [round(float(schedule(t)), 2) for t in range(4)]
        [0.4, 0.2, 0.1, 0.1]
    """

    tau: Any
    rate: Any
    least: Any = 1e-30

    def __post_init__(self) -> None:
        shape = jnp.shape(self.tau)
        cast_fields(self, ("tau",), partial(check_positive, shapes=((), shape[:1])))
        cast_fields(self, ("rate", "least"), check_positive)
        if is_concrete((self.tau, self.least)) and (self.least > self.tau).any():
            raise ValueError(
                f"Scoping: expected least <= tau, got {self.least} and {self.tau}; tau falls to least."
            )

    def __call__(self, step: Array | int) -> Array:
        """Tau at a step.

        Args:
            step: outer steps done.

        Returns:
            A scalar, or `(dim,)`.
        """
        # By the logarithm, since a power of many steps would overflow.
        return jnp.maximum(self.tau * jnp.exp(-step * jnp.log1p(self.rate)), self.least)


@pytree_dataclass
class Geometric:
    """A geometric fall: tau_t = first (last / first)^(t / (num_steps - 1)), and `last` from then on.

    Args:
        first: tau of the first step, in squared units of the parameters; a number, or one for each parameter
            `(dim,)`.
        last: tau of the last step, in the same units and forms.
        num_steps: outer steps until the last tau, at least one.

    Raises:
        TypeError: if a setting is not a number.
        ValueError: if it is not positive, or `last` exceeds `first`.

    Example:
        >>> schedule = Geometric(first=1.0, last=0.01, num_steps=3)
        >>> [round(float(schedule(t)), 2) for t in range(4)]
        [1.0, 0.1, 0.01, 0.01]
    """

    first: Any
    last: Any
    num_steps: Any

    def __post_init__(self) -> None:
        for name, value in (("first", self.first), ("last", self.last)):
            shapes = ((), jnp.shape(value)[:1])
            cast_fields(self, (name,), partial(check_positive, shapes=shapes))
        cast_fields(self, ("num_steps",), check_positive)
        if is_concrete((self.first, self.last)) and (self.last > self.first).any():
            raise ValueError(
                f"Geometric: expected last <= first, got {self.last} and {self.first}; tau falls to last."
            )

    def __call__(self, step: Array | int) -> Array:
        """Tau at a step.

        Args:
            step: outer steps done.

        Returns:
            A scalar, or `(dim,)`.
        """
        part = step / jnp.maximum(self.num_steps - 1, 1)
        # Of two numbers near overflow or underflow the ratio is neither.
        log_ratio = jnp.log(self.last) - jnp.log(self.first)
        return jnp.where(part < 1, self.first * jnp.exp(part * log_ratio), self.last)
