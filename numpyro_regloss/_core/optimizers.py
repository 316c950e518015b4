# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Optax, imported by the first engine that needs it and not with this library."""

from functools import cache
from typing import Any

import jax

__all__ = ["adam", "get_optax", "momentum"]


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
