"""Speculation by prompt lookup: what followed the newest tokens the last time they occurred."""

from collections.abc import Sequence

__all__ = ["NgramIndex"]


class NgramIndex:
    """Where n-grams of a growing sequence occurred last.

    Args:
        shortest: tokens that must match at least.
        longest: tokens that are matched at most.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._following: dict[tuple[int, ...], int] = {}
        self._seen = 0

    def guess(self, ids: Sequence[int], most: int) -> list[int]:
        """Tokens that may follow, at most `most`.

        Args:
            ids: the sequence; from call to call it only grows.
            most: tokens wanted.
        """
        for end in range(max(self._seen, 1), len(ids)):
            for size in self._sizes:
                if size <= end:
                    self._following[tuple(ids[end - size : end])] = end
        self._seen = len(ids)
        for size in self._sizes:
            begin = self._following.get(tuple(ids[len(ids) - size :])) if size <= len(ids) else None
            if begin is not None:
                return list(ids[begin : begin + most])
        return []
