"""grow and last_rows: where each step begins and ends, compared with sums done by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import RUN_TIME_ERRORS
from pool_checks import count_blocks, make_spec

import jax_kvpage as kvp


def _filled(pool: kvp.KVPool, counts: list[int]) -> tuple[list[int], kvp.KVCache]:
    """Acquires slots that hold these numbers of tokens."""
    spec = pool.spec
    slots, cache = pool.acquire(pool.cache(), counts)
    batch = kvp.Batch.from_lengths(slots, counts)
    zeros = jnp.zeros((sum(counts), spec.num_kv_heads, spec.head_dim))
    for layer in range(spec.num_layers):
        cache = kvp.append_kv(cache, zeros, zeros, batch, layer=layer)
    return slots, kvp.advance(cache, batch)


def _blocks(pool: kvp.KVPool, slot: int) -> int:
    return sum(len(blocks) for blocks in pool.block_map(slot))


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("jitted", [False, True])
def test_grow_maps_what_the_new_tokens_need(layout: str, jitted: bool, make_pool) -> None:
    pool = make_pool(make_spec(layout))
    slots, cache = _filled(pool, [5, 30, 16])
    new = [11, 40, 1]
    batch = kvp.Batch.from_lengths([slots[0], -1, slots[1], slots[2]], [new[0], 3, *new[1:]])
    cache, ok = (jax.jit(kvp.grow, donate_argnums=0) if jitted else kvp.grow)(cache, batch)
    assert ok.tolist() == [True] * 4
    for slot, total in zip(slots, [16, 70, 17], strict=True):
        assert _blocks(pool, slot) == count_blocks(pool.spec, total)
    # Growing again by the same tokens needs nothing.
    before = pool.stats().blocks_mapped
    assert kvp.grow(cache, batch)[1].all()
    assert pool.stats().blocks_mapped == before


def test_grow_leaves_out_who_finds_no_room(make_pool) -> None:
    spec = make_spec("fused", max_seq_len=64).resolve("cpu")
    pool = make_pool(spec, 4 * spec.block_bytes)
    slots, cache = _filled(pool, [16, 16])
    batch = kvp.Batch.from_lengths(slots, [49, 32])  # one beyond max_seq_len, one that fits
    cache, ok = jax.jit(kvp.grow)(cache, batch)
    assert ok.tolist() == [False, True]
    cache, ok = kvp.grow(cache, kvp.Batch.from_lengths(slots, [1, 1]))  # all blocks are in use
    assert ok.tolist() == [False, True]
    # The sum does not wrap around.
    most = np.asarray([0, 2**31 - 1], np.int32)
    assert kvp.grow(cache, kvp.Batch([slots[0]], most))[1].tolist() == [False]


def test_grow_in_scan_and_vmap(make_pool) -> None:
    spec = make_spec("fused")
    pool = make_pool(spec)
    slots, cache = _filled(pool, [3, 7])
    zeros = jnp.zeros((2, spec.num_kv_heads, spec.head_dim))

    def step(cache: kvp.KVCache, _: None) -> tuple[kvp.KVCache, jax.Array]:
        batch = kvp.Batch.decode(slots)
        cache, ok = kvp.grow(cache, batch)
        for layer in range(spec.num_layers):
            cache = kvp.append_kv(cache, zeros, zeros, batch, layer=layer)
        return kvp.advance(cache, batch.mask(ok)), ok

    cache, ok = jax.jit(lambda c: jax.lax.scan(step, c, None, 40))(cache)
    assert ok.all()
    assert cache.lengths[jnp.asarray(slots)].tolist() == [43, 47]
    each = kvp.Batch(jnp.asarray(slots)[:, None], jnp.asarray([[0, 10], [0, 60]], jnp.int32))
    cache, ok = jax.vmap(lambda b: kvp.grow(cache, b), out_axes=(None, 0))(each)
    assert ok.tolist() == [[True], [True]]
    assert [_blocks(pool, s) for s in slots] == [count_blocks(spec, n) for n in (53, 107)]


def test_grow_refuses_in_one_error(make_pool) -> None:
    pool = make_pool(make_spec())
    cache = pool.cache()
    batch = kvp.Batch.decode([0])
    with pytest.raises(ValueError, match=r"grow: cache: .*the arguments are grow\(cache, batch\)"):
        kvp.grow(batch, cache)
    with pytest.raises(ValueError, match=r"grow:\n  - batch\.query_offsets: wanted int32"):
        kvp.grow(cache, kvp.Batch([0, 1], [0, 1]))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="slot 0"):
        jax.block_until_ready(kvp.grow(cache, batch))


@pytest.mark.parametrize("jitted", [False, True])
def test_last_rows(jitted: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = rng.integers(0, 4, size=5)
        batch = kvp.Batch.from_lengths([0, 1, -1, 3, 4], counts, num_tokens=20)
        rows = (jax.jit(lambda b: b.last_rows) if jitted else lambda b: b.last_rows)(batch)
        owners = np.repeat(np.arange(5), counts)
        want = [np.flatnonzero(owners == s)[-1] if n else 0 for s, n in enumerate(counts)]
        assert rows.dtype == jnp.int32
        np.testing.assert_array_equal(rows, want)
    assert kvp.Batch.decode([7, 3]).last_rows.tolist() == [0, 1]
    assert kvp.Batch.decode([]).last_rows.shape == (0,)
    with pytest.raises(ValueError, match=r"last_rows: query_offsets"):
        _ = kvp.Batch([[0]], [[0, 1]]).last_rows


@pytest.mark.parametrize("offsets", [[1, 3], [0, -1], [-1, 1]])
def test_grow_refuses_malformed_offsets(offsets: list[int], make_pool) -> None:
    pool = make_pool(make_spec("fused"))
    slots, cache = _filled(pool, [5])
    blocks = _blocks(pool, slots[0])
    batch = kvp.Batch(jnp.asarray(slots, jnp.int32), jnp.asarray(offsets, jnp.int32))
    with pytest.raises(RUN_TIME_ERRORS, match="-1 tokens wanted"):
        pool.check(kvp.grow(cache, batch)[0])
    assert _blocks(pool, slots[0]) == blocks
