# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""LAPACK calls of a program: which they are, and large batches of matrices taken one matrix at a time.

A loop takes the place of such a call, in the program and in the programs that it holds: loops, branches, calls.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from numpyro_regloss._core.foreign import attribute

__all__ = ["equations", "factorizations", "is_divided", "one_matrix_at_a_time"]

FACTORIZATIONS = frozenset({
    "cholesky",
    "cholesky_update",
    "eig",
    "eigh",
    "geqp3",
    "geqrf",
    "hessenberg",
    "householder_product",
    "lu",
    "ormqr",
    "qr",
    "schur",
    "svd",
    "triangular_solve",
    "tridiagonal",
    "tridiagonal_solve",
})


# As JAX 0.10 and 0.11 have it: batches of less work than this many operations are not divided, and no call takes
# more operations for a matrix than this many times the cube of its longest side.
LEAST_WORK, MOST_OPERATIONS = 200_000, 30


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All operations of a program, in loops, branches and calls too, each once."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from equations(attribute(inner, "jaxpr", inner))


def factorizations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """The LAPACK calls of a program."""
    return (eqn for eqn in equations(jaxpr) if eqn.primitive.name in FACTORIZATIONS)


def is_divided(eqn: JaxprEqn) -> bool:
    """Whether a LAPACK call is for so many and so large matrices that threads may share them."""
    shape, axes = _shape(eqn.invars[0]), _num_batch_axes(eqn)
    side = max((size for atom in eqn.invars for size in _shape(atom)[axes:]), default=0)
    return axes > 0 and math.prod(shape[:axes]) * MOST_OPERATIONS * side**3 >= LEAST_WORK


def one_matrix_at_a_time(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function with a loop over the matrices in the place of each LAPACK call that threads would share.

    Of its derivatives it knows nothing: rewrite the derivative instead.

    Args:
        fn: a function of one pytree of arrays.

    Returns:
        The function; the same one in effect where no call is divided.
    """

    def rewritten(arguments: Any) -> Any:
        closed, out = jax.make_jaxpr(fn, return_shape=True)(arguments)
        if not _is_any_divided(closed.jaxpr):
            return fn(arguments)
        outs = jaxpr_as_fun(_rewritten(closed))(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(out), outs)

    return rewritten


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _is_any_divided(jaxpr: Jaxpr) -> bool:
    return any(map(is_divided, factorizations(jaxpr)))


def _num_batch_axes(eqn: JaxprEqn) -> int:
    # The first operand is a matrix or, of this one, a diagonal.
    own = 1 if eqn.primitive.name == "tridiagonal_solve" else 2
    return len(_shape(eqn.invars[0])) - own


def _rewritten(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    def run(*args: jax.Array) -> list[jax.Array]:
        values = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
        values |= zip(jaxpr.jaxpr.invars, args, strict=True)

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for eqn in jaxpr.jaxpr.eqns:
            outs = _evaluated(eqn, [read(atom) for atom in eqn.invars])
            values |= zip(eqn.outvars, outs, strict=True)
        return [read(atom) for atom in jaxpr.jaxpr.outvars]

    return jax.make_jaxpr(run)(*(v.aval for v in jaxpr.jaxpr.invars))


def _evaluated(eqn: JaxprEqn, args: list[jax.Array]) -> list[jax.Array]:
    # What holds programs of its own keeps its place around the rewritten ones: they take and return the same.
    params = jax.tree.map(_with_loops, eqn.params, is_leaf=_is_jaxpr)
    params = eqn.primitive.get_bind_params(params)

    def bind(args: list[jax.Array]) -> list[jax.Array]:
        with eqn.ctx.manager:
            out = eqn.primitive.bind(*args, **params)
        return out if eqn.primitive.multiple_results else [out]

    if eqn.primitive.name not in FACTORIZATIONS or not is_divided(eqn):
        return bind(args)
    axes = _num_batch_axes(eqn)
    batch = args[0].shape[:axes]
    outs = lax.map(bind, [jnp.reshape(a, (-1, *a.shape[axes:])) for a in args])
    return [jnp.reshape(out, (*batch, *out.shape[1:])) for out in outs]


def _with_loops(value: Any) -> Any:
    if not _is_jaxpr(value) or not _is_any_divided(attribute(value, "jaxpr", value)):
        return value
    if isinstance(value, ClosedJaxpr):
        return _rewritten(value)
    return _rewritten(ClosedJaxpr(value, ())).jaxpr
