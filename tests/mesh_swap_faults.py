"""Failure tests of `test_mesh_swap.py`, which run in a process with eight devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from mesh_rig import Failing, check_equal, check_written, make_mesh, make_spec, write
from mesh_swap import nothing_left, on_disk, pool_with
from store_rig import soon

import jax_kvpage as kvp
from jax_kvpage import _native

_BROKEN = _native.StatusError(_native.Code.INTERNAL, _native.Reason.NONE, "injected")


def failures(size: int, path: str) -> None:
    """A call that fails on one shard takes effect on none, and swapped sequences are still
    there.
    """
    ids = list(range(100, 170))
    with kvp.BlockStore(path) as store, pool_with(size, store, max_slots=6) as pool:
        (slot, busy), cache = pool.acquire(pool.cache(), [70, 40])
        cache = write(pool, cache, slot, ids)
        cache = write(pool, cache, busy, range(40))
        pool.check(cache)
        shards = pool._pool.shards

        def fails(name: str, call: Callable[[], Any], facts: Callable[[], Any]) -> None:
            before = facts()
            for at in {1, size - 1}:
                for error in (_BROKEN, KeyboardInterrupt()):
                    shard = shards[at]
                    failing = shards[at] = Failing(shard, name, error)
                    wanted: Any = KeyboardInterrupt if error is not _BROKEN else kvp.KVPageError
                    with pytest.raises(wanted):
                        call()
                    shards[at] = shard
                    assert failing.calls == 1, name
                    assert facts() == before, name
                    check_equal(pool)

        def table() -> Any:
            rows = pool.slot_table()
            stats = pool.stats()
            return rows, stats.sequences_swapped, stats.blocks_swapped, stats.swapped_in

        fails("swap_out", lambda: pool.swap_out(cache, slot), table)
        swapped, cache = pool.swap_out(cache, slot)
        on_disk(store, swapped)
        fails("start_read", lambda: pool.prefetch(swapped), lambda: (*table(), swapped.on_disk))
        assert store.stats().bytes_read == 0
        assert pool.prefetch(swapped).wait(60)
        fails("swap_in", lambda: pool.swap_in(cache, swapped), table)
        slot, cache = pool.swap_in(cache, swapped)
        check_written(cache, slot, ids)
        check_written(cache, busy, range(40))
        pool.check(pool.release(cache, [slot, busy]))
        check_equal(pool)
        nothing_left(pool, store)


def limits(size: int, path: str) -> None:
    """A store with room for some shards' parts only, and a shard with less memory."""
    ids = list(range(100, 170))
    spec = make_spec(4)
    part = 3 * 32 * spec.token_bytes // size  # a shard's part of three blocks
    with (
        kvp.BlockStore(path, limit=part * size - 1) as store,
        pool_with(size, store, capacity=2**20) as pool,  # 16 blocks of 32 tokens
    ):
        slot, cache = pool.acquire(pool.cache(), 70)
        cache = write(pool, cache, slot, ids)
        swapped, cache = pool.swap_out(cache, slot)
        assert soon(lambda: store.stats().failed_writes > 0)
        assert soon(lambda: pool.stats().blocks_draining == 0)
        assert not swapped.in_store
        assert pool.stats().bytes_swapped_out == 0
        check_equal(pool)
        slot, cache = pool.swap_in(cache, swapped)
        check_written(cache, slot, ids)
        nothing_left(pool, store)

        # A sequence that fits in the store; then one device has too little memory to swap it in.
        cache = pool.truncate(cache, slot, 32)
        swapped, cache = pool.swap_out(cache, slot)
        on_disk(store, swapped)
        full, cache = pool.acquire(cache, 250)
        last = pool._pool.shards[-1]
        last.resize(last.numbers().block_bytes * 8)
        for call in (
            lambda: pool.prefetch(swapped),
            lambda: pool.swap_in(cache, swapped, wait=True),
        ):
            with pytest.raises(kvp.OutOfBlocks):
                call()
            assert swapped.on_disk
        assert [row.slot for row in pool.slot_table()] == [full]
        cache = pool.release(cache, full)
        slot, cache = pool.swap_in(cache, swapped, wait=True)
        check_written(cache, slot, ids[:32])
        pool.check(pool.release(cache, slot))
        nothing_left(pool, store)


def refusals(path: str) -> None:
    """Unsupported uses are refused with a clear message."""
    ids = list(range(40))
    with kvp.BlockStore(path) as store, pool_with(2, store) as pool, pool_with(2, store) as second:
        slot, cache = pool.acquire(pool.cache(), 40)
        cache = write(pool, cache, slot, ids)
        swapped, cache = pool.swap_out(cache, slot)
        alone = kvp.KVPool(make_spec(4), "4MiB", store=store)
        for other in (second, alone):
            for call in (other.prefetch, lambda s, other=other: other.swap_in(other.cache(), s)):
                with pytest.raises(ValueError, match="was not swapped out of this pool"):
                    call(swapped)
        alone.close()
        with pytest.raises(kvp.KVPageError, match="swap_out: slot 3 is free"):
            pool.swap_out(cache, 3)
        with pytest.raises(ValueError, match="swap_out: slot 99 does not exist"):
            pool.swap_out(cache, 99)
        for refused in (
            lambda: pool.prefetch(ids),
            lambda: pool.stored_prefix(ids),
            lambda: pool.spill_stats(),
        ):
            with pytest.raises(ValueError, match="not supported yet on a pool over a mesh"):
                refused()
        for saving in (pool.save_prefixes, pool.load_prefixes):
            with pytest.raises(ValueError, match="only swapped sequences"):
                saving()
        slot, cache = pool.swap_in(cache, swapped, wait=True)
        check_written(cache, slot, ids)
        pool.check(pool.release(cache, slot))

        mesh = make_mesh(2)
        sequences = {"mesh": mesh, "sequence_axis": "tp", "store": store}
        heads = {"mesh": mesh, "axis": "tp"}
        cases: list[tuple[dict[str, Any], str]] = [
            (sequences, "store: not with sequence_axis: nothing is committed there"),
            (
                {**heads, "store": store, "write_ahead": 0.5},
                "write_ahead: cannot be combined with mesh",
            ),
            ({**heads, "store": "/tmp"}, "wanted a BlockStore, a HostStore or None"),
        ]
        for arguments, wanted in cases:
            with pytest.raises(ValueError, match=wanted):
                kvp.KVPool(make_spec(2), "4MiB", **arguments)
    with pytest.raises(kvp.PoolClosed):
        pool_with(2, store)
    with kvp.BlockStore(path) as store:
        pool = pool_with(2, store)
        slot, cache = pool.acquire(pool.cache(), 40)
        swapped, cache = pool.swap_out(write(pool, cache, slot, ids), slot)
        pool.close()
        assert swapped.closed
        with pytest.raises(kvp.PoolClosed):
            pool.prefetch(swapped)
        assert soon(lambda: store.stats().bytes_swapped == 0)
