# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Losses that read their data one number at a time, as a Python loop over sites or rows does.

XLA moves what does not change out of loops. Hundreds of numbers, each a variable of the loop, make it compile
several times as long, and nothing is gained. A fence ties the arguments to the point, so that they stay.
"""

import math
from typing import Any

import jax

from numpyro_regloss._core.foreign import attribute

__all__ = ["fence", "reads_many_numbers"]

# So many operations on arguments alone, and no array of more elements than this among their results.
MANY_OPERATIONS = 200
SMALL = 1024
PICKS = ("dynamic_slice", "gather", "slice")
LOOPS = ("scan", "while")


def fence(x: Any, arguments: Any) -> Any:
    """The same values, of which those of the arguments seem to change with the point."""
    return jax.lax.optimization_barrier((x, arguments))


def reads_many_numbers(jaxpr: Any) -> bool:
    """Whether a loss does little with its arguments alone, but that often.

    Args:
        jaxpr: of the loss; its first argument is the point.

    Returns:
        Whether a fence pays: never where something large would be computed again and again.
    """
    point, fixed = {id(jaxpr.invars[0])}, {id(var) for var in jaxpr.invars[1:]}
    count = 0
    for eqn in jaxpr.eqns:
        inputs = {id(var) for var in eqn.invars}
        outputs = {id(var) for var in eqn.outvars}
        if inputs & point:
            point |= outputs
        elif inputs & fixed:
            fixed |= outputs
            operations = list(_operations(eqn))
            if not all(map(_is_small, operations)):
                return False
            count += len(operations)
    return count >= MANY_OPERATIONS


def _operations(eqn: Any) -> Any:
    inner = [attribute(value, "jaxpr", value) for value in eqn.params.values()]
    inner = [jaxpr for jaxpr in inner if hasattr(jaxpr, "eqns")]
    if not inner or eqn.primitive.name in LOOPS:
        yield eqn
    else:
        for jaxpr in inner:
            for below in jaxpr.eqns:
                yield from _operations(below)


def _is_small(eqn: Any) -> bool:
    # A number is picked from an array of any size at no cost.
    picks = eqn.primitive.name in PICKS
    arrays = [*eqn.outvars, *(() if picks else eqn.invars)]
    sizes = [math.prod(attribute(array.aval, "shape", ())) for array in arrays]
    return eqn.primitive.name not in LOOPS and max(sizes, default=0) <= SMALL
