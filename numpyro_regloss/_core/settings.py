# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""JAX's settings that a user may have changed for his own code: this package's computes under its own.

Accelerators round the factors of a matrix product to three digits unless they are told not to, which is enough for
a network and not for a covariance.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

__all__ = ["own_settings"]

P = ParamSpec("P")
T = TypeVar("T")


def own_settings(fn: Callable[P, T]) -> Callable[P, T]:
    """Lets a compiled function of this package broadcast, and multiply matrices in full precision.

    The user's loss was traced under his own settings when it was built, and keeps them.

    Args:
        fn: the function, below `jax.jit`.

    Returns:
        The function that runs so.
    """

    @functools.wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.numpy_rank_promotion("allow"), jax.default_matmul_precision("highest"):
            return fn(*args, **kwargs)

    return run
