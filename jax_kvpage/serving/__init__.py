"""Continuous batching on top of a pool: a scheduler that imports no JAX.

The scheduler plans steps from counts of tokens and blocks; see `Scheduler`, `Request`, `StepPlan`
and `Memory`.
"""

from jax_kvpage.serving.admission import AdmissionPolicy, ExpectedGrowth, Load, Watermark
from jax_kvpage.serving.memory import BlockBudget, Memory
from jax_kvpage.serving.plan import Admission, Fork, StepPlan
from jax_kvpage.serving.preemption import Candidates, CostAware, LastComeFirst, PreemptionPolicy
from jax_kvpage.serving.request import Request, RequestRefused, Sequence, SequenceGroup, Status
from jax_kvpage.serving.scheduler import Scheduler
from jax_kvpage.serving.stats import SchedulerStats

__all__ = [
    "Admission",
    "AdmissionPolicy",
    "BlockBudget",
    "Candidates",
    "CostAware",
    "ExpectedGrowth",
    "Fork",
    "LastComeFirst",
    "Load",
    "Memory",
    "PreemptionPolicy",
    "Request",
    "RequestRefused",
    "Scheduler",
    "SchedulerStats",
    "Sequence",
    "SequenceGroup",
    "Status",
    "StepPlan",
    "Watermark",
]
