"""Room for the next tokens of decoding sequences, and what happens when blocks run out.

Sequences whose tokens fit into their mapped blocks need nothing. The others get new blocks while
there are any, oldest first. After that they wait and keep their memory, or victims are preempted
for them.
"""

import dataclasses

import numpy as np

from jax_kvpage.serving.builder import StepBuilder
from jax_kvpage.serving.preemption import Candidates, PreemptionPolicy
from jax_kvpage.serving.request import SequenceGroup
from jax_kvpage.serving.rows import Rows
from jax_kvpage.serving.running import RunningSet
from jax_kvpage.serving.swap import SwapSpace

__all__ = ["Growth"]


class Growth:
    """Chooses the rows that decode in a step.

    Args:
        rows: per-row arrays.
        running: running groups.
        policy: chooses victims.
        swap: where victims may be swapped to; None recomputes them.
    """

    def __init__(
        self, rows: Rows, running: RunningSet, policy: PreemptionPolicy, swap: SwapSpace | None
    ) -> None:
        self._rows = rows
        self._running = running
        self._policy = policy
        self._swap = swap
        self._waited = 0

    def decode(self, step: StepBuilder) -> None:
        """Fills in the decoding rows, the rows that grow, and the victims."""
        rows = self._rows
        short = rows.short()
        if short.size or step.blocked:
            wanted = rows.computed[short] + rows.drafts[short] + 1
            blocks = -(-wanted // rows.block_tokens) - rows.room[short] // rows.block_tokens
            needed = int(blocks.sum())
            if needed > step.free and rows.has_drafts:
                rows.drop_drafts()
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
            for group, swaps in self._victims(step, needs, deficit, must):
                needs[group.index] = 0
                self._running.preempt(group)
                step.preempt(group, swaps)
                self._waited = 0
            if step.preempted:
                waiting = self._waiting(step, needs)
                stalled = self._stalled_rows(waiting)
        self._waited += stalled.size
        step.num_stalled = stalled.size
        runs = rows.decoding.copy()
        runs[stalled] = False
        granted = runs[short]
        step.grow(short[granted], wanted[granted], rows.room, rows.block_tokens)
        step.free -= int(blocks[granted].sum())
        step.decodes = np.flatnonzero(runs).astype(np.int32)
        step.decode_sequences = rows.at(step.decodes)

    def _waiting(self, step: StepBuilder, needs: np.ndarray) -> np.ndarray:
        """bool[groups]: the first group whose blocks are not free, and all after it, must wait."""
        rows = self._rows
        waits = np.zeros(len(needs), bool)
        waits[[group.index for group in step.blocked]] = True
        short = np.flatnonzero((needs > 0) & ~waits)
        ordered = short[np.lexsort((rows.arrival[short], rows.priority[short]))]
        waits[ordered[np.cumsum(needs[ordered]) > step.free]] = True
        return waits

    def _stalled_rows(self, waits: np.ndarray) -> np.ndarray:
        """Decoding rows of waiting groups: a group waits as a whole."""
        rows = np.flatnonzero(self._rows.decoding)
        return rows[waits[self._rows.groups_of(rows)]]

    def _victims(
        self, step: StepBuilder, needs: np.ndarray, deficit: int, must: bool
    ) -> list[tuple[SequenceGroup, bool]]:
        """Groups to preempt, and whether each is to be swapped."""
        rows, groups = self._rows, self._running.groups
        lowest = groups[-1].request.priority
        eligible = rows.preemptable & (rows.priority == lowest)
        eligible[groups[0].index] = False
        eligible[[fork.parent.group.index for fork in step.forks]] = False
        indices = np.flatnonzero(eligible)
        if not indices.size:
            return []
        candidates, swaps = self._swappable(indices, rows.candidates(indices, needs))
        chosen = self._policy.victims(candidates, deficit, self._waited, must)
        found = ((rows.groups[indices[i]], bool(swaps[i])) for i in chosen)
        return [(group, swap) for group, swap in found if group is not None]

    def _swappable(
        self, indices: np.ndarray, candidates: Candidates
    ) -> tuple[Candidates, np.ndarray]:
        """Replaces the cost of candidates that are cheaper to swap than to recompute.

        Returns:
            The candidates, and bool[g]: whether each would be swapped.
        """
        swaps = np.zeros(len(indices), bool)
        if self._swap is None:
            return candidates, swaps
        groups = (self._rows.groups[index] for index in indices.tolist())
        alone = [group is not None and group.request.slots == 1 for group in groups]
        cost = np.where(alone, self._swap.cost(candidates.cost), candidates.cost)
        swaps = cost < candidates.cost
        return dataclasses.replace(candidates, cost=np.where(swaps, cost, candidates.cost)), swaps
