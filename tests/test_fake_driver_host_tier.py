"""Evicted prefixes in host memory: pools on CUDA's memory management over the fake driver.

Driver calls copy blocks between simulated device memory and pinned memory; programs run on CPU.
cc/tests/device_host_tier_test.cc covers the same with the CUDA kernels and their table.
"""

from __future__ import annotations

import pytest
from subprocesses import run_python

pytestmark = pytest.mark.fake_driver

_FAKE = {"JAX_KVPAGE_FAKE_DRIVER": "1"}

_COMMON = """
    import gc, sys, time
    import jax.numpy as jnp, numpy as np
    import jax_kvpage as kvp
    from fake_pools import end, fake, make_pool, nothing_alive
    from prefix_rig import text
    from spill_rig import add_up, fetched, rig_of, spilled
    from store_rig import DTYPES, soon

    def run(rig, ids, **options):
        slot, cached = rig.acquire(ids, **options)
        rig.check()
        rig.release(slot)
        return cached
"""

_ROUND_TRIP = (
    _COMMON
    + """
    texts = [text(100, seed) for seed in range(3)]
    for dtype in DTYPES:
        store = kvp.HostStore("1GiB")
        rig = rig_of(make_pool, store, sys.argv[1], dtype, write_ahead=1)
        for ids in texts:
            assert run(rig, ids) == 0
        spilled(rig.pool, 3 * 96)
        rig.pool.evict()
        stats, held = rig.pool.spill_stats(), store.stats()
        size = 18 * rig.pool.spec.num_ranges * rig.pool.spec.block_bytes
        assert (stats.tokens_dropped, stats.failed_writes) == (0, 0)
        assert stats.bytes_written == held.prefixes.bytes_written == held.prefixes.bytes == size
        assert held.bytes == size <= held.pinned and held.bytes_written == 0, held
        assert 0 < stats.write_seconds_median <= stats.write_seconds_p95
        run(rig, text(300, 9))  # in the same memory
        for ids in texts:
            assert (rig.pool.find_prefix(ids), rig.pool.stored_prefix(ids)) == (0, 96)
            found = rig.pool.acquire_prefix(rig.cache, ids, namespace="another")
            slot, cached, rig.cache = found
            assert (cached, found.num_stored) == (0, 0)
            rig.cache = rig.pool.release(rig.cache, slot)
            ticket = fetched(rig, ids)
            assert (ticket.tokens, ticket.error) == (96, None)
            assert run(rig, ids) == 96
        stats = rig.pool.spill_stats()
        assert (stats.store_hits, stats.prefetches) == (3 * 96, 3)
        assert stats.tokens_fetched == 3 * 96 and stats.read_bytes_per_second > 0
        assert store.stats().prefixes.bytes_read == size
        assert add_up(rig.pool)
        rig.pool._pool.audit()
        end(store)
        del rig, store, found
        nothing_alive()
    """
)


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_evicted_prefixes_come_back_bit_for_bit(layout: str) -> None:
    run_python(_ROUND_TRIP, layout, env=_FAKE, timeout=600)


_CONVERSATIONS = (
    _COMMON
    + """
    # Conversations that take turns find what they had, though the pool holds a third of them. Then
    # with a store that holds half of them, beside a sequence that is swapped out.
    turns = {seed: text(70, seed) for seed in range(6)}
    for limit, least, most in (("1GiB", 0.9, 1.0), (12, 0.01, 0.9)):
        rig = rig_of(make_pool, None, sys.argv[1])
        logical = rig.pool.spec.num_ranges * rig.pool.spec.block_bytes
        store = kvp.HostStore(limit if isinstance(limit, str) else limit * logical)
        rig = rig_of(make_pool, store, sys.argv[1], blocks=16, write_ahead=0.8)
        found = asked = 0
        for turn in range(4):
            for ids in turns.values():
                asked += 64 * (turn > 0)
                fetched(rig, ids)
                found += run(rig, ids)
                time.sleep(0.02)
        stats, held = rig.pool.spill_stats(), store.stats()
        assert stats.memory_hits + stats.store_hits == found
        assert least * asked < found <= most * asked, (found, asked, stats, held)
        assert held.bytes <= held.limit and held.pinned <= held.limit
        assert (held.prefixes.bytes_evicted > 0) == isinstance(limit, int)
        assert held.prefixes.refused_writes == held.prefixes.failed_reads == 0, held
        slot, rig.cache = rig.pool.acquire(rig.cache, 150)
        rig.ids[slot] = []
        rig.write(slot, text(150, 7))
        swapped, rig.cache = rig.pool.swap_out(rig.cache, slot)
        ids = rig.ids.pop(slot)
        assert soon(lambda: swapped.in_store), store.stats()
        slot, rig.cache = rig.pool.swap_in(rig.cache, swapped, wait=True)
        rig.ids[slot] = ids
        rig.check()
        held = store.stats()
        assert 0 < held.swap_out_seconds_median <= held.swap_out_seconds_p95
        assert 0 < held.swap_in_seconds_median <= held.swap_in_seconds_p95
        rig.release(slot)
        end(store)
        del rig, swapped, store
        nothing_alive()
    """
)


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_a_small_pool_serves_a_large_set_from_host_memory(layout: str) -> None:
    run_python(_CONVERSATIONS, layout, env=_FAKE)


_FAULTS = (
    _COMMON
    + """
    failed = missed = 0
    ids = text(70)
    functions = "MemHostAlloc MemcpyDtoHAsync_v2 MemcpyHtoDAsync_v2 StreamSynchronize"
    for function in [f"cu{name}" for name in functions.split()]:
        for n in (1, 2, 3):
            store = kvp.HostStore("1GiB")
            rig = rig_of(make_pool, store, sys.argv[1], write_ahead=1)
            fake.fail(function, n, 2 if function == "cuMemHostAlloc" else 999)
            assert run(rig, ids) == 0
            stats = rig.pool.spill_stats
            assert soon(lambda: stats().tokens_written == 64 or stats().failed_writes)
            failed += stats().failed_writes
            rig.pool.evict()
            written = stats().tokens_written
            assert stats().tokens_dropped == 64 - written
            ticket = fetched(rig, ids)
            if ticket.tokens != written:
                assert "a copy from host memory has failed" in ticket.error, ticket.error
                assert stats().missed == {"unreadable": 64}
                missed += 1
                ticket = fetched(rig, ids)  # the store has it still
            assert ticket.tokens == written
            assert run(rig, ids) == written
            fake.clear_faults()
            assert add_up(rig.pool)
            rig.pool._pool.audit()
            end(store)
            del rig, ticket, store
            nothing_alive()
    assert failed >= 4 and missed >= 2, (failed, missed)

    # Streams for the copies: no pool, and the next attempt succeeds.
    store = kvp.HostStore("1GiB")
    fake.fail("cuStreamCreate", 1, 2)
    try:
        rig_of(make_pool, store)
    except kvp.KVPageError as error:
        assert "cuStreamCreate" in str(error), error
    else:
        raise SystemExit("no stream")
    fake.clear_faults()
    rig = rig_of(make_pool, store)
    end(store)
    try:
        rig_of(make_pool, store)
    except kvp.PoolClosed:
        pass
    else:
        raise SystemExit("a closed store")
    del rig, store
    nothing_alive()
    """
)


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_what_the_driver_refuses(layout: str) -> None:
    """At worst a miss: blocks that were not written or cannot be read back are recomputed."""
    run_python(_FAULTS, layout, env=_FAKE)
