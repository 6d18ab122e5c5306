"""Continuous batching on top of a pool: an engine, and a scheduler whose modules do not use JAX.

`Scheduler` plans steps (`StepPlan`) from token and block counts (`Memory`); `ReplicatedScheduler`
plans them for several replicas. `Engine` runs the plans with a model on a `KVPool`. Names that need
JAX are imported on first use. `simulate` runs the scheduler on a `Workload` without a model, to
compare policies and sizes.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jax_kvpage.serving.admission import AdmissionPolicy, ExpectedGrowth, Load, Watermark
from jax_kvpage.serving.beams import BeamSearchParams
from jax_kvpage.serving.memory import BlockBudget, Memory
from jax_kvpage.serving.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jax_kvpage.serving.params import SamplingParams
from jax_kvpage.serving.plan import Admission, Fork, StepPlan
from jax_kvpage.serving.preemption import Candidates, CostAware, LastComeFirst, PreemptionPolicy
from jax_kvpage.serving.replicas import ReplicatedScheduler
from jax_kvpage.serving.request import Request, RequestRefused, Sequence, SequenceGroup, Status
from jax_kvpage.serving.scheduler import Scheduler
from jax_kvpage.serving.simulation import Reservation, SimulationResult, StepTime, simulate
from jax_kvpage.serving.stats import SchedulerStats
from jax_kvpage.serving.structured import StructuredOutputsParams
from jax_kvpage.serving.swap import Fetched, SwapSpace
from jax_kvpage.serving.workloads import Workload, azure_trace, mooncake_trace, synthetic

if TYPE_CHECKING:
    from jax_kvpage.serving.engine import (
        AsyncEngine,
        DraftModel,
        Engine,
        EngineConfig,
        EngineStats,
        SequenceMemory,
        Step,
    )

_NEED_JAX = (
    "AsyncEngine",
    "DraftModel",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "SequenceMemory",
    "Step",
)

__all__ = [
    "Admission",
    "AdmissionPolicy",
    "AsyncEngine",
    "BeamSearchParams",
    "BlockBudget",
    "Candidates",
    "CompletionOutput",
    "CostAware",
    "DraftModel",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "ExpectedGrowth",
    "Fetched",
    "Fork",
    "LastComeFirst",
    "Load",
    "Logprob",
    "Memory",
    "PreemptionPolicy",
    "ReplicatedScheduler",
    "Request",
    "RequestMetrics",
    "RequestOutput",
    "RequestRefused",
    "Reservation",
    "SamplingParams",
    "Scheduler",
    "SchedulerStats",
    "Sequence",
    "SequenceGroup",
    "SequenceMemory",
    "SimulationResult",
    "Status",
    "Step",
    "StepPlan",
    "StepTime",
    "StructuredOutputsParams",
    "SwapSpace",
    "Watermark",
    "Workload",
    "azure_trace",
    "mooncake_trace",
    "simulate",
    "synthetic",
]


def __getattr__(name: str) -> Any:
    if name in _NEED_JAX:
        return getattr(importlib.import_module("jax_kvpage.serving.engine"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
