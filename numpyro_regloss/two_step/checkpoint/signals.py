# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Signals that end a run: SIGTERM, as preempted machines get it, and Ctrl-C that must wait for a save."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Noted", "deferred_interrupts"]


class Noted:
    """Within it a signal is noted rather than obeyed; in the main thread, where alone Python handles signals.

    Args:
        number: of the signal.
        once: whether the second one is obeyed as before.
    """

    def __init__(self, number: int = signal.SIGTERM, *, once: bool = False) -> None:
        self.number, self.once, self.came = number, once, False
        self._before = None

    def __enter__(self) -> "Noted":
        # A handler that was not set from Python could not be put back.
        if _in_main_thread() and signal.getsignal(self.number) is not None:
            self._before = signal.signal(self.number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(self.number, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.came and self.once and callable(self._before):
            self._before(number, frame)
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
