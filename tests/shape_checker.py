# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Beartype for shapes only: other annotations are the static checker's, and users meet our own errors."""

import inspect
import typing

import beartype
import jaxtyping
from jaxtyping import AbstractArray


def _has_shape(hint):
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(_has_shape, typing.get_args(hint)))


def check_shapes(fn):
    """Decorates a function so that its array shapes are checked at every call."""
    if isinstance(fn, type):
        return fn
    fn.__annotations__ = {
        name: hint for name, hint in fn.__annotations__.items() if _has_shape(hint)
    }
    return beartype.beartype(fn)


def _annotations(fn):
    if isinstance(fn, type):
        fn = fn.__init__
    elif isinstance(fn, property):
        fn = fn.fget
    return getattr(inspect.unwrap(getattr(fn, "__func__", fn)), "__annotations__", {})


def pass_by_what_has_no_shapes():
    """Has the import hook leave functions without shapes as they are, which saves two calls at each of theirs."""
    wrap = jaxtyping.jaxtyped

    def jaxtyped(*, typechecker):
        def decorate(fn):
            checked = any(map(_has_shape, _annotations(fn).values()))
            return wrap(fn, typechecker=typechecker) if checked else fn

        return decorate

    jaxtyping.jaxtyped = jaxtyped
