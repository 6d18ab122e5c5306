"""Choice of the groups that lose their memory when blocks run out.

A preempted group is computed again from its tokens, or swapped where that takes less time. So a
victim costs the tokens that it has computed, or as many as could be computed while it is written
and read. It yields the blocks that only it holds.
"""

import dataclasses
from typing import Protocol

import numpy as np

__all__ = ["Candidates", "CostAware", "LastComeFirst", "PreemptionPolicy"]


@dataclasses.dataclass(frozen=True, slots=True)
class Candidates:
    """Groups that may be preempted: never the oldest, nor one that was preempted too often.

    Attributes:
        arrival: int64[g]: order of arrival.
        cost: int64[g]: tokens to compute again, or that could be computed while it is swapped.
        blocks: int64[g]: blocks that come free, and those that it would need in this step.
    """

    arrival: np.ndarray
    cost: np.ndarray
    blocks: np.ndarray


class PreemptionPolicy(Protocol):
    """Chooses victims."""

    def victims(self, candidates: Candidates, deficit: int, waited: int, must: bool) -> list[int]:
        """Indices into `candidates` of the groups to preempt; none to let sequences wait.

        Args:
            candidates: at least one group.
            deficit: blocks that are missing beyond those that are free or coming free.
            waited: steps that sequences have waited for blocks since the last preemption, added up
                over sequences.
            must: nothing can run and nothing comes free: waiting would not end.
        """


class LastComeFirst:
    """The last to arrive is preempted first, at once, as in vLLM."""

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
    """Victims that cost the fewest tokens to compute again, and only once waiting has cost as much.

    Sequences that find no block first wait with their memory, since others end soon. How long
    follows the rule for renting or buying: until the steps they have waited cost as much as the
    victims would.

    Args:
        tokens_per_wait: what a sequence's waiting for one step costs, in tokens computed again; 0
            preempts at once.
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
        """Groups that cover the deficit: one if it costs no more than several of the best value."""
        cost, blocks = candidates.cost, candidates.blocks
        useful = np.flatnonzero(blocks > 0)
        if not useful.size:
            return []
        # Blocks beyond the deficit are worth nothing now. Of equals, the last to arrive.
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
