# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Attributes of what is not ours: users' functions, kernels of NumPyro, equations of JAX."""

from typing import Any

__all__ = ["attribute"]


def attribute(obj: Any, name: str, default: Any = None) -> Any:
    """An attribute that not every such object has, or whose name is known only when the program runs.

    What this package makes has its attributes declared, and is read plainly.

    Args:
        obj: the object.
        name: of the attribute.
        default: what is returned without it.

    Returns:
        The attribute, or the default.
    """
    return getattr(obj, name, default)
