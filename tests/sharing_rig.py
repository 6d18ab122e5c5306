"""Helpers for tests of sequences that share blocks (test_sharing.py, test_truncate.py) or drop
their beginning (test_drop_before.py): pools of small blocks, a committed donor, and host calls that
also update the model.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from harness import Rig

import jax_kvpage as kvp

_BLOCK = 16


def spec_of(layout: str, dtype: object = jnp.float32, **changes: object) -> kvp.CacheSpec:
    fields = {
        "num_layers": 2,
        "num_kv_heads": 2,
        "head_dim": 64,
        "max_slots": 12,
        "max_seq_len": 256,
        "dtype": dtype,
        "layout": layout,
        "block_tokens": _BLOCK,
    }
    return kvp.CacheSpec(**{**fields, **changes})


def pool_of(make_pool, spec: kvp.CacheSpec, blocks: int, **options: object) -> kvp.KVPool:
    return make_pool(spec, spec.resolve("cpu").block_bytes * blocks, **options)


def filled(pool: kvp.KVPool, tokens: int, **options: object) -> tuple[Rig, int]:
    """Returns a rig and the slot of a sequence of `tokens` committed tokens."""
    rig = Rig(pool, **options)
    slot = rig.acquire(tokens)
    rig.write({slot: tokens})
    pool.commit(slot, range(tokens))
    return rig, slot


def fork(rig: Rig, slot: int, n: int, num_tokens: int | None = None) -> list[int]:
    slots, rig.cache = rig.pool.fork(rig.cache, slot, n, num_tokens)
    tokens = len(rig.pool.committed(slot)) if num_tokens is None else num_tokens
    for new in slots:
        rig.model.fork(slot, new, tokens)
    return slots


def truncate(rig: Rig, slot: int, tokens: int) -> None:
    rig.cache = rig.pool.truncate(rig.cache, slot, tokens)
    rig.model.truncate(slot, tokens)


def drop(rig: Rig, slot: int, tokens: int) -> None:
    rig.cache = rig.pool.drop_before(rig.cache, slot, tokens)


def mapped(rig: Rig, slot: int) -> list[int]:
    """Returns the logical blocks that the slot maps, which must be the same in all ranges."""
    (mapped,) = {
        tuple(i for i, (block, _) in enumerate(row) if block >= 0)
        for row in rig.pool.block_map(slot)
    }
    return list(mapped)


def grow(rig: Rig, slot: int, n: int = 1) -> None:
    rig.pool.extend(slot, rig.model.lengths[slot] + n)


def check(rig: Rig, slots: list[int]) -> None:
    """Asserts that every sequence attends as the reference does, and that the lengths are right."""
    rig.check_lengths()
    for slot in slots:
        grow(rig, slot, 2)
        out, _, want, _ = rig.step([(slot, 2)])
        tolerance = 0.1 if np.dtype(rig.spec.dtype).itemsize < 4 else 1e-4
        np.testing.assert_allclose(out[:, :2], want[:, :2], atol=tolerance)
