# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Checks of what a scheme is made of."""

import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from numpyro.infer.mcmc import MCMCKernel

from numpyro_regloss._core.checks import WITHOUT_GRADIENTS
from numpyro_regloss.anchor.base import Anchor
from numpyro_regloss.fit.base import Fit
from numpyro_regloss.losses.caller import Watch
from numpyro_regloss.shift.base import Shift

__all__ = ["check_parts", "check_start", "explaining", "followers", "who_differentiates"]


@runtime_checkable
class Verbs(Protocol):
    """What all engines have."""

    def init(self, *args: Any) -> Any: ...  # noqa: D102
    def step(self, *args: Any) -> Any: ...  # noqa: D102


def check_parts(shift: Any, fit: Any, anchor: Any, what: str) -> None:
    """Refuses shifts, fits and anchors that are something else.

    Args:
        shift: step 1.
        fit: step 2.
        anchor: step 3.
        what: begins the error message.

    Raises:
        TypeError: if a part is of the wrong kind.
    """
    for part, kind in ((shift, Shift), (fit, Fit), (anchor, Anchor)):
        name = kind.__name__.lower()
        others = {Shift, Fit, Anchor} - {kind}
        has_verbs = isinstance(part, Verbs) and callable(part.init) and callable(part.step)
        if isinstance(part, type) or not has_verbs or others & set(type(part).__mro__):
            raise TypeError(
                f"{what}: expected {name} as an object with init and step, such as those of "
                f"numpyro_regloss.{name}, got {part!r}.{_hint(part)}"
            )
        for declared, method in ((kind.init, part.init), (kind.step, part.step)):
            verb, wanted = declared.__name__, list(inspect.signature(declared).parameters)[1:]
            if not _takes(method, len(wanted)):
                raise TypeError(
                    f"{what}: expected {name} with {verb}({', '.join(wanted)}), got {type(part).__name__} with "
                    f"{verb}{inspect.signature(method)}. shift.Kernel runs the kernels of NumPyro; to use an "
                    "algorithm of another library, write a class with init and step: the docstring of "
                    f"numpyro_regloss.{name}.{kind.__name__} says what they take and return."
                )
        if not isinstance(part, kind):
            raise TypeError(
                f"{what}: expected {name} as a {name}.{kind.__name__}, which has defaults for the methods beside "
                f"init and step, got {type(part).__name__}; inherit from it: "
                f"class {type(part).__name__}({name}.{kind.__name__})."
            )


def followers(*parts: Any) -> list[str]:
    """Names of the engines that differentiate the loss."""
    return [type(part).__name__ for part in parts if part.uses_gradient]


def who_differentiates(*parts: Any) -> str:
    """The end of a sentence on engines that differentiate the loss, or nothing."""
    names = followers(*parts)
    verb = "differentiates" if len(names) == 1 else "differentiate"
    return (
        f", and {' and '.join(names)} {verb} it ({WITHOUT_GRADIENTS} need no gradient)"
        if names
        else ""
    )


def _hint(part: Any) -> str:
    base = part if isinstance(part, type) else type(part)
    if issubclass(base, MCMCKernel):
        return f" For a kernel of NumPyro use shift.Kernel({base.__name__})."
    return ""


def _takes(method: Any, count: int) -> bool:
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # of a function in C
        return True
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def check_start(value: Any, watch: Watch) -> None:
    """Refuses a start where the loss is not finite.

    Args:
        value: of the loss.
        watch: listened to its calls.

    Raises:
        ValueError: if it is not finite.
    """
    if not np.isfinite(value):
        remedy = (
            "mend what the first failure below shows, or choose another start (params)"
            if watch.first
            else "choose another start (params, or rng_key of Loss.from_model), or look for NaN among the data"
        )
        raise ValueError(
            f"TwoStep: expected a finite loss at the start, got {value}{_limit(value)}; {remedy}. "
            f"{watch.report()}".rstrip()
        )


def _limit(value: Any) -> str:
    if not np.isinf(value):
        return ""
    dtype = np.asarray(value).dtype
    return f", which any number beyond {jnp.finfo(dtype).max:.2g} is in {dtype}"


def explaining(call: Callable[..., Any], optimizer: Any, *args: Any) -> Any:
    """Calls a function of an optimizer, and says whose an error is that JAX raises in it.

    The loss itself was traced before: what raises is its gradient, its vmap or an engine of the user's own.

    Args:
        call: the function.
        optimizer: its first argument, a `TwoStep`.
        *args: the others.

    Returns:
        What it returns.

    Raises:
        TypeError: if the loss, or an engine, cannot be used as they are.
        ValueError: likewise; or if arrays lie on different devices.
    """
    try:
        return call(optimizer, *args)
    except (TypeError, ValueError, NotImplementedError) as error:
        if str(error).startswith("anchor."):
            raise
        if "incompatible devices" in str(error):
            raise ValueError(
                f"TwoStep: expected all arrays on the same devices, but JAX says: {error}. Put data, parameters "
                "and keys on one device, or on one mesh, by jax.device_put."
            ) from error
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(
            f"TwoStep: a step of these engines raised {type(error).__name__}: {error} Engines run the loss "
            f"under jax.jit and jax.vmap{who_differentiates(optimizer.shift, optimizer.fit)}: it must allow that."
        ) from error
