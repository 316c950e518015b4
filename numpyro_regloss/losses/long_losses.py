# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Losses of thousands of operations, as a Python loop over the sites of a model makes them.

Running such a model in Python takes a second, and compiling it several, in every program that it is part of. So
it is traced once and for all, a step has it only once, and draws are made by the program of the run.
"""

from typing import Any

from numpyro_regloss.losses.factorizations import equations

__all__ = ["CENTER_FROM", "is_long"]

# Some forty scalar sites.
MANY_OPERATIONS = 2_000
# Draws evaluated at once, from which on the center may be one more among them: at a price of one percent at most.
CENTER_FROM = 100


def is_long(jaxpr: Any) -> bool:
    """Whether a loss is longer than the rest of a step.

    Args:
        jaxpr: of the loss at one point.

    Returns:
        Whether it has so many operations, those of loops counted once.
    """
    return sum(1 for _ in equations(jaxpr)) >= MANY_OPERATIONS
