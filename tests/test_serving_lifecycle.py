"""The engine: whatever happens to steps and requests, nothing is lost and other requests
continue.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import serving_rig as rig

import jax_kvpage as kvp
from jax_kvpage.serving import (
    Engine,
    LastComeFirst,
    RequestOutput,
    RequestRefused,
    SamplingParams,
)

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(scope="module")
def alone() -> list[list[list[int]]]:
    return rig.alone()


def test_a_failed_step_is_run_again(alone) -> None:
    with rig.pool() as pool:
        with Engine(rig.step, rig.params(), pool, rig.config()) as engine:
            outputs = [
                engine.add_request(p, s) for p, s in zip(rig.PROMPTS, rig.MIXED, strict=True)
            ]
            steps = 0
            while engine.has_unfinished:
                if steps % 5 == 3:
                    pool.cache()
                engine.step()
                steps += 1
            assert engine.stats.failures >= 5
            assert rig.tokens(outputs) == alone
        rig.check_empty(pool)


def test_a_call_may_be_the_first_to_hear_of_a_fault(alone, monkeypatch) -> None:
    """As on CUDA, where a failed step is reported once, by whichever call comes first."""
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        told: list[str] = []

        def fail_once(name: str) -> None:
            real = getattr(pool, name)

            def call(*args: Any) -> Any:
                if name not in told:
                    told.append(name)
                    raise kvp.DeviceFault("from an earlier step")
                return real(*args)

            monkeypatch.setattr(pool, name, call)

        fail_once("extend")
        fail_once("commit")
        fail_once("find_prefix")
        outputs = engine.generate(rig.PROMPTS[:4], rig.MIXED[:4])
        assert rig.tokens(outputs) == alone[:4]
        assert sorted(told) == ["commit", "extend", "find_prefix"]


def _poisoned(params: Any, cache: kvp.KVCache, tokens: jax.Array, batch: kvp.Batch) -> Any:
    """A model that returns NaN after token 63."""
    logits, cache = rig.step(params, cache, tokens, batch)
    last = tokens[batch.last_rows]
    return jnp.where((last == 63)[:, None], jnp.nan, logits), cache


def test_a_step_that_fails_twice_ends_its_requests_and_no_others() -> None:
    good = [ids for ids in ([1, 2, 3], rig.prompt(20, 5)) if 63 not in ids]
    params = SamplingParams(temperature=0, max_tokens=8, stop_token_ids=[63])
    with rig.pool() as pool, Engine(_poisoned, rig.params(), pool, rig.config()) as engine:
        expected = rig.tokens(engine.generate(good, params))
        first = engine.add_request(good[0], params)
        for _ in range(3):
            engine.step()
        bad = engine.add_request([5, 63], params)
        while not bad.finished:
            engine.step()
        assert bad.outputs[0].finish_reason == "error"
        assert "NaN" in str(bad.error)
        assert first.outputs[0].finish_reason == "error", "it was in the same step"
        assert rig.tokens(engine.generate(good, params)) == expected
        engine.close()
        rig.check_empty(pool)


def test_overload_and_random_cancellation_lose_nothing() -> None:
    rng = random.Random(3)
    with rig.pool(12) as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        outputs = []
        for i in range(40):
            params = SamplingParams(n=rng.choice([1, 1, 2]), max_tokens=rng.randint(1, 20))
            outputs.append(engine.add_request(rig.prompt(rng.randint(1, 60), i % 7), params))
        cancelled = []
        while engine.has_unfinished:
            engine.step()
            if rng.random() < 0.15:
                output = rng.choice(outputs)
                if not output.finished:
                    engine.cancel(output)
                    cancelled.append(output)
                    assert output.finished
        assert cancelled
        for output in outputs:
            assert output.finished
            reasons = {each.finish_reason for each in output.outputs}
            assert reasons <= ({"length", "cancelled"} if output in cancelled else {"length"})
        rig.check_empty(pool)


def test_deadlines() -> None:
    now = [0.0]
    with rig.pool() as pool:
        engine = Engine(rig.step, rig.params(), pool, rig.config(), clock=lambda: now[0])
        late = engine.add_request(rig.PROMPTS[0], rig.GREEDY, deadline=5)
        other = engine.add_request(rig.PROMPTS[1], rig.GREEDY)
        while engine.has_unfinished:
            engine.step()
            now[0] += 1
        assert late.outputs[0].finish_reason == "deadline"
        assert 0 < len(late.outputs[0].token_ids) < 20
        assert other.outputs[0].finish_reason == "length"
        engine.close()


def test_close_ends_everything() -> None:
    with rig.pool() as pool:
        engine = Engine(rig.step, rig.params(), pool, rig.config())
        outputs = [engine.add_request(p, rig.GREEDY) for p in rig.PROMPTS]
        for _ in range(4):
            engine.step()
        engine.close()
        engine.close()
        assert all(output.finished for output in outputs)
        with pytest.raises(RuntimeError, match="closed"):
            engine.add_request([1])
        rig.check_empty(pool)


def test_an_exception_in_generate_cancels_its_requests() -> None:
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        with pytest.raises(RequestRefused):
            engine.generate([rig.PROMPTS[0], rig.prompt(128)], rig.GREEDY)
        expected = engine.generate([rig.PROMPTS[0]], rig.GREEDY)
        assert len(expected[0].outputs[0].token_ids) == 20
        assert engine.stats.steps == 20


@pytest.mark.parametrize("name", ["extend", "acquire_prefix", "release", "fork"])
def test_an_interrupt_ends_the_requests_of_its_step(alone, monkeypatch, name: str) -> None:
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        real, calls = getattr(pool, name), iter(range(100))

        def call(*args: Any, **options: Any) -> Any:
            if next(calls) == 1:
                raise KeyboardInterrupt
            return real(*args, **options)

        monkeypatch.setattr(pool, name, call)
        params = [dataclasses.replace(each, n=2) for each in rig.MIXED]
        outputs = [engine.add_request(p, s) for p, s in zip(rig.PROMPTS, params, strict=True)]
        assert rig.run_through(KeyboardInterrupt, engine) == 1
        reasons = []
        for output, (expected,) in zip(outputs, alone, strict=True):
            reasons.append({each.finish_reason for each in output.outputs})
            assert reasons[-1] <= {"length", "error"}
            assert reasons[-1] == {"error"} or output.outputs[0].token_ids == expected
        assert {"length"} in reasons
        assert any("error" in found for found in reasons)
        engine.close()
        rig.check_empty(pool)


def test_a_failing_sample_ends_its_siblings() -> None:
    """The step fails when the fork of the siblings is already planned."""
    prompt = [*rig.prompt(20, 5), 63]
    with rig.pool() as pool, Engine(_poisoned, rig.params(), pool, rig.config()) as engine:
        other = engine.add_request([1, 2, 3], SamplingParams(max_tokens=1))
        (output,) = engine.generate([prompt], SamplingParams(n=3, max_tokens=4))
        assert [each.finish_reason for each in output.outputs] == ["error"] * 3
        assert other.finished
        engine.close()
        rig.check_empty(pool)


@pytest.mark.parametrize("seed", range(4))
def test_everything_at_once(alone, seed: int) -> None:
    """Pressure, failures, cancellation, prefixes, samples and speculation change no token."""
    rng = random.Random(seed)
    options = rig.config(num_speculative_tokens=2 * (seed % 2), preemption=LastComeFirst())
    with rig.pool(10, layout=("fused", "per_layer")[seed // 2]) as pool:
        with Engine(rig.step, rig.params(), pool, options) as engine:
            outputs: list[tuple[int, RequestOutput]] = []
            while len(outputs) < 25 or engine.has_unfinished:
                while len(outputs) < 25 and rng.random() < 0.8:
                    which = rng.randrange(len(rig.PROMPTS))
                    n = rng.choice([1, 1, 2])
                    params = dataclasses.replace(rig.MIXED[which], n=n)
                    outputs.append((which, engine.add_request(rig.PROMPTS[which], params)))
                engine.step()
                if rng.random() < 0.04:
                    pool.cache()
                if outputs and rng.random() < 0.05:
                    engine.cancel(rng.choice(outputs)[1])
            assert engine.stats.generations > 2
            assert engine.stats.preemptions > 0
        rig.check_empty(pool)
    reasons = set()
    for which, output in outputs:
        first, (expected,) = output.outputs[0], alone[which]
        assert first.token_ids == expected[: len(first.token_ids)]
        assert first.finish_reason != "length" or first.token_ids == expected
        reasons |= {each.finish_reason for each in output.outputs}
    assert reasons == {"length", "cancelled"}
