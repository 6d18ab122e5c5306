"""Plans that repeat the previous one equal those that the scheduler makes without repeating."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from covering import num_cases
from scheduler_model import PlainMemory, PlainSwap, Server

from jax_kvpage.serving import ExpectedGrowth, SequenceGroup, Status, StepPlan
from jax_kvpage.serving.admission import Load
from jax_kvpage.serving.rows import Rows


def _cached(group: SequenceGroup) -> tuple[int, int]:
    """Of some prompts nothing is cached, of others the half, of others all."""
    tokens = group.request.num_prompt_tokens
    return (0, tokens // 2, tokens)[tokens % 3], 0


def _server(seed: int) -> Server:
    return Server(
        PlainMemory(40, 16, 256, 9, 1),
        seed,
        PlainSwap(seed) if seed % 2 else None,
        max_num_seqs=6,
        max_num_batched_tokens=24,
        admission=ExpectedGrowth(),
        max_num_waiting=50,
        find_prefix=_cached,
    )


def _fields(plan: StepPlan) -> dict[str, Any]:
    """A plan in terms that two servers have in common."""

    def named(sequences: Any) -> list[tuple[object, int]]:
        return [(each.group.request.request_id, each.index) for each in sequences]

    def groups(found: tuple[SequenceGroup, ...]) -> list[object]:
        return [group.request.request_id for group in found]

    arrays = ("extend_rows", "extend_tokens", "rows", "begins", "counts", "samples")
    return {name: getattr(plan, name).tolist() for name in arrays} | {
        "step": plan.step,
        "finished": groups(plan.finished),
        "preempted": groups(plan.preempted),
        "release": plan.release,
        "forks": [(named([fork.parent]), named(fork.children), fork.room) for fork in plan.forks],
        "admissions": [
            (named([each.sequence]), each.num_tokens, each.num_cached) for each in plan.admissions
        ],
        "sequences": named(plan.sequences),
        "num_decodes": plan.num_decodes,
        "ending": plan.ending,
        "num_stalled": plan.num_stalled,
        "free_blocks": plan.free_blocks,
    }


def _count_repeats(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """Returns a list to which every repeated plan of a server is added."""
    repeat: Callable[[], StepPlan | None] = server.scheduler.repeat
    repeated: list[StepPlan] = []

    def counted() -> StepPlan | None:
        plan = repeat()
        if plan is not None:
            repeated.append(plan)
        return plan

    monkeypatch.setattr(server.scheduler, "repeat", counted)
    return repeated


def _act(server: Server, chance: random.Random, refuses: bool = True) -> list[dict[str, Any]]:
    """Adds, cancels or finishes requests, lets time pass, or runs some steps; returns the plans."""
    action = chance.randrange(10)
    live = [group for group in server.groups if group.status is not Status.FINISHED]
    if action < 3:
        server.add(
            num_prompt_tokens=chance.randint(1, 120),
            max_tokens=chance.randint(1, 90),
            n=chance.choice([1, 1, 1, 3]),
            priority=chance.choice([0, 0, 1]),
            deadline=chance.choice([None, None, server.now + 20]),
            prefix_key=chance.choice([None, None, "a"]),
            lockstep=chance.random() < 0.4,
            wanted=chance.randint(1, 150),
        )
    elif action == 3 and live:
        server.scheduler.cancel(chance.choice(live))
    elif action == 4 and live:
        server.scheduler.finish(chance.choice(chance.choice(live).live), "gone")
    elif action == 5:
        server.now += chance.uniform(0, 10)
    refusals, drafts = chance.choice([0.0, 0.0, 0.4 * refuses]), chance.choice([0, 0, 0, 3])
    return [
        _fields(server.step(refusals, drafts if chance.random() < 0.5 else 0))
        for _ in range(chance.randrange(12))
    ]


@pytest.mark.parametrize("seed", range(num_cases(12, 100)))
def test_repeated_plans_equal_new_ones(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    repeats, plans_anew = _server(seed), _server(seed)
    repeated = _count_repeats(repeats, monkeypatch)
    monkeypatch.setattr(plans_anew.scheduler, "repeat", lambda: None)
    chances = random.Random(seed), random.Random(seed)
    for _ in range(150):
        assert _act(repeats, chances[0]) == _act(plans_anew, chances[1])
    assert repeats.scheduler.stats == plans_anew.scheduler.stats
    assert len(repeated) > 40


class _Failing(ExpectedGrowth):
    """Raises now and then."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.chance = chance
        self.raised = 0

    def admits(self, load: Load, group: SequenceGroup, blocks: int) -> bool:
        self.fail()
        return super().admits(load, group, blocks)

    def fail(self) -> None:
        if self.chance.random() < 0.3:
            self.raised += 1
            raise _Failed


class _Failed(Exception):
    pass


@pytest.mark.parametrize("seed", range(num_cases(8, 100)))
def test_a_plan_that_raises_changes_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy and the prefix cache raise at random; the next attempt gives the plan as usual."""
    policy = _Failing(random.Random(seed))

    def find(group: SequenceGroup) -> tuple[int, int]:
        policy.fail()
        return _cached(group)

    servers = [
        Server(
            PlainMemory(40, 16, 256, 9, 1),
            seed,
            max_num_seqs=6,
            max_num_batched_tokens=24,
            admission=admission,
            max_num_waiting=50,
            find_prefix=found,
        )
        for admission, found in ((policy, find), (ExpectedGrowth(), _cached))
    ]
    schedule = servers[0].scheduler.schedule

    def insist(now: float = 0.0) -> StepPlan:
        while True:
            with contextlib.suppress(_Failed):
                return schedule(now)

    monkeypatch.setattr(servers[0].scheduler, "schedule", insist)
    chances = random.Random(seed), random.Random(seed)
    for _ in range(100):
        plans = [_act(*pair, refuses=False) for pair in zip(servers, chances, strict=True)]
        assert plans[0] == plans[1]
    assert policy.raised > 10


def test_a_steady_decode_is_mostly_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    server = _server(0)
    repeated = _count_repeats(server, monkeypatch)
    for _ in range(4):
        server.add(num_prompt_tokens=5, max_tokens=64)
    while server.scheduler.has_unfinished:
        server.step()
    # Of 63 steps, one in 16 needs blocks; the first computes prompts, the last ends sequences.
    assert len(repeated) > 55
    assert all(np.array_equal(plan.counts, np.ones(4)) for plan in repeated)


def test_tokens_are_counted_for_the_rows_that_decoded() -> None:
    rows = Rows(4, 16)
    rows.set_decoding(0, True)
    rows.set_decoding(1, True)
    rows.advance_decodes()
    rows.advance_decodes()
    rows.set_decoding(1, False)
    rows.set_decoding(2, True)
    rows.advance_decodes()
    assert rows.known.tolist() == rows.computed.tolist() == [3, 2, 1, 0]
