"""Constrained decoding: every output has the requested form, and other outputs do not change."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import serving_rig as rig
from guided_rig import Words, decode, guided_engine, guided_params, tokenizer

import jax_kvpage as kvp
from jax_kvpage.serving import (
    Engine,
    LastComeFirst,
    SamplingParams,
    StructuredOutputsParams,
    Watermark,
)

pytestmark = pytest.mark.usefixtures("shared_programs")

_SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"enum": ["x", "the", None]},
        "c": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["a", "b", "c"],
}
_LARK = """
start: sum
sum: number | number "+" sum_two
sum_two: number "+" number
number: /[0-9]{1,3}/
"""
_TAG = {
    "triggers": ["<f"],
    "structures": [
        {"begin": "<fx>", "schema": {**_SCHEMA, "additionalProperties": False}, "end": "<fx>"}
    ],
}


def _check_schema(text: str) -> None:
    value = json.loads(text)
    assert list(value) == ["a", "b", "c"]
    assert 0 <= value["a"] <= 99
    assert value["b"] in ("x", "the", None)
    assert len(value["c"]) <= 2
    assert all(isinstance(each, bool) for each in value["c"])


def _matches(pattern: str) -> Any:
    def check(text: str) -> None:
        assert re.fullmatch(pattern, text), (pattern, text)

    return check


_TIGHT = {"disable_any_whitespace": True, "disable_additional_properties": True}
_CASES: list[tuple[dict[str, Any], Any]] = [
    ({"regex": "(ab|12)+-[a-f]{2,9}x"}, _matches("(ab|12)+-[a-f]{2,9}x")),
    ({"choice": ["the", "then", "é12", "{}"]}, _matches("the|then|é12|[{]}")),
    ({"json": _SCHEMA, **_TIGHT}, _check_schema),
    ({"json": json.dumps(_SCHEMA), **_TIGHT, "temperature": 0}, _check_schema),
    ({"json": _SCHEMA, **_TIGHT, "whitespace_pattern": " ?"}, _check_schema),
    ({"grammar": _LARK}, _matches(r"\d{1,3}(\+\d{1,3}\+\d{1,3})?")),
    ({"grammar": 'root ::= "a" [0-9] "b"'}, _matches("a[0-9]b")),
    ({"regex": "[a-z]{3}", "top_k": 1, "presence_penalty": 1.5}, _matches("[a-z]{3}")),
    ({"regex": "[a-z ]{60,70}"}, _matches("[a-z ]{60,70}")),
]


def _cases(**options: Any) -> list[SamplingParams]:
    return [
        guided_params(**{"seed": i, "n": 1 + i % 2, **case, **options})
        for i, (case, _) in enumerate(_CASES)
    ]


_PROMPTS = [rig.prompt(n, n) for n in (5, 40, 17, 33, 1, 21, 9, 50, 15)]


@pytest.fixture(scope="module")
def alone() -> list[list[list[int]]]:
    """Runs each request, and one without a constraint, alone."""
    with rig.pool() as pool, guided_engine(pool, prefix_caching=False) as engine:
        params = [*_cases(), SamplingParams(seed=3, max_tokens=30)]
        prompts = [*_PROMPTS, _PROMPTS[0]]
        return [
            rig.tokens(engine.generate([prompt], each))[0]
            for prompt, each in zip(prompts, params, strict=True)
        ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blocks": 7, "preemption": LastComeFirst()},
        {"blocks": 9, "num_speculative_tokens": 3, "prompt_lookup_min": 1},
    ],
    ids=["batched", "pressure", "speculation"],
)
def test_outputs_have_their_form_and_do_not_depend_on_the_batch(alone, options) -> None:
    options = {"admission": Watermark(0.0), **options}
    with rig.pool(options.pop("blocks", 64)) as pool, guided_engine(pool, **options) as engine:
        params = [*_cases(), SamplingParams(seed=3, max_tokens=30)]
        outputs = [engine.add_request(*each) for each in zip(
            [*_PROMPTS, _PROMPTS[0]], params, strict=True)]  # fmt: skip
        steps = 0
        while engine.has_unfinished:
            engine.step()
            steps += 1
            if steps == 20:
                pool.cache()  # the step in flight fails and is retried
        assert engine.stats.generations > 0
        if options.get("preemption"):
            assert engine.stats.preemptions > 0
        if options.get("num_speculative_tokens"):
            assert engine.stats.accepted > 0
    for output, (_, check) in zip(outputs[:-1], _CASES, strict=True):
        for each in output.outputs:
            assert each.finish_reason == "stop"
            check(each.text)
    assert rig.tokens(outputs) == alone


def test_a_structural_tag_is_met_where_its_trigger_is() -> None:
    with rig.pool() as pool, guided_engine(pool) as engine:
        params = [guided_params(structural_tag=_TAG, seed=i, max_tokens=110) for i in range(12)]
        found = 0
        for output in engine.generate([_PROMPTS[0]] * 12, params):
            for inner in re.findall("<fx>(.*?)<fx>", output.outputs[0].text, re.DOTALL):
                _check_schema(inner)
                found += 1
            assert not re.search("<f[^x]", output.outputs[0].text)
    assert found > 0


def test_any_json_object() -> None:
    with rig.pool() as pool, guided_engine(pool) as engine:
        params = [guided_params(json_object=True, seed=i, max_tokens=100) for i in range(8)]
        outputs = engine.generate([_PROMPTS[0]] * 8, params)
    ended = [each for output in outputs for each in output.outputs if each.finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(each.text), dict) for each in ended)


def _one(engine: Engine, **options: Any) -> Any:
    (output,) = engine.generate([_PROMPTS[0]], guided_params(**{"seed": 1, **options}))
    return output.outputs[0]


def test_where_outputs_end() -> None:
    with rig.pool() as pool, guided_engine(pool) as engine:
        full = _one(engine, regex="[a-z]{20}", max_tokens=7)
        assert (full.finish_reason, len(full.token_ids)) == ("length", 7)
        # End-of-sequence tokens wait for min_tokens, and are never chosen with ignore_eos.
        for seed in range(3):
            long = _one(engine, regex="a*", max_tokens=9, min_tokens=5, seed=seed)
            assert len(long.token_ids) > 5
        on = _one(engine, regex="a*", max_tokens=12, ignore_eos=True)
        assert (on.finish_reason, 0 in on.token_ids) == ("length", False)
        # If the grammar allows only its end, that takes precedence.
        short = _one(engine, regex="ab", max_tokens=9, min_tokens=9, ignore_eos=True)
        assert (short.finish_reason, short.stop_reason, short.text) == ("stop", None, "ab")
        empty = _one(engine, regex="", max_tokens=5, ignore_eos=True)
        assert (empty.finish_reason, empty.token_ids) == ("stop", [0])
        stopped = _one(engine, regex="[b-z]{3}a{2,9}", stop="aa")
        assert (stopped.stop_reason, len(stopped.text)) == ("aa", 3)
        token = Words.tokens.index(b"{")
        stopped = _one(engine, regex="[b-z]{3}[{][{]", stop_token_ids=[token])
        assert (stopped.stop_reason, len(stopped.token_ids)) == (token, 4)


def test_log_probabilities_are_those_of_the_model() -> None:
    with rig.pool() as pool, guided_engine(pool) as engine:
        output = _one(engine, regex="[0-9]{6}", logprobs=2)
        prompt = [*_PROMPTS[0], output.token_ids[0]]
        free = SamplingParams(temperature=0, max_tokens=1, logprobs=2)
        (plain,) = engine.generate([prompt], free)
    table, expected = output.logprobs[1], plain.outputs[0].logprobs[0]
    for token in expected:
        assert table[token] == expected[token]
    assert output.token_ids[1] in table


def test_others_stay_one_step_ahead() -> None:
    with rig.pool() as pool, guided_engine(pool) as engine:
        free = engine.add_request(_PROMPTS[0], SamplingParams(seed=3, max_tokens=30))
        for _ in range(3):
            engine.step()
        assert len(engine._runner.flights) == 1
        guided = engine.add_request(_PROMPTS[1], guided_params(regex="[a-z]{3}"))
        while not guided.finished:
            engine.step()
        assert not engine._runner.flights
        engine.step()
        assert not free.finished
        assert len(engine._runner.flights) == 1


def test_a_model_without_an_allowed_token_ends_that_request_alone() -> None:
    def step(params: Any, cache: kvp.KVCache, tokens: jax.Array, batch: kvp.Batch) -> Any:
        logits, cache = rig.step(params, cache, tokens, batch)
        return jnp.where(jnp.arange(rig.VOCABULARY) < 5, logits, -jnp.inf), cache

    config = rig.config(eos_token_ids=(0,))
    with rig.pool() as pool:
        engine = Engine(step, rig.params(), pool, config, detokenize=decode, tokenizer=tokenizer())
        with engine:
            params = [guided_params(regex="[a-d]{4}"), guided_params(regex="zz")]
            good, bad = engine.generate(_PROMPTS[:2], params)
    assert good.outputs[0].finish_reason == "stop"
    assert bad.outputs[0].finish_reason == "error"
    assert "structured_outputs" in str(bad.error)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"regex": "ab["}, "unclosed character class"),
        ({"grammar": "start: zz"}, "unknown name"),
        ({"json": {"type": "foo"}}, "Invalid type"),
        ({"json": "{"}, "JSONDecodeError"),
        ({"structural_tag": {"triggers": ["<g"], **{"structures": _TAG["structures"]}}}, "<fx>"),
        ({"structural_tag": {}}, "KeyError"),
    ],
)
def test_wrong_grammars_are_refused_at_the_door(wanted: dict[str, Any], message: str) -> None:
    with rig.pool() as pool, guided_engine(pool) as engine:
        with pytest.raises(ValueError, match=f"(?s)structured_outputs: .*{message}"):
            engine.add_request([1], guided_params(**wanted))
        assert not engine.has_unfinished


def test_refusals(monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"wanted one of json.*got none"):
        StructuredOutputsParams()
    with pytest.raises(ValueError, match="got json, regex"):
        StructuredOutputsParams(json="{}", regex="a")
    with pytest.raises(ValueError, match=r"(?s)whitespace_pattern is 3.*choice is \[\]"):
        StructuredOutputsParams(choice=[], whitespace_pattern=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="structured_outputs is 'a'"):
        SamplingParams(structured_outputs="a")  # type: ignore[arg-type]
    with rig.pool() as pool:
        with (
            Engine(rig.step, rig.params(), pool, rig.config()) as engine,
            pytest.raises(ValueError, match="needs an engine with `tokenizer`"),
        ):
            engine.add_request([1], guided_params(regex="a"))
        with pytest.raises(ValueError, match="Engine: tokenizer"):
            Engine(rig.step, rig.params(), pool, rig.config(), tokenizer="{}")
        monkeypatch.setitem(sys.modules, "llguidance", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'jax_kvpage\[guided\]'"):
            Engine(rig.step, rig.params(), pool, rig.config(), tokenizer="{}")
