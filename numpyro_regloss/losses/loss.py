# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Losses: functions of a pytree and NumPyro models, seen by the engines as one flat vector.

Only this module and the two sources below it know how parameters are stored.
"""

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_regloss._core.checks import (
    check_flag,
    check_key,
    check_own_names,
)
from numpyro_regloss._core.pytree import (
    Partition,
    is_concrete,
    pytree_dataclass,
    replace_fields,
    static_field,
    with_context_axes,
)
from numpyro_regloss._core.types import Array, Key, Scalar, Vector
from numpyro_regloss.gaussians.gaussian import AnyGaussian
from numpyro_regloss.losses.arguments import Arguments, explain
from numpyro_regloss.losses.caller import Watch
from numpyro_regloss.losses.compiled import aux_of, factorizes, raw_value, shape_of
from numpyro_regloss.losses.external import ExternalSource, external_source
from numpyro_regloss.losses.fence import fence, reads_many_numbers
from numpyro_regloss.losses.function import (
    FunctionSource,
    Shape,
    flatten_module,
    flatten_params,
)
from numpyro_regloss.losses.long_losses import is_long
from numpyro_regloss.losses.minibatch import Minibatch
from numpyro_regloss.losses.misuse import warn_of_misuse
from numpyro_regloss.losses.noise import bind_keys, renew_keys
from numpyro_regloss.losses.numpyro_model import DENSITIES, ModelSource, trace_model
from numpyro_regloss.losses.one_at_a_time import one_at_a_time
from numpyro_regloss.losses.output import (
    batch_of,
    check_output,
    warn_of_equal_draws,
    warn_of_few_digits,
)
from numpyro_regloss.losses.recalibrate import recalibrated
from numpyro_regloss.losses.rows import check_rows

__all__ = ["Loss"]

T = TypeVar("T")


@pytree_dataclass
class Loss:
    """A loss of a flat unconstrained vector, with the data bound to it.

    Build one with `Loss.from_function`, `Loss.from_module`, `Loss.from_model` or `Loss.from_external`. Arrays and
    floats among the bound arguments are traced, so new values of equal shape never recompile; integers, booleans,
    strings, None and functions are static, and so are arrays whose values the function needs when it is traced
    (`np.unique(group)`): the loss prints them as constants. Two losses of the same function and the same
    structure of parameters are the same program.

    Arrays that the function reads besides its arguments (from an object, a closure or a global) keep their values
    from when the loss was built. New arrays need a new loss, which compiles nothing. A loss is refused if such
    data have changed since.

    Attributes:
        x0: the start, `(dim,)`, flat and unconstrained, in JAX's default float.
        arguments: the bound `(args, kwargs)`.
        source: how the flat vector becomes the user's parameters and the loss.
        minibatch: which arguments are data, or None for full batches.
        fenced: whether the loss reads its arguments one number at a time, so that its programs compile faster.
        is_long: whether the loss has so many operations that a program should contain it only once.
        rng_names: the keyword arguments that hold random keys, fresh ones wherever a batch would be.
    """

    x0: Array
    arguments: Partition
    source: FunctionSource | ModelSource
    minibatch: Minibatch | None = static_field(default=None)
    fenced: bool = static_field(default=False)
    is_long: bool = static_field(default=False)
    rng_names: tuple[str, ...] = static_field(default=())

    @classmethod
    def from_function(
        cls,
        fn: Callable[..., Any],
        params: Any,
        *args: Any,
        minibatch: Minibatch | None = None,
        has_aux: bool = False,
        rng_argname: str | None = None,
        **kwargs: Any,
    ) -> "Loss":
        """A loss `fn(params, *args, **kwargs)` that returns a scalar.

        Args:
            fn: the loss. It need not be differentiable for gradient-free engines, and may return
                integers.
            params: starting values, any pytree of floating-point arrays and floats. In a module (of equinox, or
                any pytree that can be called) only arrays are trained, as equinox has it: Python numbers among its
                fields, such as a rate of 0.1, do not change. For modules of Flax NNX, and for anything with batch
                statistics, use `Loss.from_module`.
            *args: data and settings, bound as defaults.
            minibatch: which arguments are data to be drawn in batches.
            has_aux: whether `fn` returns a pair (loss, aux), as of `jax.value_and_grad`; `Loss.aux` evaluates
                the second one.
            rng_argname: the keyword argument of `fn` that is a random key, for dropout and other noise: a fresh
                one in every inner step of SGLD and `fit.RobbinsMonro`, for a whole outer step of engines that keep
                a batch. Elsewhere, in `loss.value` and `values`, it is the bound one: `random.key(0)` if none is
                given by that name.
            **kwargs: the same as `args`, by name.

        Returns:
            The loss.

        Raises:
            TypeError: if `fn` cannot be called, does not fit its arguments, or returns something other
                than a real scalar; if parameters are not floating-point, or have a framework's state among them.
            ValueError: if parameters are missing or not finite, or `fn` raises.

        Example:
            >>> loss = Loss.from_function(lambda p, y: jnp.sum((p["mean"] - y) ** 2),
            ...                           {"mean": 1.0}, jnp.array([0.0, 1.0]))
            >>> loss.dim, float(loss.value(loss.x0))
            (1, 1.0)
        """
        what = "Loss.from_function"
        own = {"minibatch": minibatch, "has_aux": has_aux or None, "rng_argname": rng_argname}
        _check_function(fn, own, 1 + len(args), what)
        x0, layout, sites = flatten_params(params)
        shape = Shape(layout, sites, check_flag(has_aux, f"{what}: has_aux"))
        return cls._of_function(fn, x0, shape, (), minibatch, rng_argname, args, kwargs, what)

    @classmethod
    def from_module(
        cls,
        fn: Callable[..., Any],
        module: Any,
        *args: Any,
        minibatch: Minibatch | None = None,
        wrt: Any = None,
        has_aux: bool = False,
        rng_argname: str | None = None,
        **kwargs: Any,
    ) -> "Loss":
        """A loss `fn(module, *args, **kwargs)` of a network of Flax NNX, Equinox or Flax Linen.

        The parameters are the arrays that the framework trains. Everything else (batch statistics, counters, keys,
        settings) is held fixed. If `fn` changes it, as batch norm does in training mode, the changes last for that
        call only. A run returns the module with new parameters; `Loss.recalibrate` computes its running averages.

        Args:
            fn: the loss, written as for the framework, in training mode.
            module: of NNX, whose `nnx.Param` are trained, and whose own streams of random numbers are seeded anew
                wherever `rng_argname` says; of Equinox, whose inexact arrays are trained, or a pair (module,
                state) of `eqx.nn.make_with_state`, for which `fn(module, state, *args)` is called; or the
                variables of Linen, a dict whose collection `"params"` is trained.
            *args: data and settings, bound as defaults.
            minibatch: which arguments are data to be drawn in batches.
            wrt: selects other arrays to train: a filter of NNX, a filter of `eqx.partition`, or names of
                collections.
            has_aux: see `Loss.from_function`. What Equinox and Linen return as the new state is found in it.
            rng_argname: see `Loss.from_function`.
            **kwargs: the same as `args`, by name.

        Returns:
            The loss.

        Raises:
            TypeError: if `module` is none of these, or as of `Loss.from_function`.
            ValueError: as of `Loss.from_function`.

        Example:
            >>> from flax import nnx
            >>> net = nnx.Sequential(nnx.Linear(2, 8, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(1)))
            >>> loss = Loss.from_module(lambda net, x: jnp.mean(net(x) ** 2), net, jnp.eye(2))
            >>> loss.dim, type(loss.constrain(loss.x0)).__name__
            (40, 'Sequential')
        """
        what = "Loss.from_module"
        x0, layout, sites, held = flatten_module(module, wrt, what)
        own = {"minibatch": minibatch, "wrt": wrt, "has_aux": has_aux or None}
        own["rng_argname"] = rng_argname
        _check_function(fn, own, layout.num_first + len(args), what)
        shape = Shape(layout, sites, check_flag(has_aux, f"{what}: has_aux"))
        return cls._of_function(fn, x0, shape, held, minibatch, rng_argname, args, kwargs, what)

    @classmethod
    def _of_function(
        cls,
        fn: Any,
        x0: Array,
        shape: Shape,
        held: tuple[Any, ...],
        minibatch: Minibatch | None,
        rng_argname: str | None,
        args: tuple,
        kwargs: dict,
        what: str,
    ) -> "Loss":
        has_streams = shape.layout.has_streams
        names, kwargs = bind_keys(rng_argname, kwargs, what, has_streams=has_streams)
        trace = functools.partial(FunctionSource.trace, fn, shape, x0, held)
        arguments, source = Arguments(fn, shape.layout.num_first).bind(
            args, kwargs, trace, _checked(minibatch), "loss"
        )
        return cls._checked(x0, arguments, source, minibatch, names)

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
                `"likelihood"`: observed sites only, and factors of the same data (a factor that depends
                on no argument is a prior, and so are those of NumPyro's reparametrizers).
            minibatch: which arguments are data. Terms that exist once per row then count `rows / batch_size`
                times, so that the loss of a batch estimates the full loss without bias. Sites that do not depend
                on the rows count once. All others are refused: sums over the rows in one term, priors that read
                the data, data that the model standardizes.
            rng_key: draws the start uniformly in (-2, 2), as NumPyro does. Default: zero in
                unconstrained coordinates.
            **kwargs: the model's keyword arguments.

        Returns:
            The loss. Its parameters are the latent sites, constrained, by name, and the model's
            deterministic sites, as `MCMC.get_samples` returns them.

        Raises:
            TypeError: if `model` cannot be called or does not fit its arguments, or the key is not one.
            ValueError: if `density` is unknown; if the model has no latent sites, discrete ones,
                `param` or `mutable` sites or subsampled plates; if a site could be data or a prior.

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
        own = {"density": None if density == "joint" else density, "minibatch": minibatch}
        check_own_names(model, {**own, "rng_key": rng_key}, len(args), "Loss.from_model")
        if density not in DENSITIES:
            raise ValueError(f"Loss.from_model: expected density in {DENSITIES}, got {density!r}.")
        trace = functools.partial(trace_model, model)
        arguments, (user, ((sites, _), *_)) = Arguments(model, 0).bind(
            args, kwargs, trace, _checked(minibatch), "model"
        )
        source = ModelSource(user, density, sites)
        split = batch_of(minibatch, arguments)
        source = explain(lambda: source.with_data(arguments, *split), "loss of a minibatch")
        x0 = jnp.zeros(source.dim, float)
        if rng_key is not None:
            rng_key = check_key(rng_key, "Loss.from_model: rng_key")
            x0 = jax.random.uniform(rng_key, x0.shape, x0.dtype, -2.0, 2.0)
        loss = cls._checked(x0, arguments, source, minibatch)
        if minibatch is not None and is_concrete(arguments):
            explain(lambda: check_rows(source, arguments, split[1], minibatch.batch_size), "model")
        return loss

    @classmethod
    def from_external(
        cls,
        fn: Callable[..., Any] | None,
        params: Any,
        *args: Any,
        executor: Executor | None = None,
        batch: bool = False,
        on_error: str = "reject",
        timeout: float | None = None,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> "Loss":
        """A loss that JAX cannot trace: a simulator, SciPy, a subprocess, a model of another framework.

        `fn(params, *args, **kwargs)` gets the user's own pytree of NumPy arrays and returns a number. All draws of
        a step are passed on at once, and their calls run in parallel in an executor of `concurrent.futures`:
        threads, processes, Dask's `client.get_executor()`, `mpi4py.futures`. The numbers do not depend on the
        executor. `fn` must be a function of its arguments alone (a simulator with noise takes the seed from one of
        them), and in threads of this process must not call JAX, whose own threads may be waiting for it.

        Nothing is called before a run. There are no gradients: engines that follow them are refused.

        Args:
            fn: the loss; None where `TwoStep.ask` and `TwoStep.tell` take its place.
            params: starting values, any pytree of floating-point arrays and floats; the function gets floats for
                floats, and arrays of the same types (with the precision of JAX's default float).
            *args: data and settings, bound as defaults; they are sent with every call. The function should read
                large data that do not change by itself.
            executor: runs the calls; None for one after the other. Processes need a function of a module.
            batch: whether `fn` takes many draws, on a leading axis of the leaves, and returns their losses,
                `(draw,)`.
            on_error: `"reject"`: a call that raises, takes too long or returns NaN is a draw of weight zero, and a
                run goes on, with one warning at its end that counts them and has the first traceback; `"raise"`:
                the exception ends the run, with the result so far as its attribute `result`.
            timeout: seconds that a call may take, on its worker. Python cannot stop a call: it goes on in the
                background, so that a subprocess should have a time limit of its own.
            chunk_size: draws per task of the executor; default: one, or with `batch` all of a cloud in one call.
            **kwargs: the same as `args`, by name.

        Returns:
            The loss.

        Raises:
            TypeError: if `fn` does not take its arguments, parameters are not floating-point, a setting is of the
                wrong kind, or the function cannot be sent to the processes of the executor.
            ValueError: if parameters are missing or not finite, a setting is out of range, or the processes
                cannot load the function.

        Example:
            >>> from concurrent.futures import ThreadPoolExecutor
            >>> def simulate(params):
            ...     return float(np.sum((params["rate"] - np.array([1.0, 2.0])) ** 2))
            >>> loss = Loss.from_external(simulate, {"rate": np.zeros(2)}, executor=ThreadPoolExecutor(4))
            >>> float(loss.value(loss.x0))
            5.0
        """
        settings = {
            "executor": executor,
            "batch": batch,
            "on_error": on_error,
            "timeout": timeout,
            "chunk_size": chunk_size,
        }
        x0, source = external_source(fn, params, args, kwargs, settings)
        arguments = Arguments(fn, 1).split(args, kwargs)  # ty: ignore[invalid-argument-type]
        return cls(x0, arguments, source)

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
    def is_random(self) -> bool:
        """Whether engines draw rows of data or a key for noise anew for this loss."""
        return self.minibatch is not None or bool(self.rng_names)

    @property
    def returns_integers(self) -> bool:
        """Whether the loss has no gradient because it returns integers or booleans."""
        if self.is_external:
            return False
        out = shape_of(self.source, self.x0, self.arguments)
        return not jnp.issubdtype(out.dtype, jnp.floating)

    @property
    def is_external(self) -> bool:
        """Whether the loss is a Python function that JAX cannot trace, from `Loss.from_external`."""
        return self.source.is_external

    @property
    def is_told(self) -> bool:
        """Whether there is no function, so that values come only from `TwoStep.tell`."""
        return self.is_external and self.source.user.fn is None

    @property
    def lacks_gradient(self) -> str:
        """Why no engine may follow gradients of the loss, for an error message; or nothing."""
        if self.is_external:
            return "an external loss (Loss.from_external) has none, since JAX cannot trace it"
        return "a loss that returns integers has none" if self.returns_integers else ""

    def watch(self) -> AbstractContextManager[Watch]:
        """Watches the calls of an external loss while programs run."""
        return self.source.watch()

    @property
    def walled(self) -> "Loss":
        """The same loss, but infinite where an external loss rejects a draw, since samplers may not use NaN."""
        if not isinstance(self.source, ExternalSource):
            return self
        return replace_fields(self, source=replace_fields(self.source, walls=True))

    def listen(self, what: str, call: Callable[..., T], *args: Any) -> T:
        """Runs programs, and reports the calls of an external loss, if it is one.

        Args:
            what: begins the warning of rejected draws.
            call: `(*args)` -> pytree of arrays.
            *args: of the call; with tracers among them nothing runs yet.

        Returns:
            What the call returns.
        """
        if not self.is_external or not is_concrete((self, args)):
            return call(*args)
        with self.watch() as watch:
            with watch.running():
                out = jax.block_until_ready(call(*args))
            watch.warn(what)
        return out

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

    def aux(self, x: Vector, args: tuple | None = None, kwargs: dict | None = None) -> Any:
        """The second value that the function returns, with `has_aux=True`; no run evaluates it.

        Args:
            x: `(dim,)`, flat and unconstrained.
            args: positional arguments in place of the bound ones.
            kwargs: keyword arguments over the bound ones.

        Returns:
            Arrays in the user's structure.

        Raises:
            TypeError: if the loss was built without `has_aux`.
        """
        self._check_point(x)
        if not isinstance(self.source, FunctionSource) or not self.source.has_aux:
            raise TypeError(
                "Loss.aux: expected a loss whose function returns (loss, aux), got another one; build it with "
                "has_aux=True in Loss.from_function or Loss.from_module."
            )
        return aux_of(self.source, with_context_axes(x), self.bind(args, kwargs))

    def recalibrate(self, params: Any, batches: Iterable[Any] | None = None) -> Any:
        """The module with running averages of its own parameters, for batch norm in evaluation mode.

        Running averages that a run could keep would belong to other parameters. Here `fn` is called in training
        mode on one batch after the other, and the momentum is removed, so that each batch counts equally.

        Args:
            params: the module, such as `result.params`.
            batches: arguments of the loss for each batch, in the forms that `TwoStep.run` takes. Default: the
                bound data, in pieces of the minibatch if there is one.

        Returns:
            A module with the same parameters. The framework updates state that is not a running average.

        Raises:
            TypeError: if the loss is not from `Loss.from_module`.
            ValueError: if there is no batch, or the new state is missing: with Equinox and Linen, `fn` must return
                it beside the loss (`has_aux=True`); with NNX, `fn` changes the module itself.
        """
        if not isinstance(self.source, FunctionSource) or self.is_external:
            raise TypeError(
                "Loss.recalibrate: expected a loss from Loss.from_module, got another one; build it from the "
                "module."
            )
        return recalibrated(self, params, batches)

    def constrain(self, x: Vector, args: tuple | None = None, kwargs: dict | None = None) -> Any:
        """The parameters as the user wrote them: their pytree, or their sites by name."""
        self._check_point(x)
        return self.source.constrain(with_context_axes(x), *self.bind(args, kwargs).tree)

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
            ValueError: if names, structure or shapes differ from those of the loss's parameters.
        """
        return self.source.unconstrain(with_context_axes(params), *self.bind(args, kwargs).tree)

    def named_sites(self, x: Array, arguments: Partition) -> dict[str, Array]:
        """The parameters as a flat dictionary, for NumPyro traces and labels."""
        return self.source.named(x, *arguments.tree)

    def bind(self, args: tuple | None = None, kwargs: dict | None = None) -> Partition:
        """The arguments to use: given positional arguments replace the bound ones, and keywords are added to them.

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
        self.source.user.check(thorough=False)
        if not args and not kwargs:
            return with_context_axes(self.arguments, divided=True)
        bound_args, bound_kwargs = self.arguments.tree
        split = Arguments(self.source.user.fn, self.source.num_first)
        given = tuple(args or bound_args), {**bound_kwargs, **(kwargs or {})}
        constants = self.arguments.constants
        arguments, _ = split.bind(*given, self.source.check, None, "model", constants)
        check_output(self.source, self.x0, arguments, self.minibatch)
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
            ValueError: if `x` is of another shape, or x64 was switched after the loss was built.
        """
        self.check_precision("Loss")
        self._check_point(x)
        x, arguments = with_context_axes(x), with_context_axes(arguments, divided=True)
        if self.fenced:
            x, arguments = fence(x, arguments)
        leaves, structure = jax.tree.flatten((self.source, x, arguments))

        def value(leaves: list[Array]) -> Scalar:
            source, x, arguments = jax.tree.unflatten(structure, leaves)
            if self.is_long and data_scale == 1.0 and not is_concrete(leaves):
                # Its trace is remembered.
                with source.own_settings():
                    return jnp.asarray(raw_value(source, x, arguments), float)
            args, kwargs = arguments.tree
            return jnp.asarray(source.value(x, args, kwargs, data_scale), float)

        alone = self.is_evaluated_alone(arguments)
        return one_at_a_time(value, leaves) if alone else value(leaves)

    def is_evaluated_alone(self, arguments: Partition, num_calls: int = 1) -> bool:
        """Whether the loss is evaluated one draw at a time, since it factorizes matrices.

        Args:
            arguments: from `bind`.
            num_calls: how many factorizations it takes.

        Returns:
            Whether it is.
        """
        leaves, structure = jax.tree.flatten((self.source, self.x0, arguments))
        shapes = tuple(jax.ShapeDtypeStruct(jnp.shape(a), a.dtype) for a in leaves)
        return factorizes(structure, shapes, num_calls)

    def draw_batch(self, rng_key: Key, arguments: Partition) -> tuple[Partition, float]:
        """One minibatch of the arguments with fresh noise, and the factor `rows / batch_size`.

        Args:
            rng_key: a random key.
            arguments: from `bind`.

        Returns:
            The arguments of the batch and the data scale. Without a minibatch: all arguments, and one.
        """
        scale = 1.0
        noisy = renew_keys(self.rng_names, rng_key, arguments)
        if self.minibatch is not None:
            scale = self.minibatch.num_rows(noisy) / self.minibatch.batch_size
            noisy = self.minibatch.draw(rng_key, with_context_axes(noisy, divided=True))
        return noisy, scale

    def check_captured(self) -> None:
        """Refuses a loss that was built with data which the function no longer reads.

        Raises:
            ValueError: if they have changed since the loss was built.
        """
        self.source.user.check()

    def check_precision(self, what: str) -> None:
        """Refuses a loss that was built before x64 was switched on or off.

        Args:
            what: begins the error message.

        Raises:
            ValueError: if its start has another float type than JAX's default.
        """
        built, now = self.x0.dtype, jnp.result_type(float)
        if built != now:
            raise ValueError(
                f"{what}: expected a Loss in JAX's default float, {now}, got one that was built in {built}: "
                "x64 was switched (jax_enable_x64) after that. Build the Loss and the optimizer again, or switch "
                "x64 before."
            )

    def check_digits(self, reference: AnyGaussian, what: str) -> None:
        """Warns where parameters have so few digits that draws around them are the same to the loss.

        Args:
            reference: the Gaussian of the draws, concrete or not; nothing is said of one that is traced.
            what: begins the warning.
        """
        warn_of_equal_draws(self.source, reference, what)

    @classmethod
    def _checked(
        cls,
        x0: Array,
        arguments: Partition,
        source: Any,
        minibatch: Minibatch | None,
        rng_names: tuple[str, ...] = (),
    ) -> "Loss":
        loss = cls(x0, arguments, source, minibatch, rng_names=rng_names)
        check_output(source, x0, arguments, minibatch)
        warn_of_few_digits(shape_of(source, x0, arguments).dtype)
        with source.own_settings():
            jaxpr = raw_value.trace(source, x0, arguments).jaxpr.jaxpr
        if source.density is None:
            warn_of_misuse(jaxpr, source, x0, arguments)
        return replace_fields(loss, fenced=reads_many_numbers(jaxpr), is_long=is_long(jaxpr))

    def _check_point(self, x: Any) -> None:
        if np.shape(x) != (self.dim,):
            raise ValueError(
                f"Loss: expected a flat vector of shape ({self.dim},), got {np.shape(x)}; use jax.vmap for "
                "several."
            )

    def __repr__(self) -> str:
        """Kind, size, bound arguments without data, and what is no parameter among the fields of modules."""
        kind = "from_model" if isinstance(self.source, ModelSource) else "from_function"
        kind = "from_external" if self.is_external else kind
        kind = "from_module" if self.source.is_module else kind
        names = self.source.fixed_names
        fixed = f", fixed={names}" if names else ""
        return (
            f"Loss.{kind}(dim={self.dim}, arguments={self.arguments}, minibatch={self.minibatch}"
            f"{fixed})"
        )


def _check_function(fn: Any, own: dict[str, Any], num_args: int, what: str) -> None:
    if not callable(fn):
        raise TypeError(f"{what}: expected a function of (params, *args), got {type(fn).__name__}.")
    check_own_names(fn, own, num_args, what)


def _checked(minibatch: Any) -> Minibatch | None:
    if not isinstance(minibatch, Minibatch | None):
        raise TypeError(
            f"Loss: expected minibatch as Minibatch(batch_size), got {type(minibatch).__name__}."
        )
    return minibatch
