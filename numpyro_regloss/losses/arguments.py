# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The arguments of a user's function: what they are called, and which ones must be constants.

Arguments are traced, so that new values of equal shape never recompile. A function that needs the values of one
when it is traced (`np.unique(group)`, a boolean index, a loop over rows) gets that one as a constant.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from numpyro_regloss._core.pytree import Partition

__all__ = ["Arguments", "explain"]

# A function needs values when it is traced that are known only when the program runs.
UNKNOWN_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class Arguments:
    """Splits arguments of a function, and names them by its parameters.

    Args:
        fn: the function.
        num_first: how many of its parameters come before the arguments.
    """

    def __init__(self, fn: Callable[..., Any], num_first: int) -> None:
        self.num_first = num_first
        try:
            parameters = inspect.signature(fn).parameters.values()
        except (TypeError, ValueError):
            parameters = ()
        single = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names = [p.name for p in parameters if p.kind in single][num_first:]

    def split(
        self, args: tuple, kwargs: dict, constants: frozenset[str] = frozenset()
    ) -> Partition:
        """The arguments as what is traced and what compiles.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.
            constants: names of arrays to bind as constants.

        Returns:
            The arguments.
        """
        return Partition((args, kwargs), self._name, constants)

    def bind(
        self,
        args: tuple,
        kwargs: dict,
        trace: Callable[..., Any],
        minibatch: Any,
        what: str,
        constants: frozenset[str] = frozenset(),
    ) -> tuple[Partition, Any]:
        """Splits the arguments so that the function can be traced with them.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.
            trace: traces the function, with arguments and, if there are batches, with those of a batch.
            minibatch: which arguments are drawn in batches, or None.
            what: `"loss"` or `"model"`.
            constants: names of arrays that must be constants, as far as is known.

        Returns:
            The arguments, and what `trace` returns.
        """
        if minibatch is not None:
            minibatch.num_rows(self.split(args, kwargs, constants))
        arguments, found = explain(lambda: self._attempt(args, kwargs, constants, trace), what)
        if minibatch is None:
            return arguments, found
        minibatch.num_rows(arguments)
        batch = jax.eval_shape(minibatch.draw, jax.random.key(0), arguments)
        return arguments, explain(lambda: trace(arguments, batch), f"{what} of a minibatch")

    def _attempt(
        self,
        args: tuple,
        kwargs: dict,
        constants: frozenset[str],
        attempt: Callable[[Partition], Any],
    ) -> tuple[Partition, Any]:
        arguments = self.split(args, kwargs, constants)
        try:
            return arguments, attempt(arguments)
        except Exception:
            found = self._needed(args, kwargs, attempt)
            if found is None:
                raise
        arguments = self.split(args, kwargs, found)
        return arguments, attempt(arguments)

    def _needed(
        self, args: tuple, kwargs: dict, attempt: Callable[[Partition], Any]
    ) -> frozenset[str] | None:
        paths, _ = jax.tree_util.tree_flatten_with_path((args, kwargs))
        kinds = (float, np.ndarray, np.floating, jax.Array)
        names = [
            self._name(p) for p, a in paths if isinstance(a, kinds) and not isinstance(a, Tracer)
        ]

        def works(constants: list[str]) -> bool:
            try:
                attempt(self.split(args, kwargs, frozenset(constants)))
            except Exception:  # noqa: BLE001
                return False
            return True

        if not names or not works(names):
            return None
        for name in tuple(names):
            fewer = [other for other in names if other != name]
            if works(fewer):
                names = fewer
        return frozenset(names)

    def _name(self, path: Any) -> str:
        key, inner = path[1], jax.tree_util.keystr(path[2:])
        if isinstance(key, jax.tree_util.DictKey):
            return f"argument {key.key!r}{inner}"
        if key.idx < len(self.names):
            return f"argument {self.names[key.idx]!r}{inner}"
        return f"argument {key.idx + self.num_first}{inner}"


def explain(call: Callable[[], Any], what: str) -> Any:
    """Runs the user's code and says what was being tried when it raises.

    Args:
        call: runs the user's code.
        what: `"loss"` or `"model"`.

    Returns:
        What `call` returns.

    Raises:
        TypeError: if values are needed that are not known yet, or the user's code raises one.
    """
    try:
        return call()
    except UNKNOWN_VALUES as error:
        raise TypeError(
            f"Loss: the {what} needs the value of something that is known only when the program runs; it must "
            "run under jax.jit. If the value depends on the parameters, use jnp.where or jax.lax.cond in place of "
            "`if`, and sizes that do not depend on them. If it is data that were passed inside of jax.jit or "
            "jax.vmap, bind them as constants with functools.partial(function, data)."
        ) from error
    except Exception as error:
        if str(error).startswith(("Loss", "argument")):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"Loss: the {what} raised {type(error).__name__} when it was run with its starting values "
            f"and arguments: {error}. Call it yourself with the same arguments to find the "
            "cause; it must run under jax.jit."
        ) from error
