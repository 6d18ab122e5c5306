"""A plan under construction."""

import bisect
from collections.abc import Iterable

import numpy as np

from jax_kvpage.serving.plan import Admission, Fork, StepPlan
from jax_kvpage.serving.request import Sequence, SequenceGroup
from jax_kvpage.serving.rows import Rows

__all__ = ["StepBuilder"]

_NONE = np.zeros(0, np.int32)
# A step is cut if its padding would exceed both a quarter of its size and this many tokens, which
# is about the cost of another step.
_MOST_PADDING = 256


class StepBuilder:
    """Collects the parts of a plan.

    Args:
        usable: free blocks that the plan may use.
        promised: how many of these siblings will need.
        coming: blocks that become free without a decision.
        slots: free slots.
        budget: maximum tokens of the step.

    Attributes:
        usable: see above.
        free: usable blocks that are not promised; negative if promises cannot be kept now.
        coming: see above.
        slots: remaining free slots.
        budget: tokens that may still be added.
        blocked: groups whose siblings cannot be forked yet.
        preempted: groups preempted in this step.
        swapped: preempted groups that are swapped out.
        forks: see `StepPlan`.
        admissions: see `StepPlan`.
        decodes: int32[s]: decoding rows.
        decode_sequences: their sequences.
        grown: rows that grow, the tokens that they get room for, and their previous room, int32[e]
            each.
        num_stalled: see `StepPlan`.
    """

    def __init__(self, usable: int, promised: int, coming: int, slots: int, budget: int) -> None:
        self.usable = usable
        self.free = usable - promised
        self.coming = coming
        self.slots = slots
        self.budget = budget
        self._most_tokens = budget
        self.blocked: list[SequenceGroup] = []
        self.preempted: list[SequenceGroup] = []
        self.swapped: list[SequenceGroup] = []
        self.forks: list[Fork] = []
        self.admissions: list[Admission] = []
        self.decodes = _NONE
        self.decode_sequences: tuple[Sequence, ...] = ()
        self.grown = _NONE, _NONE, _NONE
        self.num_stalled = 0
        self._parts: list[tuple[Sequence, int, int, int, bool]] = []

    def grow(self, rows: np.ndarray, num_tokens: np.ndarray, room: np.ndarray, size: int) -> None:
        """Gives rows room for more tokens.

        Args:
            rows: [e]: rows that grow.
            num_tokens: [e]: total tokens to have room for.
            room: [rows]: room of every row; updated in place.
            size: tokens per block.
        """
        rows = rows.astype(np.int32)
        self.grown = rows, num_tokens.astype(np.int32), room[rows]
        room[rows] = -(-num_tokens // size) * size

    def preempt(self, group: SequenceGroup, swap: bool) -> None:
        """Adds a victim, and notes whether it is swapped out."""
        self.preempted.append(group)
        if swap:
            self.swapped.append(group)
        if group in self.blocked:
            self.blocked.remove(group)

    @property
    def takes_new(self) -> bool:
        """Whether waiting groups may start: freed blocks go first to groups that have memory."""
        return not (self.num_stalled or self.blocked or self.preempted)

    @property
    def has_parts(self) -> bool:
        """Whether the step computes parts of prompts."""
        return bool(self._parts)

    def run(self, rows: Rows, sequence: Sequence) -> None:
        """Adds the next chunk of a prompt within the budget."""
        begin, lockstep = int(rows.computed[sequence.row]), sequence.group.request.lockstep
        left = int(rows.known[sequence.row]) - begin - lockstep
        count = min(left, self.budget)
        if count:  # in lockstep, everything but the newest token may be computed
            part = sequence, sequence.row, begin, count, count == left and not lockstep
            self._parts.append(part)
            self.budget -= count

    def prefill(self, rows: Rows, sequences: Iterable[Sequence]) -> None:
        """Adds prompt chunks, in order, with the budget that decoding sequences leave."""
        self.budget -= len(self.decodes)
        if rows.has_drafts:
            self.budget -= int(rows.drafts[self.decodes].sum())
        for sequence in sequences:
            if self.budget <= 0:
                break
            self.run(rows, sequence)

    def fit(self, sizes: tuple[int, ...]) -> None:
        """Cuts the last prompt chunks so that the step fits a smaller size with less padding.

        Each chunk keeps at least one token.

        Args:
            sizes: token counts of compiled steps, ascending.
        """
        num_tokens = self._most_tokens - self.budget
        at = bisect.bisect_left(sizes, num_tokens)
        if not 0 < at < len(sizes):
            return
        excess, padding = num_tokens - sizes[at - 1], sizes[at] - num_tokens
        spare = sum(count - 1 for _, _, _, count, _ in self._parts)
        if padding <= max(_MOST_PADDING, sizes[at] // 4) or excess > spare:
            return
        self.budget += excess
        for i in reversed(range(len(self._parts))):
            sequence, row, begin, count, samples = self._parts[i]
            less = min(excess, count - 1)
            self._parts[i] = sequence, row, begin, count - less, samples and not less
            excess -= less

    def build(
        self,
        step: int,
        finished: list[SequenceGroup],
        released: list[int],
        rows: Rows,
    ) -> StepPlan:
        """Builds the plan.

        Args:
            step: number of the plan.
            finished: groups that ended.
            released: rows to release.
            rows: per-row arrays, in their state before the step.
        """
        run, sequences = self.decodes, self.decode_sequences
        begins, samples = rows.computed[run], rows.decoding[run]
        counts = rows.drafts[run] + 1
        if self._parts:
            parts, part_rows, part_begins, part_counts, part_samples = zip(
                *self._parts, strict=True
            )
            run = np.append(run, np.asarray(part_rows, np.int32))
            begins = np.append(begins, np.asarray(part_begins, np.int32))
            counts = np.append(counts, np.asarray(part_counts, np.int32))
            samples = np.append(samples, part_samples)
            sequences = sequences + parts
        return StepPlan(
            step=step,
            finished=tuple(finished),
            preempted=tuple(self.preempted),
            swap=tuple(self.swapped),
            release=tuple(released),
            forks=tuple(self.forks),
            admissions=tuple(self.admissions),
            extend_rows=self.grown[0],
            extend_tokens=self.grown[1],
            rows=run,
            begins=begins,
            counts=counts,
            samples=samples,
            sequences=sequences,
            num_decodes=len(self.decodes),
            ending=(),
            num_stalled=self.num_stalled,
            free_blocks=self.usable,
        )
