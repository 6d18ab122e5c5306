"""The same bits on a GPU whatever the neighbours, the padding, the physical blocks, or the run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Rig, attend_all, input_dtype, make_batch
from test_bit_identity import pool as pool
from test_bit_identity import (
    test_neighbours_order_and_padding as test_neighbours_order_and_padding,
)
from test_bit_identity import test_physical_blocks as test_physical_blocks

import jax_kvpage as kvp

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_repeated_runs(make_pool, dtype: str) -> None:
    """One long sequence, split over the whole chip: whichever part ends first."""
    spec = kvp.CacheSpec(1, 2, 128, 2, 9000, dtype=jnp.dtype(dtype))
    pool = make_pool(spec, "64MiB", on_stale="allow")
    rig = Rig(pool, group=4, query_dtype=jnp.bfloat16, max_tokens=3000)
    slots = [rig.acquire(9000), rig.acquire(64)]
    rig.write({slots[0]: 8500, slots[1]: 40})
    k, v = rig.random_kv(20)
    q = jnp.asarray(rig.random_q(20), jnp.bfloat16)
    dtype = input_dtype(pool.spec)
    k, v = jnp.asarray(k, dtype), jnp.asarray(v, dtype)
    for new in ((1, 1), (17, 3)):
        batch = make_batch(list(zip(slots, new, strict=True)))
        run = jax.jit(lambda cache, batch=batch: _attend(cache, q, k, v, batch))
        first = [np.asarray(x).tobytes() for x in run(rig.cache)]
        for _ in range(20):
            assert [np.asarray(x).tobytes() for x in run(rig.cache)] == first


def _attend(cache: kvp.KVCache, q, k, v, batch: kvp.Batch) -> tuple[jax.Array, jax.Array]:
    out, lse, _ = attend_all.__wrapped__(cache, q, k, v, batch, None, None, None)
    return out, lse


def test_pools_of_another_block_size_agree(make_pool) -> None:
    """Where a context is cut does not depend on where its blocks end."""
    results = []
    for block_tokens in (16, 64, 256):
        spec = kvp.CacheSpec(
            2, 2, 64, 2, 1500, dtype=jnp.bfloat16, layout="fused", block_tokens=block_tokens
        )
        rig = Rig(make_pool(spec, "256MiB"), group=2, max_tokens=700)
        slot = rig.acquire(1400)
        rig.write({slot: 1300})
        out, lse, *_ = rig.step([(slot, 3)])
        results.append(out.tobytes() + lse.tobytes())
    assert results[0] == results[1] == results[2]
