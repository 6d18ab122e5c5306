"""Policies that choose which groups lose their memory when blocks run out.

A preempted group is recomputed from its tokens, or swapped if that takes less time. The cost of a
victim is thus the number of tokens that it has computed, or that could be computed in the time of
writing and reading it. Preempting it frees the blocks that only it holds.
"""

import dataclasses
from typing import Protocol

import numpy as np

__all__ = ["Candidates", "CostAware", "LastComeFirst", "PreemptionPolicy"]


@dataclasses.dataclass(frozen=True, slots=True)
class Candidates:
    """Groups that may be preempted: never the oldest, nor any that was preempted too often.

    Attributes:
        arrival: int64[g]: order of arrival.
        cost: int64[g]: tokens to recompute, or that could be computed during the swap.
        blocks: int64[g]: blocks that it frees, plus those that it would need in this step.
    """

    arrival: np.ndarray
    cost: np.ndarray
    blocks: np.ndarray


class PreemptionPolicy(Protocol):
    """Chooses victims."""

    def victims(self, candidates: Candidates, deficit: int, waited: int, must: bool) -> list[int]:
        """Returns indices into `candidates` of the groups to preempt; empty to let sequences wait.

        Args:
            candidates: at least one group.
            deficit: blocks that are missing beyond those free or about to become free.
            waited: steps that sequences have waited for blocks since the last preemption, summed
                over sequences.
            must: nothing can run and no blocks are about to become free, so waiting would never
                end.
        """


class LastComeFirst:
    """Preempts the last to arrive first, without waiting, as in vLLM."""

    def victims(self, candidates: Candidates, deficit: int, waited: int, must: bool) -> list[int]:
        """See `PreemptionPolicy`."""
        chosen = []
        for index in np.argsort(-candidates.arrival, kind="stable").tolist():
            chosen.append(index)
            deficit -= int(candidates.blocks[index])
            if deficit <= 0:
                break
        return chosen


class CostAware:
    """Preempts the groups that are cheapest to recompute, once waiting has cost as much.

    Sequences that find no free block first wait and keep their memory, since others end soon. As in
    the ski rental problem, they wait until the steps waited have cost as much as the victims would.

    Args:
        tokens_per_wait: cost of one sequence waiting for one step, in recomputed tokens; 0 preempts
            immediately.
    """

    def __init__(self, tokens_per_wait: float = 8.0) -> None:
        if tokens_per_wait < 0:
            raise ValueError(f"CostAware: tokens_per_wait is {tokens_per_wait}, wanted 0 or more")
        self._tokens_per_wait = tokens_per_wait

    def victims(self, candidates: Candidates, deficit: int, waited: int, must: bool) -> list[int]:
        """See `PreemptionPolicy`."""
        chosen = self._cheapest(candidates, deficit)
        if must or not self._tokens_per_wait:
            return chosen
        cost = int(candidates.cost[chosen].sum())
        return chosen if waited * self._tokens_per_wait >= cost else []

    @staticmethod
    def _cheapest(candidates: Candidates, deficit: int) -> list[int]:
        """Returns groups that cover the deficit: a single one if that costs no more."""
        cost, blocks = candidates.cost, candidates.blocks
        useful = np.flatnonzero(blocks > 0)
        if not useful.size:
            return []
        # Blocks beyond the deficit have no value now. Ties go to the last to arrive.
        value = cost[useful] / np.minimum(blocks[useful], max(deficit, 1))
        order = useful[np.lexsort((-candidates.arrival[useful], value))]
        covered = np.cumsum(blocks[order])
        several = order[: int(np.searchsorted(covered, deficit)) + 1]
        enough = order[blocks[order] >= deficit]
        if enough.size and len(several) > 1:
            single = enough[np.argmin(cost[enough])]
            if cost[single] <= cost[several].sum():
                return [int(single)]
        return [int(index) for index in several]
