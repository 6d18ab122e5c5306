"""The scheduler's promises, case by case, against a plain model of memory and tokens."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from scheduler_model import small_server

from jax_kvpage import serving
from jax_kvpage.serving import (
    BlockBudget,
    CostAware,
    Request,
    RequestRefused,
    Scheduler,
    Status,
    Watermark,
)

_FOLDER = pathlib.Path(__file__).resolve().parent.parent / "jax_kvpage"


def test_the_modules_import_without_jax() -> None:
    code = f"""
import importlib, sys, types
sys.modules["jax"] = sys.modules["jaxlib"] = None
package = types.ModuleType("jax_kvpage")
package.__path__ = [{str(_FOLDER)!r}]
sys.modules["jax_kvpage"] = package
for path in {sorted(path.stem for path in (_FOLDER / "serving").glob("*.py"))!r}:
    importlib.import_module("jax_kvpage.serving." + path)
assert not [name for name in sys.modules if name.startswith(("jax.", "jaxlib."))]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_type_checkers_see_the_names_that_are_imported_late() -> None:
    tree = ast.parse((_FOLDER / "serving" / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name for node in imports for alias in node.names}
    assert set(serving.__all__) <= seen


def test_a_request_from_add_to_finish() -> None:
    server = small_server()
    group = server.add(num_prompt_tokens=100, max_tokens=3)
    first = server.step()
    assert [a.sequence for a in first.admissions] == group.sequences
    assert first.admissions[0].num_tokens == 101
    assert (first.begins.tolist(), first.counts.tolist()) == ([0], [64])
    assert first.samples.tolist() == [False]
    second = server.step()
    assert (second.begins.tolist(), second.counts.tolist()) == ([64], [36])
    assert second.samples.tolist() == [True]
    assert second.num_decodes == 0
    assert server.step().num_decodes == 1
    last = server.step()
    assert last.ending == (0,)
    assert group.sequences[0].finish_reason is None
    end = server.step()
    assert end.finished == (group,)
    assert end.release == (0,)
    assert end.is_empty
    assert group.sequences[0].finish_reason == "length"
    assert group.status is Status.FINISHED
    server.check_end()


def test_prompts_share_the_budget_with_decodes() -> None:
    server = small_server()
    server.add(num_prompt_tokens=10, max_tokens=50)
    server.step()
    server.add(num_prompt_tokens=100, max_tokens=5)
    plan = server.step()
    assert plan.counts.tolist() == [1, 63]
    assert plan.num_decodes == 1
    server.run()


def test_a_sequence_grows_only_when_its_last_block_is_full() -> None:
    server = small_server()
    server.add(num_prompt_tokens=14, max_tokens=40)
    grown = []
    while server.scheduler.has_unfinished:
        plan = server.step()
        grown += plan.extend_tokens.tolist()
    # The last token is not stored, so 53 of 54.
    assert grown == [17, 33, 49]


def test_first_come_first_served_and_priorities() -> None:
    server = small_server(seqs=1, max_num_batched_tokens=32)
    server.add(num_prompt_tokens=5, max_tokens=2)
    groups = [server.add(num_prompt_tokens=5, max_tokens=2, priority=p) for p in (1, 0, 1, 0)]
    server.run()
    order = [g.arrival for g in server.reported]
    # The first one had not started when the others arrived, so its priority of 0 counts too.
    assert order == [0, groups[1].arrival, groups[3].arrival, groups[0].arrival, groups[2].arrival]


def test_the_head_of_the_queue_is_not_overtaken() -> None:
    server = small_server(capacity=10)
    server.add(num_prompt_tokens=60, max_tokens=40)
    server.step()
    big = server.add(num_prompt_tokens=140, max_tokens=2)
    small = server.add(num_prompt_tokens=5, max_tokens=2)
    server.step()
    assert big.status is Status.WAITING
    assert small.status is Status.WAITING
    server.run()
    assert server.reported.index(big) < server.reported.index(small)


@pytest.mark.parametrize("lockstep", [False, True])
def test_samples_share_their_prompt(lockstep: bool) -> None:
    server = small_server(capacity=12)
    group = server.add(num_prompt_tokens=64, max_tokens=8, n=4, lockstep=lockstep)
    assert server.step().num_tokens == 64 - lockstep
    plan = server.step()
    (fork,) = plan.forks
    assert fork.num_tokens == 63
    assert set(plan.sequences) == set(group.sequences)
    # 64 tokens in 4 blocks, 3 of which are shared.
    assert len(server.memory.used()) == 3 + 4 * 2
    server.run()
    assert {s.finish_reason for s in group.sequences} == {"length"}


def test_a_donor_that_ends_at_once_keeps_its_slot_until_the_fork() -> None:
    server = small_server()
    group = server.add(num_prompt_tokens=40, max_tokens=8, n=2)
    server.step()
    server.scheduler.finish(group.sequences[0])
    plan = server.step()
    assert plan.forks
    assert not plan.release
    assert server.step().release == (0,)
    server.run()


@pytest.mark.parametrize("lockstep", [False, True])
def test_samples_of_one_token(lockstep: bool) -> None:
    server = small_server()
    group = server.add(num_prompt_tokens=40, max_tokens=1, n=3, lockstep=lockstep)
    server.run()
    assert {s.finish_reason for s in group.sequences} == {"length"}


def test_cancellation_anywhere_returns_the_blocks() -> None:
    for when in range(8):
        server = small_server(capacity=20, drain=2)
        groups = [server.add(num_prompt_tokens=40, max_tokens=200, n=2) for _ in range(4)]
        for _ in range(when):
            server.step()
        for group in groups:
            server.scheduler.cancel(group)
        server.run()
        assert {s.finish_reason for g in groups for s in g.sequences} == {"cancelled"}


def test_deadlines() -> None:
    server = small_server(seqs=1)
    runs = server.add(num_prompt_tokens=5, max_tokens=500, deadline=3.0)
    waits = server.add(num_prompt_tokens=5, max_tokens=500, deadline=1.0)
    ends = server.add(num_prompt_tokens=5, max_tokens=5, deadline=100.0)
    while server.scheduler.has_unfinished:
        server.step()
        server.now += 0.5
    assert [g.sequences[0].finish_reason for g in (runs, waits, ends)] == [
        "deadline", "deadline", "length"
    ]  # fmt: skip
    assert server.reported == [waits, runs, ends]


def test_a_stop_in_the_last_token_replaces_the_limit() -> None:
    server = small_server()
    group = server.add(num_prompt_tokens=5, max_tokens=2)
    while not server.reported:
        server.step()
    assert group.sequences[0].finish_reason == "length"
    server.scheduler.finish(group.sequences[0], "stop")
    assert group.sequences[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("request_", "wanted", "available", "text"),
    [
        ({"num_prompt_tokens": 1024}, 1025, 1024, "max_seq_len is 1024"),
        ({"num_prompt_tokens": 200}, 13, 10, "13 blocks of 16 tokens"),
        ({"num_prompt_tokens": 120, "n": 4}, 7 + 4, 10, "there are 10 blocks"),
        ({"num_prompt_tokens": 5, "n": 9}, 9, 8, "takes 9 slots"),
        ({"num_prompt_tokens": 5, "num_slots": 9}, 9, 8, "max_num_seqs is 8"),
        ({"num_prompt_tokens": 5, "reserve_tokens": 161}, 11, 10, "161 tokens"),
    ],
)
def test_refused_at_the_door(request_: Any, wanted: int, available: int, text: str) -> None:
    server = small_server(capacity=10)
    with pytest.raises(RequestRefused, match=text) as error:
        server.scheduler.add(Request(request_id="x", max_tokens=9, **request_))
    assert (error.value.wanted, error.value.available) == (wanted, available)
    assert server.scheduler.stats.refused_requests == 1
    assert not server.scheduler.has_unfinished


def test_a_full_queue_refuses() -> None:
    server = small_server(max_num_waiting=2)
    server.add(num_prompt_tokens=5, max_tokens=5)
    server.add(num_prompt_tokens=5, max_tokens=5)
    with pytest.raises(RequestRefused, match="max_num_waiting is 2"):
        server.add(num_prompt_tokens=5, max_tokens=5)
    server.step()
    server.add(num_prompt_tokens=5, max_tokens=5)
    server.run()


def test_followers_of_a_new_prefix_wait_for_it() -> None:
    cached: set[str] = set()

    def find(group: Any) -> tuple[int, int]:
        return (96, 6) if group.request.prefix_key in cached else (0, 0)

    memory = BlockBudget(100, 16, 1024, 12)
    scheduler = Scheduler(memory, max_num_seqs=8, max_num_batched_tokens=64, find_prefix=find)
    groups = [
        scheduler.add(
            Request(
                request_id=i,
                num_prompt_tokens=100,
                max_tokens=5,
                prefix_key="a",
                num_prefix_tokens=96,
            )
        )
        for i in range(3)
    ]
    other = scheduler.add(Request(request_id=3, num_prompt_tokens=10, max_tokens=5))
    memory.carry_out(first := scheduler.schedule())
    assert [a.sequence.group for a in first.admissions] == [groups[0]]
    memory.carry_out(second := scheduler.schedule())
    assert [a.sequence.group for a in second.admissions] == [other]
    cached.add("a")
    third = scheduler.schedule()
    assert [(a.sequence.group, a.num_cached) for a in third.admissions] == [
        (groups[1], 96), (groups[2], 96)
    ]  # fmt: skip
    assert third.begins[third.num_decodes :].tolist() == [96, 96]


def test_a_cancelled_leader_lets_its_followers_go() -> None:
    server = small_server(find_prefix=lambda group: (0, 0))
    groups = [server.add(num_prompt_tokens=100, max_tokens=5, prefix_key="a") for _ in range(2)]
    server.step()
    assert groups[1].status is Status.WAITING
    server.scheduler.cancel(groups[0])
    server.run()
    assert groups[1].sequences[0].finish_reason == "length"


def test_speculated_tokens() -> None:
    memory = BlockBudget(100, 16, 1024, 8)
    scheduler = Scheduler(memory, max_num_seqs=4, max_num_batched_tokens=16)
    group = scheduler.add(Request(request_id=0, num_prompt_tokens=10, max_tokens=20))
    scheduler.add(Request(request_id=1, num_prompt_tokens=3, max_tokens=20))
    memory.carry_out(scheduler.schedule())
    rows = np.asarray([0, 1])
    scheduler.set_drafts(rows, np.asarray([5, 4]))
    memory.carry_out(plan := scheduler.schedule())
    assert plan.counts.tolist() == [6, 5]
    assert plan.begins.tolist() == [10, 3]
    scheduler.add_tokens(rows, np.asarray([5, 0]))
    memory.carry_out(plan := scheduler.schedule())
    assert plan.begins.tolist() == [16, 4]
    assert plan.extend_tokens.tolist() == [17]
    scheduler.set_drafts(rows, np.asarray([50, 50]))
    memory.carry_out(plan := scheduler.schedule())
    # The first may still produce 12 tokens, one of them certain; the budget has no room for drafts
    # of the second.
    assert plan.counts.tolist() == [12, 1]
    scheduler.add_tokens(rows[:1], np.asarray([11]))
    assert group.sequences[0].finish_reason == "length"
    assert scheduler.schedule().release == (0,)


@pytest.mark.parametrize("newcomer_comes", ["before", "after"])
def test_drafts_leave_room_for_prompts(newcomer_comes: str) -> None:
    """Decoding sequences could fill every step with drafts."""
    memory = BlockBudget(100, 16, 1024, 8)
    scheduler = Scheduler(memory, max_num_seqs=4, max_num_batched_tokens=16)
    for i in range(2):
        scheduler.add(Request(request_id=i, num_prompt_tokens=3, max_tokens=100))
    memory.carry_out(scheduler.schedule())
    newcomer = Request(request_id=2, num_prompt_tokens=20, max_tokens=1)
    if newcomer_comes == "before":  # its prompt has started; otherwise it waits
        scheduler.add(newcomer)
        memory.carry_out(plan := scheduler.schedule())
        assert plan.counts.tolist() == [1, 1, 14]
    else:
        scheduler.add(newcomer)
    counts = []
    for _ in range(3):
        scheduler.set_drafts(np.asarray([0, 1]), np.asarray([7, 7]))
        memory.carry_out(plan := scheduler.schedule())
        counts.append(plan.counts.tolist())
    # Two tokens decode. The prompt gets half of the other 14 while it needs them.
    if newcomer_comes == "before":
        assert counts == [[8, 1, 6], [8, 8], [8, 8]]
    else:
        assert counts == [[8, 1, 7], [8, 1, 7], [8, 1, 6]]


def test_equal_calls_give_equal_plans() -> None:
    plans = []
    for _ in range(2):
        server = small_server(capacity=30, drain=1)
        for i in range(30):
            server.add(num_prompt_tokens=20 + i, max_tokens=100, n=1 + i % 2, priority=i % 3)
        server.run(refusals=0.1)
        plans.append(server.plans)
    assert plans[0] == plans[1]


def test_arguments() -> None:
    memory = BlockBudget(10, 16, 100, 4)
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        Scheduler(memory, max_num_seqs=8, max_num_batched_tokens=4)
    for wrong in (
        {"num_prompt_tokens": 0}, {"max_tokens": 0}, {"n": 0}, {"n": 3, "num_slots": 2},
        {"num_prefix_tokens": 2},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(reversed(wrong))):
            Request(**({"request_id": 0, "num_prompt_tokens": 1, "max_tokens": 1} | wrong))
    with pytest.raises(ValueError, match="fraction"):
        Watermark(1.0)
    with pytest.raises(ValueError, match="tokens_per_wait"):
        CostAware(-1)
