"""Collects the counters of an engine's parts."""

from jax_kvpage.serving.engine.guessing import Guesser
from jax_kvpage.serving.engine.programs import Programs
from jax_kvpage.serving.engine.runner import Runner
from jax_kvpage.serving.engine.scheduling import AnyScheduler
from jax_kvpage.serving.engine.stats import EngineStats

__all__ = ["collect"]


def collect(
    scheduler: AnyScheduler, runner: Runner, programs: Programs, guesser: Guesser
) -> EngineStats:
    """Returns the counters of an engine's parts."""
    return EngineStats(
        running=scheduler.num_running,
        waiting=scheduler.num_waiting,
        steps=runner.steps,
        drafted=runner.drafted,
        accepted=runner.accepted,
        failures=runner.failures,
        generations=runner.generations,
        preemptions=scheduler.stats.preemptions,
        swapped=scheduler.stats.swapped,
        stalled=scheduler.stats.stalled,
        programs=programs.num_compiled,
        compile_seconds=programs.compile_seconds + guesser.compile_seconds,
    )
