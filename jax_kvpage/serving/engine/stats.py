"""Counters of the engine."""

import dataclasses

__all__ = ["EngineStats", "SequenceMemory"]


@dataclasses.dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the engine was made or warmed up.

    Attributes:
        running: requests that have memory now.
        waiting: requests in the queue now.
        steps: steps run.
        drafted: speculated tokens that were verified.
        accepted: speculated tokens that were accepted.
        failures: steps that failed, including those that succeeded when retried.
        generations: new generations of caches after failures.
        preemptions: times that a request lost its memory.
        swapped: preemptions in which the tokens went to the pool's store.
        stalled: steps that sequences waited for blocks, summed over sequences.
        programs: step programs compiled.
        compile_seconds: time spent tracing and compiling them, including those of a draft model.
    """

    running: int
    waiting: int
    steps: int
    drafted: int
    accepted: int
    failures: int
    generations: int
    preemptions: int
    swapped: int
    stalled: int
    programs: int
    compile_seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class SequenceMemory:
    """The memory of a running sequence.

    Attributes:
        request_id: id of its request.
        index: index of the continuation.
        num_tokens: tokens whose keys and values are stored.
        num_reserved: tokens that its blocks have room for; shared blocks count for each sequence.
    """

    request_id: object
    index: int
    num_tokens: int
    num_reserved: int
