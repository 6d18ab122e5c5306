"""Ctrl-C while the engine's records change: it waits until they agree again."""

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["HeldInterrupts"]


class HeldInterrupts:
    """A block in which Ctrl-C (SIGINT) is held back, to be passed on at its end.

    Python raises KeyboardInterrupt between any two operations: a request could be known to one
    table and not to the next. A second Ctrl-C is passed on at once, since a block may wait for
    something that never comes. Signals reach the main thread only: in others a block does nothing,
    and neither does it where the program has no handler in Python.
    """

    def __enter__(self) -> None:
        self._handler: Any = None
        self._held: tuple[int, FrameType | None] | None = None
        if threading.current_thread() is not threading.main_thread():
            return
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            self._handler = handler
            signal.signal(signal.SIGINT, self._hold)

    def __exit__(self, *error: object) -> None:
        if self._handler is None:
            return
        signal.signal(signal.SIGINT, self._handler)
        if self._held is not None:
            self._handler(*self._held)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self._held is not None:
            self._handler(number, frame)
        self._held = (number, frame)
