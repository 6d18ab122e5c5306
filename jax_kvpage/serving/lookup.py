"""Speculation by prompt lookup: guesses what followed the newest tokens when they last occurred."""

from collections.abc import Sequence

__all__ = ["NgramIndex"]


class NgramIndex:
    """Index of the last occurrences of n-grams in a growing sequence.

    Args:
        shortest: minimum tokens that must match.
        longest: maximum tokens to match.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._following: dict[tuple[int, ...], int] = {}
        self._seen = 0

    def guess(self, ids: Sequence[int], most: int) -> list[int]:
        """Returns up to `most` tokens that may follow.

        Args:
            ids: the sequence; it may only grow between calls.
            most: maximum tokens to return.
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
