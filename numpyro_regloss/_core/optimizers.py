# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Optax, imported by the first engine that needs it and not with this library."""

from functools import cache
from typing import Any

import jax

from numpyro_regloss._core.pytree import pytree_dataclass

__all__ = ["TracedAdam", "adam", "get_optax", "momentum"]

# Of gradients that scatter by a half or more, some hundred steps are enough to know the size, and Adam's usual
# thousand are more than a run may have.
SCATTER_DECAY = 0.99
# The size of a gradient is in units of the loss, which may be anything: only not a division by zero.
SMALLEST = 1e-30


def get_optax() -> Any:
    """The module; engines may ask for it while they are traced."""
    # Arrays that a module makes as it is imported must not belong to a trace.
    with jax.ensure_compile_time_eval():
        import optax  # noqa: PLC0415
    return optax


# Built once: another optimizer of the same settings would be another program.
@cache
def adam() -> Any:
    """Adam with a rate of 0.03."""
    return get_optax().adam(0.03)


@cache
def momentum() -> Any:
    """Nesterov's momentum of 0.9; a rate of one is the plain step where the optimizer is handed displacements."""
    return get_optax().sgd(1.0, momentum=0.9, nesterov=True)


@pytree_dataclass
class TracedAdam:
    """Adam for gradients that scatter, whose rate is traced: another rate is no new program.

    Args:
        rate: about the length of a step of each parameter, in their units: a number, or a pytree like them.
    """

    rate: Any

    def init(self, x: Any) -> Any:
        """Zero moments."""
        return _moments().init(x)

    def update(self, gradient: Any, state: Any, x: Any) -> tuple[Any, Any]:
        """The step and the next moments."""
        direction, state = _moments().update(gradient, state, x)
        rates = jax.tree.broadcast(self.rate, direction)
        return jax.tree.map(lambda rate, d: -rate * d, rates, direction), state


@cache
def _moments() -> Any:
    return get_optax().scale_by_adam(b2=SCATTER_DECAY, eps=SMALLEST)
