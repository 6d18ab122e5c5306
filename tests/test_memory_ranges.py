"""The addresses of a slot's keys and values in memory."""

from __future__ import annotations

import ctypes

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from handover_rig import HandoverRig
from prefix_rig import BLOCK, spec_of, text

import jax_kvpage as kvp


def bytes_at(ranges: list[kvp.MemoryRange]) -> list[bytes]:
    return [ctypes.string_at(address, num_bytes) for address, num_bytes in ranges]


def test_the_bytes_are_those_of_the_tokens(make_pool) -> None:
    rig = HandoverRig(make_pool(spec_of("per_layer")))
    rig.begin(text(30, 1))
    slot = rig.begin(text(40))
    ranges = rig.pool.memory_ranges(slot)
    assert [num_bytes for _, num_bytes in ranges] == [3 * rig.pool.spec.block_bytes] * 4
    for i, found in enumerate(bytes_at(ranges)):
        rows = kvp.read_kv(rig.cache, jnp.asarray([slot]), i // 2)[i % 2][0, :40]
        want = np.asarray(rows).tobytes()
        assert found[: len(want)] == want


def test_another_pool_has_the_same_bytes(make_pool, layout) -> None:
    sender, other = (HandoverRig(make_pool(spec_of(layout))) for _ in range(2))
    slot = sender.begin(text(70))
    with sender.export(slot) as sent:
        there = other.take(sent)
    one = bytes_at(sender.pool.memory_ranges(slot))
    two = bytes_at(other.pool.memory_ranges(there))
    whole = 70 // BLOCK * sender.pool.spec.block_bytes
    assert [found[:whole] for found in one] == [found[:whole] for found in two]


def test_they_grow_in_place_and_lose_what_is_dropped(make_pool, layout) -> None:
    rig = HandoverRig(make_pool(spec_of(layout)))
    slot = rig.begin(text(40))
    block = rig.pool.spec.block_bytes
    before = rig.pool.memory_ranges(slot)
    rig.pool.extend(slot, 100)
    grown = rig.pool.memory_ranges(slot)
    assert grown == [(address, 7 * block) for address, _ in before]
    rig.drop(slot, 2 * BLOCK)
    rig.pool.check(rig.cache)
    after = rig.pool.memory_ranges(slot)
    assert after == [(address + 2 * block, 5 * block) for address, _ in before]


def test_what_has_no_memory_is_refused(make_pool) -> None:
    pool = make_pool(spec_of("fused"))
    with pytest.raises(kvp.KVPageError, match="memory_ranges: slot 0 is free"):
        pool.memory_ranges(0)
    with pytest.raises(ValueError, match="memory_ranges"):
        pool.memory_ranges(99)
    slot, _ = pool.acquire(pool.cache(), 0)
    assert [num_bytes for _, num_bytes in pool.memory_ranges(slot)] == [0]
    pool.close()
    with pytest.raises(kvp.PoolClosed):
        pool.memory_ranges(slot)


def test_a_mesh_has_it_for_each_device() -> None:
    mesh = jax.make_mesh((1,), ("tp",))
    spec = kvp.CacheSpec(1, 2, 64, 2, 64)
    with (
        kvp.KVPool(spec, "1MiB", mesh=mesh, axis="tp") as pool,
        pytest.raises(ValueError, match="not supported yet on a pool over a mesh"),
    ):
        pool.memory_ranges(0)
