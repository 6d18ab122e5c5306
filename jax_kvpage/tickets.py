"""Ticket: a read into memory that is in progress."""

import time
from typing import Any

__all__ = ["Ticket"]

# Seconds between checks for Ctrl-C while waiting.
_SLICE = 0.1


class Ticket:
    """A read that `KVPool.prefetch` has started. Only `wait` waits for it."""

    def __init__(self, native: Any) -> None:
        """Takes a compiled ticket: `wait(seconds) -> bool`, `tokens` and `error`."""
        self._native = native

    @property
    def ready(self) -> bool:
        """Whether the read has ended, successfully or not."""
        return bool(self._native.wait(0.0))

    @property
    def tokens(self) -> int:
        """How many tokens were read, without those in memory before; 0 before it is ready."""
        return int(self._native.tokens) if self.ready else 0

    @property
    def error(self) -> str | None:
        """Why not all tokens could be read; None if they were, or if the ticket is not ready."""
        return str(self._native.error) or None if self.ready else None

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the ticket is ready.

        Args:
            timeout: seconds; None: without limit.

        Returns:
            Whether it is ready.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _SLICE if end is None else min(_SLICE, max(end - time.monotonic(), 0.0))
            if self._native.wait(left):
                return True
            if end is not None and time.monotonic() >= end:
                return False

    def __repr__(self) -> str:
        if not self.ready:
            return "<Ticket not ready>"
        error = self.error
        return f"<Ticket {self.tokens} tokens{f', {error}' if error else ''}>"
