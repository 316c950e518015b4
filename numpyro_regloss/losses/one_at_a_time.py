# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Losses that factorize matrices, evaluated for one draw at a time, however they are batched.

On a CPU each batched LAPACK call of JAX 0.10 and 0.11 divides its batch among XLA's threads and waits for them.
Two such calls that do not depend on each other run at the same time. Where there are no more threads than calls,
each waits for threads that the other one holds, forever. A call for a single matrix waits for nobody. So a loss
with such calls is mapped over draws, chains and particles, inside of whatever batches it, and its own batches of
matrices are loops. A single call counts too: its derivatives hold several, and so does a program that evaluates it
twice.

The price: such a loss runs on one core, one draw after the other.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.custom_derivatives import SymbolicZero

from numpyro_regloss._core.types import Array, Scalar
from numpyro_regloss.losses.factorizations import factorizations, one_matrix_at_a_time

__all__ = ["mapped", "needs_one_at_a_time", "one_at_a_time"]


def needs_one_at_a_time(
    fn: Callable[[list[Array]], Any], leaves: Sequence[Any], num_calls: int = 1
) -> bool:
    """Whether batches of a function can wait for themselves: it has LAPACK calls, on a CPU.

    Args:
        fn: the function, at one point.
        leaves: its arguments, or their shapes.
        num_calls: how many it takes.

    Returns:
        Whether to evaluate it one draw at a time.
    """
    shapes = [jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype) for leaf in leaves]
    jaxpr = jax.make_jaxpr(fn)(shapes)
    found = itertools.islice(factorizations(jaxpr.jaxpr), num_calls)
    return len(list(found)) == num_calls and jax.default_backend() == "cpu"


def one_at_a_time(fn: Callable[[list[Array]], Scalar], leaves: list[Array]) -> Scalar:
    """`fn(leaves)`, of which `jax.vmap` makes a loop; so it does of its derivatives.

    JAX's `sequential_vmap` has no transpose, which a gradient needs. The derivative of a scalar function is a
    product with its gradient, which is evaluated in the same way.

    Args:
        fn: a function to a scalar that closes over no tracer.
        leaves: its arguments.

    Returns:
        A scalar.
    """
    # JAX batches nested loops several times, until it knows all that varies. Python traces the loss only once.
    jitted = jax.jit(fn)
    alone = jax.jit(one_matrix_at_a_time(jitted))

    @jax.custom_jvp
    def value(leaves: list[Array]) -> Scalar:
        return sequential_vmap(alone)(leaves)

    def jvp(primals: tuple[list[Array]], tangents: tuple[list[Any]]) -> tuple[Scalar, Scalar]:
        (leaves,), (dots,) = primals, tangents
        moved = _moved(dots)
        gradient = jax.value_and_grad(lambda some, leaves: jitted(_put(leaves, moved, some)))
        out, slopes = mapped(lambda leaves: gradient([leaves[i] for i in moved], leaves))(leaves)
        products = [jnp.vdot(slope, dots[i]) for slope, i in zip(slopes, moved, strict=True)]
        return out, sum(products, start=jnp.zeros_like(out))

    value.defjvp(jvp, symbolic_zeros=True)
    return value(leaves)


def mapped(fn: Callable[[list[Array]], Any]) -> Callable[[list[Array]], Any]:
    """A function of arrays, of which `jax.vmap` makes a loop; its derivatives are in forward mode only.

    Args:
        fn: a function of a list of arrays that closes over no tracer.

    Returns:
        The function, for `jax.vmap` and, of a gradient, `jax.hessian`.
    """
    fn = jax.jit(fn)
    alone = jax.jit(one_matrix_at_a_time(fn))

    @jax.custom_jvp
    def call(leaves: list[Array]) -> Any:
        return sequential_vmap(alone)(leaves)

    def jvp(primals: tuple[list[Array]], tangents: tuple[list[Any]]) -> tuple[Any, Any]:
        (leaves,), (dots,) = primals, tangents
        moved = _moved(dots)

        @mapped
        def push(both: list[Array]) -> Any:
            leaves, dots = both[: -len(moved)], both[-len(moved) :]
            some = [leaves[i] for i in moved]
            return jax.jvp(lambda some: fn(_put(leaves, moved, some)), (some,), (dots,))[1]

        return call(leaves), push([*leaves, *(dots[i] for i in moved)])

    call.defjvp(jvp, symbolic_zeros=True)
    return call


def _moved(dots: list[Any]) -> list[int]:
    return [i for i, dot in enumerate(dots) if not isinstance(dot, SymbolicZero)]


def _put(leaves: list[Array], places: list[int], some: list[Array]) -> list[Array]:
    new = dict(zip(places, some, strict=True))
    return [new.get(i, leaf) for i, leaf in enumerate(leaves)]
