# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The two-step scheme: reference → shifted density → fitted Gaussian → next reference."""

import contextlib
import os
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_regloss._core.checks import (
    check_count,
    check_differentiable,
    check_key,
    check_positive,
    check_schedule,
)
from numpyro_regloss._core.mesh import check_mesh, copied
from numpyro_regloss._core.processes import Processes, here, same_everywhere
from numpyro_regloss._core.pytree import (
    Partition,
    is_concrete,
    pytree_dataclass,
    static_field,
    strip_weak_types,
    with_context_axes,
)
from numpyro_regloss._core.types import Array, Key
from numpyro_regloss.anchor import Proximal
from numpyro_regloss.draws.base import Draws
from numpyro_regloss.gaussians.gaussian import Gaussian
from numpyro_regloss.losses.groups import check_groups
from numpyro_regloss.losses.loss import Loss
from numpyro_regloss.losses.misuse import warn_of_sum
from numpyro_regloss.losses.probe import check_gradient
from numpyro_regloss.two_step import outer_step
from numpyro_regloss.two_step.asking import as_points, check_points, checked_values
from numpyro_regloss.two_step.checkpoint import Checkpoint
from numpyro_regloss.two_step.checkpoint.fingerprint import fingerprint, settings_text
from numpyro_regloss.two_step.checkpoint.keeper import Keeper, history_of
from numpyro_regloss.two_step.checkpoint.settings import settings_of
from numpyro_regloss.two_step.checkpoint.shared import SharedKeeper
from numpyro_regloss.two_step.chunks import history_capacity, run_in_chunks
from numpyro_regloss.two_step.feed import feed_of
from numpyro_regloss.two_step.motion import Path, keeps_vectors, scalars_of
from numpyro_regloss.two_step.outer_step import TwoStepInfo, TwoStepState
from numpyro_regloss.two_step.parts import (
    check_parts,
    check_start,
    explaining,
    followers,
)
from numpyro_regloss.two_step.record import Record
from numpyro_regloss.two_step.result import (
    RejectedError,
    TwoStepResult,
    headline,
    report_interruption,
    report_trouble,
    silent_unless,
)
from numpyro_regloss.two_step.until import Arrived

__all__ = ["RejectedError", "TwoStep", "TwoStepInfo", "TwoStepResult", "TwoStepState"]


@pytree_dataclass
class TwoStep:
    r"""Minimizes a regularized loss: shift a density, fit a Gaussian, move the reference there.

    q ∝ exp(-loss / T) N(centre, tau I). With `fit.ForwardKL` the centre moves to E_q[x] and the local
    entropy F_tau = -T log E exp(-loss / T) falls, up to Monte Carlo error; with `fit.RobbinsMonro` or
    `fit.ReverseKL` it moves by a proximal step on the heat regularization E loss. In both the effective learning
    rate is tau / T.

    Scale: loss and temperature have the same units, and only loss / T matters. For data, average the loss over the
    rows and set `temperature` to 1 / rows: then tau and step sizes stay right for every batch size.

    Args:
        loss: from `Loss.from_function`, `Loss.from_model` or `Loss.from_external`.
        tau: variance of the regularizer in squared units of the (unconstrained) parameters: a positive
            number, a schedule of the step such as Optax's (built once), or one value per group of
            parameters (a pytree prefix of the parameters, a dict by site name for a model).
        shift: step 1, from `numpyro_regloss.shift`.
        fit: step 2, from `numpyro_regloss.fit`.
        anchor: step 3, from `numpyro_regloss.anchor`.
        temperature: T > 0, in the units of the loss.
        record: a `Record` for verdicts and values in the history, or None.
        mesh: devices that divide draws, particles, chains and noise among them: a `jax.sharding.Mesh` with an
            axis `"draws"`, or None for one device. The bits do not depend on how many devices that axis has.
            With a second axis, `"rows"`, data of the loss that `jax.device_put` has divided along it stay divided.

    Raises:
        TypeError: if a part is of the wrong kind.
        ValueError: if tau or temperature is not positive, or the parts do not go together.

    References:
        García Trillos, Kaplan & Sanz-Alonso (2019), "Variational Characterizations of Local Entropy and
        Heat Regularization in Deep Learning".

    Example:
        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_regloss import fit, shift
        >>> loss = Loss.from_function(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(2))
        >>> optimizer = TwoStep(loss, tau=0.5, shift=shift.Importance(1000), fit=fit.ForwardKL())
        >>> result = optimizer.run(random.key(0), 20, progress_bar=False)
        >>> bool(jnp.all(jnp.abs(result.params - 1.0) < 0.1))
        True
    """

    loss: Loss
    tau: Any
    shift: Any
    fit: Any
    anchor: Any = Proximal()  # noqa: RUF009
    temperature: Any = 1.0
    record: Any = None
    mesh: Any = static_field(default=None)

    def __post_init__(self) -> None:
        if not isinstance(self.loss, Loss):
            raise TypeError(
                f"TwoStep: expected loss as a Loss, got {type(self.loss).__name__}; wrap it with "
                "Loss.from_function(fn, params) or Loss.from_model(model, *args)."
            )
        check_parts(self.shift, self.fit, self.anchor, "TwoStep")
        if self.fit.uses_draws and not self.shift.makes_draws:
            raise ValueError(
                f"TwoStep: {type(self.fit).__name__} needs draws and {type(self.shift).__name__} makes "
                "none; use shift.Importance or shift.NUTS, or fit.RobbinsMonro."
            )
        if self.fit.needs_scores and not self.shift.hands_scores:
            raise ValueError(
                f"TwoStep: {type(self.fit).__name__} needs draws with scores and those of "
                f"{type(self.shift).__name__} have none; use shift.NUTS, HMC or AdaptiveImportance, or "
                "fit.ForwardKL."
            )
        check_differentiable(followers(self.shift, self.fit), self.loss, "TwoStep")
        self.anchor.check_fit(self.fit)
        if self.record is not None and not isinstance(self.record, Record):
            raise TypeError(
                f"TwoStep: expected record as a numpyro_regloss.Record or None, got {self.record!r}."
            )
        mesh = check_mesh(self.mesh, "TwoStep: mesh", external=self.loss.is_external)
        object.__setattr__(self, "mesh", mesh)
        object.__setattr__(
            self, "temperature", check_positive(self.temperature, "TwoStep: temperature")
        )
        object.__setattr__(self, "tau", self._checked_tau())

    def init(self, rng_key: Key, *args: Any, **kwargs: Any) -> TwoStepState:
        """The state before the first step, at the loss's start.

        Args:
            rng_key: a random key.
            *args: arguments of the loss in place of the bound ones.
            **kwargs: keyword arguments over the bound ones.

        Returns:
            The state.

        Raises:
            TypeError: if the key is not one.
            ValueError: if the loss, or the gradient where it is used, is not finite at the start; if the
                gradient is used and is zero everywhere around the start, though the loss is not constant.
        """
        rng_key = check_key(rng_key, "TwoStep")
        self.loss.check_captured()
        self.loss.check_precision("TwoStep.init")
        arguments = self.loss.bind(args, kwargs)
        if self.loss.is_told:
            return explaining(outer_step.first_state, self, rng_key, arguments)
        with self.loss.watch() as watch, watch.running():
            given = copied(self.mesh, (self, rng_key, arguments))
            start = explaining(outer_step.init_state, *given)
            state, value, gradient_ok, found = start
            value = value if not is_concrete(value) else np.asarray(value)
        if is_concrete(value):
            check_start(value, watch)
            self.loss.check_digits(state.reference, "TwoStep")
            warn_of_sum(self.loss, arguments, value, self.temperature, "TwoStep")
            if not gradient_ok:
                raise ValueError(
                    "TwoStep: expected a finite gradient at the start, got NaN or infinity; choose "
                    "another start, or a gradient-free engine such as shift.Importance."
                )
            if found is not None:
                check_gradient(jax.device_get(found), followers(self.shift, self.fit), "TwoStep")
        return state

    def step(
        self, state: TwoStepState, *args: Any, **kwargs: Any
    ) -> tuple[TwoStepState, TwoStepInfo]:
        """One step: reference → draws → fitted Gaussian → next reference. Pure.

        Args:
            state: from `init` or the last step.
            *args: arguments of the loss in place of the bound ones.
            **kwargs: keyword arguments over the bound ones.

        Returns:
            The next state and what the step did.
        """
        arguments = self.loss.bind(args, kwargs)
        given = self._placed(state, arguments, "TwoStep.step: state")
        return self.loss.listen("TwoStep.step", outer_step.step, *given)

    def ask(self, state: TwoStepState, *args: Any, **kwargs: Any) -> Any:
        """The points at which the next step needs the loss, if you evaluate it yourself. Pure.

        Use it for evaluations that take hours in a queue. The shift must evaluate one cloud, as `shift.Importance`
        does, and the fit must use its draws, as `fit.ForwardKL` does. Points and state may be written to files.

        Args:
            state: from `init` or `tell`; the same state has the same points.
            *args: arguments of the loss in place of the bound ones.
            **kwargs: keyword arguments over the bound ones.

        Returns:
            The parameters as the user wrote them, of NumPy arrays with a leading axis of points. The last one is
            the centre.

        Raises:
            TypeError: if the engines do not know their points before they have values.

        Example:
            >>> from jax import random
            >>> from numpyro_regloss import schemes, shift
            >>> loss = Loss.from_external(None, {"rate": np.zeros(2)})
            >>> optimizer = schemes.local_entropy(loss, 0.5, shift.Importance(500))
            >>> state = optimizer.init(random.key(0))
            >>> for _ in range(10):
            ...     points = optimizer.ask(state)
            ...     values = np.sum((points["rate"] - 1.0) ** 2, axis=1)
            ...     state, info = optimizer.tell(state, points, values)
            >>> bool(np.all(np.abs(state.reference.mean - 1.0) < 0.2))
            True
        """
        self._check_asking()
        arguments = self.loss.bind(args, kwargs)
        given = self._placed(state, arguments, "TwoStep.ask: state")
        return as_points(self.loss, outer_step.ask(*given), arguments)

    def tell(
        self, state: TwoStepState, points: Any, values: Any, *args: Any, **kwargs: Any
    ) -> tuple[TwoStepState, TwoStepInfo]:
        """The step that `TwoStep.step` would do, from losses at the points of `ask`. Pure.

        Args:
            state: that of `ask`.
            points: from `ask`.
            values: the loss at each point, `(point,)`; NaN where it failed, a draw of weight zero.
            *args: as of `ask`.
            **kwargs: as of `ask`.

        Returns:
            The next state and what the step did.

        Raises:
            TypeError: if the engines do not know their points before they have values.
            ValueError: if points are others than those of this state, or values not one number per point.
        """
        self._check_asking()
        arguments = self.loss.bind(args, kwargs)
        given = self._placed(state, arguments, "TwoStep.tell: state")
        x = outer_step.ask(*given)
        check_points(points, as_points(self.loss, x, arguments))
        values = checked_values(values, len(x))
        return outer_step.tell(*given, copied(self.mesh, values))

    def scan(
        self, state: TwoStepState, num_steps: int, *args: Any, **kwargs: Any
    ) -> tuple[TwoStepState, TwoStepInfo]:
        """Several steps as one compiled `lax.scan`. Pure, for use inside `jax.jit` and `jax.vmap`.

        It keeps all infos of all steps on the device. The history of `run` need not grow with the parameters.

        Args:
            state: from `init` or an earlier step.
            num_steps: number of steps; a new number is a new program.
            *args: arguments of the loss in place of the bound ones.
            **kwargs: keyword arguments over the bound ones.

        Returns:
            The last state and the history.
        """
        check_count(num_steps, "TwoStep.scan: num_steps")
        arguments = self.loss.bind(args, kwargs)
        given = self._placed(state, arguments, "TwoStep.scan: state")
        return self.loss.listen("TwoStep.scan", outer_step.scan, *given, num_steps)

    def run(
        self,
        rng_key: Key,
        num_steps: int,
        *args: Any,
        init_state: TwoStepState | None = None,
        progress_bar: bool = True,
        callback: Callable[[TwoStepState, TwoStepInfo], bool | None] | None = None,
        callback_every: int = 1,
        until: Arrived | None = None,
        history: str = "auto",
        checkpoint: Checkpoint | str | os.PathLike | None = None,
        batches: Iterable[Any] | None = None,
        **kwargs: Any,
    ) -> TwoStepResult:
        """Runs the scheme in compiled chunks, which equal one whole run bit for bit.

        Args:
            rng_key: a random key; unused with `init_state`, which has its own.
            num_steps: number of steps to do now, at most; with `checkpoint`, the total that includes steps done
                before. A new number does not recompile.
            *args: arguments of the loss in place of the bound ones.
            init_state: a state to continue from, with its own key; tau and temperature are this
                optimizer's.
            progress_bar: show steps, loss, tau and ESS or acceptance, and the last value of the regularized loss
                with its standard error, if the shift or `Record(values_every=k)` finds some.
            callback: called as `callback(state, info)` with the info of the last step; returning True stops the
                run.
            callback_every: steps from one call to the next; there is also a call after the last step. So many
                steps are dispatched to the device together; by default one at a time.
            until: an `Arrived`, to stop where the centre has arrived; `result.stopped` says whether it did.
            history: `"all"` keeps all infos of all steps. `"scalars"` keeps only their single numbers, without
                centres, Gaussians and other arrays. It has `history.motion` instead, with which a report can tell
                whether the centre arrived. `"auto"` keeps everything if that takes at most 256 MiB for
                `num_steps`, and scalars otherwise. Parts that are left out take no memory on the device or the
                host. The numbers of the run do not depend on this choice.
            checkpoint: a folder, or a `Checkpoint` with one, in which state and history are saved every 30 seconds
                and at the end. If the folder already holds this run, the run continues from there, with the same
                bits as an uninterrupted run. SIGTERM then ends the run as Ctrl-C does: it finishes the steps under
                way, saves and returns.
            batches: data that do not fit on the device: an iterable, such as a loader, of which each step takes
                one item: a tuple of positional arguments of the loss, an array or a dict of keyword arguments. If
                the loss was built with one argument, such as a dict of arrays, items of its structure are that
                argument. The next item is fetched while a step runs. The run ends with the last item. A
                `Minibatch` of the loss draws rows of the item.
            **kwargs: keyword arguments of the loss over the bound ones.

        Returns:
            Parameters at the last centre, state and history. After Ctrl-C this is the result so far; an exception
            of the loss or the callback has it as its attribute `result`.

        Raises:
            TypeError: if an argument is of the wrong kind.
            ValueError: if the start or the given state is not finite; if the folder holds something else, or a run
                that differs in some setting.
            OSError: if the folder cannot be written.
            RejectedError: if every step was rejected.
            LostProcessError: if another process of the run left, or raised an error.
        """
        check_count(num_steps, "TwoStep.run: num_steps")
        self.loss.check_precision("TwoStep.run")
        if callback is not None and not callable(callback):
            raise TypeError(
                f"TwoStep.run: expected callback(state, info), got {type(callback).__name__}."
            )
        if not isinstance(progress_bar, bool | np.bool_):
            raise TypeError(
                f"TwoStep.run: expected progress_bar as True or False, got {progress_bar!r}; bind an argument of "
                "the loss of that name in Loss.from_function or Loss.from_model."
            )
        check_count(callback_every, "TwoStep.run: callback_every")
        if until is not None and not isinstance(until, Arrived):
            raise TypeError(
                f"TwoStep.run: expected until as a numpyro_regloss.Arrived or None, got {until!r}; bind an "
                "argument of the loss of that name in Loss.from_function or Loss.from_model."
            )
        if not is_concrete((self, rng_key, args, kwargs, init_state)):
            raise TypeError(
                "TwoStep.run: expected values, got tracers; inside of jax.jit, jax.vmap and jax.grad use "
                "TwoStep.init and TwoStep.scan."
            )
        feed, args, kwargs = feed_of(self, batches, num_steps, checkpoint, args, kwargs)
        arguments = self.loss.bind(args, kwargs)
        # The first step has the loss at the start too: a long one need not be compiled for it alone.
        is_checked = init_state is not None or not self._is_checked_late
        if init_state is not None:
            _check_kind(init_state, "TwoStep.run: init_state")
            rng_key = init_state.rng_key
        rng_key = check_key(rng_key, "TwoStep")
        start = init_state or rng_key
        processes = Processes(self.mesh, arguments)
        placed, arguments = copied(self.mesh, (self, arguments))
        asked = {
            "num_steps": num_steps,
            "whether there is a callback": callback is not None,
            "callback_every": callback_every,
            "history": history,
            "until": until,
            "checkpoint (every)": checkpoint and settings_of(checkpoint).every,
        }
        processes.check_same("TwoStep.run", lambda: settings_text(self, arguments, start, asked))
        given = checkpoint, start, rng_key, arguments, history, num_steps, processes
        with self.loss.watch() as watch, self._keeper(*given) as keeper:
            saved = None if keeper is None else keeper.load(num_steps)
            if saved is not None:
                is_checked, state = True, strip_weak_types(saved.state)
            elif init_state is not None:
                self.loss.check_captured()
                state = strip_weak_types(
                    self._checked_state(here(init_state), arguments, "TwoStep.run: init_state")
                )
                if not all(np.isfinite(part).all() for part in state.reference):
                    raise ValueError(
                        "TwoStep.run: expected init_state with a finite reference, got NaN or infinity; "
                        "start anew with TwoStep.init."
                    )
            elif is_checked:
                state = self.init(rng_key, *args, **kwargs)
            else:
                self.loss.check_captured()
                state = explaining(outer_step.first_state, placed, rng_key, arguments)
            state = copied(self.mesh, state)
            self._check_schedule(int(state.step), num_steps - (0 if saved is None else saved.done))
            row = self._row(state, arguments, history, num_steps) if keeper is None else keeper.row
            vectors = row.motion is None
            capacity = feed.limit or (
                1 if callback and callback_every == 1 else history_capacity(row)
            )
            kept = 0 if self.record is None or vectors else self.record.centers_every
            path = Path(kept, None if saved is None else saved.centers) if kept else None

            def advance(state: TwoStepState, count: int) -> tuple[TwoStepState, TwoStepInfo, int]:
                before, optimizer = int(state.step), outer_step.successor(placed, state)
                with watch.running(), processes.watched():
                    data = feed.of_step(arguments)
                    state, rows, _ = outer_step.advance(
                        optimizer, state, data, np.int32(count), capacity, vectors
                    )
                    feed.advance()
                    rows = jax.tree.map(same_everywhere, rows)
                    after = int(state.step)
                if not is_checked and not before:
                    check_start(rows.loss[0], watch)
                return state, rows, after - before

            state, infos, seconds, cause = run_in_chunks(
                advance,
                state,
                num_steps,
                capacity,
                callback,
                lambda infos: headline(infos, self.fit.uses_draws),
                progress_bar=progress_bar,
                until=None if until is None else until.holds,
                patience=1 if until is None else until.patience,
                callback_every=callback_every,
                path=path,
                keeper=keeper,
                rows=None if saved is None else (saved.infos, saved.seconds),
                exhausted=lambda: feed.is_empty,
                processes=processes,
            )
            if keeper is not None:
                cause = keeper.finish(state, (infos, seconds), path, cause)
        # From here on each process is by itself, and need not be followed by the others.
        state = here(state)
        arguments = arguments if processes.alone else here(arguments)
        params = here(self.loss.source.constrain(state.reference.mean, *arguments.tree))
        stopped = "interrupted" if isinstance(cause, BaseException) else cause
        centers = None if path is None else path.until(state)
        result = TwoStepResult(params, state, infos, seconds, stopped, centers)
        with silent_unless(processes.leads):
            report_interruption(cause, result, num_steps)
            report_trouble(result, self, watch.report())
        return result

    def draw(self, rng_key: Key | None, state: TwoStepState, *args: Any, **kwargs: Any) -> Draws:
        """Draws from the shifted density at the state's reference.

        Args:
            rng_key: a random key; None for the draws of the step that a run does next from this state.
            state: from `init` or a run.
            *args: arguments of the loss in place of the bound ones.
            **kwargs: keyword arguments over the bound ones.

        Returns:
            The shift's draws.
        """
        if rng_key is not None:
            rng_key = check_key(rng_key, "TwoStep.draw")
        arguments = self.loss.bind(args, kwargs)
        optimizer, *given = self._placed(state, arguments, "TwoStep.draw: state")
        if rng_key is None:
            return self.loss.listen("TwoStep.draw", outer_step.next_draws, optimizer, *given)
        rng_key = copied(self.mesh, rng_key)
        return self.loss.listen("TwoStep.draw", outer_step.draw, optimizer, rng_key, *given)

    def get_params(self, state: TwoStepState, *args: Any, **kwargs: Any) -> Any:
        """The parameters at the state's centre, as the user wrote them (sites constrained).

        Args:
            state: from `init` or a run.
            *args: arguments of the loss in place of the bound ones; deterministic sites may use them.
            **kwargs: keyword arguments over the bound ones.

        Returns:
            The user's pytree, or a dict of sites.
        """
        _check_kind(state, "TwoStep.get_params: state")
        # Data stay where they are, and a state may be on a mesh.
        return self.loss.constrain(here(state.reference.mean), args, kwargs)

    def _check_asking(self) -> None:
        if self.fit.uses_gradient or not self.fit.uses_draws:
            raise TypeError(
                f"TwoStep.ask: expected a fit that evaluates no loss, such as fit.ForwardKL, got "
                f"{type(self.fit).__name__}, which evaluates the loss at further points; call the function by "
                "Loss.from_external instead."
            )
        if self.record is not None:
            raise TypeError(
                "TwoStep.ask: expected no record, which evaluates the loss at more points; use record=None."
            )

    def _row(self, state: Any, arguments: Partition, history: str, num_steps: int) -> TwoStepInfo:
        row = explaining(outer_step.row_of_history, self, state, arguments)
        if keeps_vectors(history, row, num_steps):
            return row
        return jax.eval_shape(scalars_of, row, state.reference)

    @contextlib.contextmanager
    def _keeper(
        self,
        checkpoint: Any,
        start: Any,
        rng_key: Key,
        arguments: Partition,
        history: str,
        num_steps: int,
        processes: Processes,
    ) -> Generator[Keeper | SharedKeeper | None, None, None]:
        if checkpoint is None:
            yield None
            return
        settings = settings_of(checkpoint)
        if history == "auto":
            # That of the run that is gone on with, however many steps are asked for now.
            known = processes.led(lambda: (history_of(settings) or "").encode())
            history = known.decode() or history
        state = explaining(outer_step.first_state.eval_shape, self, rng_key, arguments)
        row = self._row(state, arguments, history, num_steps)
        print_ = fingerprint(self, arguments, start, state, row)
        make = partial(Keeper, settings, print_, state, row)
        shared = partial(SharedKeeper, processes, make, settings, state, row)
        with (make if processes.alone else shared)() as keeper:
            yield keeper

    def _checked_tau(self) -> Any:
        what = "TwoStep: tau (a variance, in squared units of the parameters)"
        if callable(self.tau):
            check_schedule(self.tau, 0, what, ((), (self.loss.dim,)))
            return self.tau
        return check_groups(self.tau, self.loss, what)

    def tau_at(self, step: Array) -> Array:
        """Tau at a step, scalar or `(dim,)`."""
        tau = self.tau(step) if callable(self.tau) else self.tau
        return jnp.asarray(tau, self.loss.x0.dtype)

    @property
    def _is_checked_late(self) -> bool:
        # A simulation may take hours, and then goes along with those of the first cloud.
        alone = self.loss.is_external
        whole = self.loss.minibatch is None
        return (self.loss.is_long and whole and not outer_step.follows_gradient(self)) or alone

    def _check_schedule(self, step: int, num_steps: int) -> None:
        if callable(self.tau):
            for t in (step, step + num_steps - 1):
                check_schedule(self.tau, t, "TwoStep: tau", ((), (self.loss.dim,)))

    def _checked_state(self, state: Any, arguments: Partition, what: str) -> TwoStepState:
        _check_kind(state, what)
        self.loss.check_precision(what.partition(":")[0])
        if np.shape(state.reference.mean) != (self.loss.dim,):
            raise ValueError(
                f"{what}: expected that of a loss with {self.loss.dim} parameters, got shape "
                f"{np.shape(state.reference.mean)}; it belongs to another loss."
            )
        dtype, _ = _type_of(state.reference.mean)
        if dtype != self.loss.x0.dtype and jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{what}: expected a state in JAX's default float, {self.loss.x0.dtype}, got one in {dtype}: "
                "x64 was switched (jax_enable_x64) after it was made. Switch x64 back, or start anew with "
                "TwoStep.init."
            )
        expected = outer_step.first_state.eval_shape(self, state.rng_key, arguments)
        types, found = (jax.tree.map(_type_of, tree) for tree in (expected, state))
        if types != found:
            raise ValueError(
                f"{what}: expected {types}, got {found}; it comes from other engines or other settings "
                "of them: start anew with TwoStep.init."
            )
        return with_context_axes(state)

    def _placed(
        self, state: Any, arguments: Partition, what: str
    ) -> tuple["TwoStep", TwoStepState, Partition]:
        # All together: JAX refuses arrays that are bound to one device beside those of a mesh.
        state = self._checked_state(state, arguments, what)
        return copied(self.mesh, (outer_step.successor(self, state), state, arguments))


def _check_kind(state: Any, what: str) -> None:
    if not isinstance(state, TwoStepState) or not isinstance(state.reference, Gaussian):
        raise TypeError(
            f"{what}: expected a TwoStepState with a Gaussian reference, got {type(state).__name__}; pass "
            "the state of an earlier run, or that of TwoStep.init."
        )


def _type_of(leaf: Any) -> tuple[Any, tuple[int, ...]]:
    # NumPy's float64 becomes a float32 on the way, which only `typeof` knows.
    known = leaf if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else jax.typeof(leaf)
    return known.dtype, known.shape
