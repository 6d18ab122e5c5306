"""Swapped sequences in host memory: pools on CUDA's memory management over the fake driver.

Driver calls copy blocks between simulated device memory and pinned memory; programs run on CPU.
cc/tests/device_swapping_test.cc covers the same with the CUDA kernels and their table.
"""

from __future__ import annotations

import pytest
from subprocesses import run_python

pytestmark = pytest.mark.fake_driver

_FAKE = {"JAX_KVPAGE_FAKE_DRIVER": "1"}

_COMMON = """
    import gc, sys
    import jax.numpy as jnp, numpy as np
    import jax_kvpage as kvp
    from fake_pools import end, fake, make_pool, nothing_alive
    from prefix_rig import text
    from store_rig import DTYPES, decode, soon
    from swap_rig import swap_rig

    def swap_out(rig, slot):
        swapped = rig.swap_out(slot, to_disk=False)
        assert soon(lambda: swapped.in_store), rig.pool.store.stats()
        assert not swapped.on_disk and "in host memory" in repr(swapped), swapped
        return swapped
"""

_DECODE = (
    _COMMON
    + """
    for dtype in DTYPES:
        store = kvp.HostStore("1GiB")
        rig, fresh = (swap_rig(make_pool, s, sys.argv[1], dtype) for s in (store, None))
        ids = text(100)
        slot, computed = rig.begin(ids), fresh.begin(ids)
        swapped = swap_out(rig, slot)
        stats = rig.audit()
        assert stats.blocks_free == stats.blocks_total
        size = 7 * rig.pool.spec.num_ranges * stats.block_bytes
        held = store.stats()
        assert (stats.bytes_swapped_out, held.bytes, held.bytes_written) == (size, size, size)
        other = rig.begin(text(300, 1))  # memory and slot are another's meanwhile
        try:
            rig.swap_in(swapped, wait=False)
        except kvp.KVPageError as error:
            assert "is in host memory: pool.prefetch" in str(error), error
        else:
            raise SystemExit("swapped in without its blocks")
        ticket = rig.pool.prefetch(swapped)
        assert ticket.wait() and (ticket.tokens, ticket.error) == (100, None), ticket
        again = rig.swap_in(swapped, wait=False)
        held = store.stats()
        assert (held.bytes, held.bytes_read) == (0, size) and held.read_bytes_per_second > 0, held
        assert 0 < held.pinned <= held.limit
        for token in text(14, 7):  # into the next block
            assert np.array_equal(decode(rig, again, token), decode(fresh, computed, token)), dtype
        rig.check()
        rig.audit()
        rig.release(again, other)
        end(store)
        del rig, fresh, swapped, ticket, store
        nothing_alive()
    """
)


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_decoding_goes_on_bit_for_bit(layout: str) -> None:
    run_python(_DECODE, layout, env=_FAKE, timeout=600)


_SHARED = (
    _COMMON
    + """
    # Shared blocks stay; a store that is full refuses, and the sequence stays; a sequence is given
    # up; one store serves two pools.
    small = kvp.HostStore(1)
    rig = swap_rig(make_pool, small, "fused")
    parent = rig.begin(text(40))
    child = rig.fork(parent)
    rig.write(child, text(30, 2))
    stuck = rig.swap_out(child, to_disk=False)
    assert soon(lambda: small.stats().refused_writes == 1)
    assert "do not fit in a store of 1 bytes" in small.stats().last_error
    assert not stuck.in_store and rig.audit().blocks_swapped == 5
    child = rig.swap_in(stuck)
    rig.check()

    store = kvp.HostStore("64MiB")
    first = swap_rig(make_pool, store, "fused")
    second = swap_rig(make_pool, store, "per_layer", jnp.int8)
    for rig in (first, second):
        parent = rig.begin(text(40))
        child = rig.fork(parent)
        rig.write(child, text(30, 2))
        ranges = rig.pool.spec.num_ranges
        held = store.stats().bytes
        swapped = swap_out(rig, child)
        assert store.stats().bytes - held == 3 * ranges * rig.pool.spec.block_bytes
        assert rig.audit().blocks_swapped == 2 * ranges
        rig.swap_in(swapped)
        rig.check()
        dropped = swap_out(rig, parent)
        rig.away.clear()
        rig.pool.drop_swapped(dropped)
        assert dropped.closed and store.stats().bytes == held, store.stats()
    for wanted, call in (
        ("HostStore has no files", lambda: first.pool.save_prefixes()),
        ("write_ahead", lambda: kvp.KVPool(first.pool.spec, "1MiB", store=store, write_ahead=2)),
        ("HostStore: limit", lambda: kvp.HostStore("much")),
    ):
        try:
            call()
        except ValueError as error:
            assert wanted in str(error), error
        else:
            raise SystemExit(wanted)
    end(small, store)
    try:
        store.stats()
    except kvp.PoolClosed:
        pass
    else:
        raise SystemExit("a closed store")
    del rig, first, second, swapped, dropped, stuck, small, store
    nothing_alive()
    """
)


def test_shared_blocks_and_full_stores() -> None:
    run_python(_SHARED, env=_FAKE)


_FAULTS = (
    _COMMON
    + """
    def attempt(call):
        try:
            return call()
        except (kvp.KVPageError, RuntimeError) as error:
            assert "cu" in str(error) or "keeps the copy" in str(error), error
            return call()

    failed = refused = reread = 0
    functions = "MemHostAlloc MemcpyDtoHAsync_v2 MemcpyHtoDAsync_v2 StreamSynchronize MemMap"
    for function in [f"cu{name}" for name in (functions + " StreamCreate").split()]:
        for n in (1, 2, 3):
            store = kvp.HostStore("1GiB")
            rig = swap_rig(make_pool, store, sys.argv[1])
            slot = rig.begin(text(40))
            faults = fake.faults
            fake.fail(function, n, 2 if function == "cuMemHostAlloc" else 999)
            swapped = attempt(lambda: rig.swap_out(slot, to_disk=False))
            stats = store.stats
            assert soon(lambda: swapped.in_store or stats().refused_writes or stats().failed_writes)
            failed += stats().failed_writes
            refused += stats().refused_writes
            again = attempt(lambda: rig.swap_in(swapped))
            reread += stats().failed_reads
            fake.clear_faults()
            rig.check()
            rig.audit()
            rig.release(again)
            end(store)
            del rig, swapped, store
            nothing_alive()
    assert failed >= 3 and refused >= 2 and reread >= 3, (failed, refused, reread)
    """
)


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_what_the_driver_refuses(layout: str) -> None:
    """Nothing is lost: the sequence stays where it is, and a retry succeeds."""
    run_python(_FAULTS, layout, env=_FAKE)


_ENGINE = (
    _COMMON
    + """
    import serving_rig as rig
    from jax_kvpage.serving import CostAware, Engine, SamplingParams
    from jax_kvpage.serving.engine.swapping import PoolSwap

    prompts = [rig.prompt(24, i) for i in range(6)]
    long = SamplingParams(temperature=0, max_tokens=90)
    spec = rig.spec(layout="fused")
    store = kvp.HostStore("1GiB")
    # By its own measurements; then as if swapping cost nothing, so that it swaps for certain.
    results = []
    for cost in (PoolSwap.cost, lambda self, tokens: np.zeros_like(tokens)):
        PoolSwap.cost = cost
        pool = kvp.KVPool(spec, 14 * spec.block_bytes, store=store)
        with pool, Engine(
            rig.step, rig.params(), pool, rig.config(preemption=CostAware(0))
        ) as engine:
            outputs = engine.generate(prompts, long)
            results.append(rig.tokens(outputs))
            stats, swapped = pool.stats(), engine.stats.swapped
        assert store.stats().bytes == 0
        del engine, pool, outputs
    assert swapped > 0 and stats.swapped_in == stats.swapped_out > 0, stats
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        want = rig.tokens(engine.generate(prompts, long))
    assert results == [want, want]
    store.close()
    del engine, pool, store
    nothing_alive()
    """
)


def test_the_engine_swaps_to_host_memory() -> None:
    """Preempted requests come back with the same tokens."""
    run_python(_ENGINE, env=_FAKE)
