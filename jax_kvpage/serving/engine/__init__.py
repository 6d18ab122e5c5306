"""The engine: runs the scheduler's plans with a model on a pool."""

from jax_kvpage.serving.engine.async_engine import AsyncEngine
from jax_kvpage.serving.engine.config import EngineConfig
from jax_kvpage.serving.engine.draft import DraftModel
from jax_kvpage.serving.engine.engine import Engine
from jax_kvpage.serving.engine.programs import Step
from jax_kvpage.serving.engine.stats import EngineStats, SequenceMemory

__all__ = [
    "AsyncEngine",
    "DraftModel",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "SequenceMemory",
    "Step",
]
