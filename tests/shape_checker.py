# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Beartype for shapes only: other annotations are the static checker's, and users meet our own errors."""

import typing

import beartype
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
