# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Signals that end a run: SIGTERM, as preempted machines get it, and Ctrl-C that must wait for a save."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Termination", "deferred_interrupts"]


class Termination:
    """Within it SIGTERM is noted rather than obeyed; in the main thread, where alone Python handles signals."""

    def __init__(self) -> None:
        self.came = False
        self._before = None

    def __enter__(self) -> "Termination":
        # A handler that was not set from Python could not be put back.
        if _in_main_thread() and signal.getsignal(signal.SIGTERM) is not None:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.came = True


@contextmanager
def deferred_interrupts() -> Generator[None, None, None]:
    """Within it Ctrl-C waits, so that what is being saved is saved whole."""
    before = signal.getsignal(signal.SIGINT)
    if not (_in_main_thread() and callable(before)):
        yield
        return
    came = []
    signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(*came[0])


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
