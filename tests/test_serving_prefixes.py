"""The engine's scheduler counts on cached prompt tokens, and is told if they are missing."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import serving_rig as rig

from jax_kvpage.serving import Engine, Request, SamplingParams, Scheduler
from jax_kvpage.serving.memory import BlockBudget

pytestmark = pytest.mark.usefixtures("shared_programs")

_GREEDY = SamplingParams(temperature=0, max_tokens=6)


def test_a_cached_prompt_starts_in_one_step_and_leaves_the_budget_to_others() -> None:
    long, other = rig.prompt(100, 1), rig.prompt(20, 2)
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        (first,) = engine.generate([long], _GREEDY)
        before = engine.stats.steps
        outputs = [engine.add_request(ids, _GREEDY) for ids in (long, other)]
        engine.step()
        engine.step()
        assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 1]
        while engine.has_unfinished:
            engine.step()
        assert engine.stats.steps == before + 6
        assert rig.tokens(outputs[:1]) == rig.tokens([first])


@pytest.mark.parametrize("length", [50, 64])
def test_followers_of_a_cached_prefix_start_together(length: int) -> None:
    prefix = rig.prompt(length, 1)
    options = rig.config(max_num_seqs=8)
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, options) as engine:
        engine.generate([prefix], _GREEDY)
        for i in range(8):
            engine.add_request(prefix if length == 64 else [*prefix, i, i], _GREEDY)
        engine.step()
        assert engine.stats.running == 8


def test_what_was_evicted_after_the_plan_is_computed(monkeypatch) -> None:
    """Fewer tokens are cached than promised: the sequences compute the rest."""
    prompts = [rig.prompt(40, 3), rig.prompt(60, 4), rig.prompt(33, 5)]
    params = [_GREEDY, SamplingParams(n=2, seed=1, max_tokens=6), SamplingParams(max_tokens=1)]
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        expected = rig.tokens(engine.generate(prompts, params))
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        monkeypatch.setattr(pool, "find_prefix", lambda ids, *args: len(ids) - 1)
        assert rig.tokens(engine.generate(prompts, params)) == expected
        assert engine.stats.failures == 0
        engine.close()
        jax.block_until_ready(pool.cache())
        assert pool.stats().slots_occupied == 0


def test_a_plan_from_fewer_cached_tokens() -> None:
    def find(group: Any) -> tuple[int, int]:
        return 99, 0

    memory = BlockBudget(100, 16, 1024, 12)
    scheduler = Scheduler(memory, max_num_seqs=8, max_num_batched_tokens=64, find_prefix=find)
    group = scheduler.add(Request(request_id=0, num_prompt_tokens=100, max_tokens=1))
    plan = scheduler.schedule()
    assert (plan.begins.tolist(), plan.counts.tolist(), plan.ending) == ([99], [1], (0,))
    left = scheduler.found(plan, group.sequences[0], 20)
    assert (left.begins.tolist(), left.counts.tolist(), left.ending) == ([20], [1], ())
    assert not left.samples[0]
    memory.carry_out(left)
    begins = []
    while scheduler.has_unfinished:
        memory.carry_out(plan := scheduler.schedule())
        begins += zip(plan.begins.tolist(), plan.counts.tolist(), plan.samples, strict=True)
    assert begins == [(21, 64, np.False_), (85, 15, np.True_)]
