"""Continuous batching on top of a pool: a scheduler that imports no JAX, and its simulation.

`Scheduler` plans steps (`StepPlan`) from counts of tokens and of blocks (`Memory`). `simulate` runs
it on a `Workload` without a model, to compare policies and to plan sizes.
"""

from jax_kvpage.serving.admission import AdmissionPolicy, ExpectedGrowth, Load, Watermark
from jax_kvpage.serving.memory import BlockBudget, Memory
from jax_kvpage.serving.plan import Admission, Fork, StepPlan
from jax_kvpage.serving.preemption import Candidates, CostAware, LastComeFirst, PreemptionPolicy
from jax_kvpage.serving.request import Request, RequestRefused, Sequence, SequenceGroup, Status
from jax_kvpage.serving.scheduler import Scheduler
from jax_kvpage.serving.simulation import Reservation, SimulationResult, StepTime, simulate
from jax_kvpage.serving.stats import SchedulerStats
from jax_kvpage.serving.workloads import Workload, azure_trace, mooncake_trace, synthetic

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
    "Reservation",
    "Scheduler",
    "SchedulerStats",
    "Sequence",
    "SequenceGroup",
    "SimulationResult",
    "Status",
    "StepPlan",
    "StepTime",
    "Watermark",
    "Workload",
    "azure_trace",
    "mooncake_trace",
    "simulate",
    "synthetic",
]
