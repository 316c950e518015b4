# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Arrays of unlike ranks: a user may forbid them in his own code, and this package's still runs."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

__all__ = ["promotes_ranks"]

P = ParamSpec("P")
T = TypeVar("T")


def promotes_ranks(fn: Callable[P, T]) -> Callable[P, T]:
    """Lets a compiled function of this package broadcast, whatever `jax_numpy_rank_promotion` says.

    The user's loss was traced under his own setting when it was built.

    Args:
        fn: the function, below `jax.jit`.

    Returns:
        The function that runs so.
    """

    @functools.wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.numpy_rank_promotion("allow"):
            return fn(*args, **kwargs)

    return run
