# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What is most likely not meant: parameters that are not used, raw images, sums with the temperature of a mean.

Each is told by what the loss does, not by how its data look: bytes that the loss divides by 255 are well, and so
is a large loss that does not grow with the number of its rows.
"""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var
from numpyro.util import find_stack_level

from numpyro_regloss._core.foreign import attribute
from numpyro_regloss._core.pytree import Partition, is_concrete, replace_fields
from numpyro_regloss._core.types import Array

__all__ = ["warn_of_misuse", "warn_of_sum"]

# Whole numbers from zero up to a byte's largest, in rows of so many: pixels.
BRIGHT, LARGEST, LEAST_PIXELS = 100, 255, 16
# Rows that are looked at.
NUM_LOOKED = 1_000
# What leaves the values as they are; only products of these with weights are of raw pixels.
SAME_VALUES = frozenset({
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "expand_dims",
    "reshape",
    "squeeze",
    "stop_gradient",
    "transpose",
})
PRODUCTS = frozenset({"conv_general_dilated", "dot_general"})
# T times rows of a temperature that is meant for a mean, with room for colder and warmer ones.
OF_A_MEAN, LEAST_ROWS = 10.0, 100
# loss / T per row of a start that is to be looked at, and how much of a sum half of its rows have.
LARGE, HALF = 20.0, (0.35, 0.65)


def warn_of_misuse(jaxpr: Any, before: Any, parameters: Array, after: Any) -> None:
    """Warns of parameters that are not used, and of pixels from 0 to 255 that meet weights without scaling.

    Args:
        jaxpr: of the loss.
        before: its inputs before the parameters, what the function captured among them; nothing is said of
            tracers, nor of arrays that are not all here.
        parameters: the flat vector.
        after: the inputs after them.
    """
    first = jax.tree.leaves(before)
    if not any(_reached(jaxpr, [len(first)])):
        warnings.warn(
            "Loss: the function does not use its parameters, so that the loss is the same everywhere. Let it use "
            "its first argument, and no module or array of weights from outside of it.",
            stacklevel=find_stack_level(),
        )
    raw = []
    inputs = [*first, parameters, *jax.tree.leaves(after)]
    for leaf, variable in zip(inputs, jaxpr.invars, strict=True):
        if _are_pixels(leaf) and _meets_weights(jaxpr, variable):
            raw.append(f"{leaf.dtype}{list(leaf.shape)}")
    if raw:
        warnings.warn(
            f"Loss: the array {' and '.join(raw)} has whole numbers from 0 to 255, and the loss multiplies them "
            "by weights without scaling. The gradients of these weights are then hundreds of times those of other "
            "parameters. Pass images as floats from 0 to 1: x.astype(float) / 255.",
            stacklevel=find_stack_level(),
        )


def warn_of_sum(loss: Any, arguments: Partition, value: Any, temperature: Any, what: str) -> None:
    """Warns of a sum over the rows with the temperature of a mean: loss / T is then rows times too large.

    Args:
        loss: a `Loss` of a function; of others nothing is said.
        arguments: bound to it.
        value: at the start, concrete or not.
        temperature: T, likewise.
        what: begins the warning.
    """
    if loss.is_external or loss.source.density is not None:
        return
    if not is_concrete((value, temperature, arguments)) or np.ndim(temperature):
        return
    rows = _num_rows(loss, arguments)
    heat = float(temperature)
    suspect = rows >= LEAST_ROWS and heat * rows <= OF_A_MEAN
    if not suspect or not abs(float(value)) / heat > LARGE * rows:
        return
    share = _share_of_half(loss, arguments, rows, float(value))
    if not HALF[0] < share < HALF[1]:
        return
    warnings.warn(
        f"{what}: the loss is a sum over {rows} rows (half of them have {share:.2f} of it), and a temperature of "
        f"{heat:.3g} is that of a mean: loss / T is {float(value) / heat:.2g} at the start, "
        f"{float(value) / heat / rows:.2g} for each row. Average the loss over its rows (jnp.mean), or use "
        "temperature=1.",
        stacklevel=find_stack_level(),
    )


def _are_pixels(leaf: Any) -> bool:
    if not is_concrete(leaf) or leaf.ndim < 2 or math.prod(leaf.shape[1:]) < LEAST_PIXELS:
        return False
    if leaf.dtype.kind not in "uif" or not leaf.size:
        return False
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return False
    # On the host: of arrays on a mesh JAX would ask where the rows shall lie.
    some = np.asarray(leaf)[:NUM_LOOKED]
    largest = some.max()
    return bool(BRIGHT <= largest <= LARGEST and some.min() >= 0 and np.all(some == np.rint(some)))


def _reached(jaxpr: Any, places: list[int]) -> list[bool]:
    # Which outputs may depend on these inputs.
    seen = {jaxpr.invars[i] for i in places}

    def is_seen(atom: Any) -> bool:
        # Literals are not hashable.
        return isinstance(atom, Var) and atom in seen

    for equation in jaxpr.eqns:
        mine = [i for i, atom in enumerate(equation.invars) if is_seen(atom)]
        if not mine:
            continue
        inner = _inner(equation)
        hit = [True] * len(equation.outvars) if inner is None else _reached(inner, mine)
        seen.update(v for v, is_hit in zip(equation.outvars, hit, strict=True) if is_hit)
    return [is_seen(atom) for atom in jaxpr.outvars]


def _inner(equation: Any) -> Any:
    # The program that an equation calls with its own inputs, if it is such a call.
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    inner = attribute(inner, "jaxpr", inner)
    return inner if inner is not None and len(inner.invars) == len(equation.invars) else None


def _meets_weights(jaxpr: Any, variable: Any) -> bool:
    same = {variable}
    for equation in jaxpr.eqns:
        # Literals are not hashable.
        mine = [i for i, v in enumerate(equation.invars) if isinstance(v, Var) and v in same]
        if not mine:
            continue
        name = equation.primitive.name
        if name in PRODUCTS:
            return True
        if name in SAME_VALUES:
            same.update(equation.outvars)
        inner = _inner(equation)
        if inner is not None and any(_meets_weights(inner, inner.invars[i]) for i in mine):
            return True
    return False


def _num_rows(loss: Any, arguments: Partition) -> int:
    if loss.minibatch is not None:
        return loss.minibatch.num_rows(arguments)
    return max((leaf.shape[0] for leaf in arguments.leaves if leaf.ndim), default=0)


def _share_of_half(loss: Any, arguments: Partition, rows: int, value: float) -> float:
    """The loss of half of the rows over that of all; NaN where the function does not take half of them."""
    if loss.minibatch is None:
        is_row = [leaf.ndim > 0 and leaf.shape[0] == rows for leaf in arguments.leaves]
    else:
        is_row = loss.minibatch.is_row(arguments)
    flags = iter(is_row)
    plain = replace_fields(loss, minibatch=None)
    try:
        half = arguments.map(
            lambda leaf: jnp.asarray(np.asarray(leaf)[: rows // 2]) if next(flags) else leaf
        )
        found: Array = plain.evaluate(loss.x0, half)
    except Exception:  # noqa: BLE001
        # The function needs all rows, whatever it raises, or they are not all here: nobody knows if it is a sum.
        return math.nan
    return float(found) / value
