"""The engine continues after faults of the model, of the caller's functions and of the pool."""

from __future__ import annotations

from typing import Any

import jax
import pytest
import serving_rig as rig

import jax_kvpage as kvp
from jax_kvpage.serving import (
    BeamSearchParams,
    Engine,
    ExpectedGrowth,
    Load,
    SamplingParams,
    SequenceGroup,
    StepPlan,
)
from jax_kvpage.serving.engine.programs import Programs

pytestmark = pytest.mark.usefixtures("shared_programs")

_GREEDY = SamplingParams(temperature=0, max_tokens=6)
_PROMPTS = [rig.prompt(n, n) for n in (5, 40, 17)]


@pytest.fixture(scope="module")
def expected() -> list[list[list[int]]]:
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        return rig.tokens(engine.generate(_PROMPTS, _GREEDY))


def _run(engine: Engine) -> None:
    while engine.has_unfinished:
        engine.step()


def _raising(error: BaseException, times: int) -> Any:
    """Returns a model whose first traces raise."""
    left = iter(range(times))

    def step(params: Any, cache: kvp.KVCache, tokens: jax.Array, batch: kvp.Batch) -> Any:
        if next(left, None) is not None:
            raise error
        return rig.step(params, cache, tokens, batch)

    return step


def test_a_model_that_raises_once_is_traced_again(expected) -> None:
    step = _raising(KeyError("layer"), 1)
    with rig.pool() as pool, Engine(step, rig.params(), pool, rig.config()) as engine:
        assert rig.tokens(engine.generate(_PROMPTS, _GREEDY)) == expected
        assert engine.stats.failures == 1
        engine.close()
        rig.check_empty(pool)


def test_a_model_that_always_raises_ends_its_requests() -> None:
    step = _raising(KeyError("layer"), 1000)
    with rig.pool() as pool, Engine(step, rig.params(), pool, rig.config()) as engine:
        for output in engine.generate(_PROMPTS, _GREEDY):
            assert output.outputs[0].finish_reason == "error"
            assert "KeyError: 'layer'" in str(output.error)
        assert not engine.scheduler.num_running
        engine.close()
        rig.check_empty(pool)


def test_an_interrupt_of_the_first_compile(expected) -> None:
    step = _raising(KeyboardInterrupt(), 1)
    with rig.pool() as pool, Engine(step, rig.params(), pool, rig.config()) as engine:
        outputs = [engine.add_request(prompt, _GREEDY) for prompt in _PROMPTS]
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        assert outputs[0].outputs[0].finish_reason == "error"
        while engine.has_unfinished:
            engine.step()
        assert rig.tokens(engine.generate(_PROMPTS, _GREEDY)) == expected
        engine.close()
        rig.check_empty(pool)


def test_engines_of_different_models_share_a_pool_and_nothing_else(expected) -> None:
    other = jax.tree.map(lambda weights: -weights, rig.params())
    prompts = [[*_PROMPTS[1], *rig.prompt(9)]]
    with rig.pool() as pool, Engine(rig.step, other, pool, rig.config()) as engine:
        wanted = rig.tokens(engine.generate(prompts, _GREEDY))
    with rig.pool() as pool:
        with Engine(rig.step, rig.params(), pool, rig.config()) as engine:
            assert rig.tokens(engine.generate(_PROMPTS, _GREEDY)) == expected
        with Engine(rig.step, other, pool, rig.config()) as engine:
            (output,) = engine.generate(prompts, _GREEDY)
            assert output.metrics.num_cached_tokens == 0
            assert rig.tokens([output]) == wanted
        rig.check_empty(pool)


def test_engines_of_one_model_share_what_has_their_namespace() -> None:
    with rig.pool() as pool:
        with Engine(rig.step, rig.params(), pool, rig.config(namespace="model")) as engine:
            engine.generate([_PROMPTS[1]], _GREEDY)
        with Engine(rig.step, rig.params(), pool, rig.config(namespace="model")) as engine:
            (output,) = engine.generate([_PROMPTS[1]], _GREEDY)
            assert output.metrics.num_cached_tokens == 39
    for wrong in ("two\nlines", 3):
        with pytest.raises(ValueError, match="namespace is"):
            rig.config(namespace=wrong)


def test_tenants_do_not_find_each_other() -> None:
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        cached = []
        for name in ("a", "b", None, "a", None):
            output = engine.add_request(_PROMPTS[1], _GREEDY, namespace=name)
            while not output.finished:
                engine.step()
            cached.append(output.metrics.num_cached_tokens)
        assert cached == [0, 0, 0, 39, 39]
        assert pool.find_prefix(_PROMPTS[1], engine.namespace_of("b")) == 39
        # They do not wait for each other either: both prompts are computed at once.
        prompt = rig.prompt(20, 9)
        for name in ("a", "b"):
            engine.add_request(prompt, _GREEDY, namespace=name)
        engine.step()
        assert engine.stats.running == 2
        with pytest.raises(ValueError, match="namespace"):
            engine.add_request([1], namespace=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", range(7, 12, 2))
def test_an_interrupt_after_guesses_were_verified(monkeypatch, call: int) -> None:
    """The scheduler learns of the results, but not of rows that belong to other sequences by
    then.
    """
    prompts = [rig.prompt(4 + i % 3, i) * 4 for i in range(8)]
    params = SamplingParams(temperature=0, max_tokens=20)
    options = rig.config(num_speculative_tokens=3, prompt_lookup_min=1, max_num_seqs=2)
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, options) as engine:
        wanted = rig.tokens(engine.generate(prompts, params))
        assert engine.stats.accepted > 5
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, options) as engine:
        real, calls = pool.commit, iter(range(1000))

        def commit(*args: Any) -> None:
            if next(calls) == call:
                raise KeyboardInterrupt
            real(*args)

        monkeypatch.setattr(pool, "commit", commit)
        outputs = [engine.add_request(prompt, params) for prompt in prompts]
        assert rig.run_through(KeyboardInterrupt, engine) == 1
        for output, (expected,) in zip(outputs, wanted, strict=True):
            found = output.outputs[0]
            assert found.finish_reason == "error" or found.token_ids == expected
        assert sum(output.outputs[0].finish_reason == "length" for output in outputs) >= 5
        engine.close()
        rig.check_empty(pool)


def test_a_detokenizer_that_raises_ends_its_request_alone(expected) -> None:
    bad = expected[1][0][2]

    def text(ids: Any) -> str:
        if bad in ids:
            raise LookupError(f"no text for {bad}")
        return "".join(f"<{token}>" for token in ids)

    others = [i for i in (0, 2) if bad not in [*_PROMPTS[i], *expected[i][0]]]
    assert others, "the model says other things now"
    with rig.pool() as pool:
        with Engine(rig.step, rig.params(), pool, rig.config(), detokenize=text) as engine:
            outputs = engine.generate([_PROMPTS[i] for i in (1, *others)], _GREEDY)
            assert outputs[0].outputs[0].finish_reason == "error"
            assert str(outputs[0].error) == f"LookupError: no text for {bad}"
            assert rig.tokens(outputs)[1:] == [expected[i] for i in others]
            output = engine.add_request(_PROMPTS[0], SamplingParams(max_tokens=60))
            while not output.outputs[0].token_ids:
                engine.step()
            bad = output.outputs[0].token_ids[0]
            engine.cancel(output)
            assert output.finished
            assert output.outputs[0].finish_reason == "error"
        rig.check_empty(pool)


def test_an_interrupt_between_tokens_loses_no_token_of_others(expected) -> None:
    calls = iter(range(1000))

    def text(ids: Any) -> str:
        if next(calls) == 10:
            raise KeyboardInterrupt
        return "".join(f"<{token}>" for token in ids)

    with rig.pool() as pool:
        with Engine(rig.step, rig.params(), pool, rig.config(), detokenize=text) as engine:
            outputs = [engine.add_request(prompt, _GREEDY) for prompt in _PROMPTS]
            assert rig.run_through(KeyboardInterrupt, engine) == 1
            for output, tokens in zip(outputs, expected, strict=True):
                found = output.outputs[0]
                assert found.finish_reason == "error" or [found.token_ids] == tokens
        rig.check_empty(pool)


def test_an_interrupted_last_release_is_made_up_for(monkeypatch) -> None:
    with rig.pool() as pool:
        engine = Engine(rig.step, rig.params(), pool, rig.config())
        output = engine.add_request(_PROMPTS[0], _GREEDY)
        real = pool.release

        def release(*args: Any) -> Any:
            monkeypatch.setattr(pool, "release", real)
            raise KeyboardInterrupt

        monkeypatch.setattr(pool, "release", release)
        with pytest.raises(KeyboardInterrupt):
            _run(engine)
        assert output.finished
        assert engine.has_unfinished, "a slot to release"
        engine.close()
        assert not engine.has_unfinished
        rig.check_empty(pool)


def test_an_interrupt_while_another_is_cleared_up(expected, monkeypatch) -> None:
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        outputs = [engine.add_request(prompt, _GREEDY) for prompt in _PROMPTS]
        real, left = pool.release, iter(range(3))

        def release(*args: Any) -> Any:
            if next(left, None) is not None:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(pool, "release", release)
        assert rig.run_through(KeyboardInterrupt, engine) == 3
        assert all(output.finished for output in outputs)
        assert rig.tokens(engine.generate(_PROMPTS, _GREEDY)) == expected
        engine.close()
        rig.check_empty(pool)


def test_a_closed_pool_ends_every_request() -> None:
    pool = rig.pool()
    engine = Engine(rig.step, rig.params(), pool, rig.config())
    outputs = [engine.add_request(prompt, _GREEDY) for prompt in [*_PROMPTS, *_PROMPTS]]
    for _ in range(3):
        engine.step()
    pool.close()
    with pytest.raises(kvp.PoolClosed):
        engine.step()
    assert {output.outputs[0].finish_reason for output in outputs} == {"error"}
    assert all("PoolClosed" in str(output.error) for output in outputs)
    assert not engine.has_unfinished
    late = engine.add_request(_PROMPTS[0], _GREEDY)
    engine.close()
    assert late.outputs[0].finish_reason == "cancelled"
    assert not engine.has_unfinished
    engine.close()


@pytest.mark.parametrize("guesses", [0, 1], ids=["in-flight", "read-back"])
def test_a_slot_that_was_to_be_released_is_lost(expected, monkeypatch, guesses: int) -> None:
    """As on CUDA, where the slot of an acquire that did not run is free in a new generation."""
    options = rig.config(num_speculative_tokens=guesses)
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, options) as engine:
        real, slots = pool.acquire_prefix, []

        def acquire(*args: Any) -> Any:
            found = real(*args)
            slots.append(found[0])
            return found

        monkeypatch.setattr(pool, "acquire_prefix", acquire)
        outputs = [engine.add_request(prompt, _GREEDY) for prompt in _PROMPTS]
        for _ in range(3):
            engine.step()
        engine.cancel(outputs[0])
        fresh = pool.cache

        def cache() -> kvp.KVCache:
            monkeypatch.setattr(pool, "cache", fresh)
            return pool.release(fresh(), slots[0])

        fresh()  # fails the next call, and the step in flight if there is one
        monkeypatch.setattr(pool, "cache", cache)
        _run(engine)
        assert engine.stats.generations == 1
        assert rig.tokens(outputs)[1:] == expected[1:]
        engine.close()
        rig.check_empty(pool)


@pytest.mark.parametrize("error", [RuntimeError("lengths"), KeyboardInterrupt()])
def test_a_recovery_that_fails_is_made_again(expected, monkeypatch, error: BaseException) -> None:
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        set_lengths, release = Programs.set_lengths, pool.release
        outputs = [engine.add_request(prompt, _GREEDY) for prompt in _PROMPTS]

        def failing_set(*args: Any) -> Any:
            monkeypatch.setattr(Programs, "set_lengths", set_lengths)
            raise error

        def failing_release(*args: Any) -> Any:
            monkeypatch.setattr(pool, "release", release)
            pool.cache()
            return release(*args)

        monkeypatch.setattr(Programs, "set_lengths", failing_set)
        monkeypatch.setattr(pool, "release", failing_release)
        with pytest.raises(type(error)):
            _run(engine)
        _run(engine)
        assert engine.stats.generations == 2
        for output, tokens in zip(outputs, expected, strict=True):
            found = output.outputs[0]
            assert found.finish_reason == "error" or [found.token_ids] == tokens
        assert rig.tokens(engine.generate(_PROMPTS, _GREEDY)) == expected
        engine.close()
        rig.check_empty(pool)


def test_a_search_whose_admission_is_lost(expected, monkeypatch) -> None:
    """Its prompt is cached, so it runs no token in the step that admits it."""
    search = BeamSearchParams(beam_width=2, max_tokens=4)
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        engine.generate([_PROMPTS[1]], _GREEDY)  # into the prefix cache
        other = engine.add_request(_PROMPTS[0], _GREEDY)
        engine.step()
        output = engine.add_request(_PROMPTS[1][:33], search)
        claim = engine._slots.claim

        def failing(plan: StepPlan, *args: Any) -> StepPlan:
            if plan.admissions:
                monkeypatch.setattr(engine._slots, "claim", claim)
                assert plan.admissions[0].sequence not in plan.sequences
                raise ZeroDivisionError("in a claim")
            return claim(plan, *args)

        monkeypatch.setattr(engine._slots, "claim", failing)
        assert rig.run_through(ZeroDivisionError, engine) == 1
        assert {each.finish_reason for each in output.outputs} == {"error"}
        assert output.error == "ZeroDivisionError: in a claim"
        assert engine.stats.failures == 0
        assert rig.tokens(engine.generate(_PROMPTS, _GREEDY)) == expected
        assert other.finished
        engine.close()
        rig.check_empty(pool)


class _RaisesOnce(ExpectedGrowth):
    """A caller's policy with an error."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.left = call

    def admits(self, load: Load, group: SequenceGroup, blocks: int) -> bool:
        self.left -= 1
        if self.left == 0:
            raise ZeroDivisionError("in a policy")
        return super().admits(load, group, blocks)


@pytest.mark.parametrize("call", [1, 3, 6])
def test_a_policy_that_raises_changes_nothing(call: int) -> None:
    """The step raises, and the next one goes on as if nothing had happened."""
    options = rig.config(admission=_RaisesOnce(call))
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, options) as engine:
        outputs = [engine.add_request(*each) for each in zip(rig.PROMPTS, rig.MIXED, strict=True)]
        assert rig.run_through(ZeroDivisionError, engine) == 1
        assert rig.tokens(outputs) == rig.alone()
        assert engine.stats.failures == 0
