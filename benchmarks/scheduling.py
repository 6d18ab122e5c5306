"""Cost of scheduling policies: simulated servers, without a model.

    python benchmarks/scheduling.py [--quick] [--json] [--data FOLDER]

Memory and concurrent sequences compared with static reservation, with the lengths of the
PagedAttention paper; tokens recomputed by the choice of victims and by admission policy, on the
Azure trace with too little memory; and a large server. FOLDER has the traces azure2023_conv.csv.gz
and mooncake_conversation.jsonl.gz (../shared/data by default); without them, their tables are left
out.
"""

from __future__ import annotations

import itertools
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import script

from jax_kvpage.serving import (
    CostAware,
    ExpectedGrowth,
    LastComeFirst,
    SimulationResult,
    StepTime,
    Watermark,
    Workload,
    azure_trace,
    mooncake_trace,
    simulate,
    synthetic,
)

__all__ = ["measure"]

# KV memory and longest sequence of OPT-13B on a GPU with 40 GB, as in the paper.
_PAPER = {"capacity_tokens": 15728, "max_seq_len": 2048, "max_num_batched_tokens": 2048}


def _row(result: SimulationResult, **labels: Any) -> dict[str, Any]:
    return labels | {
        "sequences at one time": result.running,
        "waste": result.waste,
        "tokens/s": result.throughput,
        "recomputed": result.recomputed_tokens,
        "of all computed": result.recomputed_tokens / result.computed_tokens,
        "preemptions": result.preemptions,
        "swapped": result.swapped,
        "waits": result.stalled,
        "s to first token, p50": float(np.median(result.first_token)),
        "s to end, p99": float(np.percentile(result.latency, 99)),
    }


def _reservations(count: int, azure: Workload | None) -> list[dict[str, Any]]:
    """The same memory, reserved in blocks or statically; all requests arrive at the start."""
    workloads = [synthetic(name, count, rate=math.inf) for name in ("sharegpt", "alpaca")]
    workloads += [synthetic("alpaca", count // 4, rate=math.inf, n=4)]
    if azure is not None:
        workloads.append(azure.within(2048).first(count).faster(math.inf))
    rows = []
    for workload in workloads:
        for reservation in ("blocks", "oracle", "power_of_two", "maximum"):
            if workload.n > 1 and reservation != "blocks":
                continue  # static reservation does not share
            result = simulate(
                workload,
                max_num_seqs=512,
                reservation=reservation,
                block_tokens=16 if reservation == "blocks" else 1,
                **_PAPER,
            )
            name = workload.name + (f", {workload.n} samples" if workload.n > 1 else "")
            rows.append(_row(result, workload=name, reservation=reservation))
    return rows


def _policies(count: int, azure: Workload) -> list[dict[str, Any]]:
    """Victims and admission under pressure: all requests of the trace wait from the start."""
    victims: dict[str, Callable[[], Any]] = {
        "last come first": LastComeFirst,
        "cost, at once": lambda: CostAware(0),
        "cost": CostAware,
    }
    admissions = {"watermark 1%": Watermark, "expected growth": ExpectedGrowth}
    workload = azure.within(8192).first(count).faster(math.inf)
    rows = []
    # Without a store, and with stores of about 1 and 10 GB/s: a token of an 8B model has 131 KB.
    cases = [(victim, None) for victim in victims] + [("cost", 8e3), ("cost", 8e4)]
    for capacity, admission, (victim, store) in itertools.product(
        (32768, 131072), admissions, cases
    ):
        result = simulate(
            workload,
            capacity_tokens=capacity,
            max_seq_len=8192,
            max_num_seqs=512,
            max_num_batched_tokens=2048,
            drain_steps=1,
            preemption=victims[victim](),
            admission=admissions[admission](),
            swap_tokens_per_second=store,
        )
        about = {"tokens": capacity, "admission": admission, "victims": victim}
        about["store, tokens/s"] = "none" if store is None else f"{store:.0f}"
        rows.append(_row(result, **about))
    return rows


def _large(count: int, workloads: list[Workload]) -> list[dict[str, Any]]:
    """Thousands of slots. The last column is the time for scheduling and simulation."""
    rows = []
    for workload in workloads:
        begin = time.process_time()
        result = simulate(
            workload.within(32768).repeated(count).faster(math.inf),
            capacity_tokens=4 << 20,
            max_seq_len=32768,
            max_num_seqs=4096,
            max_num_batched_tokens=16384,
            drain_steps=1,
            step_time=StepTime(fixed=9e-3, per_token=8e-6, per_context_token=12e-9),
        )
        seconds = time.process_time() - begin
        rows.append(
            _row(result, workload=workload.name)
            | {"requests": result.finished, "ms of simulation a step": seconds / result.steps * 1e3}
        )
    return rows


def measure(quick: bool, data: str) -> dict[str, Any]:
    """Measures all tables.

    Args:
        quick: fewer requests.
        data: folder of the traces.
    """
    count = 300 if quick else 2000
    folder = pathlib.Path(data)
    azure = mooncake = None
    if folder.is_dir():
        azure, mooncake = azure_trace(folder), mooncake_trace(folder)
    else:
        print(f"absent: the traces ({folder})", file=sys.stderr)
    tables = {"reservation": _reservations(count, azure)}
    workloads = [synthetic("sharegpt", 10_000, rate=math.inf)]
    if azure is not None and mooncake is not None:
        tables["policies"] = _policies(300 if quick else 6000, azure)
        workloads += [azure, mooncake]
    tables["large"] = _large(2000 if quick else 100_000, workloads)
    return {"tables": tables}


if __name__ == "__main__":
    script.run(__doc__, measure, data="../shared/data")
