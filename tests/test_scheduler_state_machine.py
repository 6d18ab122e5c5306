"""Random requests, stops, cancellations and refusals of memory. Every plan is checked against a
plain model (scheduler_model.py); at the end all requests must have finished and all memory be
returned.
"""

from __future__ import annotations

from typing import Any

import pytest
from covering import num_cases
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from scheduler_model import PlainMemory, PlainSwap, Server

from jax_kvpage.serving import (
    CostAware,
    ExpectedGrowth,
    LastComeFirst,
    RequestRefused,
    SequenceGroup,
    Status,
    Watermark,
)

_POLICIES = {
    "cost": (lambda: CostAware(), lambda: Watermark()),
    "at_once": (lambda: CostAware(0), lambda: ExpectedGrowth()),
    "last_come": (lambda: LastComeFirst(), lambda: Watermark(0.0)),
}
_requests = st.fixed_dictionaries(
    {
        "num_prompt_tokens": st.integers(1, 150),
        "max_tokens": st.integers(1, 120),
        "n": st.sampled_from([1, 1, 1, 2, 3]),
        "priority": st.sampled_from([0, 0, 0, 1]),
        "deadline": st.sampled_from([None, None, None, 5.0, 20.0]),
        "prefix_key": st.sampled_from([None, None, "a", "b"]),
        "reserve_tokens": st.sampled_from([0, 0, 0, 200]),
        "num_slots": st.sampled_from([0, 0, 4]),
        "lockstep": st.booleans(),
        "wanted": st.integers(1, 150),
    }
)


class SchedulerMachine(RuleBasedStateMachine):
    """Few rows and few blocks, so that everything is short at some time."""

    policy = "cost"
    budget = 24

    @initialize(
        drain=st.integers(0, 2),
        capacity=st.integers(14, 40),
        slots=st.integers(6, 9),
        seed=st.integers(0, 1 << 30),
        swap=st.sampled_from([None, None, 0.3, 2.0]),
    )
    def begin(self, drain: int, capacity: int, slots: int, seed: int, swap: float | None) -> None:
        preemption, admission = (make() for make in _POLICIES[self.policy])
        self.server = Server(
            PlainMemory(capacity, 16, 256, slots, drain),
            seed,
            None if swap is None else PlainSwap(seed, swap),
            max_num_seqs=6,
            max_num_batched_tokens=self.budget,
            preemption=preemption,
            admission=admission,
            max_num_waiting=50,
            find_prefix=self._find,
        )

    def _find(self, group: SequenceGroup) -> tuple[int, int]:
        """Simulates a cache with the prefixes of all finished requests."""
        tokens = group.request.num_prompt_tokens
        has = any(g.request.prefix_key == group.request.prefix_key for g in self.server.reported)
        return (tokens // 2, 0) if has and group.request.prefix_key else (0, 0)

    @rule(requests=st.lists(_requests, min_size=1, max_size=4))
    def add(self, requests: list[dict[str, Any]]) -> None:
        for request in requests:
            if request["num_slots"]:
                request["num_slots"] = max(request["num_slots"], request["n"])
            try:
                self.server.add(**request)
            except RequestRefused as error:
                refused = error.wanted, error.available
                assert refused[0] > refused[1]

    @rule(
        steps=st.integers(1, 12),
        refusals=st.sampled_from([0.0, 0.0, 0.0, 0.3, 1.0]),
        drafts=st.sampled_from([0, 0, 3, 20]),
    )
    def step(self, steps: int, refusals: float, drafts: int) -> None:
        for _ in range(steps):
            self.server.step(refusals, drafts)

    @rule(which=st.integers(0, 1 << 20), several=st.booleans())
    def cancel(self, which: int, several: bool) -> None:
        live = [g for g in self.server.groups if g.status is not Status.FINISHED]
        if live:
            group = live[which % len(live)]
            if several:
                self.server.scheduler.cancel(group)
            else:
                self.server.scheduler.finish(group.live[which % len(group.live)], "gone")

    @rule(seconds=st.floats(0, 10))
    def tick(self, seconds: float) -> None:
        self.server.now += seconds

    def teardown(self) -> None:
        if hasattr(self, "server"):
            self.server.run()


@pytest.mark.parametrize("policy", list(_POLICIES))
def test_against_a_plain_model(policy: str) -> None:
    machine = type("Machine", (SchedulerMachine,), {"policy": policy})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=num_cases(40, 400), stateful_step_count=15)
    )


@pytest.mark.parametrize("policy", list(_POLICIES))
def test_overload(policy: str) -> None:
    """Ten times more than fits, some of it cancelled: nothing is lost, and nothing starves."""
    preemption, admission = (make() for make in _POLICIES[policy])
    server = Server(
        PlainMemory(40, 16, 256, 12, 1),
        max_num_seqs=8,
        max_num_batched_tokens=32,
        preemption=preemption,
        admission=admission,
    )
    for i in range(80):
        server.add(
            num_prompt_tokens=30 + 7 * i % 90, max_tokens=20 + 11 * i % 60, n=1 + (i % 5 == 0)
        )
    while server.scheduler.has_unfinished:
        server.step()
        if server.steps % 25 == 0 and server.scheduler.num_running:
            server.scheduler.cancel(server.random.choice(server.scheduler.running()))
    server.check_end()
    reasons = {s.finish_reason for g in server.groups for s in g.sequences}
    assert reasons == {"length", "cancelled"}
