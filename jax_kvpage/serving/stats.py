"""What a scheduler has done so far."""

import dataclasses

__all__ = ["SchedulerStats"]


@dataclasses.dataclass(slots=True)
class SchedulerStats:
    """Counts since the scheduler was made.

    Attributes:
        steps: plans.
        admissions: groups that started, those that came back included.
        preemptions: groups that lost their memory.
        recomputed_tokens: tokens to compute again after that, without those found in a cache.
        stalled: steps that sequences waited for blocks, added up over sequences.
        refused_requests: requests that `add` refused.
        refused_plans: plans that memory refused in part.
    """

    steps: int = 0
    admissions: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    stalled: int = 0
    refused_requests: int = 0
    refused_plans: int = 0
