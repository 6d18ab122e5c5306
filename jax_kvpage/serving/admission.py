"""Admission policies: enough blocks must stay free for the groups that are already running."""

import collections
from typing import Protocol

import numpy as np

from jax_kvpage.serving.request import SequenceGroup
from jax_kvpage.serving.rows import Rows

__all__ = ["AdmissionPolicy", "ExpectedGrowth", "Load", "Watermark"]


class Load:
    """Running sequences and free blocks, for policies.

    Args:
        rows: the running sequences.
        capacity: total number of blocks.
        free: blocks that can be taken now and are not promised.
        coming: blocks that are about to become free.

    Attributes:
        expected: scratch space in which a policy may keep its results for this step.
    """

    def __init__(self, rows: Rows, capacity: int, free: int, coming: int) -> None:
        self.capacity = capacity
        self.free = free
        self.coming = coming
        self.block_tokens = rows.block_tokens
        self.expected: np.ndarray | None = None
        self._rows = rows

    def held(self) -> np.ndarray:
        """int[s]: blocks that only this sequence holds, for each running sequence."""
        occupied = self._rows.occupied()
        shared = self._rows.shared[self._rows.groups_of(occupied)]
        return self._rows.room[occupied] // self.block_tokens - shared

    def spare(self) -> np.ndarray:
        """int[s]: tokens that each sequence has room for beyond its known tokens."""
        occupied = self._rows.occupied()
        return self._rows.room[occupied] - self._rows.known[occupied]

    def produced(self) -> np.ndarray:
        """int[s]: tokens that each sequence has produced."""
        occupied = self._rows.occupied()
        return self._rows.known[occupied] - self._rows.prompt[occupied]

    def remaining(self) -> np.ndarray:
        """int[s]: tokens that each sequence may still produce."""
        occupied = self._rows.occupied()
        return self._rows.limit[occupied] - self._rows.known[occupied]


class AdmissionPolicy(Protocol):
    """Decides about the group at the head of the queue. Not called when nothing is running."""

    def admits(self, load: Load, group: SequenceGroup, blocks: int) -> bool:
        """Whether the group may start now.

        Args:
            load: running sequences and free blocks.
            group: the head of the queue.
            blocks: blocks that it needs to start.
        """

    def observe(self, num_output_tokens: int) -> None:
        """Records how many tokens a finished sequence has produced."""


# How far ahead memory is checked, in tokens.
_AHEAD = np.asarray([1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096])
# Without any history, sequences are expected to end within this many tokens.
_GUESS = 512


def _fraction(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"{name}: fraction is {value}, wanted 0 <= fraction < 1")
    return value


class Watermark:
    """Keeps a fraction of the capacity free for running sequences, as in vLLM.

    Args:
        fraction: fraction of the capacity.
    """

    def __init__(self, fraction: float = 0.01) -> None:
        self._fraction = _fraction("Watermark", fraction)

    def admits(self, load: Load, group: SequenceGroup, blocks: int) -> bool:
        """See `AdmissionPolicy`."""
        return load.free - blocks >= self._fraction * load.capacity

    def observe(self, num_output_tokens: int) -> None:
        """Does nothing."""


class ExpectedGrowth:
    """Admits a group if memory is likely to suffice at all later times.

    The probability that a sequence keeps running is estimated from the lengths of recently finished
    ones. It gives the mean and variance of the blocks in use at several later times; the mean plus
    `deviations` standard deviations must fit. The idea is from LightLLM's past-future scheduler
    (Gong et al., 2025).

    Args:
        deviations: a higher value leaves more memory unused but preempts less.
        window: number of finished sequences to remember.
    """

    def __init__(self, deviations: float = 2.0, window: int = 1000) -> None:
        if deviations < 0 or window < 1:
            raise ValueError(
                f"ExpectedGrowth: deviations is {deviations} and window {window}, wanted 0 or more "
                "and 1 or more"
            )
        self._deviations = deviations
        self._recent: collections.deque[int] = collections.deque(maxlen=window)
        self._survivors: np.ndarray | None = None
        self._refused: SequenceGroup | None = None
        self._refused_room = 0

    def observe(self, num_output_tokens: int) -> None:
        """Records a length and drops the oldest."""
        self._recent.append(num_output_tokens)
        self._survivors = None

    def survival(self, produced: np.ndarray, remaining: np.ndarray) -> np.ndarray:
        """Returns the probability that each sequence is still running at each of the later times.

        Args:
            produced: int[s]: tokens produced so far.
            remaining: int[s]: tokens that may still follow.

        Returns:
            float64[s, times].
        """
        if self._survivors is None:
            lengths = np.bincount(np.asarray(self._recent, np.int64), minlength=1)
            self._survivors = len(self._recent) - np.cumsum(lengths)
        last = len(self._survivors) - 1
        later = produced[:, None] + _AHEAD
        now = self._survivors[np.minimum(produced, last)][:, None]
        then = self._survivors[np.minimum(later, last)]
        # No recent sequence was this long: assume a uniform distribution of the length.
        guess = 1 - _AHEAD / np.clip(remaining, 1, _GUESS)[:, None]
        found = np.where(now > 0, then / np.maximum(now, 1), np.maximum(guess, 0.0))
        return np.where(remaining[:, None] > _AHEAD, found, 0.0)

    def admits(self, load: Load, group: SequenceGroup, blocks: int) -> bool:
        """See `AdmissionPolicy`."""
        room = load.free + load.coming
        if load.free < blocks or (group is self._refused and room <= self._refused_room):
            return False  # nothing has become free since the last refusal
        if load.expected is None:
            held = load.held()
            load.expected = self._moments(
                load.block_tokens, held, load.spare(), load.produced(), load.remaining()
            )
            # Shared and promised blocks stay in use.
            load.expected[0] += max(load.capacity - room - held.sum(), 0)
        known = np.asarray([sequence.num_tokens for sequence in group.live])
        own, spare = np.zeros((2, len(known)), np.int64)
        own[0] = blocks
        spare[:] = max(blocks * load.block_tokens - int(known.sum()), 0) // len(known)
        prompt = group.request.num_prompt_tokens
        more = self._moments(load.block_tokens, own, spare, known - prompt, group.limit - known)
        mean, variance = load.expected + more
        if (mean + self._deviations * np.sqrt(variance)).max() > load.capacity:
            self._refused, self._refused_room = group, room
            return False
        load.expected = load.expected + more
        return True

    def _moments(
        self,
        block_tokens: int,
        held: np.ndarray,
        spare: np.ndarray,
        produced: np.ndarray,
        remaining: np.ndarray,
    ) -> np.ndarray:
        """Mean and variance of the blocks held at the later times, float64[2, times]."""
        likely = self.survival(produced, remaining)
        size = held[:, None] + np.maximum(_AHEAD - spare[:, None], 0) / block_tokens
        mean = likely * size
        return np.stack([mean.sum(0), (mean * size * (1 - likely)).sum(0)])
