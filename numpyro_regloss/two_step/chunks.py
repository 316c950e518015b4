# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The one mechanism for progress, callbacks, early stopping and Ctrl-C: chunks of compiled steps."""

import contextlib
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from numpyro_regloss._core.processes import LostProcessError, Processes, here
from numpyro_regloss.two_step.checkpoint.keeper import Keeper
from numpyro_regloss.two_step.checkpoint.shared import SharedKeeper
from numpyro_regloss.two_step.checkpoint.signals import Noted
from numpyro_regloss.two_step.motion import Path

__all__ = ["history_capacity", "run_in_chunks"]

# A chunk runs about this long, so that the bar moves and Ctrl-C answers, at a negligible cost; in long runs this
# share of the time so far.
SECONDS_PER_CHUNK, MOST_SECONDS, SHARE = 0.25, 10.0, 0.1
# Room for the history of one chunk on the device: at most so many bytes and so many steps.
CHUNK_BYTES = 2**23
CHUNK_STEPS = 512
# Why several processes end a run together; of several causes the last one.
CAUSES = (None, "exhausted", "arrived", "callback", "terminated", "interrupted", "failed")


def history_capacity(row: Any) -> int:
    """How many steps a chunk may have.

    Args:
        row: shapes and types of one step's info.

    Returns:
        The largest number of steps per chunk; it does not depend on how many steps are run.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(row))
    return max(1, min(CHUNK_STEPS, CHUNK_BYTES // max(size, 1)))


def run_in_chunks(
    advance: Callable[[Any, int], tuple[Any, Any, int]],
    state: Any,
    num_steps: int,
    capacity: int,
    callback: Callable[[Any, Any], bool | None] | None,
    headline: Callable[[Any], dict[str, str]],
    *,
    progress_bar: bool,
    until: Callable[[Any, int], bool] | None,
    patience: int,
    callback_every: int = 1,
    path: Path | None = None,
    keeper: Keeper | SharedKeeper | None = None,
    rows: Any = None,
    exhausted: Callable[[], bool] = lambda: False,
    processes: Processes,
) -> tuple[Any, Any, np.ndarray, BaseException | str | None]:
    """Advances a state chunk by chunk and collects the history on the host.

    Args:
        advance: `(state, count)` -> state after up to `count` steps, buffers whose first rows are the infos of
            those steps, and how many there are.
        state: where to start.
        num_steps: steps to do.
        capacity: steps per chunk at most.
        callback: called after every `callback_every` steps, and after the last one, with the state and the info of
            the step before; true stops.
        headline: what the bar shows of the infos of a chunk. A name that a later chunk lacks keeps its text.
        progress_bar: whether there is a bar.
        until: called after every `patience` steps with their infos and the number of such calls; true stops.
        patience: see there.
        callback_every: see there.
        path: keeps centres at its own interval.
        keeper: saves the run, and knows of its end.
        rows: of a run that is gone on with, its infos and seconds so far; they count as steps of this one.
        exhausted: whether there are no data for a further step.
        processes: that run it together, each of which gets the same.

    Returns:
        The last state, the infos stacked as NumPy arrays, the wall seconds of each step (of its chunk over the
        steps in it; compilation counts to the first), and why it stopped before its time: `"arrived"`,
        `"callback"`, `"terminated"`, `"exhausted"`, what was raised on the way (Ctrl-C or an exception of
        the loss or the callback), or None.

    Raises:
        KeyboardInterrupt: if it came before the first chunk was done; as does any other exception.
    """
    chunk, past, cause = 1, (state, rows, 0 if rows is None else len(rows[1])), None
    # Whether the other processes wait to hear of this one: while a step runs they cannot.
    heard = False
    shown: dict[str, str] = {}
    begun = time.perf_counter()
    if path is not None and not path.kept:
        path.add(state)

    def stops(rows: Any, done: int) -> bool:
        looks, rest = divmod(done, patience)
        if until is None or rest or not done:
            return False
        return until(jax.tree.map(lambda a: a[done - patience : done], rows[0]), looks)

    shows = progress_bar and processes.leads
    # Of several processes Ctrl-C, too, is what they agree on.
    interrupt = Noted(signal.SIGINT, once=True)
    with (
        tqdm(total=num_steps, initial=past[2], disable=not shows, desc="two-step") as bar,
        contextlib.nullcontext() if processes.alone else interrupt,
    ):
        try:
            # A run that had stopped by itself does so again.
            cause = "arrived" if stops(*past[1:]) else None
            while past[2] < num_steps and cause is None:
                before, rows, done = past
                count = min(chunk, num_steps - done)
                # Where a run stops, and what is seen of it, must not depend on how it was chunked.
                if until is not None:
                    count = min(count, patience - done % patience)
                if callback is not None:
                    count = min(count, callback_every - done % callback_every)
                if keeper is not None:
                    count = int(min(count, keeper.room(done)))
                if path is not None:
                    count = min(count, path.every - int(before.step) % path.every)
                start, heard = time.perf_counter(), False
                after, buffers, count = advance(before, count)
                infos = jax.tree.map(lambda a, n=count: a[:n], jax.device_get(buffers))
                now, heard = time.perf_counter(), True
                seconds = (now - start) / count
                wanted = np.clip(SHARE * (now - begun), SECONDS_PER_CHUNK, MOST_SECONDS)
                chunk = int(np.clip(wanted / seconds, 1, min(2 * chunk, capacity)))
                rows = _append(rows, (infos, np.full(count, seconds)), done, num_steps)
                # One assignment, so that an interrupt cannot part the state from its history.
                past = (after, rows, done + count)
                if path is not None and not int(after.step) % path.every:
                    path.add(after)
                # Copies: a view would keep its whole chunk, or let a callback write into the history.
                last = jax.tree.map(lambda a: a[-1].copy(), infos)
                shown |= headline(infos)
                bar.set_postfix(shown, refresh=False)
                bar.update(count)
                due = not (done + count) % callback_every or done + count == num_steps
                if callback is not None and due and callback(here(after), last):
                    cause = "callback"
                elif stops(rows, done + count):
                    cause = "arrived"
                elif keeper is not None and keeper.termination.came:
                    cause = "terminated"
                elif exhausted() and done + count < num_steps:
                    cause = "exhausted"
                if not processes.alone:
                    cause = "interrupted" if interrupt.came else cause
                    heard = False
                    chunk, cause = _together(processes, chunk, cause)
                if cause is None and keeper is not None:
                    keeper.keep(after, rows, done + count, path)
        except (KeyboardInterrupt, Exception) as error:
            if not processes.alone and heard and isinstance(error, Exception):
                with contextlib.suppress(LostProcessError):  # what ended the run here is told
                    processes.agree((0, CAUSES.index("failed")))
            if past[1] is None:
                raise
            cause = error
    state, rows, done = past
    infos, seconds = jax.tree.map(lambda a: a if len(a) == done else a[:done].copy(), rows)
    return state, infos, seconds, cause


def _together(
    processes: Processes, chunk: int, cause: str | None
) -> tuple[int, BaseException | str | None]:
    """The next chunk and why to stop, the same in all processes."""
    votes = processes.agree((chunk, CAUSES.index(cause)))
    chunk = int(votes[processes.numbers[0]][0])
    found = CAUSES[max(int(vote[1]) for vote in votes.values())]
    if found == "failed":
        failed = [number for number, vote in votes.items() if CAUSES[vote[1]] == "failed"]
        return chunk, processes.lost(failed[:1], "raised an error, and its own output says which")
    return chunk, KeyboardInterrupt() if found == "interrupted" else found


def _append(rows: Any, infos: Any, done: int, num_steps: int) -> Any:
    # Room grows twofold, so that time and memory per step do not depend on the number of steps. Views of
    # the device's buffers would each keep a buffer of a whole chunk alive.
    def write(row: np.ndarray, info: np.ndarray) -> np.ndarray:
        stop = done + len(info)
        if stop > len(row):
            room = np.empty((min(2 * stop, num_steps), *row.shape[1:]), row.dtype)
            room[:done] = row[:done]
            row = room
        row[done:stop] = info
        return row

    return jax.tree.map(
        write, jax.tree.map(lambda a: a[:0], infos) if rows is None else rows, infos
    )
