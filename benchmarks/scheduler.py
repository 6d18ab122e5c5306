"""Cost of the scheduler per step: steady decoding, admissions, and shortage of blocks.

    python benchmarks/scheduler.py [--quick] [--json]

CPU time of `Scheduler.schedule`, without a model or a pool: plans are carried out on a counted
budget, which is not timed. "steady" steps decode all sequences, one in 16 of which grows by a
block. In "turnover" steps, about one in 200 sequences ends per step and others are admitted, by
expected growth or by a watermark. In "short" steps, sequences wait for blocks or are preempted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import script

from jax_kvpage.serving import AdmissionPolicy, BlockBudget, Request, Scheduler, StepPlan, Watermark

__all__ = ["measure"]

_BLOCK, _MAX_SEQ_LEN = 16, 4096


def _steps(
    running: int,
    blocks: int,
    lengths: Iterator[tuple[int, int]],
    requests: int,
    admission: AdmissionPolicy | None = None,
) -> Iterator[tuple[float, StepPlan]]:
    """Yields seconds and plan of each step in which most rows are in use."""
    memory = BlockBudget(blocks, _BLOCK, _MAX_SEQ_LEN, running)
    scheduler = Scheduler(
        memory,
        max_num_seqs=running,
        max_num_batched_tokens=running + 8192,
        admission=admission,
    )
    for i in range(requests):
        prompt, output = next(lengths)
        scheduler.add(Request(request_id=i, num_prompt_tokens=prompt, max_tokens=output))
    while scheduler.has_unfinished:
        begin = time.thread_time()
        plan = scheduler.schedule()
        seconds = time.thread_time() - begin
        memory.carry_out(plan)
        if scheduler.num_running > 0.8 * running:
            yield seconds, plan


def _steady(running: int, steps: int) -> list[float]:
    lengths = ((100 + i % _BLOCK, 2048) for i in range(running))
    found = []
    for seconds, plan in _steps(running, running * 256, lengths, running):
        if plan.num_decodes == running:
            found.append(seconds)
        if len(found) == steps:
            break
    return found


def _turnover(running: int, steps: int, admission: AdmissionPolicy | None = None) -> list[float]:
    requests = running * 4
    lengths = ((100 + 7 * i % 300, 2 + 37 * i % 400) for i in range(requests))
    found = []
    for seconds, plan in _steps(running, running * 256, lengths, requests, admission):
        if plan.admissions:
            found.append(seconds)
        if len(found) == steps:
            break
    return found


def _short(running: int, steps: int) -> list[float]:
    lengths = ((100 + 7 * i % 300, 500 + 37 * i % 400) for i in range(running * 4))
    found = []
    for seconds, plan in _steps(running, running * 32, lengths, running * 4, Watermark(0.0)):
        if plan.num_stalled or plan.preempted:
            found.append(seconds)
        if len(found) == steps:
            break
    return found


def measure(quick: bool) -> dict[str, Any]:
    """Measures one table; times are medians and 99th percentiles."""
    steps = 100 if quick else 1000
    rows = []
    kinds = {
        "steady": _steady,
        "turnover": _turnover,
        "turnover, watermark": lambda *sizes: _turnover(*sizes, Watermark()),
        "short": _short,
    }
    for kind, run in kinds.items():
        for running in (64, 256, 1024, 2048):
            times = run(running, steps)
            rows.append(
                {
                    "steps": kind,
                    "running": running,
                    "us a step": statistics.median(times) * 1e6,
                    "us, p99": sorted(times)[int(len(times) * 0.99)] * 1e6,
                    "timed": len(times),
                }
            )
    return {"tables": {"scheduler": rows}}


if __name__ == "__main__":
    script.run(__doc__, measure)
