"""Divides the CPU time of a thread among its calls."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["ThreadSplit"]


class ThreadSplit:
    """Divides the CPU time of one thread among parts.

    The time of a call counts for its part, without that of timed calls inside it. Reading the clock
    takes about a microsecond per call, most of which is counted too.

    Args:
        rest: name of the part outside timed calls.
    """

    def __init__(self, rest: str) -> None:
        self._part = rest
        self._since = 0
        self._spent: collections.Counter[str] = collections.Counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts time only inside the `with` block."""
        self._since = time.thread_time_ns()
        try:
            yield
        finally:
            self._enter(self._part)

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a function so that its time counts for a part."""

        def run(*args: Any, **options: Any) -> Any:
            outer = self._enter(part)
            try:
                return call(*args, **options)
            finally:
                self._enter(outer)

        return run

    def milliseconds(self, count: int) -> dict[str, float]:
        """The time of each part, divided by a number of steps."""
        return {part: spent * 1e-6 / count for part, spent in self._spent.items()}

    def _enter(self, part: str) -> str:
        now = time.thread_time_ns()
        self._spent[self._part] += now - self._since
        outer, self._part, self._since = self._part, part, now
        return outer
