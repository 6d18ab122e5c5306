"""Holds Ctrl-C back while the engine's records are inconsistent."""

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["HeldInterrupts"]


class HeldInterrupts:
    """A context in which Ctrl-C (SIGINT) is held back and then delivered at the end.

    Python raises KeyboardInterrupt between any two operations: a request could be known to one
    table but not to the next. A second Ctrl-C is delivered immediately, since the block may be
    waiting for something that never comes. Signals only reach the main thread, so in other threads
    the context does nothing, and likewise if the program has no Python handler.
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
