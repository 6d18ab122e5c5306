"""A pool at its limits: errors when blocks or slots run out, waiting for draining blocks, and
capacity that is trimmed and resized.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Rig, busy
from pool_checks import check_totals, count_blocks, drained, make_spec

import jax_kvpage as kvp


@pytest.fixture(params=["fused", "per_layer"])
def pool(request: pytest.FixtureRequest, make_pool) -> kvp.KVPool:
    spec = make_spec(request.param).resolve("cpu")
    return make_pool(spec, count_blocks(spec, 16 * 20) * spec.block_bytes)


def test_out_of_blocks_carries_the_numbers(pool: kvp.KVPool) -> None:
    spec = pool.spec
    _slot, cache = pool.acquire(pool.cache(), 16 * 15)
    other, cache = pool.acquire(cache, 16 * 2)
    before, maps = pool.stats(), pool.block_map(other)
    with pytest.raises(kvp.OutOfBlocks) as caught:
        pool.extend(other, 16 * 9)
    error = caught.value
    assert (error.wanted, error.free, error.draining) == (
        count_blocks(spec, 16 * 7),
        count_blocks(spec, 16 * 3),
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
    pool.extend(other, 16 * 5)  # all remaining blocks


def test_no_slot_left(pool: kvp.KVPool) -> None:
    slots, cache = pool.acquire(pool.cache(), [1] * 6)
    with pytest.raises(Exception, match=r"(?i)slot.*6|6.*slot"):
        pool.acquire(cache, 1)
    cache = drained(pool.release(cache, slots[2]))
    assert pool.acquire(cache, 1)[0] == slots[2]


def test_draining_is_not_handed_out(pool: kvp.KVPool) -> None:
    slot, cache = pool.acquire(pool.cache(), 16 * 15)
    cache = kvp.after(cache, busy(1))
    cache = pool.release(cache, slot)
    stats = check_totals(pool)
    assert stats.blocks_draining == count_blocks(pool.spec, 16 * 15)
    assert stats.blocks_parked == 0
    with pytest.raises(kvp.OutOfBlocks, match="draining") as caught:
        pool.acquire(cache, 16 * 6)
    assert caught.value.draining == count_blocks(pool.spec, 16 * 15)
    small, cache = pool.acquire(cache, 16 * 5)
    assert small != slot
    drained(cache)
    stats = check_totals(pool)
    assert stats.blocks_draining == 0
    assert stats.blocks_parked == count_blocks(pool.spec, 16 * 15)


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
    assert pool.stats().physical == 2 * count_blocks(pool.spec, 100) * size
    rig.release(slots[0])
    drained(rig.cache)
    pool.trim()
    stats = check_totals(pool)
    assert stats.blocks_parked == 0
    assert stats.blocks_mapped == count_blocks(pool.spec, 100)
    assert stats.physical == count_blocks(pool.spec, 100) * size
    again = rig.acquire(100)
    rig.write({again: 80})
    out, _, want, _ = rig.step([(slots[1], 10), (again, 10)])  # the other slot has kept its data
    assert np.max(np.abs(out - want)) < 1e-4


def test_resize(pool: kvp.KVPool) -> None:
    spec = pool.spec
    _slot, cache = pool.acquire(pool.cache(), 16 * 18)
    small, size = 16 * 18, spec.block_bytes
    with pytest.raises(kvp.OutOfBlocks):
        pool.acquire(cache, 16 * 4)
    pool.resize(count_blocks(spec, 16 * 30) * size)
    assert check_totals(pool).blocks_total == count_blocks(spec, 16 * 30)
    other, cache = pool.acquire(cache, 16 * 10)
    with pytest.raises((ValueError, kvp.OutOfBlocks)):
        pool.resize(count_blocks(spec, 16 * 20) * size)  # less than live requests hold
    assert check_totals(pool).blocks_total == count_blocks(spec, 16 * 30)
    cache = drained(pool.release(cache, other))
    pool.resize(count_blocks(spec, small) * size)
    stats = check_totals(pool)
    assert stats.blocks_total == stats.blocks_mapped == count_blocks(spec, small)
    assert stats.physical <= count_blocks(spec, small) * size


def test_resized_pool_keeps_its_data(pool: kvp.KVPool) -> None:
    rig = Rig(pool)
    slots = rig.acquire_scattered([100, 90, 80])
    rig.write({slots[0]: 80, slots[1]: 70, slots[2]: 60})
    rig.release(slots[1])
    drained(rig.cache)
    pool.resize(count_blocks(pool.spec, 16 * 13) * pool.spec.block_bytes)
    pool.resize(count_blocks(pool.spec, 16 * 40) * pool.spec.block_bytes)
    slots[1] = rig.acquire(300)
    rig.write({slots[1]: 280})
    out, _, want, _ = rig.step([(slot, 10) for slot in slots])
    assert np.max(np.abs(out - want)) < 1e-4


def test_map_slots_maps_inside_a_program(pool: kvp.KVPool) -> None:
    slots, cache = pool.acquire(pool.cache(), [1, 1])
    step = jax.jit(kvp.map_slots)
    ids = jnp.asarray([slots[0], -1, slots[1]], jnp.int32)
    cache, ok = step(cache, ids, jnp.asarray([40, 999999, 16 * 17], jnp.int32))
    assert ok.tolist() == [True, True, True]
    assert pool.stats().blocks_mapped == count_blocks(pool.spec, 40) + count_blocks(
        pool.spec, 16 * 17
    )
    cache, ok = step(cache, ids, jnp.asarray([16 * 4, 0, 16 * 3], jnp.int32))
    assert ok.tolist() == [False, True, True]  # one block short; asking for less is not an error
    assert pool.stats().blocks_mapped == count_blocks(pool.spec, 40) + count_blocks(
        pool.spec, 16 * 17
    )
    cache = drained(pool.release(cache, slots[1]))
    cache, ok = step(cache, ids.at[2].set(-1), jnp.asarray([16 * 4, 0, 0], jnp.int32))
    assert ok.tolist() == [True, True, True]


def test_peak(pool: kvp.KVPool) -> None:
    slot, cache = pool.acquire(pool.cache(), 16 * 10)
    peak = pool.stats().peak
    assert peak == count_blocks(pool.spec, 16 * 10) * pool.spec.block_bytes
    cache = drained(pool.release(cache, slot))
    pool.trim()
    assert pool.stats().mapped == 0
    assert pool.stats().peak == peak


@pytest.mark.parametrize("capacity", [2**63, 2**70, "99999999999GiB", 2**400])
def test_a_capacity_beyond_64_bits(pool: kvp.KVPool, capacity: int | str) -> None:
    with pytest.raises(ValueError, match="capacity"):
        kvp.KVPool(pool.spec, capacity)
    with pytest.raises(ValueError, match="capacity"):
        pool.resize(capacity)


@pytest.mark.parametrize("number", [2**31, 2**40, -(2**40), 2**63])
def test_integers_that_cpp_has_no_room_for(pool: kvp.KVPool, number: int) -> None:
    slot, cache = pool.acquire(pool.cache(), 20)
    before = pool.stats()
    for name, call in {
        "extend": lambda: pool.extend(number, 20),
        "release": lambda: pool.release(cache, [slot, number]),
        "commit": lambda: pool.commit(number, [1, 2]),
        "committed": lambda: pool.committed(number),
        "block_map": lambda: pool.block_map(number),
    }.items():
        with pytest.raises(ValueError, match=rf"{name}: slot.*{number}"):
            call()
    with pytest.raises(ValueError, match=rf"num_tokens.*{number}"):
        pool.extend(slot, number)
    with pytest.raises(ValueError, match=rf"num_tokens.*{number}"):
        pool.acquire(cache, [1, number])
    assert pool.stats() == before
    pool.release(cache, slot)
