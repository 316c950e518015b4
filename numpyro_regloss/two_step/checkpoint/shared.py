# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The folder of a run of several processes: the first one reads and writes it, all have what is in it."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_regloss._core.processes import LostProcessError, Processes
from numpyro_regloss.two_step.checkpoint.fingerprint import host
from numpyro_regloss.two_step.checkpoint.keeper import Keeper, Saved
from numpyro_regloss.two_step.checkpoint.settings import Checkpoint, room_of
from numpyro_regloss.two_step.checkpoint.signals import Noted
from numpyro_regloss.two_step.motion import Path

__all__ = ["SharedKeeper"]


class SharedKeeper:
    """A `Keeper` of several processes, which all call its methods together, but for `room` and `keep`.

    Args:
        processes: of the run.
        make: the `Keeper`; called by the first process alone.
        settings: where and how often.
        state: shapes and types of the state.
        row: shapes and types of a row of the history.

    Raises:
        Exception: in all processes, what `make` raised in the first.
    """

    def __init__(
        self,
        processes: Processes,
        make: Callable[[], Keeper],
        settings: Checkpoint,
        state: Any,
        row: Any,
    ) -> None:
        self.processes, self.make, self.settings = processes, make, settings
        self.state, self.row = state, row
        self.keeper: Keeper | None = None

        def open_() -> bytes:
            self.keeper = make()
            return b""

        processes.led(open_)
        self.termination = Noted() if self.keeper is None else self.keeper.termination

    def __enter__(self) -> "SharedKeeper":
        (self.termination if self.keeper is None else self.keeper).__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        (self.termination if self.keeper is None else self.keeper).__exit__(*error)

    def load(self, num_steps: int) -> Saved | None:
        """As of `Keeper`: what the first process has read."""

        def read() -> bytes:
            assert self.keeper is not None
            found = self.keeper.load(num_steps)
            return b"" if found is None else _packed(found)

        data = self.processes.led(read)
        return _unpacked(data, self.state, self.row) if data else None

    def room(self, done: int) -> float:
        """As of `Keeper`, which has the same settings."""
        return room_of(self.settings, done)

    def keep(self, state: Any, rows: Any, done: int, path: Path | None) -> None:
        """As of `Keeper`: the first process saves, and nobody waits."""
        if self.keeper is not None:
            self.keeper.keep(state, rows, done, path)

    def finish(
        self, state: Any, rows: Any, path: Path | None, cause: BaseException | str | None
    ) -> BaseException | str | None:
        """As of `Keeper`: all wait until the first process has saved, unless one of them was lost."""
        before = f"What process {self.processes.numbers[0]} saved is in {self.settings.folder}."
        try:
            if not self.processes.broken:
                self.processes.led(partial(self._save, self.keeper, state, rows, path))
            elif self.keeper is not None:
                self._save(self.keeper, state, rows, path)
            elif self._inherits(cause):
                with self.make() as keeper:
                    keeper.load(len(rows[1]))
                    self._save(keeper, state, rows, path)
            else:
                assert isinstance(cause, BaseException)
                cause.add_note(before)
                return cause
        except LostProcessError as error:
            # Lost meanwhile: a run that is whole is no error.
            return error if cause is None else cause
        except (OSError, ValueError) as error:
            if not isinstance(cause, Exception):
                return error
            cause.add_note(f"{error} {before}")
            return cause
        if isinstance(cause, LostProcessError):
            cause.add_note(
                f"State and history of all steps that were done are saved in {self.settings.folder}; started "
                "again, on fewer processes too, the run goes on from there."
            )
        return cause

    def _inherits(self, cause: Any) -> bool:
        # Where the first process itself left. If it did not, it holds the folder, and no other can.
        lost = cause.processes if isinstance(cause, LostProcessError) else ()
        return (
            self.processes.numbers[0] in lost and self.processes.numbers[1] == jax.process_index()
        )

    def _save(self, keeper: Keeper | None, state: Any, rows: Any, path: Path | None) -> bytes:
        assert keeper is not None
        failed = keeper.finish(state, rows, path, None)
        if isinstance(failed, OSError):
            raise failed
        return b""


def _packed(saved: Saved) -> bytes:
    parts = [host(leaf) for leaf in jax.tree.leaves(saved.state)]
    parts += [*jax.tree.leaves(saved.infos), saved.seconds, *saved.centers]
    header = json.dumps([saved.done, len(saved.centers[0])]).encode()
    arrays = (np.ascontiguousarray(a).reshape(-1).view(np.uint8).tobytes() for a in parts)
    return b"".join([header, b"\n", *arrays])


def _unpacked(data: bytes, state: Any, row: Any) -> Saved:
    header, _, _ = data[: data.index(b"\n") + 1].partition(b"\n")
    done, num_centers = json.loads(header)
    place = len(header) + 1

    def taken(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        nonlocal place
        count = int(np.prod(shape, dtype=int))
        found = np.frombuffer(data, dtype, count, place) if count else np.empty(0, dtype)
        place += found.nbytes
        return found.reshape(shape).copy()

    def of_state(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.asarray(taken(leaf.shape, leaf.dtype))
        like = jax.eval_shape(jax.random.key_data, leaf)
        return jax.random.wrap_key_data(
            jnp.asarray(taken(like.shape, like.dtype)), dtype=leaf.dtype
        )

    found = jax.tree.map(of_state, state)
    infos = jax.tree.map(lambda leaf: taken((done, *leaf.shape), leaf.dtype), row)
    seconds = taken((done,), np.float64)
    mean = state.reference.mean
    centers = taken((num_centers,), np.int64), taken((num_centers, *mean.shape), mean.dtype)
    return Saved(found, infos, seconds, centers)
