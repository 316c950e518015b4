# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Losses: functions of a pytree and NumPyro models, seen by the engines as one flat vector.

Only this module and the two sources below it know how parameters are stored.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_regloss._checks import check_key
from numpyro_regloss._fence import fence, reads_many_numbers
from numpyro_regloss._function_source import FunctionSource, flatten_params
from numpyro_regloss._model_source import DENSITIES, ModelSource, latent_sites, observed_sizes
from numpyro_regloss._pytree import Partition, pytree_dataclass, replace_fields, static_field
from numpyro_regloss._typing import Array, Key, Scalar, Vector
from numpyro_regloss.minibatch import Minibatch

__all__ = ["Loss"]


@pytree_dataclass
class Loss:
    """A loss of a flat unconstrained vector, with the data bound to it.

    Build one with `Loss.from_function` or `Loss.from_model`. Arrays and floats among the bound
    arguments are traced, so new values of equal shape never recompile; integers, booleans, strings,
    None and functions are static. Two losses of the same function and the same structure of
    parameters are the same program.

    Attributes:
        x0: the start, `(dim,)`, flat and unconstrained, in JAX's default float.
        arguments: the bound `(args, kwargs)`.
        source: how the flat vector becomes the user's parameters and the loss.
        minibatch: which arguments are data, or None for full batches.
        fenced: whether the loss reads its arguments one number at a time; such programs compile faster so.
    """

    x0: Array
    arguments: Partition
    source: FunctionSource | ModelSource
    minibatch: Minibatch | None = static_field(default=None)
    fenced: bool = static_field(default=False)

    @classmethod
    def from_function(
        cls,
        fn: Callable[..., Any],
        params: Any,
        *args: Any,
        minibatch: Minibatch | None = None,
        **kwargs: Any,
    ) -> "Loss":
        """A loss `fn(params, *args, **kwargs)` that returns a scalar.

        Args:
            fn: the loss. It need not be differentiable for gradient-free engines, and may return
                integers. Build it once: a new function object is a new program.
            params: starting values, any pytree of floating-point arrays.
            *args: data and settings, bound as defaults.
            minibatch: which arguments are data to be drawn in batches.
            **kwargs: the same, by name.

        Returns:
            The loss.

        Raises:
            TypeError: if `fn` cannot be called, does not fit its arguments, or returns something other
                than a real scalar; if parameters are not floating-point.
            ValueError: if parameters are missing or not finite, or `fn` raises.

        Example:
            >>> loss = Loss.from_function(lambda p, y: jnp.sum((p["mean"] - y) ** 2),
            ...                           {"mean": 1.0}, jnp.array([0.0, 1.0]))
            >>> loss.dim, float(loss.value(loss.x0))
            (1, 1.0)
        """
        if not callable(fn):
            raise TypeError(
                f"Loss.from_function: expected a function of (params, *args), got {type(fn).__name__}."
            )
        x0, structure, sites = flatten_params(params)
        source = FunctionSource(Partition(fn, "fn"), structure, sites)
        return cls._checked(x0, Partition((args, kwargs)), source, minibatch)

    @classmethod
    def from_model(
        cls,
        model: Callable[..., Any],
        *args: Any,
        density: str = "joint",
        minibatch: Minibatch | None = None,
        rng_key: Key | None = None,
        **kwargs: Any,
    ) -> "Loss":
        """Minus the log density of a NumPyro model, in unconstrained coordinates.

        Args:
            model: a NumPyro model with continuous latent sites.
            *args: the model's arguments, bound as defaults.
            density: `"joint"`: the potential energy that NUTS sees, with the Jacobian of the
                constraints; `"map"`: without it, so that the minimizer is the maximum a posteriori;
                `"likelihood"`: observed (and factor) sites only.
            minibatch: which arguments are data. Observed sites then count `rows / batch_size` times,
                so that the loss of a batch estimates the full loss without bias; every observed site
                must be data.
            rng_key: draws the start uniformly in (-2, 2), as NumPyro does. Default: zero in
                unconstrained coordinates.
            **kwargs: the model's keyword arguments.

        Returns:
            The loss. Its parameters are the latent sites, constrained, by name, and the model's
            deterministic sites, as `MCMC.get_samples` returns them.

        Raises:
            TypeError: if `model` cannot be called or does not fit its arguments, or the key is not one.
            ValueError: if `density` is unknown; if the model has no latent sites, discrete ones,
                `param` or `mutable` sites or subsampled plates.

        Example:
            >>> import numpyro, numpyro.distributions as dist
            >>> def model(y):
            ...     sd = numpyro.sample("sd", dist.HalfNormal(1.0))
            ...     numpyro.sample("y", dist.Normal(0.0, sd), obs=y)
            >>> loss = Loss.from_model(model, jnp.array([0.5, -0.5]))
            >>> {name: float(value) for name, value in loss.constrain(loss.x0).items()}
            {'sd': 1.0}
        """
        if not callable(model):
            raise TypeError(
                f"Loss.from_model: expected a NumPyro model, got {type(model).__name__}."
            )
        if density not in DENSITIES:
            raise ValueError(f"Loss.from_model: expected density in {DENSITIES}, got {density!r}.")
        arguments = Partition((args, kwargs))
        sites = _explain(lambda: latent_sites(model, arguments), "model")
        if density == "likelihood" and not observed_sizes(model, arguments):
            raise ValueError(
                "Loss.from_model: expected observed sites for density='likelihood', got none; pass the data "
                "(obs=...), or use density='joint'."
            )
        source = ModelSource(model, density, sites)
        x0 = jnp.zeros(source.dim, float)
        if rng_key is not None:
            rng_key = check_key(rng_key, "Loss.from_model: rng_key")
            x0 = jax.random.uniform(rng_key, x0.shape, x0.dtype, -2.0, 2.0)
        return cls._checked(x0, arguments, source, minibatch)

    @property
    def dim(self) -> int:
        """Number of flat unconstrained parameters."""
        return self.source.dim

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, which are sites of a model or paths of a pytree."""
        return self.source.names

    @property
    def flat_names(self) -> tuple[str, ...]:
        """One label per flat parameter, such as `theta[0]`."""
        return self.source.flat_names

    @property
    def returns_integers(self) -> bool:
        """Whether the loss has no gradient because it returns integers or booleans."""
        return not jnp.issubdtype(_raw_value.eval_shape(self).dtype, jnp.floating)

    def value(self, x: Vector, args: tuple | None = None, kwargs: dict | None = None) -> Scalar:
        """The loss at `x`.

        Args:
            x: `(dim,)`, flat and unconstrained.
            args: positional arguments in place of the bound ones.
            kwargs: keyword arguments over the bound ones.

        Returns:
            A scalar in JAX's default float, in the units of the user's loss (summed or averaged as
            the user wrote it).
        """
        return self.evaluate(x, self.bind(args, kwargs))

    def constrain(self, x: Vector, args: tuple | None = None, kwargs: dict | None = None) -> Any:
        """The parameters as the user wrote them: their pytree, or their sites by name."""
        self._check_point(x)
        return self.source.constrain(x, *self.bind(args, kwargs).tree)

    def unconstrain(
        self, params: Any, args: tuple | None = None, kwargs: dict | None = None
    ) -> Array:
        """The flat vector of parameters: the inverse of `constrain`.

        Args:
            params: as the user wrote them: their pytree, or constrained sites by name (deterministic ones are
                passed over).
            args: positional arguments in place of the bound ones.
            kwargs: keyword arguments over the bound ones.

        Returns:
            `(dim,)`.

        Raises:
            ValueError: if names, structure or shapes are other ones.
        """
        return self.source.unconstrain(params, *self.bind(args, kwargs).tree)

    def named_sites(self, x: Array, arguments: Partition) -> dict[str, Array]:
        """The parameters as a flat dictionary, for NumPyro traces and labels."""
        return self.source.named(x, *arguments.tree)

    def bind(self, args: tuple | None = None, kwargs: dict | None = None) -> Partition:
        """The arguments to use: given positional ones replace the bound ones, names go on top.

        Args:
            args: positional arguments, or None or `()` for the bound ones.
            kwargs: keyword arguments to override.

        Returns:
            The arguments, split into what is traced and what compiles.

        Raises:
            TypeError: if `args` is not a tuple or `kwargs` not a dict.
        """
        if not isinstance(args, tuple | list | None) or not isinstance(kwargs, dict | None):
            raise TypeError(
                "Loss: expected args as a tuple and kwargs as a dict, got "
                f"{type(args).__name__} and {type(kwargs).__name__}; write args=(y,) for one argument."
            )
        if not args and not kwargs:
            return self.arguments
        bound_args, bound_kwargs = self.arguments.tree
        arguments = Partition((tuple(args or bound_args), {**bound_kwargs, **(kwargs or {})}))
        _explain(lambda: self.source.check(arguments), "model")
        replace_fields(self, arguments=arguments)._check_value()
        return arguments

    def evaluate(self, x: Vector, arguments: Partition, data_scale: float = 1.0) -> Scalar:
        """The loss at `x` for arguments that are bound already.

        Args:
            x: `(dim,)`.
            arguments: from `bind` or `draw_batch`.
            data_scale: rows of the data per row of the batch.

        Returns:
            A scalar in JAX's default float.

        Raises:
            ValueError: if `x` is of another shape.
        """
        self._check_point(x)
        if self.fenced:
            x, arguments = fence(x, arguments)
        args, kwargs = arguments.tree
        return jnp.asarray(self.source.value(x, args, kwargs, data_scale), float)

    def draw_batch(self, rng_key: Key, arguments: Partition) -> tuple[Partition, float]:
        """One minibatch of the arguments and the factor `rows / batch_size`; all of them without one.

        Args:
            rng_key: a random key.
            arguments: from `bind`.

        Returns:
            The arguments of the batch and the data scale.
        """
        if self.minibatch is None:
            return arguments, 1.0
        scale = self.minibatch.num_rows(arguments) / self.minibatch.batch_size
        return self.minibatch.draw(rng_key, arguments), scale

    @classmethod
    def _checked(
        cls, x0: Array, arguments: Partition, source: Any, minibatch: Minibatch | None
    ) -> "Loss":
        if not isinstance(minibatch, Minibatch | None):
            raise TypeError(
                f"Loss: expected minibatch as Minibatch(batch_size), got {type(minibatch).__name__}."
            )
        loss = cls(x0, arguments, source, minibatch)
        loss._check_value()  # noqa: SLF001
        return replace_fields(loss, fenced=reads_many_numbers(_raw_value.trace(loss).jaxpr.jaxpr))

    def _check_point(self, x: Any) -> None:
        if np.shape(x) != (self.dim,):
            raise ValueError(
                f"Loss: expected a flat vector of shape ({self.dim},), got {np.shape(x)}; use jax.vmap for "
                "several."
            )

    def _check_value(self) -> None:
        if self.minibatch is not None:
            self.minibatch.num_rows(self.arguments)
            batch = jax.eval_shape(self.minibatch.draw, jax.random.key(0), self.arguments)
            _explain(lambda: self.source.check_batch(self.arguments, batch), "loss of a minibatch")
        # The shapes of a jitted function are remembered: new values of equal shape run nothing again.
        out = _explain(lambda: _raw_value.eval_shape(self), "loss")
        if not hasattr(out, "shape") or out.shape != ():
            got = f"shape {out.shape}" if hasattr(out, "shape") else type(out).__name__
            raise TypeError(
                f"Loss: expected the loss to return a scalar, got {got}; sum or average it over the "
                "data, and return nothing beside it."
            )
        if not any(jnp.issubdtype(out.dtype, kind) for kind in (jnp.floating, jnp.integer, bool)):
            raise TypeError(
                f"Loss: expected a real scalar, got {out.dtype}; take its real part, or another number."
            )

    def __repr__(self) -> str:
        """Kind, size and bound arguments, without data."""
        kind = "from_model" if isinstance(self.source, ModelSource) else "from_function"
        return (
            f"Loss.{kind}(dim={self.dim}, arguments={self.arguments}, minibatch={self.minibatch})"
        )


@jax.jit
def _raw_value(loss: Loss) -> Any:
    args, kwargs = loss.arguments.tree
    return loss.source.value(loss.x0, args, kwargs, 1.0)


def _explain(call: Callable[[], Any], what: str) -> Any:
    """Runs the user's code and says what was being tried when it raises.

    Args:
        call: runs the user's code.
        what: `"loss"` or `"model"`.

    Returns:
        What `call` returns.
    """
    try:
        return call()
    except Exception as error:
        if str(error).startswith("Loss"):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"Loss: the {what} raised {type(error).__name__} when it was run with its starting values "
            f"and arguments: {error}. Call it yourself with the same arguments to find the "
            "cause; it must run under jax.jit."
        ) from error
