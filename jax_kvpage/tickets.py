"""Ticket: something on its way into memory."""

import time
from typing import Any

__all__ = ["Ticket"]

# A wait looks up this often (seconds), so that Ctrl-C works.
_SLICE = 0.1


class Ticket:
    """A read that `KVPool.prefetch` has begun. Nothing waits for it but `wait`."""

    def __init__(self, native: Any) -> None:
        """Takes a compiled ticket: `wait(seconds) -> bool`, `tokens` and `error`."""
        self._native = native

    @property
    def ready(self) -> bool:
        """Whether the read has ended, well or not."""
        return bool(self._native.wait(0.0))

    @property
    def tokens(self) -> int:
        """Tokens that are in memory now, from the first one on; 0 before it is ready."""
        return int(self._native.tokens) if self.ready else 0

    @property
    def error(self) -> str | None:
        """Why not all tokens could be read; None: they were, or the ticket is not ready."""
        return str(self._native.error) or None if self.ready else None

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the ticket is ready.

        Args:
            timeout: seconds; None: as long as it takes.

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
