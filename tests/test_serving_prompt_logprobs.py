"""Log probabilities of prompts, whichever way the prompts are computed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import serving_rig as rig
from test_compile_count import compilations

from jax_kvpage.serving import (
    Engine,
    LastComeFirst,
    Logprob,
    RequestOutput,
    SamplingParams,
    Watermark,
)

pytestmark = pytest.mark.usefixtures("shared_programs")

_PROMPTS = [rig.prompt(n, n) for n in (70, 33, 5, 1, 64, 40)]
_EVERY = rig.VOCABULARY
_SCORED = SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=3)


def _engine(pool: Any, **options: Any) -> Engine:
    options = {"max_logprobs": _EVERY, "prompt_logprobs": True, **options}
    return Engine(rig.step, rig.params(), pool, rig.config(**options))


@pytest.fixture(scope="module")
def expected() -> list[list[dict[int, Logprob]]]:
    """Log probabilities of all tokens after each prefix of each prompt."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=_EVERY)
    with rig.pool() as pool, _engine(pool, prompt_logprobs=False) as engine:
        found = []
        for prompt in _PROMPTS:
            outputs = engine.generate([prompt[:i] for i in range(1, len(prompt))], params)
            found.append([output.outputs[0].logprobs[0] for output in outputs])
    return found


def _check(outputs: list[RequestOutput], expected: list[list[dict[int, Logprob]]]) -> None:
    for output, tables in zip(outputs, expected, strict=True):
        prompt, found = output.prompt_token_ids, output.prompt_logprobs
        assert found is not None
        assert len(found) == len(prompt)
        assert found[0] is None
        for token, got, table in zip(prompt[1:], found[1:], tables, strict=True):
            assert token in got
            assert len(got) == 3 + (table[token].rank > 3)
            for each, value in got.items():
                assert value.logprob == pytest.approx(table[each].logprob, abs=1e-4)
                assert value.rank == table[each].rank
        assert {each.finish_reason for each in output.outputs} == {"length"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blocks": 8, "preemption": LastComeFirst(), "admission": Watermark(0.0)},
        {"num_speculative_tokens": 3, "prompt_lookup_min": 1},
        {"prefix_caching": False},
    ],
    ids=["batched", "pressure", "speculation", "no-prefixes"],
)
def test_they_are_those_of_the_model(expected, options: dict[str, Any]) -> None:
    with rig.pool(options.pop("blocks", 64)) as pool, _engine(pool, **options) as engine:
        # Other samples, and requests without prompt_logprobs, do not disturb them.
        n = [1, 2, 1, 2, 1, 1]
        params = [dataclasses.replace(_SCORED, n=k) for k in n]
        plain = [SamplingParams(temperature=0, max_tokens=20)] * len(_PROMPTS)
        every = zip(
            [p for pair in zip(_PROMPTS, _PROMPTS, strict=True) for p in pair],
            [p for pair in zip(plain, params, strict=True) for p in pair],
            strict=True,
        )
        outputs = [engine.add_request(*each) for each in every]
        steps = 0
        while engine.has_unfinished:
            engine.step()
            steps += 1
            if steps in (2, 5):
                pool.cache()  # the step in flight fails and is retried
        assert engine.stats.generations > 0
        assert (engine.stats.preemptions > 0) == ("preemption" in options)
    _check(outputs[1::2], expected)
    assert all(output.prompt_logprobs is None for output in outputs[::2])
    for first, second in zip(outputs[::2], outputs[1::2], strict=True):
        assert all(each.token_ids == first.outputs[0].token_ids for each in second.outputs)


def test_the_prefix_cache_is_not_read(expected) -> None:
    plain = SamplingParams(temperature=0, max_tokens=2)
    with rig.pool() as pool, _engine(pool) as engine:
        for params, cached in ((plain, 0), (_SCORED, 0), (_SCORED, 0), (plain, 69)):
            (output,) = engine.generate(_PROMPTS[:1], params)
            assert output.metrics.num_cached_tokens == cached
            if params is _SCORED:
                _check([output], expected[:1])


def test_nothing_is_compiled_after_warm_up(monkeypatch) -> None:
    monkeypatch.undo()  # these engines compile their own programs
    with rig.pool() as pool, _engine(pool) as engine:
        engine.warm_up()
        assert engine.stats.programs == 2
        with compilations() as seen:
            engine.generate(_PROMPTS, [_SCORED, SamplingParams(max_tokens=3)] * 3)
        assert not seen


def test_refusals() -> None:
    with pytest.raises(ValueError, match="prompt_logprobs is -1"):
        SamplingParams(prompt_logprobs=-1)
    with rig.pool() as pool:
        with (
            _engine(pool, prompt_logprobs=False) as engine,
            pytest.raises(ValueError, match=r"EngineConfig\(prompt_logprobs=True\)"),
        ):
            engine.add_request([1], _SCORED)
        with (
            _engine(pool, max_logprobs=2) as engine,
            pytest.raises(ValueError, match="prompt_logprobs is 3, but max_logprobs is 2"),
        ):
            engine.add_request([1], _SCORED)
