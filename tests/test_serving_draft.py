"""Speculation with a draft model changes no token, and its memory follows the requests."""

from __future__ import annotations

import asyncio
import random
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import serving_rig as rig
from test_compile_count import compilations

import jax_kvpage as kvp
from jax_kvpage.serving import (
    AsyncEngine,
    DraftModel,
    Engine,
    LastComeFirst,
    RequestOutput,
    SamplingParams,
    Watermark,
)

pytestmark = pytest.mark.usefixtures("shared_programs")

_GREEDY = SamplingParams(temperature=0, max_tokens=20)
_SAMPLED = SamplingParams(seed=7, max_tokens=20, top_k=20, temperature=0.7, logprobs=1)
_PENALIZED = SamplingParams(seed=8, max_tokens=20, presence_penalty=0.5)
_PROMPTS = [rig.prompt(n, n) for n in (5, 40, 17, 60, 1, 33)]
_MIXED = [_GREEDY, _SAMPLED, _PENALIZED, _GREEDY, _SAMPLED, _GREEDY]


def _other() -> dict[str, jax.Array]:
    """Weights unrelated to the model's."""
    return {name: x[..., ::-1] for name, x in rig.params().items()}


@pytest.fixture
def draft_pool() -> Iterator[kvp.KVPool]:
    with rig.pool() as pool:
        yield pool


def _engine(pool: kvp.KVPool, draft: kvp.KVPool, params: Any, **options: Any) -> Engine:
    options.setdefault("num_speculative_tokens", 3)
    model = DraftModel(step=rig.step, params=params, pool=draft)
    return Engine(rig.step, rig.params(), pool, rig.config(**options), draft=model)


@pytest.fixture(scope="module")
def expected() -> list[list[list[int]]]:
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        return rig.tokens(engine.generate(_PROMPTS, _MIXED))


def test_a_draft_equal_to_the_model_is_always_right(expected, draft_pool) -> None:
    with rig.pool() as pool, _engine(pool, draft_pool, rig.params()) as engine:
        outputs = [
            *engine.generate(_PROMPTS[:1], _GREEDY),
            *engine.generate(_PROMPTS[3:4], _GREEDY),
        ]
        stats = engine.stats
        # 19 tokens follow the first one: four per step, and not all of the last three are guessed.
        assert stats.accepted == stats.drafted
        assert stats.drafted >= 2 * 14
        assert stats.steps <= 2 * (1 + 6) + 3
        assert draft_pool.stats().slots_occupied == 0
    assert rig.tokens(outputs) == [expected[0], expected[3]]


@pytest.mark.parametrize("same", [True, False], ids=["same", "other"])
@pytest.mark.parametrize("blocks", [(64, 64), (8, 64), (64, 5), (8, 7)])
def test_a_draft_changes_no_token(expected, same: bool, blocks: tuple[int, int]) -> None:
    few, short = blocks
    options = {"preemption": LastComeFirst(), "admission": Watermark(0.0)}
    with rig.pool(few) as pool, rig.pool(short) as draft:
        with _engine(pool, draft, rig.params() if same else _other(), **options) as engine:
            outputs = engine.generate(_PROMPTS, _MIXED)
            stats = engine.stats
        assert rig.tokens(outputs) == expected
        assert (stats.preemptions > 0) == (few == 8)
        assert stats.drafted > 0
        if same:
            assert stats.accepted > stats.drafted * 0.35
        else:
            assert stats.accepted < stats.drafted * 0.2
        rig.check_empty(pool)
        rig.check_empty(draft)


def test_samples_fork_the_drafts_prompt(draft_pool, monkeypatch) -> None:
    params = SamplingParams(n=4, seed=3, max_tokens=12, temperature=0.4)
    prompts = [rig.prompt(40, 2), rig.prompt(20, 3)]
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        plain = rig.tokens(engine.generate(prompts, params))
    forks = []
    fork = draft_pool.fork
    monkeypatch.setattr(
        draft_pool, "fork", lambda *args: forks.append(args[2:]) or fork(*args), raising=True
    )
    with rig.pool() as pool, _engine(pool, draft_pool, rig.params()) as engine:
        assert rig.tokens(engine.generate(prompts, params)) == plain
        assert engine.stats.accepted > 0
    assert forks.count((1, 40)) == 3
    assert forks.count((1, 20)) == 3
    rig.check_empty(draft_pool)


def test_prompts_are_computed_in_parts(draft_pool) -> None:
    """No step of the draft model exceeds the budget, and decoding sequences go first."""
    prompt = rig.prompt(100, 5)
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        plain = rig.tokens(engine.generate([prompt, [1]], _GREEDY))
    with rig.pool() as pool, _engine(pool, draft_pool, rig.params()) as engine:
        assert rig.tokens(engine.generate([prompt, [1]], _GREEDY)) == plain
        assert engine.stats.accepted > 20


def test_cancelled_requests_give_the_drafts_memory_back(expected, draft_pool) -> None:
    rng = random.Random(0)
    with rig.pool(10) as pool, _engine(pool, draft_pool, _other()) as engine:
        outputs: list[tuple[int, RequestOutput]] = []
        while len(outputs) < 20 or engine.has_unfinished:
            if len(outputs) < 20:
                which = rng.randrange(len(_PROMPTS))
                added = engine.add_request(_PROMPTS[which], _MIXED[which])
                outputs.append((which, added))
            engine.step()
            if rng.random() < 0.2:
                engine.cancel(rng.choice(outputs)[1])
            if rng.random() < 0.05:
                pool.cache()  # makes the engine's step fail and be retried
        rig.check_empty(draft_pool)
    for which, output in outputs:
        (first,) = output.outputs
        assert first.finish_reason in ("length", "cancelled")
        assert first.token_ids == expected[which][0][: len(first.token_ids)]


def test_a_failure_costs_guesses_only(expected, draft_pool) -> None:
    """A stale cache fails the draft's step, after which the draft starts over."""
    with rig.pool() as pool, _engine(pool, draft_pool, rig.params()) as engine:
        outputs = [engine.add_request(*each) for each in zip(_PROMPTS, _MIXED, strict=True)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(1000):
                if not engine.has_unfinished:
                    break
                engine.step()
                if step in (3, 9):
                    draft_pool.cache()
                    before = engine.stats.drafted
        assert engine.stats.drafted > before
        assert (engine.stats.failures, engine.stats.generations) == (0, 0)
    assert rig.tokens(outputs) == expected
    rig.check_empty(draft_pool)


@pytest.mark.parametrize("kind", ["raises", "nan"])
def test_a_draft_that_always_fails_is_given_up_with_a_warning(
    expected, draft_pool, kind: str
) -> None:
    def step(params: Any, cache: kvp.KVCache, tokens: jax.Array, batch: kvp.Batch) -> Any:
        if kind == "raises":
            raise KeyError("layer")
        logits, cache = rig.step(params, cache, tokens, batch)
        return logits * np.nan, cache

    model = DraftModel(step=step, params=rig.params(), pool=draft_pool)
    config = rig.config(num_speculative_tokens=3)
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, config, draft=model) as engine:
        with pytest.warns(RuntimeWarning, match="draft model has failed twice") as caught:
            outputs = engine.generate(_PROMPTS, _MIXED)
        assert len(caught) == 1
        assert engine.stats.drafted == 0
        rig.check_empty(draft_pool)
    assert rig.tokens(outputs) == expected


def test_a_failure_just_before_a_release(expected, draft_pool) -> None:
    """The restart has already taken the slots that were about to be released."""
    with rig.pool() as pool, _engine(pool, draft_pool, rig.params()) as engine:
        first, other = [engine.add_request(_PROMPTS[i], _GREEDY) for i in (0, 3)]
        while engine.stats.accepted < 6:
            engine.step()
        draft_pool.cache()  # makes the next guess fail
        engine.cancel(first)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine.step()
            before = engine.stats.drafted
            while engine.has_unfinished:
                engine.step()
        assert engine.stats.drafted > before
    assert rig.tokens([other]) == [expected[3]]
    rig.check_empty(draft_pool)


def test_an_interrupt_of_the_draft(expected, draft_pool, monkeypatch) -> None:
    """Ctrl-C between the draft's steps ends no request."""
    with rig.pool() as pool, _engine(pool, draft_pool, rig.params()) as engine:
        outputs = [engine.add_request(*each) for each in zip(_PROMPTS, _MIXED, strict=True)]
        programs, calls = engine._guesser._programs, iter(range(10**6))
        run = programs.run

        def interrupted(*args: Any) -> Any:
            result = run(*args)
            if next(calls) in (2, 7, 8, 20):
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(programs, "run", interrupted)
        assert rig.run_through(KeyboardInterrupt, engine) == 4
        assert engine.stats.accepted > 0
    assert rig.tokens(outputs) == expected
    rig.check_empty(draft_pool)


def test_nothing_is_compiled_after_warm_up(draft_pool, monkeypatch) -> None:
    monkeypatch.undo()  # these engines compile their own programs
    progress: list[tuple[int, int]] = []
    with rig.pool() as pool, _engine(pool, draft_pool, rig.params()) as engine:
        engine.warm_up(lambda *each: progress.append(each))
        assert sum(done == total for done, total in progress) == 2
        with compilations() as count:
            engine.generate(_PROMPTS, _MIXED)
            engine.generate(_PROMPTS[:1], SamplingParams(n=3, max_tokens=5))
        assert not count


def test_tasks_and_a_draft(expected, draft_pool) -> None:
    async def serve(pool: kvp.KVPool) -> list[RequestOutput]:
        async with AsyncEngine(_engine(pool, draft_pool, rig.params())) as server:
            return await asyncio.gather(*map(server.generate, _PROMPTS, _MIXED))

    with rig.pool() as pool:
        assert rig.tokens(asyncio.run(serve(pool))) == expected
    rig.check_empty(draft_pool)


def test_refusals(draft_pool) -> None:
    with rig.pool() as pool:
        with pytest.raises(ValueError, match="num_speculative_tokens is 0"):
            _engine(pool, draft_pool, rig.params(), num_speculative_tokens=0)
        with pytest.raises(ValueError, match="a pool that is not the engine's"):
            _engine(pool, pool, rig.params())
