"""Counters of the scheduler."""

import dataclasses

from jax_kvpage.serving.plan import StepPlan
from jax_kvpage.serving.request import SequenceGroup

__all__ = ["SchedulerStats"]


@dataclasses.dataclass(slots=True)
class SchedulerStats:
    """Counts since the scheduler was created.

    Attributes:
        steps: plans made.
        admissions: groups that started, including those that returned after a preemption.
        preemptions: groups that lost their memory.
        swapped: preempted groups that were to be swapped out.
        recomputed_tokens: tokens recomputed after preemptions, without those found in a cache.
        stalled: steps that sequences waited for blocks, summed over sequences.
        refused_requests: requests that `add` refused.
        refused_plans: plans that memory partly refused.
    """

    steps: int = 0
    admissions: int = 0
    preemptions: int = 0
    swapped: int = 0
    recomputed_tokens: int = 0
    stalled: int = 0
    refused_requests: int = 0
    refused_plans: int = 0

    def planned(self, plan: StepPlan) -> None:
        """Counts a plan."""
        self.steps += 1
        self.admissions += len(plan.admissions)
        self.preemptions += len(plan.preempted)
        self.swapped += len(plan.swap)
        self.stalled += plan.num_stalled

    def restarts(self, group: SequenceGroup, num_cached: int) -> None:
        """Counts the tokens that a preempted group recomputes."""
        if group.num_preemptions:
            self.recomputed_tokens += max(group.num_lost_tokens - num_cached, 0)
