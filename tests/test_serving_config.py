"""Options of the engine: which are refused, by name, and which are converted."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import serving_rig as rig

import jax_kvpage as kvp
from jax_kvpage.serving import Engine, EngineConfig, SamplingParams


@pytest.mark.parametrize(
    "option",
    [
        {"eos_token_ids": 2},
        {"eos_token_ids": ["</s>"]},
        {"eos_token_ids": (-1,)},
        {"max_num_batched_tokens": "32"},
        {"max_num_batched_tokens": None},
        {"max_num_seqs": 2.5},
        {"seed": None},
        {"max_num_waiting": True},
        {"prompt_lookup_min": "2"},
        {"buckets": 32},
        {"buckets": (32, 4)},
        {"buckets": ((32, 0),)},
    ],
    ids=str,
)
def test_options_of_another_type_are_refused(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=rf"EngineConfig:\n  - {name} is "):
        EngineConfig(**option)


def test_options_may_be_lists_and_numpy_integers() -> None:
    config = EngineConfig(
        eos_token_ids=[np.int32(2), 3],  # type: ignore[arg-type]
        buckets=[[np.int64(32), 4]],  # type: ignore[arg-type,list-item]
        seed=np.int64(3),  # type: ignore[arg-type]
    )
    assert config.eos_token_ids == (2, 3)
    assert config.buckets == ((32, 4),)


def test_more_logprobs_than_the_vocabulary_has() -> None:
    def step(params: Any, cache: kvp.KVCache, tokens: jax.Array, batch: kvp.Batch) -> Any:
        return rig.step(params, cache, tokens, batch)

    options = rig.config(max_logprobs=100)
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=80)
    with rig.pool() as pool, Engine(step, rig.params(), pool, options) as engine:
        (output,) = engine.generate([rig.prompt(5)], params)
        assert output.error is None
        tables = output.outputs[0].logprobs
        assert tables is not None
        assert [sorted(table) for table in tables] == [list(range(rig.VOCABULARY))] * 2
