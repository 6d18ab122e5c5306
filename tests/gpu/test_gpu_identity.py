"""Results on a GPU are bit-identical for any neighbours, padding, physical blocks and run."""

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
    """One long sequence is split over the whole GPU; results do not depend on which part ends
    first.
    """
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
    """The split of a context does not depend on its block boundaries."""
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


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("window", [None, 3000])
def test_shared_prefixes(make_pool, layout: str, dtype: str, window: int | None) -> None:
    """Forks, and forks of forks, that share enough to be read together give the same as if
    alone.
    """
    spec = kvp.CacheSpec(2, 8, 128, 9, 4096, dtype=jnp.dtype(dtype), layout=layout)
    pool = make_pool(spec, "1GiB", on_stale="allow")
    rig = Rig(pool, group=4, query_dtype=jnp.dtype(dtype), max_tokens=1024)
    root = rig.acquire(2200)
    rig.write({root: 2100})
    pool.commit(root, range(2100))
    branches, rig.cache = pool.fork(rig.cache, root, 5)
    for slot in branches:
        pool.extend(slot, 4096)
    branch = branches[0]
    _append(rig, [(branch, 1024)])
    pool.commit(branch, range(3124))
    leaves, rig.cache = pool.fork(rig.cache, branch, 2)
    slots = [root, *branches, *leaves]
    for i, slot in enumerate(slots):
        pool.extend(slot, 4096)
        _append(rig, [(slot, 1 + 7 * i)])
    q = jnp.asarray(rig.random_q(len(slots))[0], jnp.dtype(dtype))
    k = jnp.asarray(rig.random_kv(len(slots))[0][0], jnp.dtype(dtype))
    cache = rig.cache

    @jax.jit
    def attend(cache: kvp.KVCache, q: jax.Array, k: jax.Array, batch: kvp.Batch) -> jax.Array:
        out, _ = kvp.update_and_attend(q, k, k, cache, batch, layer=1, sliding_window=window)
        return out

    together = np.asarray(attend(cache, q, k, make_batch([(slot, 1) for slot in slots])))
    for i, slot in enumerate(slots):
        alone = attend(cache, q[i : i + 1], k[i : i + 1], make_batch([(slot, 1)]))
        assert np.asarray(alone).tobytes() == together[i : i + 1].tobytes(), slot
    pool.check(cache)


def _append(rig: Rig, sequences: list[tuple[int, int]]) -> None:
    """Appends new tokens without updating the rig's model."""
    rig.append(sequences)
    rig.cache = jax.jit(kvp.advance)(rig.cache, make_batch(sequences))
