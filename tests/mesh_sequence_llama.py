"""Programs of `test_mesh_sequence.py` with the example's Llama, in a process with eight devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from llama.serving import model_step
from llama_models import UNTIED, random_model
from mesh_sequence import make_mesh

import jax_kvpage as kvp

_PROMPT, _CHUNK, _NEW = 75, 25, 12


def text(sizes: tuple[int, ...]) -> None:
    """A prompt in chunks beside another sequence that decodes, then greedy text of both."""
    wanted_logits, wanted = _text(0)
    for size in sizes:
        logits, tokens = _text(size)
        np.testing.assert_allclose(logits, wanted_logits, atol=1e-4)
        np.testing.assert_array_equal(tokens, wanted)


def _text(size: int) -> tuple[np.ndarray, np.ndarray]:
    config = UNTIED
    spec = kvp.CacheSpec(
        config.num_hidden_layers,
        config.num_key_value_heads,
        config.head_dim,
        max_slots=2,
        max_seq_len=128,
        dtype=jnp.float32,
        block_tokens=16,
    )
    step, weights = model_step(random_model(config, scale=2.0))
    over = {"mesh": make_mesh(size), "sequence_axis": "sp"} if size else {}
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, _PROMPT)
    with kvp.KVPool(spec, "4MiB", **over) as pool:
        weights = jax.device_put(weights, pool.placement)
        slots, cache = pool.acquire(pool.cache(), [_PROMPT + _NEW, 30])

        @jax.jit
        def run(cache: kvp.KVCache, tokens: jax.Array, batch: kvp.Batch) -> tuple:
            logits, cache = step(weights, cache, tokens, batch)
            return logits, kvp.advance(cache, batch)

        all_logits, all_tokens, last = [], [], 7
        for begin in range(0, _PROMPT, _CHUNK):
            batch = kvp.Batch.from_lengths(slots, [_CHUNK, 1])
            tokens = np.append(prompt[begin : begin + _CHUNK], last).astype(np.int32)
            logits, cache = run(cache, tokens, batch)
            all_logits.append(np.asarray(logits))
            last = int(all_logits[-1][-1].argmax())
        for _ in range(_NEW):
            all_tokens.append(all_logits[-1][-2:].argmax(axis=-1).astype(np.int32))
            logits, cache = run(cache, all_tokens[-1], kvp.Batch.decode(slots))
            all_logits.append(np.asarray(logits))
        pool.check(pool.release(cache, slots))
    return np.concatenate(all_logits), np.asarray(all_tokens)
