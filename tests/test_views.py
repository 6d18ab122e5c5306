"""Zero-copy views of the per-layer layout: dense kernels read them unchanged, and they keep their
memory alive.
"""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Rig, make_batch

import jax_kvpage as kvp

_LAYERS, _MAX = 2, 256


def _spec(dtype: object = jnp.float32, layout: str = "per_layer") -> kvp.CacheSpec:
    return kvp.CacheSpec(_LAYERS, 2, 64, 4, _MAX, dtype=dtype, layout=layout, block_tokens=32)


@pytest.fixture
def rig(make_pool) -> Rig:
    return Rig(make_pool(_spec(), poison=True), group=2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dot_product_attention_reads_views_unchanged(make_pool, dtype: object) -> None:
    """One new token in every slot; key_value_seq_lengths masks what is not there."""
    pool = make_pool(_spec(dtype), poison=True)
    rig = Rig(pool, group=2, query_dtype=dtype)
    slots = rig.acquire_scattered([200, 1, 77])
    rig.write(dict(zip(slots, [199, 0, 40], strict=True)))
    rig.append([(slot, 1) for slot in slots])
    q = jnp.asarray(rig.random_q(4), dtype)
    lengths = np.ones(pool.spec.max_slots, np.int32)
    for slot, n in rig.model.lengths.items():
        lengths[slot] = n + 1

    @jax.jit
    def dense(q, k, v, lengths):
        return jax.nn.dot_product_attention(
            q[:, None], k, v, key_value_seq_lengths=lengths, implementation="xla"
        )[:, 0]

    for layer in range(_LAYERS):
        k, v = pool.view(layer)
        assert k.shape == v.shape == (4, _MAX, 2, 64)
        assert k.dtype == dtype
        got = np.asarray(dense(q[layer], k, v, jnp.asarray(lengths)), np.float32)
        batch = make_batch([(slot, 1) for slot in slots])
        want = kvp.paged_attention(q[layer][jnp.asarray(slots)], rig.cache, batch, layer=layer)
        tolerance = 1e-5 if dtype == jnp.float32 else 2**-6
        np.testing.assert_allclose(got[slots], np.asarray(want, np.float32), atol=tolerance)


def test_views_show_what_was_written_and_zeros_elsewhere(rig: Rig) -> None:
    """Even with poisoned memory, nobody sees what an earlier request or the test mode left
    behind.
    """
    first = rig.acquire(_MAX)
    rig.write({first: _MAX})
    rig.release(first)
    jax.block_until_ready(rig.cache)
    slots = rig.acquire_scattered([60, 90])
    rig.write({slots[0]: 33, slots[1]: 90})
    jax.block_until_ready(rig.cache)
    for layer in range(_LAYERS):
        for whole, which in zip(rig.pool.view(layer), (0, 1), strict=True):
            got = np.asarray(whole)
            for slot in range(rig.spec.max_slots):
                want = np.zeros((_MAX, 2, 64))
                if slot in slots:
                    written = rig.model.context(slot, layer)[which]
                    want[: len(written)] = written
                np.testing.assert_array_equal(got[slot], want)
                if slot in slots:
                    one = rig.pool.view(layer, slot)[which]
                    assert one.shape == (_MAX, 2, 64)
                    np.testing.assert_array_equal(np.asarray(one), want)


def test_views_copy_nothing_and_follow_writes(rig: Rig) -> None:
    slot = rig.acquire(20)
    before = rig.pool.stats().physical
    k, v = rig.pool.view(1)
    again, _ = rig.pool.view(1)
    assert k.unsafe_buffer_pointer() == again.unsafe_buffer_pointer()
    one, _ = rig.pool.view(1, slot)
    assert one.unsafe_buffer_pointer() == k.unsafe_buffer_pointer() + slot * _MAX * 2 * 64 * 4
    read = jax.jit(lambda k: k + 0)
    assert not np.any(read(k))
    assert rig.pool.stats().physical == before
    rig.write({slot: 20})
    rig.pool.extend(slot, 150)  # maps memory where the view had a hole
    rig.write({slot: 130})
    jax.block_until_ready(rig.cache)
    for view, want in zip((k, v), rig.model.context(slot, 1), strict=True):
        np.testing.assert_array_equal(np.asarray(read(view))[slot, :150], want)


def test_a_view_pins_its_slot(rig: Rig) -> None:
    """A released slot with a view drains until the view is gone, and is not handed out
    meanwhile.
    """
    slots = [rig.acquire(100), rig.acquire(100)]
    rig.write({slots[0]: 100, slots[1]: 50})
    k, v = rig.pool.view(0, slots[0])
    want = np.asarray(k).copy()
    rig.release(*slots)
    jax.block_until_ready(rig.cache)
    stats = rig.pool.stats()
    assert stats.blocks_draining == stats.blocks_parked > 0
    for _ in range(3):
        other = rig.acquire(100)
        assert other != slots[0]
        rig.write({other: 100})
    jax.block_until_ready(rig.cache)
    np.testing.assert_array_equal(np.asarray(k), want)
    del k, v
    gc.collect()
    assert rig.pool.stats().blocks_draining == 0
    rig.acquire(100)


def test_a_view_outlives_its_pool() -> None:
    """Even after close, the memory stays until the last array that shows it is gone."""
    pool = kvp.KVPool(_spec(), "8MiB")
    rig = Rig(pool)
    slot = rig.acquire(50)
    rig.write({slot: 50})
    jax.block_until_ready(rig.cache)
    k, _ = pool.view(0, slot)
    want = rig.model.context(slot, 0)[0]
    pool.close()
    del pool, rig.pool
    gc.collect()
    np.testing.assert_array_equal(np.asarray(jax.jit(lambda x: x * 1)(k))[:50], want)


@pytest.mark.parametrize("taken", ["before", "after"])
def test_views_and_the_next_tenant(rig: Rig, taken: str) -> None:
    """The whole-arena view shows the slot's new request, and never the old one's tail after the new
    one's tokens.
    """
    slot = rig.acquire(100)
    rig.write({slot: 100})
    if taken == "before":
        k, _ = rig.pool.view(0)
    rig.release(slot)
    jax.block_until_ready(rig.cache)
    slot = rig.acquire(100)
    other = rig.acquire(256)
    rig.write({slot: 10})
    rig.pool.extend(slot, 200)
    jax.block_until_ready(rig.cache)
    if taken == "after":
        k, _ = rig.pool.view(0)
    np.testing.assert_array_equal(np.asarray(k)[slot, :10], rig.model.context(slot, 0)[0])
    assert not np.any(np.asarray(k)[slot, 10:])
    assert not np.any(np.asarray(k)[other])


def test_the_fused_layout_has_no_views(make_pool) -> None:
    pool = make_pool(_spec(layout="fused"))
    with pytest.raises(ValueError, match="per_layer"):
        pool.view(0)


@pytest.mark.parametrize(("layer", "slot"), [(2, None), (-1, None), (0, 4), (0, -1)])
def test_views_out_of_range(rig: Rig, layer: int, slot: int | None) -> None:
    bad = layer if slot is None else slot
    with pytest.raises((ValueError, IndexError), match=str(bad)):
        rig.pool.view(layer, slot)


@pytest.mark.parametrize("wrong", [True, 1.5, "0", 2**40, [0], None])
def test_layers_and_slots_of_the_wrong_kind(rig: Rig, wrong: object) -> None:
    with pytest.raises(ValueError, match="view: layer: wanted"):
        rig.pool.view(wrong)
    if wrong is not None:
        with pytest.raises(ValueError, match="view: slot: wanted"):
            rig.pool.view(0, wrong)
