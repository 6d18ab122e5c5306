"""Room for the next token of sequences that decode, and what happens when blocks run out.

Sequences that fit into their last block keep it. Those that do not get a block each while there are
any, the oldest first. The others wait, with their memory, or victims are preempted for them.
"""

import numpy as np

from jax_kvpage.serving.builder import StepBuilder
from jax_kvpage.serving.preemption import PreemptionPolicy
from jax_kvpage.serving.request import SequenceGroup
from jax_kvpage.serving.rows import Rows
from jax_kvpage.serving.running import RunningSet

__all__ = ["Growth"]


class Growth:
    """Chooses the rows that decode in a step.

    Args:
        rows: the arrays.
        running: the groups.
        policy: chooses victims.
    """

    def __init__(self, rows: Rows, running: RunningSet, policy: PreemptionPolicy) -> None:
        self._rows = rows
        self._running = running
        self._policy = policy
        self._waited = 0

    def decode(self, step: StepBuilder) -> None:
        """Fills in the rows that decode, those that grow, and the victims."""
        rows = self._rows
        short = np.flatnonzero(rows.decoding & (rows.computed + rows.drafts >= rows.room))
        if short.size or step.blocked:
            wanted = rows.computed[short] + rows.drafts[short] + 1
            blocks = -(-wanted // rows.block_tokens) - rows.room[short] // rows.block_tokens
            needed = int(blocks.sum())
            if needed > step.free and rows.drafts.any():
                rows.drafts[:] = 0
                self.decode(step)
                return
            if needed > step.free or step.blocked:
                self._under_pressure(step, short, blocks, wanted)
                return
            step.grow(short, wanted, rows.room, rows.block_tokens)
            step.free -= needed
        self._waited = 0
        step.decodes, step.decode_sequences = rows.decodes()

    def _under_pressure(
        self, step: StepBuilder, short: np.ndarray, blocks: np.ndarray, wanted: np.ndarray
    ) -> None:
        rows = self._rows
        needs = np.bincount(rows.groups_of(short), blocks, len(rows.groups)).astype(np.int64)
        waiting = self._waiting(step, needs)
        stalled = self._stalled_rows(waiting)
        deficit = int(needs.sum()) - step.free - step.coming
        if deficit > 0:
            idle = stalled.size == np.count_nonzero(rows.decoding) and not self._running.prefilling
            must = idle and step.coming <= 0
            for group in self._victims(step, needs, deficit, must):
                needs[group.index] = 0
                self._running.preempt(group)
                step.preempt(group)
                self._waited = 0
            if step.preempted:
                waiting = self._waiting(step, needs)
                stalled = self._stalled_rows(waiting)
        self._waited += stalled.size
        step.num_stalled = stalled.size
        granted = rows.decoding[short] & ~np.isin(short, stalled)
        step.grow(short[granted], wanted[granted], rows.room, rows.block_tokens)
        step.free -= int(blocks[granted].sum())
        runs = rows.decoding.copy()
        runs[stalled] = False
        step.decodes = np.flatnonzero(runs).astype(np.int32)
        step.decode_sequences = rows.at(step.decodes)

    def _waiting(self, step: StepBuilder, needs: np.ndarray) -> np.ndarray:
        """Indices of groups that wait: all from the first on whose blocks are not there."""
        everyone = self._rows.groups
        short = [everyone[index] for index in np.flatnonzero(needs).tolist()]
        ordered = sorted((g for g in short if g is not None), key=lambda group: group.order)
        left, found = step.free, []
        blocked = {group.index for group in step.blocked}
        for group in ordered:
            if group.index in blocked:
                continue
            left -= int(needs[group.index])
            if left < 0:
                found.append(group.index)
        return np.asarray(sorted(blocked | set(found)), np.int32)

    def _stalled_rows(self, waiting: np.ndarray) -> np.ndarray:
        """Decoding rows of groups that wait: the whole group does."""
        rows = np.flatnonzero(self._rows.decoding)
        return rows[np.isin(self._rows.groups_of(rows), waiting)]

    def _victims(
        self, step: StepBuilder, needs: np.ndarray, deficit: int, must: bool
    ) -> list[SequenceGroup]:
        groups = self._running.groups
        lowest = groups[-1].request.priority
        forked = {fork.parent.group.index for fork in step.forks}
        eligible = [
            group
            for group in groups[1:]
            if group.request.priority == lowest
            and group.index not in forked
            and not self._running.is_protected(group)
        ]
        if not eligible:
            return []
        indices = np.asarray([group.index for group in eligible])
        candidates = self._rows.candidates(indices, needs)
        chosen = self._policy.victims(candidates, deficit, self._waited, must)
        return [eligible[index] for index in chosen]
