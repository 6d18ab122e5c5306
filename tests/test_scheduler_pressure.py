"""The scheduler when memory is short: growth, victims, waits and refusals, against a plain
model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scheduler_model import small_server

from jax_kvpage.serving import CostAware, ExpectedGrowth, LastComeFirst, Watermark


def test_a_request_ends_where_memory_does() -> None:
    server = small_server(capacity=4)
    group = server.add(num_prompt_tokens=20, max_tokens=500)
    server.run()
    assert group.sequences[0].finish_reason == "capacity"
    assert server.known[group.sequences[0]] == 4 * 16 + 1


@pytest.mark.parametrize("policy", [CostAware(), CostAware(0), LastComeFirst()])
@pytest.mark.parametrize("drain", [0, 1, 3])
def test_pressure(policy: Any, drain: int) -> None:
    server = small_server(capacity=30, drain=drain, preemption=policy, admission=Watermark(0.0))
    for i in range(40):
        server.add(num_prompt_tokens=20 + i, max_tokens=100, n=1 + 2 * (i % 3 == 0))
    server.run()
    assert server.scheduler.stats.preemptions > 0
    assert max(g.num_preemptions for g in server.groups) <= 4


def test_one_preempted_too_often_comes_back_with_its_maximum() -> None:
    server = small_server(capacity=12, preemption=LastComeFirst(), max_preemptions=1)
    for _ in range(3):
        server.add(num_prompt_tokens=40, max_tokens=100)
    rooms = []
    while server.scheduler.has_unfinished:
        plan = server.step()
        rooms += [a.num_tokens for a in plan.admissions if a.sequence.group.num_preemptions]
    assert rooms
    assert set(rooms) == {139}


def test_the_oldest_is_never_preempted() -> None:
    server = small_server(capacity=12, preemption=CostAware(0))
    oldest = server.add(num_prompt_tokens=20, max_tokens=150)
    for _ in range(3):
        server.add(num_prompt_tokens=40, max_tokens=100)
    server.run()
    assert oldest.num_preemptions == 0
    assert server.scheduler.stats.preemptions > 0


def test_waiting_for_blocks_before_preempting() -> None:
    """A group that ends soon is waited for, and nothing is computed twice."""
    results = {}
    for name, policy in (("wait", CostAware()), ("at once", CostAware(0))):
        server = small_server(capacity=8, preemption=policy, admission=Watermark(0.0))
        server.add(num_prompt_tokens=50, max_tokens=14)
        server.add(num_prompt_tokens=60, max_tokens=20)
        server.run()
        results[name] = server.scheduler.stats
    assert results["wait"].preemptions == 0
    assert results["wait"].stalled > 0
    assert results["at once"].recomputed_tokens > 0


def test_refusals_of_memory_lose_nothing() -> None:
    for seed in range(5):
        server = small_server(capacity=30, drain=seed % 3)
        server.random.seed(seed)
        for i in range(20):
            server.add(num_prompt_tokens=20 + i, max_tokens=60, n=1 + 2 * (i % 3 == 0))
        server.run(refusals=0.3)
        assert server.scheduler.stats.refused_plans > 0
        assert {s.finish_reason for g in server.groups for s in g.sequences} == {"length"}


def test_memory_that_always_refuses_ends_requests() -> None:
    server = small_server()
    groups = [server.add(num_prompt_tokens=20, max_tokens=5) for _ in range(3)]
    server.run(refusals=1.0)
    assert {g.sequences[0].finish_reason for g in groups} == {"capacity"}


def test_a_refusal_is_not_repeated_while_memory_is_the_same() -> None:
    server = small_server(capacity=40)
    server.add(num_prompt_tokens=50, max_tokens=100)
    server.step()
    server.add(num_prompt_tokens=50, max_tokens=100)
    server.step(refusals=1.0)
    plans = [server.step() for _ in range(10)]
    admitted = [i for i, plan in enumerate(plans) if plan.admissions]
    assert admitted
    assert admitted[0] > 0
    server.run()


def test_survival() -> None:
    policy = ExpectedGrowth()
    produced, remaining = np.asarray([0, 0, 16]), np.asarray([999, 10, 999])
    # Without a history, all lengths up to the limit, or at most 512, are equally likely.
    assert policy.survival(produced, remaining)[:2, 1].tolist() == [1 - 4 / 512, 1 - 4 / 10]
    for length in (2, 10, 20, 40):
        policy.observe(length)
    likely = policy.survival(produced, remaining)
    assert likely[0, :4].tolist() == [1.0, 0.75, 0.5, 0.25]  # 1, 4, 16, 32 tokens ahead
    assert likely[1, :4].tolist() == [1.0, 0.75, 0.0, 0.0]
    assert likely[2, :3].tolist() == [1.0, 0.5, 0.5]
    with pytest.raises(ValueError, match="deviations"):
        ExpectedGrowth(-1)


def test_expected_growth_keeps_room() -> None:
    preemptions = {}
    for name, admission in (("growth", ExpectedGrowth()), ("free", Watermark(0.0))):
        server = small_server(capacity=40, admission=admission, preemption=CostAware(0))
        for _ in range(40):
            server.add(num_prompt_tokens=30, max_tokens=120)
        server.run()
        preemptions[name] = server.scheduler.stats.preemptions
    assert preemptions["growth"] * 2 < preemptions["free"]
