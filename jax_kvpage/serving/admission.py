"""When a new group may start: enough blocks must stay free for those that run already."""

import bisect
import collections
from typing import Protocol

import numpy as np

from jax_kvpage.serving.request import SequenceGroup
from jax_kvpage.serving.rows import Rows

__all__ = ["AdmissionPolicy", "ExpectedGrowth", "Load", "Watermark"]


class Load:
    """What runs, and what is free.

    Args:
        rows: the running sequences.
        capacity: blocks in all.
        free: blocks that can be taken now and that nobody was promised.
        coming: blocks that are about to come free.
    """

    def __init__(self, rows: Rows, capacity: int, free: int, coming: int) -> None:
        self.capacity = capacity
        self.free = free
        self.coming = coming
        self.block_tokens = rows.block_tokens
        self._rows = rows
        self._occupied = rows.occupied()

    def held(self) -> np.ndarray:
        """int[s]: blocks that only this sequence holds, for each that runs."""
        shared = self._rows.shared[self._rows.groups_of(self._occupied)]
        return self._rows.room[self._occupied] // self.block_tokens - shared

    def produced(self) -> np.ndarray:
        """int[s]: tokens it has produced."""
        return self._rows.known[self._occupied] - self._rows.prompt[self._occupied]

    def remaining(self) -> np.ndarray:
        """int[s]: tokens it may still produce."""
        return self._rows.limit[self._occupied] - self._rows.known[self._occupied]


class AdmissionPolicy(Protocol):
    """Decides on the group at the head of the queue. Not asked when nothing runs."""

    def admits(self, load: Load, group: SequenceGroup, blocks: int) -> bool:
        """Whether the group may start now.

        Args:
            load: what runs.
            group: what waits.
            blocks: that it needs to start.
        """

    def observe(self, num_output_tokens: int) -> None:
        """Hears how many tokens a finished sequence has produced."""


def _fraction(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"{name}: fraction is {value}, wanted 0 <= fraction < 1")
    return value


class Watermark:
    """A part of the capacity stays free for sequences that run, as in vLLM.

    Args:
        fraction: of the capacity.
    """

    def __init__(self, fraction: float = 0.01) -> None:
        self._fraction = _fraction("Watermark", fraction)

    def admits(self, load: Load, group: SequenceGroup, blocks: int) -> bool:
        """See `AdmissionPolicy`."""
        return load.free - blocks >= self._fraction * load.capacity

    def observe(self, num_output_tokens: int) -> None:
        """Learns nothing."""


class ExpectedGrowth:
    """The memory that running sequences are expected to need at their peak stays free.

    How much a sequence will still produce is the mean of those recent ones that produced more than
    it has so far. The peak is the largest sum over the moments at which one is expected to end, as
    in LightLLM's past-future scheduler (Gong et al., 2025).

    Args:
        fraction: of the capacity, to stay free on top for sequences that grow more than expected.
        window: finished sequences to remember.
    """

    def __init__(self, fraction: float = 0.01, window: int = 1000) -> None:
        self._fraction = _fraction("ExpectedGrowth", fraction)
        self._recent: collections.deque[int] = collections.deque(maxlen=window)
        self._sorted: list[int] = []
        self._tails: tuple[np.ndarray, np.ndarray] | None = None

    def observe(self, num_output_tokens: int) -> None:
        """Remembers a length, and forgets the oldest."""
        if len(self._recent) == self._recent.maxlen:
            self._sorted.pop(bisect.bisect_left(self._sorted, self._recent[0]))
        self._recent.append(num_output_tokens)
        bisect.insort(self._sorted, num_output_tokens)
        self._tails = None

    def expected(self, produced: np.ndarray, remaining: np.ndarray) -> np.ndarray:
        """Tokens that sequences will still produce, [s], of those that they may."""
        if self._tails is None:
            lengths = np.asarray(self._sorted, np.float64)
            sums = np.append(np.cumsum(lengths[::-1])[::-1], 0.0)
            self._tails = lengths, sums
        lengths, sums = self._tails
        at = np.searchsorted(lengths, produced, side="right")
        longer = len(lengths) - at
        mean = sums[at] / np.maximum(longer, 1) - produced
        # Nobody produced as much: half of what it may is as good a guess as any.
        return np.minimum(np.where(longer > 0, mean, remaining / 2), remaining)

    def admits(self, load: Load, group: SequenceGroup, blocks: int) -> bool:
        """See `AdmissionPolicy`."""
        if load.free < blocks:
            return False
        known = np.asarray([sequence.num_tokens for sequence in group.live])
        own, before = np.zeros(len(known), np.int64), load.held()
        own[0] = blocks
        ahead = self.expected(
            np.append(load.produced(), known - group.request.num_prompt_tokens),
            np.append(load.remaining(), group.limit - known),
        )
        held = np.append(before, own)
        latest_first = np.argsort(-ahead, kind="stable")
        growth = ahead[latest_first] / load.block_tokens * np.arange(1, len(ahead) + 1)
        peak = (np.cumsum(held[latest_first]) + growth).max()
        others = load.capacity - load.free - load.coming - before.sum()
        return bool(peak + max(others, 0) <= load.capacity * (1 - self._fraction))
