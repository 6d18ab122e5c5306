"""The example's Llama on replicas: a program of `test_replicas_llama.py`, with eight devices."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from covering import is_exhaustive
from llama.mesh import make_mesh, sharded_step
from llama.serving import model_step
from llama_models import TINY, random_model

import jax_kvpage as kvp

_GATHERS = re.compile(r"all-gather|all-to-all|collective-permute|reduce-scatter")
_STEPS = 12
_Results = tuple[list[list[int]], list[np.ndarray]]


def _prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(1, TINY.vocab_size, n).tolist() for n in (9, 3, 17, 1, 6)]


def _spec(slots: int) -> kvp.CacheSpec:
    return kvp.CacheSpec(
        TINY.num_hidden_layers, TINY.num_key_value_heads, TINY.head_dim, slots, 64,
        dtype=jnp.float32, block_tokens=16)  # fmt: skip


def _generate(pool: kvp.KVPool, step: Any, weights: Any, gathers: bool) -> _Results:
    """Decodes all prompts greedily; returns tokens, and logits [sequences, vocabulary] per step."""
    prompts = _prompts()
    slots, _, cache = pool.acquire_prefix(pool.cache(), prompts)
    new, outputs, logits = prompts, [[] for _ in prompts], []
    run = jax.jit(step)
    assert {pool.replica_of(slot) for slot in slots} == set(range(pool.replicas))
    lengths = [0] * len(prompts)
    for _ in range(_STEPS):
        lengths = [length + len(ids) for length, ids in zip(lengths, new, strict=True)]
        pool.extend(slots, lengths)
        made = kvp.spread(pool, slots, [len(ids) for ids in new])
        tokens = made.scatter([token for ids in new for token in ids])
        if gathers:
            text = run.lower(weights, cache, tokens, made.batch).compile().as_text()
            assert not _GATHERS.search(text)
        out, cache = run(weights, cache, tokens, made.batch)
        cache = kvp.advance(cache, made.batch)
        for slot, ids in zip(slots, new, strict=True):
            pool.commit(slot, ids)
        logits.append(np.asarray(out)[made.sequences])
        new = [[int(token)] for token in logits[-1].argmax(axis=-1)]
        outputs = [[*ids, *one] for ids, one in zip(outputs, new, strict=True)]
        gathers = gathers and len(logits) < 2  # the prefill and a decode step
    pool.check(pool.release(cache, slots))
    return outputs, logits


def logits() -> None:
    """Tokens equal one device's, and logits are within 1e-4; the only collectives are sums."""
    step, weights = model_step(random_model(TINY, scale=2.0))
    with kvp.KVPool(_spec(8), "8MiB") as pool:
        tokens, wanted = _generate(pool, step, weights, False)
    assert len({tuple(ids) for ids in tokens}) > 1
    for replicas, parts in ((2, 1), (2, 2), *([(4, 2)] if is_exhaustive() else [])):
        mesh = make_mesh(parts, TINY, replicas)
        step, weights = sharded_step(random_model(TINY, scale=2.0), mesh, None)
        with kvp.KVPool(_spec(8), "8MiB", mesh=mesh, axis="tp", data_axis="dp") as pool:
            got, found = _generate(pool, step, weights, True)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
        assert got == tokens
