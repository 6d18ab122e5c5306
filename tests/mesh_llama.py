"""Programs of `test_mesh_llama.py`, which run in a process with eight devices."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from typing import Any

import decode_llama
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from llama.config import LlamaConfig
from llama.mesh import make_mesh, sharded_step
from llama.serving import model_step
from llama_models import TINY, random_model

import jax_kvpage as kvp


def logits() -> None:
    """Logits are within 1e-4 of one device's; the only collectives are sums."""
    config = dataclasses.replace(
        TINY, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    )
    for size in (2, 4):  # with 4 devices, each KV head is on two of them
        wanted = _logits(config, 1)
        for got, alone in zip(_logits(config, size), wanted, strict=True):
            np.testing.assert_allclose(got, alone, atol=1e-4)


def _model(config: LlamaConfig) -> Any:
    model = random_model(config, scale=2.0)
    state = nnx.state(model)  # biases are initialized to 0
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(state))))
    noisy = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), state)
    nnx.update(model, noisy)
    return model


def _logits(config: LlamaConfig, size: int) -> list[np.ndarray]:
    model = _model(config)
    spec = kvp.CacheSpec(
        config.num_hidden_layers, config.num_key_value_heads, config.head_dim, 2, 64,
        dtype=jnp.float32, block_tokens=16)  # fmt: skip
    mesh = None
    if size == 1:
        step, weights = model_step(model)
    else:
        mesh = make_mesh(size, config)
        step, weights = sharded_step(model, mesh, None)
    results = []
    with kvp.KVPool(spec, "8MiB", mesh=mesh, axis=mesh and "tp") as pool:
        slots, cache = pool.acquire(pool.cache(), [32, 32])
        for batch in (kvp.Batch.from_lengths(slots, [9, 3]), kvp.Batch.decode(slots)):
            tokens = jax.device_put(np.arange(batch.num_tokens, dtype=np.int32) * 7, pool.placement)
            batch = jax.device_put(batch, pool.placement)
            run = jax.jit(step).lower(weights, cache, tokens, batch).compile()
            text = run.as_text()
            assert not any(
                word in text for word in ("all-gather", "all-to-all", "collective-permute")
            )
            out, cache = run(weights, cache, tokens, batch)
            cache = kvp.advance(cache, batch)
            results.append(np.asarray(out))
        pool.check(pool.release(cache, slots))
    return results


def command() -> None:
    """decode_llama.py generates the same text over a mesh."""
    common = ["--json", "--prompt", "A class is", "--prompt", "If the file", "--max-new-tokens",
              "12"]  # fmt: skip
    results = []
    # With --scan, programs map their own blocks.
    meshes = (
        [],
        ["--mesh", "tp=2"],
        ["--scan", "4", "--mesh", "tp=2"],
        ["--prefill-chunk", "16", "--mesh", "dp=2,tp=2"],
    )
    for more in meshes:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert decode_llama.main([*common, *more]) == 0
        results.append(json.loads(out.getvalue()))
    alone, *others = ([each["output_ids"] for each in r["sequences"]] for r in results)
    assert all(other == alone for other in others)
    assert results[0]["capacity"] == results[1]["capacity"]
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        assert decode_llama.main([*common, "--mesh", "tp=16"]) == 2
        assert decode_llama.main([*common, "--mesh", "tp=4"]) == 2
        assert decode_llama.main([*common, "--mesh", "dp=16"]) == 2
        assert decode_llama.main([*common, "--mesh", "dp=2", "--max-slots", "3"]) == 2
    first, second, third, fourth = error.getvalue().splitlines()
    assert "JAX has 8 devices; on CPU set XLA_FLAGS" in first
    assert "--mesh tp=4 does not divide the model's 6 attention heads" in second
    assert "--mesh dp=16: JAX has 8 devices" in third
    assert "--max-slots 3 cannot be split over the 2 replicas" in fourth
    texts = []
    for more in ([], ["--mesh", "dp=2"]):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            words = ["--prompt", "The pool", "--num-samples", "3", "--temperature", "0.8"]
            words += ["--max-new-tokens", "12", "--seed", "5", "--prefill-chunk", "16"]
            assert decode_llama.main([*words, *more]) == 0
        texts.append(out.getvalue().rpartition("\n\n")[0])  # without the table
    assert texts[0] == texts[1] != ""
