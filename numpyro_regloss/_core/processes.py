# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Processes that run one program together, after `jax.distributed.initialize()`: what they share and agree on.

Each of them runs the same script and sees its own devices alone. Arrays are made on each process from what it has
itself; decisions that hang on a clock, a signal or a callback are taken together; the first process alone deals
with the world outside. One that leaves becomes an error of the others.
"""

import contextlib
import functools
import json
import re
import socket
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = ["LostProcessError", "Processes", "here", "placed", "same_everywhere"]

T = TypeVar("T")

AXIS = "processes of numpyro_regloss"
# What is sent at once, in bytes: each device holds it.
LEAST_PIECE, MOST_PIECE = 1 << 12, 1 << 24
NAME_BYTES = 64
# What the runtimes of CPUs, GPUs and TPUs say of a peer that does not answer.
OF_A_PEER = re.compile(
    r"gloo|\bnccl|\brccl|\bmpi\b|connection (reset|closed|refused|timed out)|broken pipe|socket closed|heartbeat"
    r"|coordination ?service|unhealthy|peer\b|^(UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|CANCELLED)\b",
    re.IGNORECASE,
)
# Errors that a process may tell the others of, as they are.
TOLD = (ValueError, TypeError, ImportError, OSError, RuntimeError)


class LostProcessError(RuntimeError):
    """Another process of a run ended, cannot be reached any more, or raised an error.

    Before this is raised, the first process saves the steps that were done, if the run has a checkpoint. Started
    again, on fewer processes too, the run goes on from there.

    Attributes:
        processes: the processes that left, by `jax.process_index()`. With more than two processes, the runtime
            only tells that one of the others left.
        result: the `TwoStepResult` of the steps that were done, where there are any.
    """

    def __init__(self, message: str, processes: tuple[int, ...]) -> None:
        super().__init__(message)
        self.processes = processes


def placed(leaf: Any, sharding: NamedSharding) -> Any:
    """An array on the devices of a mesh, which may be those of several processes.

    Args:
        leaf: an array of this process, of which every other process has the same one; one that lies on several
            processes already; or a tracer.
        sharding: where it shall lie.

    Returns:
        The array.
    """
    if isinstance(leaf, Tracer) or sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    leaf = here(leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key):
        data = placed(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    # JAX's own placement asks all processes whether they have the same.
    host = np.asarray(jnp.asarray(leaf))
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def here(tree: T) -> T:
    """What came from several devices, or several processes, where each of them has all of it.

    Args:
        tree: of arrays. Those that are divided stay as they are.

    Returns:
        The tree, of arrays that this process may use alone, beside arrays on any devices.
    """

    def local(leaf: Any) -> Any:
        if (
            not isinstance(leaf, jax.Array)
            or isinstance(leaf, Tracer)
            or len(leaf.sharding.device_set) == 1
            or not leaf.is_fully_replicated
        ):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = local(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        # By the host: JAX refuses an array that is bound to a device beside one that is bound to others.
        return jnp.asarray(np.asarray(leaf))

    return jax.tree.map(local, tree)


class Processes:
    """The processes whose devices a run uses; mostly one, which asks nobody.

    Attributes:
        devices: all of theirs, in the order of a mesh.
        numbers: the processes, by `jax.process_index()`.
        names: their hosts.
        broken: whether one was lost, so that nothing can be asked any more.
    """

    def __init__(self, mesh: Mesh | None, tree: Any) -> None:
        found = {} if mesh is None else dict.fromkeys(mesh.devices.flat)
        for leaf in jax.tree.leaves(tree):
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                found |= dict.fromkeys(_devices_of(leaf))
        self.devices = tuple(found)
        self.numbers = sorted({d.process_index for d in found}) or [jax.process_index()]
        self.names, self.broken = {}, False
        if not self.alone:
            name = socket.gethostname().encode()[:NAME_BYTES].ljust(NAME_BYTES)
            rows = self.agree(np.frombuffer(name, np.uint8))
            self.names = {p: bytes(rows[p].astype(np.uint8)).decode().strip() for p in self.numbers}

    @property
    def alone(self) -> bool:
        """Whether there is one."""
        return len(self.numbers) == 1

    @property
    def leads(self) -> bool:
        """Whether this is the first one, which writes and speaks for all."""
        return jax.process_index() == self.numbers[0]

    def agree(self, vote: Iterable[int]) -> dict[int, np.ndarray]:
        """What every process says, by process; all of them call it together.

        Args:
            vote: as many integers of 32 bits in every process.

        Returns:
            The votes.
        """
        own = np.asarray([*vote], np.int32)
        mesh = _mesh_of(self.devices)
        sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        shape = (len(self.devices), own.size)
        with self.watched():
            rows = jax.make_array_from_callback(
                shape, sharding, lambda index: _rows(own, shape, index)
            )
            found = np.asarray(_gather(mesh)(rows))
        return {d.process_index: row for d, row in zip(self.devices, found, strict=True)}

    def led(self, call: Callable[[], bytes]) -> bytes:
        """What the first process finds or raises, in all of them; all of them call it together.

        Args:
            call: run by the first process alone.

        Returns:
            Its bytes.

        Raises:
            Exception: what it raised there.
        """
        if self.alone:
            return call()
        data, error = b"", None
        if self.leads:
            try:
                data = call()
            except Exception as raised:  # noqa: BLE001  (told to all, and raised again)
                error = raised
                kind = next((k for k in TOLD if isinstance(raised, k)), RuntimeError)
                data = json.dumps([kind.__name__, str(raised)]).encode()
        data = self._from_first(data, failed=error is not None)
        if error is not None:
            raise error
        if data[:1] == b"!":
            kind, text = json.loads(data[1:])
            raise {k.__name__: k for k in TOLD}[kind](text)
        return data[1:]

    def check_same(self, what: str, text: Callable[[], dict[str, str]]) -> None:
        """Refuses to begin where a process has another run than the first one.

        Args:
            what: begins the message.
            text: what a run is, by name.

        Raises:
            ValueError: in all processes, with the first difference in the one that differs.
        """
        if self.alone:
            return
        own = text()
        first = json.loads(self.led(lambda: json.dumps(own).encode()))
        names = [name for name in (*first, *own) if first.get(name) != own.get(name)]
        others = [p for p, (count,) in self.agree([len(names)]).items() if count]
        if not others:
            return
        known = "see its message"
        if names:
            there, mine = (run.get(names[0], "nothing") for run in (first, own))
            known = f"{names[0]} is {there} there and {mine} here"
        raise ValueError(
            f"{what}: expected the same run in every process, got another one in {self._said(others)} than in "
            f"{self._said(self.numbers[:1])} ({known}). Give all of them the same arguments, a callback too: it "
            "may look at jax.process_index() by itself."
        )

    @contextlib.contextmanager
    def watched(self) -> Generator[None]:
        """Within it the runtime's error of a lost peer is our own.

        Raises:
            LostProcessError: in its place.
            RuntimeError: any other.
            ValueError: likewise.
        """
        try:
            yield
        except (RuntimeError, ValueError) as error:
            known = isinstance(error, LostProcessError)
            if self.alone or known or not OF_A_PEER.search(str(error)):
                raise
            self.broken = True
            others = [p for p in self.numbers if p != jax.process_index()]
            raise self.lost(
                others, f"left the run, or cannot be reached ({_brief(error)})"
            ) from error

    def lost(self, numbers: list[int], how: str) -> LostProcessError:
        """The error of processes that left.

        Args:
            numbers: which ones; of several one of them.
            how: the rest of the sentence.

        Returns:
            The error.
        """
        return LostProcessError(f"TwoStep.run: {self._said(numbers)} {how}.", tuple(numbers))

    def _said(self, numbers: list[int]) -> str:
        each = [
            f"process {p} ({self.names[p]})" if p in self.names else f"process {p}" for p in numbers
        ]
        return each[0] if len(each) == 1 else f"one of {', '.join(each)}"

    def _from_first(self, data: bytes, *, failed: bool) -> bytes:
        data = (b"!" if failed else b".") + data
        size = len(data) if self.leads else 0
        high, low = self.agree(divmod(size, 1 << 30))[self.numbers[0]]
        size = (int(high) << 30) + int(low)
        piece = min(MOST_PIECE, max(LEAST_PIECE, 1 << (size - 1).bit_length()))
        mesh = _mesh_of(self.devices)
        sharding, shape = NamedSharding(mesh, PartitionSpec(AXIS)), (len(self.devices), piece // 4)
        first = next(i for i, d in enumerate(self.devices) if d.process_index == self.numbers[0])
        found = []
        for start in range(0, size, piece):
            part = data[start : start + piece].ljust(piece, b"\0") if self.leads else bytes(piece)
            words = np.frombuffer(part, np.int32)

            def rows(index: Any, words: np.ndarray = words) -> np.ndarray:
                is_first = range(shape[0])[index[0]] == range(first, first + 1)
                return _rows(words if is_first else np.zeros_like(words), shape, index)

            with self.watched():
                whole = _total(mesh)(jax.make_array_from_callback(shape, sharding, rows))
                found.append(np.asarray(whole).tobytes())
        return b"".join(found)[:size]


def same_everywhere(leaf: Any) -> Any:
    """An array that each process has whole, of one that they divide; all of them call it together.

    Args:
        leaf: an array.

    Returns:
        The array.
    """
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    mesh = _mesh_of(_devices_of(leaf))
    return placed(leaf, NamedSharding(mesh, PartitionSpec()))


def _devices_of(leaf: jax.Array) -> tuple[Any, ...]:
    devices: set[Any] = set(leaf.sharding.device_set)
    return tuple(sorted(devices, key=lambda device: device.id))


def _rows(own: np.ndarray, shape: tuple[int, ...], index: Any) -> np.ndarray:
    return np.broadcast_to(own, (len(range(shape[0])[index[0]]), shape[1]))


@functools.cache
def _mesh_of(devices: tuple[Any, ...]) -> Mesh:
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


@functools.cache
def _gather(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda rows: rows, out_shardings=NamedSharding(mesh, PartitionSpec()))


@functools.cache
def _total(mesh: Mesh) -> Callable[[Any], Any]:
    # Others have zeros. A gathered array would be as long as there are devices.
    divided, same = PartitionSpec(AXIS), PartitionSpec()
    add = jax.shard_map(
        lambda rows: lax.psum(rows[0], AXIS), mesh=mesh, in_specs=divided, out_specs=same
    )
    return jax.jit(add)


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{text[:300]}{'…' if len(text) > 300 else ''}"
