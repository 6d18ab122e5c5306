"""Constrained decoding: random expressions, and JSON from the shipped model."""

from __future__ import annotations

import asyncio
import json
import pathlib
import re

import jax.numpy as jnp
import pytest
import serving_rig as rig
from guided_rig import guided_engine, guided_params
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jax_kvpage as kvp
from jax_kvpage.serving import (
    AsyncEngine,
    Engine,
    EngineConfig,
    RequestOutput,
)

pytestmark = pytest.mark.usefixtures("shared_programs")

_PATTERNS = st.recursive(
    st.sampled_from(["a", "b", "1", "[a-f]", "[^a-z]", "the", "é", "x?"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("({0[0]}|{0[1]})".format),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}"])).map(
            "({0[0]}){0[1]}".format
        ),
    ),
    max_leaves=8,
)


def test_random_expressions(request: pytest.FixtureRequest) -> None:
    exhaustive = request.config.getoption("--exhaustive")

    with rig.pool() as pool, guided_engine(pool, num_speculative_tokens=2) as engine:

        @settings(
            max_examples=300 if exhaustive else 12,
            deadline=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture],
        )
        @given(st.lists(_PATTERNS, min_size=4, max_size=4), st.integers(0, 2**32 - 1))
        def check(patterns: list[str], seed: int) -> None:
            params = [guided_params(regex=each, seed=seed, max_tokens=12) for each in patterns]
            prompts = [rig.prompt(n, n) for n in (5, 40, 17, 33)]
            for pattern, output in zip(patterns, engine.generate(prompts, params), strict=True):
                each = output.outputs[0]
                assert each.finish_reason in ("stop", "length"), output.error
                if each.finish_reason == "stop":
                    assert re.fullmatch(pattern, each.text), (pattern, each.text)

        check()


_TINY = pathlib.Path(__file__).parents[1] / "examples" / "tiny_llama"


def test_the_shipped_model_writes_json() -> None:
    from llama.checkpoint import load_model
    from llama.config import load_config
    from llama.serving import model_step
    from llama.tokenizer import Tokenizer

    config = load_config(_TINY)
    text = Tokenizer(_TINY, config.vocab_size)
    spec = kvp.CacheSpec(
        config.num_hidden_layers, config.num_key_value_heads, config.head_dim, 4, 256,
        dtype=jnp.float32, block_tokens=16,
    )  # fmt: skip
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "lines": {"type": "integer", "minimum": 1, "maximum": 500},
        },
        "required": ["name", "lines"],
        "additionalProperties": False,
    }
    params = guided_params(json=schema, n=2, seed=1, disable_any_whitespace=True, max_tokens=80)
    options = EngineConfig(
        max_num_batched_tokens=64, buckets=((64, 4),), eos_token_ids=tuple(config.eos_token_ids)
    )
    step, weights = model_step(load_model(_TINY, dtype=jnp.float32))

    async def serve(pool: kvp.KVPool) -> list[RequestOutput]:
        source = (_TINY / "tokenizer.json").read_text(encoding="utf-8")
        engine = Engine(step, weights, pool, options, detokenize=text.decode, tokenizer=source)
        async with AsyncEngine(engine) as server:
            with pytest.raises(ValueError, match="unclosed"):
                await server.generate([1], guided_params(regex="["))
            prompts = ["A function that", "The module"]
            return await asyncio.gather(
                *(server.generate(text.encode(prompt), params) for prompt in prompts)
            )

    with kvp.KVPool(spec, "16MiB") as pool:
        outputs = asyncio.run(serve(pool))
    for output in outputs:
        for each in output.outputs:
            assert each.finish_reason == "stop"
            value = json.loads(each.text)
            assert set(value) == {"name", "lines"}
            assert len(value["name"]) <= 20
            assert 1 <= value["lines"] <= 500
