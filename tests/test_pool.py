"""The host side of the pool: blocks move between free, mapped, draining and parked exactly as the
contract says.
"""

from __future__ import annotations

import numpy as np
import pytest
from harness import Rig, busy
from pool_checks import check_totals, count_blocks, drained, make_spec

import jax_kvpage as kvp


@pytest.fixture(params=["fused", "per_layer"])
def pool(request: pytest.FixtureRequest, make_pool) -> kvp.KVPool:
    spec = make_spec(request.param).resolve("cpu")
    return make_pool(spec, count_blocks(spec, 16 * 20) * spec.block_bytes)


def test_a_new_pool_is_empty(pool: kvp.KVPool) -> None:
    stats = check_totals(pool)
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
        mapped += count_blocks(pool.spec, tokens)
        assert check_totals(pool).blocks_mapped == mapped
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
    drained(cache)
    assert pool.stats().slots_occupied == 0


def test_a_list_is_acquired_whole_or_not_at_all(pool: kvp.KVPool) -> None:
    cache = pool.cache()
    before = pool.stats()
    with pytest.raises(kvp.OutOfBlocks):
        pool.acquire(cache, [16 * 10, 16 * 11])
    after = pool.stats()
    assert (after.blocks_mapped, after.slots_occupied) == (before.blocks_mapped, 0)
    _slot, cache = pool.acquire(cache, 16 * 20)  # the same cache is still valid


def test_extend_keeps_the_mapping_while_there_is_room(pool: kvp.KVPool) -> None:
    slot, _cache = pool.acquire(pool.cache(), 3)
    first = pool.block_map(slot)
    calls = pool.stats().system_calls
    pool.extend(slot, 16)
    assert pool.block_map(slot) == first
    assert pool.stats().system_calls == calls
    assert pool.slot_table()[0].reserved_tokens == 16
    pool.extend(slot, 10)  # less than before: nothing happens
    assert pool.slot_table()[0].reserved_tokens == 16
    pool.extend(slot, 50)
    assert pool.stats().blocks_mapped == count_blocks(pool.spec, 50)
    row = pool.slot_table()[0]
    assert (row.reserved_tokens, row.num_blocks) == (50, count_blocks(pool.spec, 50))
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
    assert len(blocks) == count_blocks(pool.spec, 70) + count_blocks(pool.spec, 33)
    assert len(set(blocks)) == len(blocks)
    assert all(0 <= block < pool.stats().blocks_total for block in blocks)
    assert {count for _, count in entries} == {1}


def test_release_parks_and_acquire_adopts(pool: kvp.KVPool) -> None:
    cache = pool.cache()
    slot, cache = pool.acquire(cache, 100)
    blocks = pool.block_map(slot)
    cache = pool.release(cache, slot)
    assert int(drained(cache).lengths[slot]) == -1
    stats = check_totals(pool)
    assert (stats.blocks_parked, stats.blocks_mapped) == (count_blocks(pool.spec, 100), 0)
    assert stats.slots_occupied == 0
    assert pool.slot_table() == []
    again, cache = pool.acquire(cache, 90)
    assert pool.block_map(again) == blocks
    after = check_totals(pool)
    assert after.blocks_parked == 0
    assert after.system_calls == stats.system_calls


def test_the_best_fitting_parked_slot_is_adopted(pool: kvp.KVPool) -> None:
    sizes = [16 * 2, 16 * 9, 16 * 5]
    slots, cache = pool.acquire(pool.cache(), sizes)
    blocks = [pool.block_map(slot) for slot in slots]
    cache = drained(pool.release(cache, slots))
    calls = pool.stats().system_calls
    for wanted, fits in ((16 * 4, 2), (16 * 6, 1), (16 * 1, 0)):
        slot, cache = pool.acquire(cache, wanted)
        assert pool.block_map(slot) == blocks[fits]
    assert pool.stats().system_calls == calls


def test_tails_are_stolen_only_under_pressure(pool: kvp.KVPool) -> None:
    """Twelve of twenty blocks are parked and nine more are needed: exactly as many blocks are
    stolen as are missing.
    """
    spec = pool.spec
    slots, cache = pool.acquire(pool.cache(), [16 * 6, 16 * 6])
    cache = drained(pool.release(cache, slots))
    one, cache = pool.acquire(cache, 16 * 3)  # adopts a parked slot
    two, cache = pool.acquire(cache, 16 * 3)  # the other
    three, cache = pool.acquire(cache, 16 * 8)  # all free blocks
    assert check_totals(pool).blocks_free == 0
    cache = drained(pool.release(cache, [one, two]))
    assert pool.stats().blocks_parked == 2 * count_blocks(spec, 16 * 6)
    _four, cache = pool.acquire(
        cache, 16 * 10
    )  # six adopted, four stolen from the tail of the other
    stats = check_totals(pool)
    assert stats.blocks_parked == count_blocks(spec, 16 * 2)
    assert stats.blocks_free == 0
    pool.extend(three, 16 * 10)  # all remaining blocks
    assert check_totals(pool).blocks_parked == 0


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


@pytest.mark.covering(1)
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
    drained(cache)
    with pytest.raises(kvp.KVPageError, match=f"slot {slot} is free"):
        calls[call](slot)
