"""The driver fails at every call of every host operation: the pool is unchanged, the operation
succeeds when it is retried, data is intact, and nothing is left alive at the end.
"""

from __future__ import annotations

import pytest
from subprocesses import run_python

pytestmark = pytest.mark.fake_driver

_FAKE = {"JAX_KVPAGE_FAKE_DRIVER": "1"}

_COMMON = """
    import dataclasses, gc, sys
    import jax, jax.numpy as jnp, numpy as np
    import jax_kvpage as kvp
    from harness import Rig
    from jax_kvpage import _native

    fake = _native.fake_driver
    OUT_OF_MEMORY, UNKNOWN = 2, 999
    spec = kvp.CacheSpec(
        2, 2, 64, 6, 256, dtype=jnp.float32, layout=sys.argv[1], block_tokens=32
    )

    def open_pool(capacity="4MiB", **options):
        pool = kvp.KVPool(spec, capacity, **options)
        return pool, Rig(pool, group=2)

    def look(pool):
        '''Everything that the pool tells of itself, but for how often it called the driver and
        for handles that it has made ahead.'''
        rows = pool.slot_table()
        stats = dataclasses.replace(pool.stats(), system_calls=0, waits=0, physical=0, peak=0)
        return stats, rows, [pool.block_map(row.slot) for row in rows]

    def verify(rig, slots):
        out, _, want, _ = rig.step([(slot, 1) for slot in slots])
        np.testing.assert_allclose(out, want, atol=1e-4)
        rig.check_lengths()

    def nothing_alive():
        counts, violation = fake.report()
        assert not any(counts.values()), (counts, violation)
"""

_SWEEP = (
    _COMMON
    + """
    RANGES = 1 if sys.argv[1] == "fused" else 4
    BLOCKS = spec.resolve("cpu").block_bytes * RANGES  # bytes that 32 tokens take

    def fork(rig, slots):
        (new,), rig.cache = rig.pool.fork(rig.cache, slots[0], 1)
        rig.model.fork(slots[0], new, 35)

    # What is asked for while two slots are occupied and a third one occupied or parked.
    OPERATIONS = dict(
        acquire=lambda rig, slots: rig.acquire(100),
        adopt=lambda rig, slots: rig.acquire(60),
        adopt_more=lambda rig, slots: rig.acquire(250),
        extend=lambda rig, slots: rig.pool.extend(slots[0], 200),
        extend_both=lambda rig, slots: rig.pool.extend(slots, [120, 150]),
        trim=lambda rig, slots: rig.pool.trim(),
        shrink=lambda rig, slots: rig.pool.resize(6 * BLOCKS),
        grow=lambda rig, slots: rig.pool.resize("8MiB"),
        steal=lambda rig, slots: rig.pool.extend(slots[0], 256),
        fork=fork,
    )
    PARKED = ("adopt", "adopt_more", "trim", "shrink", "steal")
    CAPACITY = dict(steal=12 * BLOCKS)  # less than is free: it takes what is parked
    QUIET = ("adopt", "grow")  # no call of the driver

    def kept(name, looked):
        # What is taken from parked slots belongs to nobody before and after: when the rest fails,
        # it need not be mapped where it was.
        stats, rows, maps = looked
        if name in ("shrink", "steal"):
            taken = dict(parked=0, free=stats.parked + stats.free, blocks_parked=0, slots_parked=0)
            taken["blocks_free"] = stats.blocks_parked + stats.blocks_free
            stats = dataclasses.replace(stats, **taken)
        return stats, rows, maps

    def life(name, n, code, poison):
        # One pool, in which the n-th call that the operation makes answers this code. Returns
        # whether there was such a call, and whether the operation failed.
        operation = OPERATIONS[name]
        pool, rig = open_pool(CAPACITY.get(name, "4MiB"), poison=poison)
        slots = [rig.acquire(40), rig.acquire(33)]
        third = rig.acquire(140)
        rig.write({slots[0]: 35, slots[1]: 20, third: 130})
        pool.commit(slots[0], range(35))
        if name in PARKED:
            rig.release(third)
        pool.check(rig.cache)
        before, cache, faults = look(pool), rig.cache, fake.faults
        fake.fail_any(n, code)
        failed = None
        try:
            operation(rig, slots)
        except (kvp.KVPageError, RuntimeError) as error:
            failed = error
        fake.clear_faults()
        struck = fake.faults > faults
        assert struck or failed is None, failed
        if failed is not None:
            assert kept(name, look(pool)) == kept(name, before), (name, n, before, look(pool))
            assert rig.cache is cache
            assert "cu" in str(failed), failed
            if code == OUT_OF_MEMORY:
                assert isinstance(failed, kvp.OutOfBlocks), repr(failed)
                assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in str(failed), failed
            operation(rig, slots)  # nothing is in its way now
        verify(rig, slots)
        pool.close()
        return struck, failed is not None

    code, poison = int(sys.argv[2]), sys.argv[3] == "poison"
    for name in sys.argv[4:] or OPERATIONS:
        failures = 0
        for n in range(1, 500):
            struck, failed = life(name, n, code, poison)
            failures += failed
            gc.collect()
            if not struck:
                break
        else:
            raise SystemExit(f"{name} never ends")
        print(name, n, failures)
        assert (failures == 0) == (name in QUIET), (name, n, failures)
        nothing_alive()
    """
)


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_a_fault_at_every_call(layout: str) -> None:
    run_python(_SWEEP, layout, "999", "plain", env=_FAKE, timeout=600)


def test_out_of_memory_at_every_call() -> None:
    run_python(_SWEEP, "fused", "2", "plain", "acquire", "adopt_more", "extend_both", env=_FAKE)


def test_a_fault_while_memory_is_filled() -> None:
    run_python(_SWEEP, "fused", "999", "poison", "acquire", "extend", env=_FAKE)


_MAP_SLOTS = (
    _COMMON
    + """
    code = int(sys.argv[2])
    step = jax.jit(lambda cache, slots, tokens: kvp.map_slots(cache, slots, tokens))

    for n in range(1, 500):
        pool, rig = open_pool()
        slots = [rig.acquire(40), rig.acquire(33)]
        rig.write({slots[0]: 35, slots[1]: 20})
        pool.check(rig.cache)
        before, faults = look(pool), fake.faults
        fake.fail_any(n, code)
        wants = np.asarray([200, 100], np.int32)
        failed = None
        try:
            rig.cache, ok = step(rig.cache, jnp.asarray(slots, jnp.int32), wants)
            ok = np.asarray(ok)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            failed = error
            rig.cache = pool.cache()
        fake.clear_faults()
        struck = fake.faults > faults
        after = look(pool)
        if failed is not None:
            assert struck and "cu" in str(failed), failed
        elif not struck:
            assert ok.all()
        # A slot has what it asked for, or what it had.
        for row, old, want in zip(after[1], before[1], wants, strict=True):
            full = -(-int(want) // 32) * (1 if sys.argv[1] == "fused" else 4)
            assert row.num_blocks in (old.num_blocks, full), (n, row, old)
        rig.cache, ok = step(rig.cache, jnp.asarray(slots, jnp.int32), wants)
        assert np.asarray(ok).all()
        rig.write({slots[0]: 100})
        verify(rig, slots)
        pool.close()
        del pool, rig
        gc.collect()
        if not struck:
            break
    else:
        raise SystemExit("map_slots never ends")
    assert n > 5
    nothing_alive()
    """
)


@pytest.mark.parametrize("code", [2, 999])
def test_map_slots_under_faults(code: int) -> None:
    """map_slots in a program returns ok=False or an error, and never leaves a slot half mapped."""
    run_python(_MAP_SLOTS, "per_layer" if code == 2 else "fused", str(code), env=_FAKE)


_OPEN = (
    _COMMON
    + """
    failures = 0
    for n in range(1, 100):
        faults = fake.faults
        fake.fail_any(n, UNKNOWN)
        try:
            pool = kvp.KVPool(spec, "1MiB")
        except (kvp.KVPageError, ValueError) as error:
            assert "cu" in str(error), error
            failures += 1
            pool = None
        fake.clear_faults()
        if pool is not None:
            pool.close()
            pool = None
        gc.collect()
        nothing_alive()
        if fake.faults == faults:
            break
    assert failures > 5, failures
    """
)


def test_a_fault_while_a_pool_is_made() -> None:
    run_python(_OPEN, "fused", env=_FAKE)


_CARD = (
    _COMMON
    + """
    granule = 64 << 10
    fake.configure(granule, 20 * granule)
    # Blocks that do not fit the granularity, and a pool that is larger than the card.
    try:
        kvp.KVPool(dataclasses.replace(spec, block_tokens=16), "1MiB")
    except ValueError as error:
        assert "65536" in str(error), error
    else:
        raise SystemExit("blocks of half a granule")
    pool, rig = open_pool(64 * granule)
    assert pool.spec.block_bytes == granule
    slot = rig.acquire(256)
    rig.write({slot: 200})
    pool.check(rig.cache)
    before = look(pool)
    other = rig.acquire(256)
    try:
        rig.acquire(256)
    except kvp.OutOfBlocks as error:
        assert "cuMemCreate" in str(error) and "1310720" in str(error), error
        assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in str(error), error
    else:
        raise SystemExit("more than the card has")
    rig.release(other)
    pool.check(rig.cache)
    pool.trim()
    assert look(pool) == before
    verify(rig, [slot])
    pool.close()
    del rig, pool
    gc.collect()
    nothing_alive()
    """
)


def test_a_card_that_is_full() -> None:
    run_python(_CARD, "fused", env=_FAKE)
