"""The engine: outputs do not depend on what else runs, and nothing is lost."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import serving_rig as rig
from serving_rig import shared_programs  # noqa: F401
from test_compile_count import compilations

import jax_kvpage as kvp
from jax_kvpage.serving import (
    Engine,
    EngineConfig,
    LastComeFirst,
    RequestOutput,
    RequestRefused,
    SamplingParams,
    Watermark,
)

pytestmark = pytest.mark.usefixtures("shared_programs")

_GREEDY = SamplingParams(temperature=0, max_tokens=20)
_SAMPLED = SamplingParams(seed=7, max_tokens=20, top_k=20, top_p=0.9, min_p=0.01)
_PENALIZED = SamplingParams(
    seed=8, max_tokens=20, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.3
)
_PROMPTS = [rig.prompt(n, n) for n in (5, 40, 17, 70, 1, 33, 20, 64)]
_MIXED = [_GREEDY, _SAMPLED, _PENALIZED, _GREEDY, _SAMPLED, _PENALIZED, _SAMPLED, _GREEDY]


def _generate(
    prompts: Sequence[list[int]], params: Any, blocks: int = 64, **options: Any
) -> list[RequestOutput]:
    with rig.pool(blocks) as pool:
        with Engine(rig.step, rig.params(), pool, rig.config(**options)) as engine:
            outputs = engine.generate(prompts, params)
        _check_empty(pool)
    return outputs


def _check_empty(pool: kvp.KVPool) -> None:
    jax.block_until_ready(pool.cache())
    stats = pool.stats()
    assert (stats.blocks_mapped, stats.blocks_draining, stats.slots_occupied) == (0, 0, 0)


@pytest.fixture(scope="module")
def alone() -> list[list[list[int]]]:
    """Each request in an engine that runs nothing else and has memory for everything."""
    with rig.pool() as pool:
        engine = Engine(rig.step, rig.params(), pool, rig.config(prefix_caching=False))
        with engine:
            return [
                rig.tokens(engine.generate([prompt], params))[0]
                for prompt, params in zip(_PROMPTS, _MIXED, strict=True)
            ]


def _reference(prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens from the whole text in one step each."""
    step = jax.jit(rig.step)
    ids = list(prompt)
    with rig.pool() as pool:
        for _ in range(num_tokens):
            slot, cache = pool.acquire(pool.cache(), len(ids))
            batch = kvp.Batch.from_lengths([slot], [len(ids)], num_tokens=32)
            padded = np.zeros(32, np.int32)
            padded[: len(ids)] = ids
            logits, cache = step(rig.params(), cache, padded, batch)
            ids.append(int(np.argmax(logits[0])))
            pool.release(kvp.advance(cache, batch), slot)
    return ids[len(prompt) :]


def test_greedy_tokens_are_those_of_the_model(alone) -> None:
    assert alone[0] == [_reference(_PROMPTS[0], 20)]
    assert len({tuple(tokens[0]) for tokens in alone}) == len(alone), "the model says one thing"


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_caching": False},
        {},
        {"max_num_batched_tokens": 32, "max_num_seqs": 2, "buckets": ((32, 4),)},
        {"blocks": 8, "prefix_caching": False, "preemption": LastComeFirst()},
        {"blocks": 8, "preemption": LastComeFirst()},
    ],
    ids=["batched", "prefixes", "two-at-a-time", "pressure", "pressure-prefixes"],
)
def test_outputs_do_not_depend_on_the_batch(alone, options: dict[str, Any]) -> None:
    outputs = _generate(_PROMPTS, _MIXED, **options)
    assert rig.tokens(outputs) == alone
    assert {each.finish_reason for output in outputs for each in output.outputs} == {"length"}
    preempted = sum(output.metrics.num_preemptions for output in outputs)
    assert (preempted > 0) == ("blocks" in options)


def test_default_buckets_give_the_same_tokens(alone) -> None:
    """Other program shapes may round differently; with these weights no token is that close."""
    outputs = _generate(_PROMPTS, _MIXED, buckets=None)
    assert rig.tokens(outputs) == alone


_REPEATING = [ids * 6 for ids in (rig.prompt(4, 1), rig.prompt(5, 2), rig.prompt(7, 3))]


@pytest.mark.parametrize("blocks", [64, 9])
def test_speculation_changes_no_token(blocks: int) -> None:
    prompts = [*_PROMPTS[:3], *_REPEATING]
    plain = SamplingParams(temperature=0, max_tokens=30, logprobs=2)
    cold = SamplingParams(temperature=0.3, seed=4, max_tokens=30)
    params = [_MIXED[1], plain, _PENALIZED, plain, cold, plain]
    expected = _generate(prompts, params, prefix_caching=False)
    with rig.pool(blocks) as pool:
        options = rig.config(
            num_speculative_tokens=3,
            prompt_lookup_min=1,
            preemption=LastComeFirst(),
            admission=Watermark(0.0),  # as many as fit for now: later they run short
        )
        with Engine(rig.step, rig.params(), pool, options) as engine:
            outputs = engine.generate(prompts, params)
            assert engine.stats.accepted > 5
            assert (engine.stats.preemptions > 0) == (blocks == 9)
            assert rig.tokens(outputs) == rig.tokens(expected)
            same = outputs[3].outputs[0].cumulative_logprob
            assert same == pytest.approx(expected[3].outputs[0].cumulative_logprob, abs=1e-4)
            at = outputs[3].outputs[0].token_ids
            stop = SamplingParams(temperature=0, max_tokens=30, stop_token_ids=[at[20]])
            (stopped,) = engine.generate([prompts[3]], stop)
            assert stopped.outputs[0].token_ids == at[: at.index(at[20]) + 1]
            # What was rejected is found nowhere: the next turn continues from these tokens.
            (again,) = engine.generate([prompts[3] + at], plain)
        _check_empty(pool)
    (fresh,) = _generate([prompts[3] + at], plain)
    assert rig.tokens([again]) == rig.tokens([fresh])


def test_a_prompt_that_is_in_memory_is_not_computed_again() -> None:
    prefix = rig.prompt(50, 1)
    prompts = [prefix + rig.prompt(6, seed) for seed in range(2, 6)]
    expected = rig.tokens(_generate(prompts, _GREEDY, prefix_caching=False))
    outputs = _generate(prompts, _GREEDY)
    assert rig.tokens(outputs) == expected
    assert [output.metrics.num_cached_tokens for output in outputs] == [0, 50, 50, 50]
    assert [output.metrics.num_computed_tokens for output in outputs] == [75, 25, 25, 25]
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        (first,) = engine.generate([prefix], _GREEDY)
        turn = prefix + first.outputs[0].token_ids + rig.prompt(3)
        (second,) = engine.generate([turn], _GREEDY)
        assert second.metrics.num_cached_tokens == len(turn) - 4, "all but the last token"


def test_samples_share_the_prompt_and_differ() -> None:
    params = SamplingParams(n=3, seed=3, max_tokens=12)
    (output,) = _generate([_PROMPTS[1]], params)
    (alone,) = _generate([_PROMPTS[1]], SamplingParams(seed=3, max_tokens=12))
    texts = [tuple(each.token_ids) for each in output.outputs]
    assert len(set(texts)) == 3
    assert list(texts[0]) == alone.outputs[0].token_ids
    assert output.metrics.num_computed_tokens == 40 + 2 + 3 * 11
    under_pressure = _generate([_PROMPTS[1], _PROMPTS[3]], params, blocks=12)
    assert tuple(map(tuple, rig.tokens(under_pressure)[0])) == tuple(texts)


def test_seeds() -> None:
    def run(**options: Any) -> list[list[list[int]]]:
        params = SamplingParams(max_tokens=12, **options)
        return rig.tokens(_generate([_PROMPTS[0]] * 2, params))

    first = run(seed=1)
    assert first[0] == first[1] == run(seed=1)[0] != run(seed=2)[0]
    unseeded = run()
    assert unseeded[0] != unseeded[1]
    assert unseeded == run(), "the engine's own seeds are repeatable"


def test_it_ends_at_stop_tokens() -> None:
    (whole,) = _generate([_PROMPTS[0]], _GREEDY)
    ids = whole.outputs[0].token_ids
    at = next(i for i in range(3, 20) if ids[i] not in ids[:i])
    stop = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[ids[at]])
    (output,) = _generate([_PROMPTS[0]], stop)
    assert output.outputs[0].token_ids == ids[: at + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", ids[at])
    plain = SamplingParams(temperature=0, max_tokens=20)
    (output,) = _generate([_PROMPTS[0]], plain, eos_token_ids=(ids[at],))
    assert output.outputs[0].token_ids == ids[: at + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)
    ignored = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    (output,) = _generate([_PROMPTS[0]], ignored, eos_token_ids=(ids[at],))
    assert output.outputs[0].token_ids == ids
    late = SamplingParams(temperature=0, max_tokens=20, min_tokens=at + 2)
    (output,) = _generate([_PROMPTS[0]], late, eos_token_ids=(ids[at],))
    assert output.outputs[0].token_ids[:at] == ids[:at]
    assert ids[at] not in output.outputs[0].token_ids[: at + 2]


def test_stop_strings_and_text() -> None:
    def text(ids: Sequence[int]) -> str:
        return "".join(f"<{token}>" for token in ids)

    with rig.pool() as pool:
        engine = Engine(rig.step, rig.params(), pool, rig.config(), detokenize=text)
        (whole,) = engine.generate([_PROMPTS[0]], _GREEDY)
        ids = whole.outputs[0].token_ids
        assert whole.outputs[0].text == text(ids)
        at = next(i for i in range(3, 20) if ids[i] not in ids[:i])
        for included in (False, True):
            params = SamplingParams(
                temperature=0,
                max_tokens=20,
                stop=f"<{ids[at]}",
                include_stop_str_in_output=included,
            )
            (output,) = engine.generate([_PROMPTS[0]], params)
            found = output.outputs[0]
            assert found.text == text(ids[:at]) + (f"<{ids[at]}" if included else "")
            assert (found.finish_reason, found.stop_reason) == ("stop", f"<{ids[at]}")
            assert found.token_ids == ids[: at + 1]
        engine.close()


def test_logprobs() -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3)
    outputs = _generate([_PROMPTS[0], _PROMPTS[1]], [params, _SAMPLED])
    found = outputs[0].outputs[0]
    assert outputs[1].outputs[0].logprobs is None
    assert found.logprobs is not None
    assert found.cumulative_logprob is not None
    ids = list(_PROMPTS[0])
    with rig.pool() as pool:
        slot, cache = pool.acquire(pool.cache(), 64)
        last: list[int] = ids
        for token, table in zip(found.token_ids, found.logprobs, strict=True):
            batch = kvp.Batch.from_lengths([slot], [len(last)])
            logits, cache = rig.step(rig.params(), cache, jnp.asarray(last, jnp.int32), batch)
            cache = kvp.advance(cache, batch)
            expected = np.asarray(jax.nn.log_softmax(logits[0]))
            assert sorted(table) == sorted(np.argsort(-expected)[:3].tolist())
            for key, entry in table.items():
                assert abs(entry.logprob - expected[key]) < 1e-4
                assert entry.rank == 1 + int((expected > expected[key]).sum())
            last = [token]
    total = sum(t[i].logprob for i, t in zip(found.token_ids, found.logprobs, strict=True))
    assert abs(total - found.cumulative_logprob) < 1e-4


def test_nothing_is_compiled_after_warm_up() -> None:
    with rig.pool(24) as pool:
        options = rig.config(buckets=((4, 4), (32, 4)), num_speculative_tokens=2)
        with Engine(rig.step, rig.params(), pool, options) as engine:
            seen: list[tuple[int, int]] = []
            engine.warm_up(progress=lambda done, total: seen.append((done, total)))
            assert seen[-1][0] == seen[-1][1] > engine.stats.programs == 4
            with compilations() as compiled:
                engine.generate(_PROMPTS, _MIXED)
                engine.generate([_PROMPTS[1]] * 2, SamplingParams(n=3, logprobs=2))
                pool.cache()  # makes the engine's cache stale: the next step fails
                engine.generate([_PROMPTS[3]], _GREEDY)
                assert engine.stats.generations == 1
            assert compiled == []
            assert engine.stats.programs == 4
        _check_empty(pool)


def test_a_failed_step_is_run_again(alone) -> None:
    with rig.pool() as pool:
        with Engine(rig.step, rig.params(), pool, rig.config()) as engine:
            outputs = [engine.add_request(p, s) for p, s in zip(_PROMPTS, _MIXED, strict=True)]
            steps = 0
            while engine.has_unfinished:
                if steps % 5 == 3:
                    pool.cache()
                engine.step()
                steps += 1
            assert engine.stats.failures >= 5
            assert rig.tokens(outputs) == alone
        _check_empty(pool)


def test_a_call_may_be_the_first_to_hear_of_a_fault(alone, monkeypatch) -> None:
    """As on CUDA, where a failed step is told to any call, once."""
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        told: list[str] = []

        def fail_once(name: str) -> None:
            real = getattr(pool, name)

            def call(*args: Any) -> None:
                if name not in told:
                    told.append(name)
                    raise kvp.DeviceFault("from an earlier step")
                real(*args)

            monkeypatch.setattr(pool, name, call)

        fail_once("extend")
        fail_once("commit")
        outputs = engine.generate(_PROMPTS[:4], _MIXED[:4])
        assert rig.tokens(outputs) == alone[:4]
        assert sorted(told) == ["commit", "extend"]


def _poisoned(params: Any, cache: kvp.KVCache, tokens: jax.Array, batch: kvp.Batch) -> Any:
    """A model that has no answer after token 63."""
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
        _check_empty(pool)


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
        _check_empty(pool)


def test_deadlines() -> None:
    now = [0.0]
    with rig.pool() as pool:
        engine = Engine(rig.step, rig.params(), pool, rig.config(), clock=lambda: now[0])
        late = engine.add_request(_PROMPTS[0], _GREEDY, deadline=5)
        other = engine.add_request(_PROMPTS[1], _GREEDY)
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
        outputs = [engine.add_request(p, _GREEDY) for p in _PROMPTS]
        for _ in range(4):
            engine.step()
        engine.close()
        engine.close()
        assert all(output.finished for output in outputs)
        with pytest.raises(RuntimeError, match="closed"):
            engine.add_request([1])
        _check_empty(pool)


def test_an_exception_in_generate_cancels_its_requests() -> None:
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        with pytest.raises(RequestRefused):
            engine.generate([_PROMPTS[0], rig.prompt(128)], _GREEDY)
        expected = engine.generate([_PROMPTS[0]], _GREEDY)
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
        params = [dataclasses.replace(each, n=2) for each in _MIXED]
        outputs = [engine.add_request(p, s) for p, s in zip(_PROMPTS, params, strict=True)]
        interrupts = 0
        while engine.has_unfinished:
            try:
                engine.step()
            except KeyboardInterrupt:
                interrupts += 1
        assert interrupts == 1
        reasons = []
        for output, (expected,) in zip(outputs, alone, strict=True):
            reasons.append({each.finish_reason for each in output.outputs})
            assert reasons[-1] <= {"length", "error"}
            assert reasons[-1] == {"error"} or output.outputs[0].token_ids == expected
        assert {"length"} in reasons
        assert any("error" in found for found in reasons)
        engine.close()
        _check_empty(pool)


def test_a_sequence_ends_where_the_slot_or_the_memory_does() -> None:
    (output,) = _generate([rig.prompt(120)], SamplingParams(max_tokens=100))
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (8, "length")
    (output,) = _generate([rig.prompt(40)], SamplingParams(max_tokens=100), blocks=4)
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (25, "capacity")


def test_refusals_list_every_reason() -> None:
    with pytest.raises(ValueError) as error:
        SamplingParams(n=0, temperature=-1, top_p=0, stop="", max_tokens=2, min_tokens=3)
    assert str(error.value).count("\n  - ") == 5
    with pytest.raises(ValueError, match="max_logprobs"):
        EngineConfig(max_logprobs=-1)
    with rig.pool() as pool:
        with pytest.raises(ValueError, match="have none for 32 tokens"):
            Engine(rig.step, rig.params(), pool, rig.config(buckets=((16, 4),)))
        with pytest.raises(ValueError, match="max_num_seqs is 9"):
            Engine(rig.step, rig.params(), pool, rig.config(max_num_seqs=9))
        with Engine(rig.step, rig.params(), pool, rig.config()) as engine:
            params = SamplingParams(
                logprobs=21, stop="x", min_tokens=1, stop_token_ids=list(range(9))
            )
            with pytest.raises(ValueError, match=r"(?s)logprobs is 21.*stop strings.*min_tokens"):
                engine.add_request([1], params)
            for prompt in ([], [-1], "text"):
                with pytest.raises(ValueError, match="prompt"):
                    engine.add_request(prompt)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="Engine: 2 prompts, but 1 params"):
                engine.generate([[1], [2]], [SamplingParams()])
            assert not engine.has_unfinished


def test_a_failing_sample_ends_its_siblings() -> None:
    """The step fails in which the siblings' fork is planned already."""
    prompt = [*rig.prompt(20, 5), 63]
    with rig.pool() as pool, Engine(_poisoned, rig.params(), pool, rig.config()) as engine:
        other = engine.add_request([1, 2, 3], SamplingParams(max_tokens=1))
        (output,) = engine.generate([prompt], SamplingParams(n=3, max_tokens=4))
        assert [each.finish_reason for each in output.outputs] == ["error"] * 3
        assert other.finished
        engine.close()
        _check_empty(pool)


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
                    which = rng.randrange(len(_PROMPTS))
                    n = rng.choice([1, 1, 2])
                    params = dataclasses.replace(_MIXED[which], n=n)
                    outputs.append((which, engine.add_request(_PROMPTS[which], params)))
                engine.step()
                if rng.random() < 0.04:
                    pool.cache()
                if outputs and rng.random() < 0.05:
                    engine.cancel(rng.choice(outputs)[1])
            assert engine.stats.generations > 2
            assert engine.stats.preemptions > 0
        _check_empty(pool)
    reasons = set()
    for which, output in outputs:
        first, (expected,) = output.outputs[0], alone[which]
        assert first.token_ids == expected[: len(first.token_ids)]
        assert first.finish_reason != "length" or first.token_ids == expected
        reasons |= {each.finish_reason for each in output.outputs}
    assert reasons == {"length", "cancelled"}


def test_a_sequence_may_use_what_its_slot_had_before() -> None:
    """A parked slot that a request adopts may have more blocks than it asked for."""
    with rig.pool(4) as pool:
        options = rig.config(prefix_caching=False)
        with Engine(rig.step, rig.params(), pool, options) as engine:
            for seed in range(3):
                (output,) = engine.generate(
                    [rig.prompt(40, seed)], SamplingParams(temperature=0, max_tokens=15)
                )
                assert output.outputs[0].finish_reason == "length"
                assert len(output.outputs[0].token_ids) == 15
