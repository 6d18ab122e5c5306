"""The host side of the pool: blocks move between free, mapped, draining and parked exactly as the
contract says.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Rig, busy

import jax_kvpage as kvp


def _spec(layout: str = "fused", max_slots: int = 6, max_seq_len: int = 512) -> kvp.CacheSpec:
    return kvp.CacheSpec(
        2, 2, 64, max_slots, max_seq_len, dtype=jnp.float32, layout=layout, block_tokens=16
    )


def _blocks(spec: kvp.CacheSpec, num_tokens: int) -> int:
    ranges = 1 if spec.layout == "fused" else 2 * spec.num_layers
    return ranges * math.ceil(num_tokens / spec.block_tokens)


def _drained(cache: kvp.KVCache) -> kvp.KVCache:
    """After this, every release that was queued has run."""
    return jax.block_until_ready(cache)


@pytest.fixture(params=["fused", "per_layer"])
def pool(request: pytest.FixtureRequest, make_pool) -> kvp.KVPool:
    spec = _spec(request.param).resolve("cpu")
    return make_pool(spec, _blocks(spec, 16 * 20) * spec.block_bytes)


def _check_totals(pool: kvp.KVPool) -> kvp.PoolStats:
    """Every block is in exactly one state, and bytes are blocks times their size."""
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


def test_a_new_pool_is_empty(pool: kvp.KVPool) -> None:
    stats = _check_totals(pool)
    assert stats.blocks_mapped == stats.blocks_parked == stats.blocks_draining == 0
    assert stats.slots_occupied == stats.shared == stats.waits == stats.peak == 0
    assert pool.slot_table() == []
    cache = pool.cache()
    np.testing.assert_array_equal(np.asarray(cache.lengths), [-1] * 6)
    assert cache.spec == pool.spec


def test_acquire_maps_what_the_tokens_need(pool: kvp.KVPool) -> None:
    cache = pool.cache()
    mapped = 0
    for tokens in (1, 16, 17, 100):
        slot, cache = pool.acquire(cache, tokens)
        mapped += _blocks(pool.spec, tokens)
        assert _check_totals(pool).blocks_mapped == mapped
        assert int(cache.lengths[slot]) == 0
    assert pool.stats().slots_occupied == 4


def test_acquire_takes_lists(pool: kvp.KVPool) -> None:
    cache = pool.cache()
    slots, cache = pool.acquire(cache, [5, 40])
    assert isinstance(slots, list)
    assert len(set(slots)) == 2
    rows = {row.slot: row for row in pool.slot_table()}
    assert rows[slots[0]].reserved_tokens == 5
    assert rows[slots[1]].reserved_tokens == 40
    cache = pool.release(cache, slots)
    _drained(cache)
    assert pool.stats().slots_occupied == 0


def test_a_list_is_acquired_whole_or_not_at_all(pool: kvp.KVPool) -> None:
    cache = pool.cache()
    before = pool.stats()
    with pytest.raises(kvp.OutOfBlocks):
        pool.acquire(cache, [16 * 10, 16 * 11])
    after = pool.stats()
    assert (after.blocks_mapped, after.slots_occupied) == (before.blocks_mapped, 0)
    _slot, cache = pool.acquire(cache, 16 * 20)  # the same cache is still good


def test_extend_keeps_the_mapping_while_there_is_room(pool: kvp.KVPool) -> None:
    slot, _cache = pool.acquire(pool.cache(), 3)
    first = pool.block_map(slot)
    calls = pool.stats().system_calls
    pool.extend(slot, 16)
    assert pool.block_map(slot) == first
    assert pool.stats().system_calls == calls
    assert pool.slot_table()[0].reserved_tokens == 16
    pool.extend(slot, 10)  # less than before: nothing to do
    assert pool.slot_table()[0].reserved_tokens == 16
    pool.extend(slot, 50)
    assert pool.stats().blocks_mapped == _blocks(pool.spec, 50)
    row = pool.slot_table()[0]
    assert (row.reserved_tokens, row.num_blocks) == (50, _blocks(pool.spec, 50))
    assert row.bytes == row.num_blocks * pool.spec.block_bytes


def test_block_map_names_every_block_once(pool: kvp.KVPool) -> None:
    slots, _cache = pool.acquire(pool.cache(), [70, 33])
    entries = []
    for slot in slots:
        rows = pool.block_map(slot)
        assert len(rows) == (1 if pool.spec.layout == "fused" else 2 * pool.spec.num_layers)
        assert len({len(row) for row in rows}) == 1
        entries += [entry for row in rows for entry in row]
    blocks = [block for block, _ in entries]
    assert len(blocks) == _blocks(pool.spec, 70) + _blocks(pool.spec, 33)
    assert len(set(blocks)) == len(blocks)
    assert all(0 <= block < pool.stats().blocks_total for block in blocks)
    assert {count for _, count in entries} == {1}


def test_release_parks_and_acquire_adopts(pool: kvp.KVPool) -> None:
    cache = pool.cache()
    slot, cache = pool.acquire(cache, 100)
    blocks = pool.block_map(slot)
    cache = pool.release(cache, slot)
    assert int(_drained(cache).lengths[slot]) == -1
    stats = _check_totals(pool)
    assert (stats.blocks_parked, stats.blocks_mapped) == (_blocks(pool.spec, 100), 0)
    assert stats.slots_occupied == 0
    assert pool.slot_table() == []
    again, cache = pool.acquire(cache, 90)
    assert pool.block_map(again) == blocks
    after = _check_totals(pool)
    assert after.blocks_parked == 0
    assert after.system_calls == stats.system_calls


def test_the_best_fitting_parked_slot_is_adopted(pool: kvp.KVPool) -> None:
    sizes = [16 * 2, 16 * 9, 16 * 5]
    slots, cache = pool.acquire(pool.cache(), sizes)
    blocks = [pool.block_map(slot) for slot in slots]
    cache = _drained(pool.release(cache, slots))
    calls = pool.stats().system_calls
    for wanted, fits in ((16 * 4, 2), (16 * 6, 1), (16 * 1, 0)):
        slot, cache = pool.acquire(cache, wanted)
        assert pool.block_map(slot) == blocks[fits]
    assert pool.stats().system_calls == calls


def test_tails_are_stolen_only_under_pressure(pool: kvp.KVPool) -> None:
    """Twelve of twenty blocks are parked: nine more do not fit beside them, so some are taken, and
    no more than needed.
    """
    spec = pool.spec
    slots, cache = pool.acquire(pool.cache(), [16 * 6, 16 * 6])
    cache = _drained(pool.release(cache, slots))
    one, cache = pool.acquire(cache, 16 * 3)  # adopts a parked slot
    two, cache = pool.acquire(cache, 16 * 3)  # the other
    three, cache = pool.acquire(cache, 16 * 8)  # all that was free
    assert _check_totals(pool).blocks_free == 0
    cache = _drained(pool.release(cache, [one, two]))
    assert pool.stats().blocks_parked == 2 * _blocks(spec, 16 * 6)
    _four, cache = pool.acquire(
        cache, 16 * 10
    )  # six adopted, four stolen from the tail of the other
    stats = _check_totals(pool)
    assert stats.blocks_parked == _blocks(spec, 16 * 2)
    assert stats.blocks_free == 0
    pool.extend(three, 16 * 10)  # the rest
    assert _check_totals(pool).blocks_parked == 0


def test_out_of_blocks_carries_the_numbers(pool: kvp.KVPool) -> None:
    spec = pool.spec
    _slot, cache = pool.acquire(pool.cache(), 16 * 15)
    other, cache = pool.acquire(cache, 16 * 2)
    before, maps = pool.stats(), pool.block_map(other)
    with pytest.raises(kvp.OutOfBlocks) as caught:
        pool.extend(other, 16 * 9)
    error = caught.value
    assert (error.wanted, error.free, error.draining) == (
        _blocks(spec, 16 * 7),
        _blocks(spec, 16 * 3),
        0,
    )
    for number in (error.wanted, error.free):
        assert str(number) in str(error)
    with pytest.raises(kvp.OutOfBlocks):
        pool.acquire(cache, 16 * 4)
    after = pool.stats()
    assert (before.blocks_mapped, before.slots_occupied) == (
        after.blocks_mapped,
        after.slots_occupied,
    )
    assert pool.block_map(other) == maps
    pool.extend(other, 16 * 5)  # exactly what is left


def test_no_slot_left(pool: kvp.KVPool) -> None:
    slots, cache = pool.acquire(pool.cache(), [1] * 6)
    with pytest.raises(Exception, match=r"(?i)slot.*6|6.*slot"):
        pool.acquire(cache, 1)
    cache = _drained(pool.release(cache, slots[2]))
    assert pool.acquire(cache, 1)[0] == slots[2]


def test_draining_is_not_handed_out(pool: kvp.KVPool) -> None:
    slot, cache = pool.acquire(pool.cache(), 16 * 15)
    cache = kvp.after(cache, busy(1))
    cache = pool.release(cache, slot)
    stats = _check_totals(pool)
    assert stats.blocks_draining == _blocks(pool.spec, 16 * 15)
    assert stats.blocks_parked == 0
    with pytest.raises(kvp.OutOfBlocks, match="draining") as caught:
        pool.acquire(cache, 16 * 6)
    assert caught.value.draining == _blocks(pool.spec, 16 * 15)
    small, cache = pool.acquire(cache, 16 * 5)
    assert small != slot
    _drained(cache)
    stats = _check_totals(pool)
    assert stats.blocks_draining == 0
    assert stats.blocks_parked == _blocks(pool.spec, 16 * 15)


def test_acquire_waits_for_draining_blocks(pool: kvp.KVPool) -> None:
    slot, cache = pool.acquire(pool.cache(), 16 * 15)
    cache = pool.release(kvp.after(cache, busy(1)), slot)
    waits = pool.stats().waits
    assert pool.stats().blocks_draining
    again, cache = pool.acquire(cache, 16 * 12, wait=True)
    assert pool.stats().blocks_draining == 0
    assert pool.stats().waits == waits + 1
    assert int(cache.lengths[again]) == 0


def test_waiting_for_what_will_never_come_is_an_error(pool: kvp.KVPool) -> None:
    _slot, cache = pool.acquire(pool.cache(), 16 * 15)
    with pytest.raises(kvp.OutOfBlocks):
        pool.acquire(cache, 16 * 6, wait=True)


def test_trim_gives_memory_back(pool: kvp.KVPool) -> None:
    rig = Rig(pool)
    slots = rig.acquire_scattered([100, 100])
    rig.write(dict.fromkeys(slots, 80))
    size = pool.spec.block_bytes
    assert pool.stats().physical == 2 * _blocks(pool.spec, 100) * size
    rig.release(slots[0])
    _drained(rig.cache)
    pool.trim()
    stats = _check_totals(pool)
    assert stats.blocks_parked == 0
    assert stats.blocks_mapped == _blocks(pool.spec, 100)
    assert stats.physical == _blocks(pool.spec, 100) * size
    again = rig.acquire(100)
    rig.write({again: 80})
    out, _, want, _ = rig.step([(slots[1], 10), (again, 10)])  # the other slot kept its data
    assert np.max(np.abs(out - want)) < 1e-4


def test_resize(pool: kvp.KVPool) -> None:
    spec = pool.spec
    _slot, cache = pool.acquire(pool.cache(), 16 * 18)
    small, size = 16 * 18, spec.block_bytes
    with pytest.raises(kvp.OutOfBlocks):
        pool.acquire(cache, 16 * 4)
    pool.resize(_blocks(spec, 16 * 30) * size)
    assert _check_totals(pool).blocks_total == _blocks(spec, 16 * 30)
    other, cache = pool.acquire(cache, 16 * 10)
    with pytest.raises((ValueError, kvp.OutOfBlocks)):
        pool.resize(_blocks(spec, 16 * 20) * size)  # less than live requests hold
    assert _check_totals(pool).blocks_total == _blocks(spec, 16 * 30)
    cache = _drained(pool.release(cache, other))
    pool.resize(_blocks(spec, small) * size)
    stats = _check_totals(pool)
    assert stats.blocks_total == stats.blocks_mapped == _blocks(spec, small)
    assert stats.physical <= _blocks(spec, small) * size


def test_resized_pool_keeps_its_data(pool: kvp.KVPool) -> None:
    rig = Rig(pool)
    slots = rig.acquire_scattered([100, 90, 80])
    rig.write({slots[0]: 80, slots[1]: 70, slots[2]: 60})
    rig.release(slots[1])
    _drained(rig.cache)
    pool.resize(_blocks(pool.spec, 16 * 13) * pool.spec.block_bytes)
    pool.resize(_blocks(pool.spec, 16 * 40) * pool.spec.block_bytes)
    slots[1] = rig.acquire(300)
    rig.write({slots[1]: 280})
    out, _, want, _ = rig.step([(slot, 10) for slot in slots])
    assert np.max(np.abs(out - want)) < 1e-4


def test_commit_and_slot_table(pool: kvp.KVPool) -> None:
    rig = Rig(pool)
    slots = [rig.acquire(40), rig.acquire(20)]
    rig.write({slots[0]: 30, slots[1]: 7})
    pool.commit(slots[0], list(range(30)))
    rows = {row.slot: row for row in pool.slot_table(rig.cache)}
    assert set(rows) == set(slots)
    assert rows[slots[0]].committed_tokens == 30
    assert rows[slots[1]].committed_tokens == 0
    assert rows[slots[0]].length == 30
    assert rows[slots[1]].length == 7
    pool.commit(slots[0], [1, 2])
    assert pool.slot_table()[0 if slots[0] < slots[1] else 1].committed_tokens == 32
    rig.release(slots[0])
    again = rig.acquire(40)
    assert {row.slot: row.committed_tokens for row in pool.slot_table()}[again] == 0
    with pytest.raises(ValueError, match="slot 99"):
        pool.commit(99, [1])


def test_commit_past_the_mapping_is_an_error(pool: kvp.KVPool) -> None:
    slot, _ = pool.acquire(pool.cache(), 16)
    with pytest.raises(ValueError, match="17"):
        pool.commit(slot, list(range(17)))


@pytest.mark.parametrize("tokens", [-1, 513])
def test_token_counts_out_of_range(pool: kvp.KVPool, tokens: int) -> None:
    slot, cache = pool.acquire(pool.cache(), 16)
    with pytest.raises(ValueError, match=str(tokens)):
        pool.acquire(cache, tokens)
    with pytest.raises(ValueError, match=str(tokens)):
        pool.extend(slot, tokens)


@pytest.mark.parametrize("call", ["extend", "release", "block_map"])
def test_free_and_invalid_slots_on_the_host(pool: kvp.KVPool, call: str) -> None:
    cache = pool.cache()
    slot, cache = pool.acquire(cache, 16)
    calls = {
        "extend": lambda slot: pool.extend(slot, 16),
        "release": lambda slot: pool.release(cache, slot),
        "block_map": pool.block_map,
    }
    for bad in (6, -1):
        with pytest.raises(ValueError, match=f"slot {bad} does not exist.*0..5"):
            calls[call](bad)
    with pytest.raises(kvp.KVPageError, match=f"slot {slot + 1} is free"):
        calls[call](slot + 1)
    cache = pool.release(kvp.after(cache, busy(1)), slot)
    with pytest.raises(kvp.KVPageError, match=f"slot {slot} is draining"):
        calls[call](slot)
    _drained(cache)
    with pytest.raises(kvp.KVPageError, match=f"slot {slot} is free"):
        calls[call](slot)


def test_map_slots_maps_inside_a_program(pool: kvp.KVPool) -> None:
    slots, cache = pool.acquire(pool.cache(), [1, 1])
    step = jax.jit(kvp.map_slots)
    ids = jnp.asarray([slots[0], -1, slots[1]], jnp.int32)
    cache, ok = step(cache, ids, jnp.asarray([40, 999999, 16 * 17], jnp.int32))
    assert ok.tolist() == [True, True, True]
    assert pool.stats().blocks_mapped == _blocks(pool.spec, 40) + _blocks(pool.spec, 16 * 17)
    cache, ok = step(cache, ids, jnp.asarray([16 * 4, 0, 16 * 3], jnp.int32))
    assert ok.tolist() == [False, True, True]  # one block short, and shrinking is never asked for
    assert pool.stats().blocks_mapped == _blocks(pool.spec, 40) + _blocks(pool.spec, 16 * 17)
    cache = _drained(pool.release(cache, slots[1]))
    cache, ok = step(cache, ids.at[2].set(-1), jnp.asarray([16 * 4, 0, 0], jnp.int32))
    assert ok.tolist() == [True, True, True]


def test_peak(pool: kvp.KVPool) -> None:
    slot, cache = pool.acquire(pool.cache(), 16 * 10)
    peak = pool.stats().peak
    assert peak == _blocks(pool.spec, 16 * 10) * pool.spec.block_bytes
    cache = _drained(pool.release(cache, slot))
    pool.trim()
    assert pool.stats().mapped == 0
    assert pool.stats().peak == peak
