"""The simulated server: its reports, and the scheduler's promises on larger workloads."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest

from jax_kvpage.serving import (
    CostAware,
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

_AT_ONCE = math.inf


def _run(workload: Workload, **options: Any) -> SimulationResult:
    options = {
        "capacity_tokens": 16384,
        "max_seq_len": 2048,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 2048,
    } | options
    return simulate(workload, **options)


def _workload(prompts: list[int], outputs: list[int], n: int = 1) -> Workload:
    return Workload("test", np.zeros(len(prompts)), np.asarray(prompts), np.asarray(outputs), n)


def test_one_request_by_hand() -> None:
    time = StepTime(fixed=1.0, per_token=0.1, per_context_token=0.01)
    result = _run(_workload([20], [3]), step_time=time)
    # 20 tokens, then one with context 21 and one with 22; the third token is not fed back.
    assert result.seconds == pytest.approx((1 + 2 + 0.2) + (1 + 0.1 + 0.21) + (1 + 0.1 + 0.22))
    assert result.first_token.tolist() == pytest.approx([3.2])
    assert result.latency.tolist() == pytest.approx([result.seconds])
    assert (result.steps, result.finished, result.output_tokens) == (3, 1, 3)
    assert result.computed_tokens == 22
    # Two blocks throughout, holding 20 to 22 tokens.
    stored = (20 * 3.2 + 21 * 1.31 + 22 * 1.32) / result.seconds
    assert result.waste == pytest.approx(1 - stored / 32)
    assert result.throughput == pytest.approx(3 / result.seconds)


def test_a_request_that_can_never_run() -> None:
    result = _run(_workload([20, 5000], [3, 3]))
    assert (result.finished, result.refused) == (1, 1)


def test_samples_share_their_prompt() -> None:
    alone = _run(_workload([1000] * 8, [50] * 8), capacity_tokens=4096)
    group = _run(_workload([1000] * 2, [50] * 2, n=4), capacity_tokens=4096)
    assert group.running > 1.9 * alone.running
    assert group.output_tokens == alone.output_tokens
    assert group.waste < 0.05


@pytest.mark.parametrize("name", ["sharegpt", "alpaca"])
def test_against_static_reservation(name: str) -> None:
    workload = synthetic(name, 150, rate=_AT_ONCE, max_seq_len=1024)
    capacity = 8192 if name == "sharegpt" else 2048
    paged = _run(workload, capacity_tokens=capacity, max_seq_len=1024)
    for reservation, factor in (("maximum", 2.5), ("power_of_two", 1.8), ("oracle", 1.3)):
        static = _run(
            workload,
            capacity_tokens=capacity,
            max_seq_len=1024,
            reservation=reservation,
            block_tokens=1,
        )
        assert static.recomputed_tokens == 0
        if reservation == "maximum":  # all of the memory is in use
            assert static.running == pytest.approx(capacity // 1024, rel=0.05)
        assert static.finished == paged.finished == 150
        assert paged.running > factor * static.running, reservation
        assert paged.throughput > static.throughput
    if name == "sharegpt":
        assert paged.waste < 0.04


def test_victims_by_cost() -> None:
    """Lengths like those of the Azure trace: long prompts, a few of which fill the memory."""
    random = np.random.default_rng(3)
    prompts = random.lognormal(np.log(900), 0.9, 400).astype(int).clip(1, 6000)
    outputs = random.lognormal(np.log(150), 0.8, 400).astype(int).clip(1, 1000)
    workload = _workload(prompts.tolist(), outputs.tolist())
    results = {
        name: _run(
            workload,
            capacity_tokens=24576,
            max_seq_len=8192,
            preemption=policy,
            admission=Watermark(),
        )
        for name, policy in (("last", LastComeFirst()), ("cost", CostAware()))
    }
    assert 0 < results["cost"].recomputed_tokens < results["last"].recomputed_tokens / 2
    assert results["cost"].throughput > 0.98 * results["last"].throughput


def test_a_store_below_memory() -> None:
    """Single-sequence requests are swapped if that is faster, and nothing is computed twice."""
    workload = synthetic("sharegpt", 300, rate=_AT_ONCE)
    without, slow, fast = (
        _run(workload, capacity_tokens=12288, admission=Watermark(0.0), swap_tokens_per_second=rate)
        for rate in (None, 1e3, 1e6)
    )
    assert without.swapped == 0
    assert slow.swapped == 0
    assert slow.recomputed_tokens == without.recomputed_tokens > 0
    assert fast.swapped == fast.preemptions > 0
    assert fast.recomputed_tokens == 0
    assert fast.finished == without.finished == len(workload)
    samples = dataclasses.replace(workload, n=2)
    shared = _run(
        samples, capacity_tokens=12288, admission=Watermark(0.0), swap_tokens_per_second=1e6
    )
    assert shared.preemptions > shared.swapped == 0


def test_lengths_have_the_means_of_the_paper() -> None:
    for name, prompt, output in (("sharegpt", 161.31, 337.99), ("alpaca", 19.31, 58.45)):
        workload = synthetic(name, 20000, rate=2.0, seed=1)
        assert workload.prompts.mean() == pytest.approx(prompt, rel=0.15)
        assert workload.outputs.mean() == pytest.approx(output, rel=0.15)
        assert workload.arrivals[-1] == pytest.approx(10000, rel=0.05)
        assert (workload.prompts + workload.outputs).max() <= 2048
    with pytest.raises(ValueError, match="sharegpt, alpaca"):
        synthetic("squad", 1, rate=1.0)


def test_traces(tmp_path: pathlib.Path) -> None:
    with gzip.open(tmp_path / "azure2023_conv.csv.gz", "wt") as file:
        file.write("TIMESTAMP,ContextTokens,GeneratedTokens\n")
        file.write("2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n")
    with gzip.open(tmp_path / "mooncake_conversation.jsonl.gz", "wt") as file:
        for second, length in ((0, 10), (3, 20)):
            row = {"timestamp": 1000 * second, "input_length": length, "output_length": 5}
            file.write(json.dumps(row) + "\n")
    azure, mooncake = azure_trace(tmp_path), mooncake_trace(tmp_path)
    assert azure.arrivals.tolist() == pytest.approx([0.0, 4.314579])
    assert (azure.prompts.tolist(), azure.outputs.tolist()) == ([374, 396], [44, 109])
    assert mooncake.arrivals.tolist() == [0.0, 3.0]
    assert len(azure.within(450)) == 1
    assert len(azure.first(1)) == 1
    again = mooncake.repeated(5)
    assert again.prompts.tolist() == [10, 20, 10, 20, 10]
    assert again.arrivals.tolist() == [0, 3, 3, 6, 6]
    assert again.faster(3).arrivals.tolist() == [0, 1, 1, 2, 2]
