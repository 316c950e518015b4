# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""A folder that holds a run, and goes on holding it: its settings, its last states, its history.

    run.json       the run's fingerprint, written once
    states/        states by step, by Orbax: asynchronous, atomic, the last few
    history.bin    one row per step, appended
    centers.bin    centres that were kept beside a history without vectors

Rows are on the disk before the state that counts them is begun, and a state exists once it is whole: whenever the
process ends, the last state has its history. Everything of Orbax is in this module.
"""

import contextlib
import json
import os
import pathlib
import time
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_regloss.two_step.checkpoint import fingerprint as prints
from numpyro_regloss.two_step.checkpoint.rows import Rows
from numpyro_regloss.two_step.checkpoint.settings import Checkpoint, room_of
from numpyro_regloss.two_step.checkpoint.signals import Noted, deferred_interrupts
from numpyro_regloss.two_step.motion import Path

__all__ = ["Keeper", "Saved", "history_of", "write_whole"]

FORMAT = 1
MANIFEST, STATES, HISTORY, CENTERS = "run.json", "states", "history.bin", "centers.bin"
UNREADABLE = "unreadable"
ANOTHER = "use another folder"


class Saved(NamedTuple):
    """A run so far.

    Attributes:
        state: the state.
        infos: the history.
        seconds: of each step.
        centers: numbers of steps and centres that were kept.
    """

    state: Any
    infos: Any
    seconds: np.ndarray
    centers: tuple[np.ndarray, np.ndarray]

    @property
    def done(self) -> int:
        """How many steps were done."""
        return len(self.seconds)


class Keeper:
    """Saves a run into its folder; of several processes the first one does.

    Args:
        settings: where and how often.
        fingerprint: of the run.
        state: shapes and types of the state.
        row: shapes and types of a row of the history.

    Raises:
        ImportError: if Orbax is not there.
        OSError: if the folder cannot be written.
        ValueError: if it holds something else, or another run.
    """

    def __init__(
        self, settings: Checkpoint, fingerprint: dict[str, str], state: Any, row: Any
    ) -> None:
        self.settings, self.folder = settings, pathlib.Path(settings.folder)
        self.state, self.row = state, row
        self.termination = Noted()
        self._orbax = _orbax()
        seconds = jax.ShapeDtypeStruct((), np.float64)
        center = jax.ShapeDtypeStruct(state.reference.mean.shape, state.reference.mean.dtype)
        step = jax.ShapeDtypeStruct((), np.int64)
        with self._told(), contextlib.ExitStack() as opened:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check(fingerprint)
            self.history = Rows(self.folder / HISTORY, (row, seconds))
            opened.callback(self.history.close)
            self._lock()
            self.centers = Rows(self.folder / CENTERS, (step, center))
            opened.callback(self.centers.close)
            self._manager = self._managed()
            opened.pop_all()
        # Steps of the last state that was begun, rows that are written, centres likewise.
        self.saved, self._rows, self._num_centers = -1, 0, 0
        self._time, self._warned = time.monotonic(), False

    def __enter__(self) -> "Keeper":
        self.termination.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.termination.__exit__()
        with contextlib.suppress(Exception):  # told before, by `finish`
            self._manager.close()
        self.history.close()
        self.centers.close()

    def load(self, num_steps: int) -> Saved | None:
        """The last state that can be read, with its history.

        Args:
            num_steps: steps that are asked for.

        Returns:
            The run so far, or None of a new one.

        Raises:
            ValueError: if there are states and none can be read, or more steps were done than are asked for.
        """
        found = self._last()
        if found is not None and found.done > num_steps:
            raise ValueError(
                f"TwoStep.run: expected num_steps of at least the {found.done} steps that were done in "
                f"{self.folder}, got {num_steps}: with checkpoint it counts all steps. Ask for more, or {ANOTHER}."
            )
        return found

    def _last(self) -> Saved | None:
        steps = sorted(self._manager.all_steps(), reverse=True)
        failed = []
        for step in steps:
            try:
                found = self._load(step)
            except Exception as error:  # noqa: BLE001  (of Orbax, tensorstore, JSON: what a damaged file brings forth)
                failed.append((step, error))
                continue
            self._set_aside([step for step, _ in failed])
            if failed:
                warnings.warn(
                    f"TwoStep.run: the last state in {self.folder} cannot be read ({_brief(failed[0][1])}); the "
                    f"run goes on from the state before it, after {found.done} steps. Unreadable files are in "
                    f"{UNREADABLE}.",
                    stacklevel=3,
                )
            self.saved = self._rows = found.done
            self._num_centers = len(found.centers[0])
            return found
        if failed:
            raise ValueError(
                f"TwoStep.run: expected a readable run in {self.folder}, but none of its {len(failed)} states can "
                f"be read ({_brief(failed[0][1])}): files are damaged or missing. Restore them from a copy, or "
                f"{ANOTHER}; nothing was changed."
            )
        return None

    def room(self, done: int) -> float:
        """How many steps there are until the next state is due, where steps are counted."""
        return room_of(self.settings, done)

    def keep(self, state: Any, rows: Any, done: int, path: Path | None) -> None:
        """Saves a state in the background, if one is due.

        Args:
            state: the state.
            rows: infos and seconds so far, in buffers of `done` rows or more.
            done: how many steps were done.
            path: the centres that were kept so far.
        """
        every, waited = self.settings.every, time.monotonic() - self._time
        due = waited >= every if isinstance(every, float) else not done % every
        # Steps are counted to be met: one under way is waited for.
        if not due or (isinstance(every, float) and self._manager.is_saving_in_progress()):
            return
        try:
            with deferred_interrupts():
                self._save(state, rows, done, path)
        except Exception as error:  # noqa: BLE001  (whatever the disk brings forth must not end the run)
            self._failed(error)
        self._time = time.monotonic()

    def finish(
        self,
        state: Any,
        rows: Any,
        path: Path | None,
        cause: BaseException | str | None,
    ) -> BaseException | str | None:
        """Saves the end of a run, and waits for it.

        Args:
            state: the state.
            rows: infos and seconds of all steps.
            path: as for `keep`.
            cause: why the run ended.

        Returns:
            The same, or what came while it was saved: SIGTERM, or an OSError where it could not be.
        """
        done = len(rows[1])
        with deferred_interrupts():
            try:
                self._manager.wait_until_finished()
            except Exception as error:  # noqa: BLE001  (as in `keep`: the state of now is saved anew)
                self._failed(error)
            try:
                with self._told():
                    if self.saved < done:
                        self._save(state, rows, done, path)
                        self._manager.wait_until_finished()
            except OSError as error:
                if not isinstance(cause, Exception):
                    return error
                cause.add_note(str(error))
        return "terminated" if cause is None and self.termination.came else cause

    def _managed(self) -> Any:
        # Of several processes this one alone: Orbax waits for no other.
        me = jax.process_index()
        alone = self._orbax.options.MultiprocessingOptions(primary_host=me, active_processes={me})
        (self.folder / STATES).mkdir(exist_ok=True)
        options = self._orbax.CheckpointManagerOptions(
            max_to_keep=self.settings.keep,
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=alone,
        )
        return self._orbax.CheckpointManager(self.folder / STATES, options=options)

    def _save(self, state: Any, rows: Any, done: int, path: Path | None) -> None:
        new = jax.tree.map(lambda a: a[self._rows : done], rows)
        self.history.write(new, self._rows)
        centers = {} if path is None else path.kept
        kept = sorted(centers)
        if kept[self._num_centers :]:
            steps = np.array(kept[self._num_centers :], np.int64)
            self.centers.write((steps, np.stack([centers[i] for i in steps])), self._num_centers)
        self._num_centers = len(kept)
        self._rows = done
        leaves = {
            str(i): prints.host(a) for i, a in enumerate(jax.tree.leaves(state)) if np.size(a)
        }
        meta = {"done": done, "centers": self._num_centers, "hash": prints.hash_of(state)}
        args = self._orbax.args
        both = args.Composite(state=args.StandardSave(leaves), meta=args.JsonSave(meta))
        if not self._manager.save(done, args=both, force=True):
            raise RuntimeError(f"Orbax did not save the state after {done} steps")
        self.saved = done

    def _load(self, done: int) -> Saved:
        args = self._orbax.args
        meta = self._manager.restore(done, args=args.Composite(meta=args.JsonRestore()))["meta"]
        shapes, structure = jax.tree.flatten(self.state)
        blanks = {str(i): _blank(shape) for i, shape in enumerate(shapes) if np.prod(shape.shape)}
        read = self._manager.restore(done, args=args.Composite(state=args.StandardRestore(blanks)))
        leaves = [self._leaf(read["state"].get(str(i)), shape) for i, shape in enumerate(shapes)]
        state = jax.tree.unflatten(structure, leaves)
        if prints.hash_of(state) != meta["hash"]:
            raise ValueError(f"the state after {done} steps is damaged")
        infos, seconds = self.history.read(meta["done"])
        return Saved(state, infos, seconds, self.centers.read(meta["centers"]))

    def _leaf(self, array: np.ndarray | None, shape: Any) -> Any:
        if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(array), dtype=shape.dtype)
        return jnp.asarray(np.empty(shape.shape, shape.dtype) if array is None else array)

    def _check(self, fingerprint: dict[str, str]) -> None:
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            # A process that was killed here has left what it began.
            begun = f".{MANIFEST}."
            names = sorted(path.name for path in self.folder.iterdir())
            others = [name for name in names if not name.startswith(begun)]
            if others:
                raise ValueError(
                    f"TwoStep.run: expected a new or empty folder, or that of a run, got {self.folder} with "
                    f"{', '.join(others[:3])}{', …' if len(others) > 3 else ''} and no {MANIFEST}; {ANOTHER}."
                )
            known = {
                "format": FORMAT,
                "versions": prints.versions(),
                "fingerprint": fingerprint,
            }
            write_whole(manifest, json.dumps(known, indent=1).encode())
            return
        try:
            known = json.loads(manifest.read_text())
            there, versions, layout = known["fingerprint"], known["versions"], known["format"]
            if not (isinstance(there, dict) and isinstance(versions, dict)):
                raise TypeError("its settings are no table")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"TwoStep.run: expected the settings of a run in {manifest}, got something else "
                f"({_brief(error)}); restore that file from a copy, or {ANOTHER}."
            ) from error
        if layout != FORMAT:
            raise ValueError(
                f"TwoStep.run: expected a checkpoint of format {FORMAT} in {self.folder}, got {layout}: another "
                f"release of numpyro_regloss wrote it. Go on with that one, or {ANOTHER}."
            )
        found = prints.first_difference(there, fingerprint, versions)
        if found is not None:
            name, old, new = found
            raise ValueError(
                f"TwoStep.run: expected the same run as in {self.folder}, which differs in {name}: there {old}, "
                f"here {new}. Go on with the old setting, or {ANOTHER}."
            )

    def _lock(self) -> None:
        try:
            import fcntl  # noqa: PLC0415
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self.history.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"TwoStep.run: expected a folder for this run alone, and another one saves to {self.folder}; wait "
                f"for its end, or {ANOTHER}."
            ) from error
        except OSError:  # a file system without locks
            return

    def _set_aside(self, steps: list[int]) -> None:
        # A later state of the same number needs the place.
        for step in steps:
            place = self.folder / UNREADABLE
            place.mkdir(exist_ok=True)
            os.replace(self.folder / STATES / str(step), place / f"{step}-{time.time_ns()}")
        if steps:
            self._manager.reload()

    def _failed(self, error: Exception) -> None:
        self.saved = -1
        with contextlib.suppress(Exception):  # of what has failed already
            self._manager.close()
        if not self._warned:
            warnings.warn(
                f"TwoStep.run: a state could not be saved in {self.folder} ({_brief(error)}). The run goes on and "
                "tries again; what was saved before is there.",
                stacklevel=5,
            )
        self._warned = True
        self._manager = self._managed()

    @contextlib.contextmanager
    def _told(self) -> Any:
        try:
            yield
        except ValueError as error:
            # Of our own, which say all; Orbax and tensorstore have others for a disk that is full.
            if str(error).startswith("TwoStep.run:"):
                raise
            raise OSError(self._trouble(error)) from error
        except Exception as error:
            raise OSError(self._trouble(error)) from error

    def _trouble(self, error: Exception) -> str:
        return (
            f"TwoStep.run: expected a checkpoint folder that can be written, got {self.folder} with "
            f"{_brief(error)}: is it read-only, or the disk full? What was saved before is there."
        )


def history_of(settings: Checkpoint) -> str | None:
    """What the history of a run that is gone on with keeps.

    Args:
        settings: where it is.

    Returns:
        `"all"`, `"scalars"`, or None of a new run and of one that cannot be read, which its keeper tells.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(
            json.loads((pathlib.Path(settings.folder) / MANIFEST).read_text())["fingerprint"][
                "history"
            ]
        )
    return None


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all, in place of an old one.

    Args:
        path: of the file.
        data: its content.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _blank(shape: Any) -> np.ndarray:
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        shape = jax.eval_shape(jax.random.key_data, shape)
    return np.empty(shape.shape, shape.dtype)


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"


def _orbax() -> Any:
    try:
        import orbax.checkpoint as orbax  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            'TwoStep.run: checkpoint needs Orbax; pip install "numpyro_regloss[checkpoint]".'
        ) from error
    return orbax
