"""The scheduler for several replicas, against the plain model of scheduler_model.py with one memory
per replica.
"""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import pytest
from covering import num_cases
from scheduler_model import PlainMemory, Server

from jax_kvpage.serving import (
    CostAware,
    ExpectedGrowth,
    LastComeFirst,
    ReplicatedScheduler,
    Request,
    RequestRefused,
    Scheduler,
    Sequence,
    SequenceGroup,
    Status,
    StepPlan,
    Watermark,
)

_ROWS = 4


def _replica(sequence: Sequence) -> int:
    return sequence.group.first_row // _ROWS


class _Memories:
    """The memories of all replicas; each sequence is in that of its own replica."""

    def __init__(self, parts: list[PlainMemory]) -> None:
        self.parts = parts
        self.block_tokens = parts[0].block_tokens
        self.capacity = sum(part.capacity for part in parts)
        self.slots = sum(part.slots for part in parts)
        self.draining = parts[0].draining

    @property
    def of(self) -> dict[Sequence, list[int]]:
        return {sequence: own for part in self.parts for sequence, own in part.of.items()}

    def free_blocks(self) -> int:
        return sum(part.free_blocks() for part in self.parts)

    def free_slots(self) -> int:
        return sum(part.free_slots() for part in self.parts)

    def release(self, sequences: list[Sequence]) -> None:
        for part in self.parts:
            part.release([sequence for sequence in sequences if sequence in part.of])

    def extend(self, sequence: Sequence, tokens: int) -> None:
        part = self.parts[_replica(sequence)]
        assert all(sequence not in other.of for other in self.parts if other is not part)
        part.extend(sequence, tokens)

    def fork(self, parent: Sequence, child: Sequence, tokens: int) -> None:
        self.parts[_replica(parent)].fork(parent, child, tokens)


class _Server(Server):
    """Runs a scheduler for several replicas."""

    def __init__(self, parts: list[PlainMemory], seed: int, **options: Any) -> None:
        super().__init__(parts[0], seed, **options)
        self.scheduler: Any = ReplicatedScheduler(parts, **options)
        self.memory: Any = _Memories(parts)
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            self.options[name] *= len(parts)

    def _enter(self, sequence: Sequence, computed: int) -> None:
        assert sequence.place not in self.rows
        self.rows[sequence.place] = sequence
        self.computed[sequence] = computed

    def _check_victims(self, plan: StepPlan, before: list[SequenceGroup]) -> None:
        """As with one replica, and no request starts on a replica that is short of blocks."""
        running = [group for group in before if group not in plan.finished]
        for group in plan.preempted:
            beside = [other for other in running if other.first_row == group.first_row]
            assert group.order > min(other.order for other in beside)
            assert group.request.priority == max(other.request.priority for other in beside)
        short = {group.first_row for group in plan.preempted}
        assert not short & {admission.sequence.group.first_row for admission in plan.admissions}

    def _check_order(self, plan: StepPlan, waiting: list[SequenceGroup]) -> None:
        """Nobody is overtaken in the queue."""
        for admission in plan.admissions:
            for other in waiting:
                if other.status in (Status.WAITING, Status.PREEMPTED):
                    assert other.request.prefix_key or admission.sequence.group.order < other.order

    def _run(self, plan: StepPlan) -> None:
        budget = self.options["max_num_batched_tokens"] // len(self.memory.parts)
        for replica in range(len(self.memory.parts)):
            own = plan.rows // _ROWS == replica
            assert plan.counts[own].sum() <= budget
        decodes = plan.rows[: plan.num_decodes]
        assert (np.diff(decodes) > 0).all()
        super()._run(plan)


_POLICIES = (
    {"preemption": CostAware(0), "admission": Watermark(0.0)},
    {"preemption": LastComeFirst(), "admission": Watermark()},
    {"preemption": None, "admission": ExpectedGrowth()},
)


@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("policy", range(len(_POLICIES)))
def test_random_requests_under_pressure(replicas: int, policy: int) -> None:
    preempted = 0
    for seed in range(num_cases(6, 100)):
        rng = random.Random(seed)
        drain = rng.randint(0, 2)
        capacity = rng.randint(14, 24)
        parts = [PlainMemory(capacity, 16, 1024, _ROWS + 2, drain) for _ in range(replicas)]
        server = _Server(
            parts, seed, max_num_seqs=_ROWS, max_num_batched_tokens=24, **_POLICIES[policy]
        )
        for _ in range(150):
            if rng.random() < 0.3:
                with contextlib.suppress(RequestRefused):
                    server.add(
                        wanted=rng.randint(1, 150),
                        num_prompt_tokens=rng.randint(1, 150),
                        max_tokens=rng.randint(1, 120),
                        n=rng.choice([1, 1, 1, 2, 3]),
                        priority=rng.choice([0, 0, 0, 1]),
                        deadline=rng.choice([None, None, None, server.now + 20]),
                        prefix_key=rng.choice([None, None, "a", "b"]),
                        lockstep=rng.random() < 0.2,
                    )
            if server.groups and rng.random() < 0.04:
                server.scheduler.cancel(rng.choice(server.groups))
            server.now += 1
            server.step(refusals=0.05 if rng.random() < 0.3 else 0.0, drafts=rng.choice([0, 2]))
        server.run()
        preempted += server.scheduler.stats.preemptions
        assert server.scheduler.stats.steps == server.steps
    assert preempted > 0


class _Failed(Exception):
    pass


class _FailingServer(_Server):
    """Its prefix cache raises at random; the server plans again."""

    def __init__(self, parts: list[PlainMemory], seed: int, **options: Any) -> None:
        self.chance = random.Random(seed)
        self.failures = 0
        super().__init__(parts, seed, find_prefix=self._find, **options)
        self.insist, self.scheduler.schedule = self.scheduler.schedule, self._schedule

    def _find(self, *of: Any) -> tuple[int, int]:
        if self.chance.random() < 0.3:
            raise _Failed
        return 0, 0

    def _schedule(self, now: float) -> StepPlan:
        while True:
            try:
                return self.insist(now)
            except _Failed:
                self.failures += 1

    def _release(self, plan: StepPlan, stopped: set[Sequence]) -> None:
        # The victims of a plan that failed are in none.
        super()._release(plan, stopped | set(self.computed))


def test_a_plan_that_raises_loses_no_request() -> None:
    """One replica has preempted requests when another one's look-up raises."""
    in_no_plan = 0
    for seed in range(num_cases(8, 100)):
        rng = random.Random(seed)
        parts = [PlainMemory(16, 16, 1024, _ROWS + 2, 0) for _ in range(2)]
        server = _FailingServer(
            parts, seed, max_num_seqs=_ROWS, max_num_batched_tokens=24, **_POLICIES[0]
        )
        for _ in range(120):
            if rng.random() < 0.4:
                server.add(
                    num_prompt_tokens=rng.randint(1, 60),
                    max_tokens=rng.randint(1, 120),
                    n=rng.choice([1, 1, 2]),
                )
            server.step()
        server.run()
        assert server.failures > 0
        in_no_plan += sum(group.num_preemptions for group in server.groups)
        in_no_plan -= server.scheduler.stats.preemptions
    assert in_no_plan > 0


def test_one_replica_plans_what_a_scheduler_plans() -> None:
    plans = []
    for make in (Scheduler, lambda memory, **options: ReplicatedScheduler([memory], **options)):
        server = Server(PlainMemory(20, 16, 1024, 8, 1), max_num_seqs=8, max_num_batched_tokens=64)
        server.scheduler = make(server.memory, **server.options)
        rng = random.Random(1)
        for _ in range(12):
            server.add(
                wanted=rng.randint(1, 99), num_prompt_tokens=rng.randint(1, 99), max_tokens=99
            )
        server.run()
        plans.append(server.plans)
    assert plans[0] == plans[1]


def _schedule(
    scheduler: ReplicatedScheduler, *prompts: int, **options: Any
) -> list[tuple[int, int]]:
    """Adds requests; returns the replica of each that starts, and the tokens that it finds."""
    groups = [
        scheduler.add(Request(request_id=i, num_prompt_tokens=n, max_tokens=9, **options))
        for i, n in enumerate(prompts)
    ]
    plan = scheduler.schedule()
    return [
        (_replica(admission.sequence), admission.num_cached)
        for group in groups
        for admission in plan.admissions
        if admission.sequence.group is group
    ]


def test_requests_go_where_they_cost_least() -> None:
    def memories() -> list[PlainMemory]:
        return [PlainMemory(32, 16, 1024, 8, 0) for _ in range(2)]

    options: dict[str, Any] = {"max_num_seqs": _ROWS, "max_num_batched_tokens": 512}
    scheduler = ReplicatedScheduler(memories(), **options)
    assert _schedule(scheduler, 100, 20, 20, 20) == [(0, 0), (1, 0), (1, 0), (1, 0)]

    def found(group: SequenceGroup, replica: int) -> tuple[int, int]:
        del group
        return (0, 64)[replica], 0

    scheduler = ReplicatedScheduler(memories(), find_prefix=found, **options)
    assert _schedule(scheduler, 100) == [(1, 64)]
    # Each replica computes the prefix once, and the other requests wait for it there.
    scheduler = ReplicatedScheduler(memories(), find_prefix=lambda group, r: (0, 0), **options)
    assert _schedule(scheduler, 100, 100, 100, 100, prefix_key="a") == [(0, 0), (1, 0)]
    scheduler = ReplicatedScheduler(memories(), find_prefix=lambda group, r: (0, 0), **options)
    scheduler.add(Request(request_id="long", num_prompt_tokens=300, max_tokens=9))
    assert _schedule(scheduler, 100, 100, 100, prefix_key="a") == [(1, 0)]


def test_a_request_must_fit_into_one_replica() -> None:
    memories = [PlainMemory(8, 16, 1024, 8, 0) for _ in range(2)]
    scheduler = ReplicatedScheduler(memories, max_num_seqs=_ROWS, max_num_batched_tokens=64)
    with pytest.raises(RequestRefused, match="needs 9 blocks"):
        scheduler.add(Request(request_id=0, num_prompt_tokens=140, max_tokens=9))
    with pytest.raises(RequestRefused, match="takes 5 slots, but max_num_seqs is 4"):
        scheduler.add(Request(request_id=0, num_prompt_tokens=1, max_tokens=9, n=5))
    assert scheduler.stats.refused_requests == 2
