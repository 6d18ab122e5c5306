"""A plan under construction."""

import bisect
from collections.abc import Iterable

import numpy as np

from jax_kvpage.serving.plan import Admission, Fork, StepPlan
from jax_kvpage.serving.request import Sequence, SequenceGroup
from jax_kvpage.serving.rows import Rows

__all__ = ["StepBuilder"]

_NONE = np.zeros(0, np.int32)
# A step is cut where its padding would exceed a quarter of it, and this many tokens: about what
# another step costs.
_MOST_PADDING = 256


class StepBuilder:
    """Collects the parts of a plan.

    Args:
        usable: free blocks that the plan may use.
        promised: those of them that siblings will need.
        coming: blocks that come free without a decision.
        slots: free slots.
        budget: tokens that the step may run.

    Attributes:
        usable: see above.
        free: blocks that are not promised; negative if promises cannot be kept now.
        coming: see above.
        slots: free slots that are not promised.
        budget: tokens that may still be added.
        blocked: groups whose siblings cannot be forked yet.
        preempted: victims.
        swapped: those of them that are swapped.
        forks: see `StepPlan`.
        admissions: see `StepPlan`.
        decodes: int32[s]: rows that decode.
        decode_sequences: their sequences.
        grown: rows that grow, the tokens they get room for, and their room before, int32[e] each.
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
        """Maps room for more tokens.

        Args:
            rows: [e] that grow.
            num_tokens: [e]: tokens in all.
            room: [rows]: what every row has; those that grow are changed.
            size: tokens in a block.
        """
        rows = rows.astype(np.int32)
        self.grown = rows, num_tokens.astype(np.int32), room[rows]
        room[rows] = -(-num_tokens // size) * size

    def preempt(self, group: SequenceGroup, swap: bool) -> None:
        """Notes a victim, and whether it is swapped."""
        self.preempted.append(group)
        if swap:
            self.swapped.append(group)
        if group in self.blocked:
            self.blocked.remove(group)

    @property
    def takes_new(self) -> bool:
        """Whether groups that wait may start: freed blocks go to those first that wait with their
        memory."""
        return not (self.num_stalled or self.blocked or self.preempted)

    @property
    def has_parts(self) -> bool:
        """Whether the step computes parts of prompts."""
        return bool(self._parts)

    def run(self, rows: Rows, sequence: Sequence) -> None:
        """Adds the next part of a prompt, as far as the budget allows."""
        begin, lockstep = int(rows.computed[sequence.row]), sequence.group.request.lockstep
        left = int(rows.known[sequence.row]) - begin - lockstep
        count = min(left, self.budget)
        if count:  # in lockstep all may be computed but the newest token
            part = sequence, sequence.row, begin, count, count == left and not lockstep
            self._parts.append(part)
            self.budget -= count

    def prefill(self, rows: Rows, sequences: Iterable[Sequence]) -> None:
        """Adds parts of prompts, in order, with the budget that the decodes leave."""
        self.budget -= len(self.decodes)
        if rows.has_drafts:
            self.budget -= int(rows.drafts[self.decodes].sum())
        for sequence in sequences:
            if self.budget <= 0:
                break
            self.run(rows, sequence)

    def fit(self, sizes: tuple[int, ...]) -> None:
        """Cuts the last parts of prompts so that the step fills a smaller size, instead of being
        padded far to a larger one. Each part keeps a token.

        Args:
            sizes: of compiled steps, in tokens, ascending.
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
        """The plan.

        Args:
            step: its number.
            finished: groups.
            released: rows that have lost their sequence.
            rows: as they are before the step.
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
