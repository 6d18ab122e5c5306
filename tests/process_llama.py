"""Programs of `test_processes.py`: the engine and the example's Llama in several processes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from llama.mesh import make_mesh, sharded_step
from llama.serving import model_step
from llama_models import UNTIED, random_model

import jax_kvpage as kvp
from jax_kvpage.serving import Engine, EngineConfig, SamplingParams, Watermark

_PROMPTS = [[7] * 3 + list(range(20)), [9, 8, 7], list(range(40, 75)), [7] * 3 + list(range(30))]
_PARAMS = [
    SamplingParams(temperature=0, max_tokens=20),
    SamplingParams(seed=7, n=2, max_tokens=12, top_p=0.9),
    SamplingParams(seed=8, max_tokens=20, presence_penalty=0.5),
    SamplingParams(temperature=0, max_tokens=30),
]


def _tokens(size: int, capacity: int) -> tuple[list[list[list[int]]], tuple[int, ...]]:
    model = random_model(UNTIED)
    spec = kvp.CacheSpec(
        UNTIED.num_hidden_layers, UNTIED.num_key_value_heads, UNTIED.head_dim, 6, 128,
        dtype=jnp.float32, block_tokens=16)  # fmt: skip
    mesh = make_mesh(size, UNTIED) if size > 1 else None
    step, weights = model_step(model) if mesh is None else sharded_step(model, mesh, None)
    config = EngineConfig(max_num_batched_tokens=32, buckets=((32, 6),), admission=Watermark(0.0))
    results = []
    with (
        kvp.KVPool(spec, capacity, mesh=mesh, axis=mesh and "tp") as pool,
        Engine(step, weights, pool, config) as engine,
    ):
        for _ in range(2):  # the second time, prompts are cached
            outputs = engine.generate(_PROMPTS, _PARAMS)
            results += [[each.token_ids for each in output.outputs] for output in outputs]
        stats = engine.stats
        return results, (stats.preemptions, stats.steps, pool.stats().prefix_tokens)


def tokens() -> None:
    """Text, preemptions and prefix cache hits are the same as on one device."""
    spec = kvp.CacheSpec(2, 2, 32, 6, 128, dtype=jnp.float32, block_tokens=16)
    capacity = 6 * spec.resolve("cpu").block_bytes  # too little for all requests
    got, counts = _tokens(len(jax.devices()), capacity)
    assert counts[0]
    assert counts[2]
    print("tokens", got, counts)
    if jax.process_index() == 0:
        assert _tokens(1, capacity) == (got, counts)
