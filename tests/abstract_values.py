"""A cache, a batch and tokens for tests that stop before a program runs: no pool is needed."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

import jax_kvpage as kvp

LAYERS, KV_HEADS, HEADS, DIM, SLOTS = 3, 2, 4, 32, 4
SPEC = kvp.CacheSpec(LAYERS, KV_HEADS, DIM, SLOTS, 256, jnp.float32).resolve("cpu")


def abstract_cache(**fields: Any) -> kvp.KVCache:
    """Arrays of a cache without a pool; enough for whatever happens before a program runs."""
    return kvp.KVCache(
        **{
            "handle": jnp.zeros(2, jnp.int32),
            "epoch": jnp.zeros(1, jnp.uint32),
            "lengths": jnp.zeros(SLOTS, jnp.int32),
            "spec": SPEC,
            **fields,
        }
    )


def make_q(tokens: int = 2, heads: int = HEADS, dim: int = DIM, dtype: Any = jnp.float32) -> Any:
    return jnp.zeros((tokens, heads, dim), dtype)


make_kv = functools.partial(make_q, heads=KV_HEADS)
BATCH = kvp.Batch.decode([0, 1])
