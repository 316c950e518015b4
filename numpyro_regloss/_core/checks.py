# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Checks of the values users give: expected, got, remedy."""

import functools
import inspect
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.optim import _NumPyroOptim

from numpyro_regloss._core.optimizers import get_optax
from numpyro_regloss._core.pytree import is_concrete, with_context_axes
from numpyro_regloss._core.types import Key

__all__ = [
    "cast_fields",
    "check_flag",
    "WITHOUT_GRADIENTS",
    "check_choice",
    "check_count",
    "check_differentiable",
    "check_key",
    "check_optimizer",
    "check_own_names",
    "check_positive",
    "check_schedule",
    "differentiating",
    "follow",
    "usable_range",
]

WITHOUT_GRADIENTS = (
    'shift.Importance or shift.SMC(moves="crank_nicolson") with fit.ForwardKL, or '
    'fit.RobbinsMonro(gradient="score")'
)


POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check_count(value: Any, what: str, minimum: int = 1) -> int:
    """Refuses what is not an integer of at least `minimum`.

    Args:
        value: the count.
        what: begins the error message.
        minimum: the least value allowed.

    Returns:
        The count as a Python integer.

    Raises:
        TypeError: if it is not an integer (booleans and floats are not).
        ValueError: if it is below `minimum`.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise TypeError(f"{what}: expected an integer >= {minimum}, got {value!r}.")
    if value < minimum:
        raise ValueError(f"{what}: expected an integer >= {minimum}, got {value}.")
    return int(value)


def check_choice(value: Any, what: str, choices: tuple[Any, ...]) -> None:
    """Refuses what is not one of the choices.

    Args:
        value: the choice made.
        what: begins the error message.
        choices: what is allowed.

    Raises:
        ValueError: if it is none of them.
    """
    if not any(
        value is choice or (isinstance(value, str) and value == choice) for choice in choices
    ):
        raise ValueError(f"{what}: expected one of {choices}, got {value!r}.")


def check_differentiable(
    names: list[str], loss: Any, what: str, remedy: str = WITHOUT_GRADIENTS
) -> None:
    """Refuses engines that follow gradients where the loss returns integers or is external.

    Args:
        names: of the engines that do.
        loss: a `Loss`.
        what: begins the error message.
        remedy: what to use instead.

    Raises:
        TypeError: if there are such engines and it does.
    """
    why = loss.lacks_gradient if names else ""
    if why:
        raise TypeError(f"{what}: {follow(names)} gradients, and {why}; use {remedy}.")


@contextmanager
def differentiating(
    names: list[str], loss: Any, what: str, remedy: str = WITHOUT_GRADIENTS
) -> Generator[None]:
    """Refuses a loss that JAX cannot differentiate (a callback, a while loop), once its gradient was asked for.

    Args:
        names: of the engines that ask for it.
        loss: a `Loss`.
        what: begins the error message.
        remedy: what to use instead.

    Yields:
        None, while the gradient is traced.

    Raises:
        TypeError: if its gradient raises where its value does not.
        ValueError: what the block raised for any other reason, as it was.
    """
    try:
        yield
    except (TypeError, ValueError, NotImplementedError):
        # Looked for only now, since tracing a gradient takes its time.
        jax.eval_shape(loss.value, loss.x0)
        try:
            jax.eval_shape(jax.grad(loss.value), loss.x0)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise TypeError(
                f"{what}: {follow(names)} gradients, and JAX cannot differentiate this loss: "
                f"{type(error).__name__}: {error} Use {remedy}."
            ) from error
        raise


def follow(names: list[str]) -> str:
    """The names of engines and a verb: "NUTS follows", "SGLD and RobbinsMonro follow"."""
    return f"{' and '.join(names)} follow{'s' if len(names) == 1 else ''}"


def check_key(rng_key: Any, what: str) -> Key:
    """Turns a raw key into a typed one and refuses anything else.

    Args:
        rng_key: `jax.random.key(seed)`, or a raw key of `jax.random.PRNGKey(seed)`.
        what: begins the error message.

    Returns:
        A typed key of shape `()`.

    Raises:
        TypeError: if it is not one random key.
    """
    key = with_context_axes(rng_key)
    if isinstance(key, jax.Array | np.ndarray) and key.dtype == jnp.uint32 and key.ndim == 1:
        try:
            key = jax.random.wrap_key_data(jnp.asarray(key))
        except TypeError as error:
            raise TypeError(
                f"{what}: expected a random key such as jax.random.key(0), got {key.shape} numbers."
            ) from error
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"{what}: expected a random key such as jax.random.key(0), got {type(rng_key).__name__}."
        )
    if key.shape != ():
        raise TypeError(
            f"{what}: expected one random key, got an array of keys of shape {key.shape}; use jax.vmap "
            "for several runs."
        )
    return key


def check_optimizer(optimizer: Any, what: str) -> None:
    """Refuses what is neither Optax's nor NumPyro's.

    Args:
        optimizer: the optimizer, or None for a default.
        what: begins the error message.

    Raises:
        TypeError: if it is something else.
    """
    if optimizer is None or isinstance(optimizer, _NumPyroOptim):
        return
    if not isinstance(optimizer, get_optax().GradientTransformation):
        raise TypeError(
            f"{what}: expected optimizer as an Optax or NumPyro optimizer such as optax.adam(0.01), got "
            f"{type(optimizer).__name__}."
        )


def check_own_names(fn: Callable[..., Any], own: dict[str, Any], num_args: int, what: str) -> None:
    """Refuses a keyword that both the caller's function and ours have: nobody knows whose it is.

    Args:
        fn: the user's function.
        own: what was given under the names of our keywords, None where nothing was.
        num_args: how many arguments the user's function gets by position.
        what: begins the error message.

    Raises:
        TypeError: if such a name was given, or if the function needs it.
    """
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # some functions of C have no signature
        return
    bound = set(fn.keywords) if isinstance(fn, functools.partial) else set()
    bound |= {parameter.name for parameter in parameters[:num_args] if parameter.kind in POSITIONAL}
    for parameter in parameters:
        if parameter.name not in own or parameter.name in bound or parameter.kind in REST:
            continue
        if own[parameter.name] is not None or parameter.default is parameter.empty:
            raise TypeError(
                f"{what}: the function has an argument {parameter.name!r}, and so has {what}, so that it cannot "
                f"be passed on by name; pass it by position, or bind it before: "
                f"functools.partial(function, {parameter.name}=...)."
            )


def cast_fields(engine: Any, names: Iterable[str], check: Callable[[Any, str], Any]) -> None:
    """Checks fields of a frozen dataclass and replaces them by what the check returns.

    Args:
        engine: the dataclass, while it is made.
        names: of the fields.
        check: of a value and the beginning of its error message, such as `check_positive`.
    """
    for name in names:
        what = f"{type(engine).__name__}: {name}"
        object.__setattr__(engine, name, check(vars(engine)[name], what))


def check_flag(value: Any, what: str) -> bool:
    """Refuses what is neither True nor False.

    Args:
        value: the value.
        what: begins the error message.

    Returns:
        The value.

    Raises:
        TypeError: if it is something else.
    """
    if not isinstance(value, bool):
        kind, _, name = what.rpartition(": ")
        raise TypeError(f"{kind}: expected {name} as True or False, got {value!r}.")
    return value


def check_positive(value: Any, what: str, shapes: tuple[tuple[int, ...], ...] = ((),)) -> Any:
    """Casts a number to the default float and refuses what is not finite and positive.

    Args:
        value: a number or array; the values of tracers pass unchecked.
        what: begins the error message.
        shapes: the shapes allowed.

    Returns:
        The value as an array that is not weakly typed.

    Raises:
        TypeError: if it is not a real number.
        ValueError: if it is not finite and positive everywhere, so small or large that it or its inverse is
            rounded to zero, or of another shape.
    """
    try:
        dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    except ValueError:  # of a list of lists of different lengths
        dtype = np.dtype(object)
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{what}: expected a positive number, got {value!r}.")
    if np.shape(value) not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"{what}: expected shape {wanted}, got {np.shape(value)}.")
    if not is_concrete(value):
        return jnp.asarray(value, float)
    with np.errstate(over="ignore"):
        array = np.asarray(value, jnp.result_type(float))
    if not (np.isfinite(array).all() and (array > 0).all()):
        raise ValueError(f"{what}: expected a finite positive number, got {value!r}.")
    least, most = usable_range(array.dtype)
    if (array < least).any() or (array > most).any():
        raise ValueError(
            f"{what}: expected a number between {least:.3g} and {most:.3g}, got {value!r}; beyond, in "
            f"{array.dtype}, it or its inverse is rounded to zero. Change the units of what it multiplies."
        )
    return array


def usable_range(dtype: Any) -> tuple[Any, Any]:
    """The least and the largest positive number which is normal, as is its inverse.

    Args:
        dtype: a floating-point type.

    Returns:
        Two numbers of that type.
    """
    finfo = np.finfo(dtype)
    return finfo.tiny, 1 / finfo.tiny


def check_schedule(
    schedule: Callable[[Any], Any],
    step: int,
    what: str,
    shapes: tuple[tuple[int, ...], ...] = ((),),
) -> None:
    """Refuses a schedule that is not finite and positive at a step, or does not run under `jax.jit`.

    Args:
        schedule: a function of the step.
        step: where to try it.
        what: begins the error message.
        shapes: the shapes allowed.

    Raises:
        TypeError: if it raises, or returns something other than a real number.
    """
    try:
        value = schedule(step)
        jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.int32))
    except Exception as error:
        raise TypeError(
            f"{what}: expected a schedule, a function of the step that runs under jax.jit, such as Optax's, "
            "got one that raises; take one argument, return a number, and use jnp.where instead of if."
        ) from error
    check_positive(value, f"{what} at step {step}", shapes)
