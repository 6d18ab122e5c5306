"""The engine: outputs do not depend on what else is running, and nothing is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import serving_rig as rig
from test_compile_count import compilations

import jax_kvpage as kvp
from jax_kvpage.serving import (
    Engine,
    EngineConfig,
    LastComeFirst,
    RequestOutput,
    SamplingParams,
    Watermark,
)

pytestmark = pytest.mark.usefixtures("shared_programs")


def _generate(
    prompts: Sequence[list[int]], params: Any, blocks: int = 64, **options: Any
) -> list[RequestOutput]:
    with rig.pool(blocks) as pool:
        with Engine(rig.step, rig.params(), pool, rig.config(**options)) as engine:
            outputs = engine.generate(prompts, params)
        rig.check_empty(pool)
    return outputs


@pytest.fixture(scope="module")
def alone() -> list[list[list[int]]]:
    return rig.alone()


def _reference(prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens, with a single step over the whole text for each token."""
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
    assert alone[0] == [_reference(rig.PROMPTS[0], 20)]
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
    outputs = _generate(rig.PROMPTS, rig.MIXED, **options)
    assert rig.tokens(outputs) == alone
    assert {each.finish_reason for output in outputs for each in output.outputs} == {"length"}
    preempted = sum(output.metrics.num_preemptions for output in outputs)
    assert (preempted > 0) == ("blocks" in options)


def test_default_buckets_give_the_same_tokens(alone) -> None:
    """Other program shapes may round differently; with these weights no two tokens are that
    close.
    """
    outputs = _generate(rig.PROMPTS, rig.MIXED, buckets=None)
    assert rig.tokens(outputs) == alone


_REPEATING = [ids * 6 for ids in (rig.prompt(4, 1), rig.prompt(5, 2), rig.prompt(7, 3))]


@pytest.mark.parametrize("blocks", [64, 9])
def test_speculation_changes_no_token(blocks: int) -> None:
    prompts = [*rig.PROMPTS[:3], *_REPEATING]
    plain = SamplingParams(temperature=0, max_tokens=30, logprobs=2)
    cold = SamplingParams(temperature=0.3, seed=4, max_tokens=30)
    params = [rig.MIXED[1], plain, rig.PENALIZED, plain, cold, plain]
    expected = _generate(prompts, params, prefix_caching=False)
    with rig.pool(blocks) as pool:
        options = rig.config(
            num_speculative_tokens=3,
            prompt_lookup_min=1,
            preemption=LastComeFirst(),
            admission=Watermark(0.0),  # as many as fit for now, so blocks run short later
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
            # Rejected tokens cannot be found: the next turn continues from these tokens.
            (again,) = engine.generate([prompts[3] + at], plain)
        rig.check_empty(pool)
    (fresh,) = _generate([prompts[3] + at], plain)
    assert rig.tokens([again]) == rig.tokens([fresh])


def test_a_prompt_that_is_in_memory_is_not_computed_again() -> None:
    prefix = rig.prompt(50, 1)
    prompts = [prefix + rig.prompt(6, seed) for seed in range(2, 6)]
    expected = rig.tokens(_generate(prompts, rig.GREEDY, prefix_caching=False))
    outputs = _generate(prompts, rig.GREEDY)
    assert rig.tokens(outputs) == expected
    assert [output.metrics.num_cached_tokens for output in outputs] == [0, 50, 50, 50]
    assert [output.metrics.num_computed_tokens for output in outputs] == [75, 25, 25, 25]
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        (first,) = engine.generate([prefix], rig.GREEDY)
        turn = prefix + first.outputs[0].token_ids + rig.prompt(3)
        (second,) = engine.generate([turn], rig.GREEDY)
        assert second.metrics.num_cached_tokens == len(turn) - 4, "all but the last token"


def test_samples_share_the_prompt_and_differ() -> None:
    params = SamplingParams(n=3, seed=3, max_tokens=12)
    (output,) = _generate([rig.PROMPTS[1]], params)
    (alone,) = _generate([rig.PROMPTS[1]], SamplingParams(seed=3, max_tokens=12))
    texts = [tuple(each.token_ids) for each in output.outputs]
    assert len(set(texts)) == 3
    assert list(texts[0]) == alone.outputs[0].token_ids
    assert output.metrics.num_computed_tokens == 40 + 2 + 3 * 11
    under_pressure = _generate([rig.PROMPTS[1], rig.PROMPTS[3]], params, blocks=12)
    assert tuple(map(tuple, rig.tokens(under_pressure)[0])) == tuple(texts)


def test_seeds() -> None:
    def run(**options: Any) -> list[list[list[int]]]:
        params = SamplingParams(max_tokens=12, **options)
        return rig.tokens(_generate([rig.PROMPTS[0]] * 2, params))

    first = run(seed=1)
    assert first[0] == first[1] == run(seed=1)[0] != run(seed=2)[0]
    unseeded = run()
    assert unseeded[0] != unseeded[1]
    assert unseeded == run(), "the engine's own seeds are repeatable"


def test_it_ends_at_stop_tokens() -> None:
    (whole,) = _generate([rig.PROMPTS[0]], rig.GREEDY)
    ids = whole.outputs[0].token_ids
    at = next(i for i in range(3, 20) if ids[i] not in ids[:i])
    stop = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[ids[at]])
    (output,) = _generate([rig.PROMPTS[0]], stop)
    assert output.outputs[0].token_ids == ids[: at + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", ids[at])
    plain = SamplingParams(temperature=0, max_tokens=20)
    (output,) = _generate([rig.PROMPTS[0]], plain, eos_token_ids=(ids[at],))
    assert output.outputs[0].token_ids == ids[: at + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)
    ignored = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    (output,) = _generate([rig.PROMPTS[0]], ignored, eos_token_ids=(ids[at],))
    assert output.outputs[0].token_ids == ids
    late = SamplingParams(temperature=0, max_tokens=20, min_tokens=at + 2)
    (output,) = _generate([rig.PROMPTS[0]], late, eos_token_ids=(ids[at],))
    assert output.outputs[0].token_ids[:at] == ids[:at]
    assert ids[at] not in output.outputs[0].token_ids[: at + 2]


def test_stop_strings_and_text() -> None:
    def text(ids: Sequence[int]) -> str:
        return "".join(f"<{token}>" for token in ids)

    with rig.pool() as pool:
        engine = Engine(rig.step, rig.params(), pool, rig.config(), detokenize=text)
        (whole,) = engine.generate([rig.PROMPTS[0]], rig.GREEDY)
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
            (output,) = engine.generate([rig.PROMPTS[0]], params)
            found = output.outputs[0]
            assert found.text == text(ids[:at]) + (f"<{ids[at]}" if included else "")
            assert (found.finish_reason, found.stop_reason) == ("stop", f"<{ids[at]}")
            assert found.token_ids == ids[: at + 1]
        engine.close()


def test_logprobs() -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3)
    outputs = _generate([rig.PROMPTS[0], rig.PROMPTS[1]], [params, rig.SAMPLED])
    found = outputs[0].outputs[0]
    assert outputs[1].outputs[0].logprobs is None
    assert found.logprobs is not None
    assert found.cumulative_logprob is not None
    ids = list(rig.PROMPTS[0])
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
                engine.generate(rig.PROMPTS, rig.MIXED)
                engine.generate([rig.PROMPTS[1]] * 2, SamplingParams(n=3, logprobs=2))
                pool.cache()  # makes the engine's cache stale, so the next step fails
                engine.generate([rig.PROMPTS[3]], rig.GREEDY)
                assert engine.stats.generations == 1
            assert compiled == []
            assert engine.stats.programs == 4
        rig.check_empty(pool)


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


def test_steps_that_have_room_do_not_ask_the_pool(monkeypatch) -> None:
    """The pool's stats take longer than the rest of a plan."""
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        asked, real = [], pool.stats
        monkeypatch.setattr(pool, "stats", lambda: asked.append(engine.stats.steps) or real())
        (output,) = engine.generate([rig.PROMPTS[0]], SamplingParams(max_tokens=40, temperature=0))
        length = len(rig.PROMPTS[0]) + 40
    first, *grown = sorted(set(asked))
    assert first == 0
    assert len(output.outputs[0].token_ids) == 40
    assert 0 < len(grown) <= length // rig.BLOCK + 1
