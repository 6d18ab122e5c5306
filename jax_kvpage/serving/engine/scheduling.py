"""Creates the scheduler of an engine, for one or several replicas."""

from collections.abc import Callable
from typing import Any

from jax_kvpage.serving.engine.config import EngineConfig
from jax_kvpage.serving.engine.pool_memory import PoolMemory
from jax_kvpage.serving.replicas import ReplicatedScheduler
from jax_kvpage.serving.request import SequenceGroup
from jax_kvpage.serving.scheduler import Scheduler
from jax_kvpage.serving.swap import SwapSpace

__all__ = ["AnyScheduler", "make_scheduler"]

AnyScheduler = Scheduler | ReplicatedScheduler


def make_scheduler(
    config: EngineConfig,
    memory: PoolMemory,
    rows: int,
    find_prefix: Callable[[SequenceGroup, int], tuple[int, int]],
    swap: SwapSpace | None,
) -> AnyScheduler:
    """Creates a scheduler for a pool.

    Args:
        config: configuration of the engine.
        memory: memory of the pool.
        rows: maximum sequences of a replica at one time.
        find_prefix: see `ReplicatedScheduler`.
        swap: see `Scheduler`; None for a pool with several replicas.

    Raises:
        ValueError: prefix caching is requested, but the pool does not support it.
    """
    if config.prefix_caching and not memory.shares:
        raise ValueError(
            "Engine: the pool's sequences are spread over a mesh (sequence_axis), which has no "
            "prefix cache: give EngineConfig(prefix_caching=False), or use a pool on one device or "
            "with its heads spread (axis=...)"
        )
    find = find_prefix if config.prefix_caching else None
    options: dict[str, Any] = {
        "max_num_seqs": rows,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "step_sizes": {tokens for tokens, size in config.shapes(rows) if size >= rows},
        "preemption": config.preemption,
        "admission": config.admission,
        "max_num_waiting": config.max_num_waiting,
    }
    if len(memory.replicas) > 1:
        assert swap is None
        return ReplicatedScheduler(memory.replicas, find_prefix=find, **options)
    alone = None if find is None else lambda group: find(group, 0)
    return Scheduler(memory.replicas[0], find_prefix=alone, swap=swap, **options)
