"""Helpers for tests of the pool's host side: a small spec, block counts, and a check that every
block is in exactly one state.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

import jax_kvpage as kvp


def make_spec(layout: str = "fused", max_slots: int = 6, max_seq_len: int = 512) -> kvp.CacheSpec:
    return kvp.CacheSpec(
        2, 2, 64, max_slots, max_seq_len, dtype=jnp.float32, layout=layout, block_tokens=16
    )


def count_blocks(spec: kvp.CacheSpec, num_tokens: int) -> int:
    ranges = 1 if spec.layout == "fused" else 2 * spec.num_layers
    return ranges * math.ceil(num_tokens / spec.block_tokens)


def drained(cache: kvp.KVCache) -> kvp.KVCache:
    """Waits until every queued release has run."""
    return jax.block_until_ready(cache)


def check_totals(pool: kvp.KVPool) -> kvp.PoolStats:
    """Asserts that every block is in exactly one state, and that bytes are blocks times block
    size.
    """
    stats, size = pool.stats(), pool.spec.block_bytes
    in_use = stats.blocks_mapped + stats.blocks_parked + stats.blocks_draining
    assert stats.blocks_total == in_use + stats.blocks_free
    assert stats.capacity == stats.blocks_total * size
    assert stats.mapped == stats.blocks_mapped * size
    assert stats.free == stats.blocks_free * size
    assert stats.parked == stats.blocks_parked * size
    assert stats.draining == stats.blocks_draining * size
    assert stats.reserved_virtual == pool.spec.virtual_bytes
    assert stats.peak >= in_use * size
    return stats
