# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Calls of a Python function for many draws at once, through any executor of `concurrent.futures`.

All of this runs on the host, within a callback of a compiled program, and never calls JAX: the threads that it
would wait for may be those that wait for it. Nothing is raised through a program either, where a driver listens:
what stops a run is kept for the driver, and the rest of the program gets NaN at once.
"""

import contextlib
import os
import pickle
import signal
import socket
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from numpyro.util import find_stack_level

from numpyro_regloss._core.foreign import attribute
from numpyro_regloss.losses.captured import handle

__all__ = ["WHAT", "Call", "Caller", "Watch", "as_kept", "as_reals", "check_executor"]

WHAT = "Loss.from_external"
# How often a wait for results looks for Ctrl-C, in seconds.
POLL = 0.05


class Call(NamedTuple):
    """One call of the function.

    Attributes:
        args: positional arguments, parameters first.
        kwargs: keyword arguments.
        count: draws among the parameters; zero of a call for a single draw, which has no axis of them.
    """

    args: tuple
    kwargs: dict
    count: int


class Failure(NamedTuple):
    """A call that gave no number.

    Attributes:
        text: the traceback; nothing where another call has told one.
        is_timeout: whether it took too long.
    """

    text: str
    is_timeout: bool = False

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """What an exception says, with where it was raised, in another process too."""
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        text = "".join(traceback.format_exception(type(error), error, trace)).rstrip()
        return cls(text, isinstance(error, TookTooLongError))


class TookTooLongError(TimeoutError):
    """A call took longer than it may."""


class Watch:
    """What happened to the calls of a loss while someone listened; nothing, of losses that JAX evaluates.

    Attributes:
        num_calls: draws that were evaluated.
        num_rejected: draws whose loss was NaN or -infinity, those of failed calls among them.
        num_raised: draws of calls that raised.
        num_late: draws of calls that took too long.
        first: the traceback of the first failed call, or nothing.
        stopped: what a run cannot go on after, or None.
    """

    def __init__(self, name: str = "", heard: Callable[[], bool] = lambda: False) -> None:
        self.name, self.heard = name, heard
        self.num_calls = self.num_rejected = self.num_raised = self.num_late = 0
        self.first = ""
        self.stopped: BaseException | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def running(self) -> Generator[None]:
        """Runs programs; what stopped the calls is raised in the place of what the programs made of it."""
        try:
            yield
        except Exception:
            self.check()
            raise
        self.check()

    def check(self) -> None:
        """Raises what stopped the calls.

        Raises:
            KeyboardInterrupt: if it was Ctrl-C, or any other exception.
        """
        if self.stopped is not None:
            raise self.stopped
        if self.heard():
            raise KeyboardInterrupt

    def add(self, values: np.ndarray, failures: Sequence[tuple[Failure, int]]) -> None:
        """Counts draws.

        Args:
            values: their losses, `(draw,)`.
            failures: those of calls, with their numbers of draws.
        """
        with self._lock:
            self.num_calls += values.size
            self.num_rejected += int(np.sum(np.isnan(values) | (values == -np.inf)))
            for failure, count in failures:
                self.num_late += count if failure.is_timeout else 0
                self.num_raised += 0 if failure.is_timeout else count
                self.first = self.first or failure.text

    def report(self) -> str:
        """A sentence on rejected draws with the first traceback, or nothing."""
        if not self.num_rejected:
            return ""
        rest = self.num_rejected - self.num_raised - self.num_late
        kinds = {
            "raised": self.num_raised,
            "took longer than the timeout": self.num_late,
            "returned NaN or -infinity": rest,
        }
        found = ", ".join(f"{count} {what}" for what, count in kinds.items() if count)
        first = f" The first failure:\n{self.first}" if self.first else ""
        return (
            f"{WHAT}: {self.num_rejected} of {self.num_calls} calls of {self.name} failed and were rejected "
            f"draws, of weight zero ({found}).{first}"
        )

    def warn(self, what: str) -> None:
        """The same as a warning, if there is something to say.

        Args:
            what: begins the message.
        """
        if self.num_rejected:
            warnings.warn(f"{what}: {self.report()}", stacklevel=find_stack_level())


_callers: WeakValueDictionary[Any, "Caller"] = WeakValueDictionary()


class Caller:
    """A Python function, how it is called, and who listens; compared by identity, as what compiles is.

    Attributes:
        fn: the function, or None if its values are told by hand.
        executor: runs the calls, or None for one after the other.
        batch: whether a call takes many draws.
        on_error: `"reject"` or `"raise"`.
        timeout: seconds per call, or None.
        chunk_size: draws per task of the executor; None: one, and all of them in one call with `batch`.
    """

    def __init__(
        self,
        fn: Callable[..., Any] | None,
        executor: Executor | None,
        *,
        batch: bool,
        on_error: str,
        timeout: float | None,
        chunk_size: int | None,
    ) -> None:
        self.fn, self.executor, self.batch = fn, executor, batch
        self.on_error, self.timeout, self.chunk_size = on_error, timeout, chunk_size
        self._watches: list[Watch] = []

    @classmethod
    def of(cls, fn: Callable[..., Any] | None, executor: Executor | None, **how: Any) -> "Caller":
        """The one caller of a function in this way, so that a loss that is built anew compiles nothing.

        Args:
            fn: the function, or None.
            executor: runs the calls, or None.
            **how: see the attributes.

        Returns:
            The caller.
        """
        key = (handle(fn), handle(executor), *sorted(how.items()))
        found = _callers.get(key)
        if found is None:
            found = _callers[key] = cls(fn, executor, **how)
        return found

    def __reduce__(self) -> Any:
        if self.executor is not None:
            raise TypeError(
                f"{WHAT}: a loss with an executor ({type(self.executor).__name__}) cannot be pickled. The state "
                "of a run can, without the optimizer: save it, and build the loss again where you go on."
            )
        how = (self.batch, self.on_error, self.timeout, self.chunk_size)
        return _rebuilt, (self.fn, *how)

    def __repr__(self) -> str:
        # A part of the program by which a run is known: it may go on with another executor.
        return _name(self.fn)

    def check(self, *, thorough: bool = True) -> None:
        """Nothing is remembered of what the function reads: it reads what is there when it is called."""

    @contextlib.contextmanager
    def watch(self) -> Generator[Watch]:
        """Listens to the calls of programs that run within; the innermost listener hears."""
        with _interrupts() as heard:
            watch = Watch(_name(self.fn), heard)
            self._watches.append(watch)
            try:
                yield watch
            finally:
                self._watches.remove(watch)

    def evaluate(self, calls: Sequence[Call]) -> np.ndarray:
        """The losses of all draws of some calls.

        Args:
            calls: in the order of their draws.

        Returns:
            `(draw,)`, double precision, NaN where a call failed.
        """
        watch = self._watches[-1] if self._watches else None
        sizes = [max(call.count, 1) for call in calls]
        if watch is not None and watch.stopped is not None:
            return np.full(sum(sizes), np.nan)
        try:
            outcomes = self._outcomes(calls, watch)
        except BaseException as error:
            if watch is None:
                raise
            watch.stopped = error
            return np.full(sum(sizes), np.nan)
        failed = [(o, n) for o, n in zip(outcomes, sizes, strict=True) if isinstance(o, Failure)]
        values = np.concatenate([
            np.full(n, np.nan) if isinstance(o, Failure) else np.reshape(o, n)
            for o, n in zip(outcomes, sizes, strict=True)
        ])
        if watch is not None:
            watch.add(values, failed)
        return values

    def _outcomes(self, calls: Sequence[Call], watch: Watch | None) -> list[np.ndarray | Failure]:
        if self.fn is None:
            raise RuntimeError(
                f"{WHAT}: this loss has no function to call (fn=None); evaluate its points yourself, with "
                "TwoStep.ask and TwoStep.tell, or build it with a function."
            )
        raises, heard = self.on_error == "raise", watch.heard if watch else lambda: False
        if self.executor is None:
            found = []
            for call in calls:
                if heard():
                    raise KeyboardInterrupt
                found += in_turn(self.fn, [call], self.timeout, raises)
            return found
        # Workers need this package only for what their executor does not do by itself.
        size = 1 if self.batch else self.chunk_size or 1
        tasks = [calls[start : start + size] for start in range(0, len(calls), size)]
        direct = size == 1 and self.timeout is None
        futures: list[Future] = []
        try:
            for task in tasks:
                if direct:
                    future = self._submit(self.executor, self.fn, *task[0].args, **task[0].kwargs)
                else:
                    future = self._submit(
                        self.executor, in_turn, self.fn, task, self.timeout, raises
                    )
                futures.append(future)
            self._await(futures, heard, raises=raises)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        found, is_told = [], False
        for task, future in zip(tasks, futures, strict=True):
            error = future.exception()
            if error is not None:
                found += [Failure("") if is_told else Failure.of(error)] * len(task)
                is_told = True
            elif direct:
                found.append(_checked(future.result(), task[0], raises=raises))
            else:
                found += future.result()
        return found

    def _submit(
        self, executor: Executor, fn: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Future:
        try:
            return executor.submit(fn, *args, **kwargs)
        except RuntimeError as error:
            # A pool that is broken or was shut down takes nothing more.
            raise self._lost(error) from error

    def _await(self, futures: list[Future], heard: Callable[[], bool], *, raises: bool) -> None:
        # Futures tell when they are done: to ask ten thousand of them at every turn takes longer than calls do.
        done: SimpleQueue[Future] = SimpleQueue()
        for future in futures:
            future.add_done_callback(done.put)
        left = len(futures)
        while left:
            if heard():
                raise KeyboardInterrupt
            try:
                future = done.get(timeout=POLL)
            except Empty:
                continue
            left -= 1
            error = CancelledError() if future.cancelled() else future.exception()
            if isinstance(error, BrokenExecutor | CancelledError):
                raise self._lost(error) from error
            if error is not None and (raises or not isinstance(error, Exception)):
                raise error

    def _lost(self, error: BaseException) -> RuntimeError:
        return RuntimeError(
            f"{WHAT}: the executor ({type(self.executor).__name__}) takes no more calls: {type(error).__name__}: "
            f"{error} A worker that dies breaks a pool of processes (out of memory, a crash of the simulator, "
            "os._exit), and an executor may have been shut down. No step that was done is lost: build the loss "
            "and the optimizer again with a new executor, and go on with run(..., init_state=error.result.state); "
            "`error.result` is there once a step was done."
        )


def _rebuilt(
    fn: Any,
    batch: bool,  # noqa: FBT001
    on_error: str,
    timeout: float | None,
    chunk_size: int | None,
) -> Caller:
    return Caller.of(
        fn, None, batch=batch, on_error=on_error, timeout=timeout, chunk_size=chunk_size
    )


def in_turn(
    fn: Callable[..., Any],
    calls: Sequence[Call],
    timeout: float | None,
    raises: bool,  # noqa: FBT001
) -> list[np.ndarray | Failure]:
    """Calls a function several times, on a worker.

    Args:
        fn: the function.
        calls: of it.
        timeout: seconds that each may take, or None.
        raises: whether a failed call ends all; else it becomes a `Failure`.

    Returns:
        One outcome per call.
    """
    found: list[np.ndarray | Failure] = []
    for call in calls:
        try:
            out = _within(timeout, fn, call)
        except Exception as error:
            if raises:
                raise
            found.append(Failure.of(error))
        else:
            found.append(_checked(out, call, raises=raises))
    return found


def _within(timeout: float | None, fn: Callable[..., Any], call: Call) -> Any:
    if timeout is None:
        return fn(*call.args, **call.kwargs)
    # Python cannot stop a call. In a thread of its own it does no longer keep its worker.
    done: Future = Future()

    def run() -> None:
        try:
            done.set_result(fn(*call.args, **call.kwargs))
        except BaseException as error:  # noqa: BLE001
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    wait([done], timeout)
    if not done.done():
        raise TookTooLongError(f"a call of {_name(fn)} took longer than timeout={timeout} seconds")
    return done.result()


def as_reals(found: Any) -> np.ndarray:
    """What a function or a user gave as losses, in double precision; NaN where an entry is masked or None.

    Args:
        found: a number or an array, or what NumPy makes one of.

    Returns:
        An array of its shape.

    Raises:
        TypeError: if it is nothing, text, times or complex, of which NumPy would make a number.
        ValueError: if NumPy makes no array of it.
    """
    if isinstance(found, np.ma.MaskedArray):
        found = np.ma.filled(found.astype(float), np.nan)
    if found is None or np.asarray(found).dtype.kind in "cmMSU":
        raise TypeError("not a real number")
    return np.asarray(found, float)


def as_kept(losses: np.ndarray, dtype: Any) -> np.ndarray:
    """Losses in the type in which JAX keeps them; those beyond it are infinite there.

    Args:
        losses: in double precision.
        dtype: of JAX.

    Returns:
        The same numbers, rounded.
    """
    # What infinity means to an engine holds for them too: a weight of zero, or a failure if it is negative.
    with np.errstate(over="ignore"):
        return losses.astype(dtype)


def _checked(out: Any, call: Call, *, raises: bool) -> np.ndarray | Failure:
    shape = (call.count,) if call.count else ()
    wanted = f"an array of {call.count} losses, one per draw" if call.count else "one real number"
    try:
        values = as_reals(out)
        if values.shape != shape:
            raise TypeError(f"got shape {values.shape}")
    except Exception as error:
        wrong = TypeError(f"{WHAT}: expected {wanted}, got {type(out).__name__}: {error}")
        if raises:
            raise wrong from error
        return Failure.of(wrong)
    return values


def check_executor(fn: Callable[..., Any] | None, executor: Any) -> None:
    """Refuses what is no executor, and a function that its processes cannot have.

    Args:
        fn: the function.
        executor: what the user gave.

    Raises:
        TypeError: if it is no executor, or the function cannot be sent to its processes.
        ValueError: if the processes cannot load it.
    """
    if executor is None:
        return
    if not isinstance(executor, Executor):
        has_one = callable(attribute(executor, "get_executor"))
        remedy = "pass client.get_executor()" if has_one else "pass such as ThreadPoolExecutor(8)"
        raise TypeError(
            f"{WHAT}: expected executor as a concurrent.futures.Executor, got {type(executor).__name__}; {remedy}."
        )
    if not isinstance(executor, ProcessPoolExecutor):
        return
    try:
        pickle.dumps(fn)
    except Exception as error:
        raise TypeError(
            f"{WHAT}: {_name(fn)} cannot be sent to the processes of the executor: {error}. Define it at the top "
            "level of a module (no lambda, no function within a function; functools.partial of a function is "
            "fine), or use threads, or an executor that pickles by value, such as that of loky or Dask."
        ) from error
    context = attribute(executor, "_mp_context")
    if context is not None and context.get_start_method() == "fork":
        warnings.warn(
            f"{WHAT}: the processes of the executor are forks of this one, which has JAX's threads, and may wait "
            'for them forever; use ProcessPoolExecutor(..., mp_context=multiprocessing.get_context("spawn")).',
            stacklevel=find_stack_level(),
        )
    try:
        with warnings.catch_warnings():
            # JAX's own warning of forks, after ours.
            warnings.filterwarnings("ignore", ".*fork", RuntimeWarning)
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            executor.submit(callable, fn).result()
    except Exception as error:
        raise ValueError(
            f"{WHAT}: the processes of the executor cannot load {_name(fn)} ({type(error).__name__}: {error}). "
            "They import the module that defines it: in a script, put the code that starts the run below "
            'if __name__ == "__main__":, and in a notebook, define the function in a file and import it.'
        ) from error


def _name(fn: Any) -> str:
    return attribute(fn, "__qualname__") or attribute(fn, "__name__") or type(fn).__name__


@contextlib.contextmanager
def _interrupts() -> Generator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, for other threads: the main one hears nothing while a program runs."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    here, there = socket.socketpair()
    here.setblocking(False)
    there.setblocking(False)
    before = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
    seen = bytearray()

    def heard() -> bool:
        with contextlib.suppress(BlockingIOError):
            seen.extend(here.recv(256))
        return signal.SIGINT in seen

    try:
        yield heard
    finally:
        signal.set_wakeup_fd(before)
        heard()
        if before != -1 and seen and os.name == "posix":
            # An event loop that listens waits for its turn.
            os.write(before, seen)
        here.close()
        there.close()
