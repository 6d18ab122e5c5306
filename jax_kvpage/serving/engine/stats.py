"""What an engine has done so far."""

import dataclasses
from typing import Self

from jax_kvpage.serving.engine.programs import Programs
from jax_kvpage.serving.engine.runner import Runner
from jax_kvpage.serving.scheduler import Scheduler

__all__ = ["EngineStats"]


@dataclasses.dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the engine was made or warmed up.

    Attributes:
        running: requests that have memory now.
        waiting: requests in the queue now.
        steps: steps run.
        failures: steps that failed, those run again with success included.
        generations: new generations of caches after failures.
        preemptions: times that a request lost its memory.
        stalled: steps that sequences waited for blocks, added up over sequences.
        programs: step programs compiled.
    """

    running: int
    waiting: int
    steps: int
    failures: int
    generations: int
    preemptions: int
    stalled: int
    programs: int

    @classmethod
    def of(cls, scheduler: Scheduler, runner: Runner, programs: Programs) -> Self:
        """A snapshot."""
        return cls(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            steps=runner.steps,
            failures=runner.failures,
            generations=runner.generations,
            preemptions=scheduler.stats.preemptions,
            stalled=scheduler.stats.stalled,
            programs=programs.num_compiled,
        )
