"""Programs of `test_processes.py`, which run in each of several processes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from churning import Churn
from jax.sharding import PartitionSpec as P
from mesh_rig import (
    HEAD_DIM,
    HEADS,
    Failing,
    check_equal,
    make_pool,
    make_spec,
    place,
    random,
    step,
    write,
    write_each,
)

import jax_kvpage as kvp
from jax_kvpage import _native

KV_HEADS = 4


def written(cache: kvp.KVCache, slot: int, tokens: int) -> np.ndarray:
    """Returns the ids encoded in a slot's keys, for each head of this process: [tokens, heads]."""
    k, v = kvp.read_kv(cache, [slot], 1)
    columns = []
    for key, value in zip(k.addressable_shards, v.addressable_shards, strict=True):
        np.testing.assert_array_equal(key.data, value.data)
        heads = np.arange(*key.index[2].indices(k.shape[2]), dtype=np.float32)
        columns.append(np.asarray(key.data)[0, :tokens, :, 0] - heads)
    return np.concatenate(columns, axis=1)


def check_written(cache: kvp.KVCache, slot: int, ids: Any) -> None:
    found = written(cache, slot, len(ids))
    assert found.shape[1] > 0
    np.testing.assert_array_equal(found, np.repeat([ids], found.shape[1], 0).T)


def attention() -> None:
    """The attention of each head of this process equals that of a pool on one device, bit for
    bit.
    """
    size, heads = len(jax.devices()), 8
    with make_pool(size, KV_HEADS) as pool:
        slots, cache = pool.acquire(pool.cache(), [64, 64])
        batches = [kvp.Batch.from_lengths(slots, [5, 40]), kvp.Batch.decode(slots)]
        results: list[Any] = [[], []]
        run = jax.jit(step)
        for batch in batches:
            tokens = int(batch.query_offsets[-1])
            shapes = ((tokens, n, HEAD_DIM) for n in (heads, KV_HEADS, KV_HEADS))
            operands = [random(tokens + i, *shape) for i, shape in enumerate(shapes)]
            outs, cache = run(cache, *(place(pool, x, HEADS) for x in operands), batch)
            results[0].append((operands, outs))
        assert [row.length for row in pool.slot_table(cache)] == [6, 41]
        pool.check(pool.release(cache, slots))
    with kvp.KVPool(make_spec(KV_HEADS), "8MiB") as alone:
        slots, cache = alone.acquire(alone.cache(), [64, 64])
        for batch, (operands, outs) in zip(batches, results[0], strict=True):
            wanted, cache = run(cache, *operands, batch)
            for a, b in zip(jax.tree.leaves(outs), jax.tree.leaves(wanted), strict=True):
                assert len(a.addressable_shards) == len(jax.local_devices())
                for shard in a.addressable_shards:
                    assert shard.data.shape[1] == heads // size
                    np.testing.assert_array_equal(shard.data, np.asarray(b)[shard.index])


def verbs() -> None:
    """Growth, forks, beams, truncation, dropping and prefixes."""
    with make_pool(len(jax.devices()), KV_HEADS, max_slots=6) as pool:
        slot, cache = pool.acquire(pool.cache(), 10)
        ids = list(range(100, 170))
        cache = write(pool, cache, slot, ids[:10])
        pool.extend(slot, 70)
        cache = write(pool, cache, slot, ids[10:])
        check_written(cache, slot, ids)
        (one, two), cache = pool.fork(cache, slot, 2, 40)
        assert pool.stats().blocks_shared == 1
        pool.extend([one, two], 50)
        cache = write(pool, cache, one, [7, 8])
        beams, cache = pool.reorder(cache, [one, two], [0, 0])
        for beam in beams:
            assert pool.committed(beam) == [*ids[:40], 7, 8]
            check_written(cache, beam, [*ids[:40], 7, 8])
        cache = pool.truncate(cache, slot, 20)
        cache = write(pool, cache, slot, [1, 2, 3])
        check_written(cache, slot, [*ids[:20], 1, 2, 3])
        check_written(cache, beams[1], [*ids[:40], 7, 8])
        cache = pool.drop_before(cache, beams[0], 33)
        cache = pool.release(cache, [slot, *beams])
        pool.check(cache)
        check_equal(pool)
        assert pool.stats().slots_occupied == pool.stats().slots_draining == 0

        text = np.arange(1, 101, dtype=np.int32)
        slot, found, cache = pool.acquire_prefix(cache, text)
        assert found == 0
        cache = write(pool, cache, slot, text.tolist())
        assert pool.find_prefix(text) == 99
        assert pool.pin(text[:64], max_share=0.9) == 64
        with pytest.raises(ValueError, match=r"ttl.*clocks differ"):
            pool.pin(text, ttl=3.0)
        other, found, cache = pool.acquire_prefix(cache, [*text[:80], 5, 6, 7])
        assert found == 80
        cache = write(pool, cache, other, [5, 6, 7])
        check_written(cache, other, [*text[:80], 5, 6, 7])
        cache = pool.release(cache, [slot, other])
        again, found, cache = pool.acquire_prefix(cache, [*text, 9])
        assert found == 100
        check_written(cache, again, text)
        pool.hint(text, "drop")
        pool.unpin(text[:64])
        cache = pool.release(cache, again)
        assert pool.evict() > 0
        assert pool.find_prefix(text) == 0
        assert pool.trim() >= 0
        stats = pool.stats()
        assert stats.capacity == stats.block_bytes * stats.blocks_total <= 8 * 2**20
        assert stats.block_bytes == 32 * pool.spec.token_bytes
        pool.resize(stats.capacity // 2)
        assert pool.stats().blocks_total == stats.blocks_total // 2
        # Processes may see different amounts of memory: the least counts.
        pool.resize(stats.capacity // (4 if jax.process_index() else 2))
        assert pool.stats().blocks_total == stats.blocks_total // 4
        pool.check(cache)


def churn(steps: int) -> None:
    """Processes never disagree, and tokens are kept."""
    with make_pool(len(jax.devices()), KV_HEADS, max_slots=8, capacity=2 * 2**20) as pool:
        requests = Churn(pool, 7, write=write_each, check=check_written, audit=check_equal)
        requests.run(steps)
        lengths = sorted((slot, len(ids)) for slot, ids in requests.live.items())
        print(lengths, pool.stats().blocks_mapped)
        requests.end_all()


def _facts(pool: kvp.KVPool) -> Any:
    return pool.slot_table(), [pool.committed(row.slot) for row in pool.slot_table()]


_BROKEN = _native.StatusError(_native.Code.INTERNAL, _native.Reason.NONE, "injected")
_NO_MEMORY = _native.StatusError(
    _native.Code.RESOURCE_EXHAUSTED, _native.Reason.OUT_OF_BLOCKS, "injected"
)


def failures() -> None:
    """A call that fails in one process takes effect in none, and all processes learn why."""
    calls = {
        "acquire": lambda pool, cache, a, b: pool.acquire(cache, [40, 8]),
        "extend": lambda pool, cache, a, b: pool.extend([a, b], [200, 90]),
        "fork": lambda pool, cache, a, b: pool.fork(cache, a, 2),
        "truncate": lambda pool, cache, a, b: pool.truncate(cache, a, 3),
        "drop_before": lambda pool, cache, a, b: pool.drop_before(cache, a, 33),
        "acquire_prefix": lambda pool, cache, a, b: pool.acquire_prefix(cache, range(9)),
        "resize": lambda pool, cache, a, b: pool.resize("4MiB"),
    }
    here = jax.process_index()
    with make_pool(len(jax.devices()), KV_HEADS, max_slots=6) as pool:
        (a, b), cache = pool.acquire(pool.cache(), [50, 60])
        cache = write(pool, cache, a, range(40))
        shards = pool._pool.shards
        before, total = _facts(pool), pool.stats().blocks_total
        for name, call in calls.items():
            for at in (0, 1):
                for error, wanted in (
                    (_NO_MEMORY, kvp.OutOfBlocks),
                    (_BROKEN, kvp.KVPageError),
                    (KeyboardInterrupt(), kvp.KVPageError),
                ):
                    last = shards[-1]
                    if here == at:
                        shards[-1] = Failing(last, name, error)
                        if isinstance(error, KeyboardInterrupt):
                            wanted = KeyboardInterrupt
                    match = "injected" if here == at else f"process {at}: |process {at} failed"
                    with pytest.raises(wanted, match=match if str(error) else None):
                        call(pool, cache, a, b)
                    shards[-1] = last
                    assert _facts(pool) == before, name
                    assert pool.stats().blocks_total == total
                    check_equal(pool)
        c, cache = pool.acquire(cache, 100)  # the same cache can still be used
        pool.extend(a, 100)
        cache = write(pool, cache, a, range(40, 60))
        check_written(cache, a, range(60))
        pool.check(pool.release(cache, [a, b, c]))


def out_of_blocks() -> None:
    """Too little memory in one process raises OutOfBlocks in all, and changes nothing."""
    with make_pool(len(jax.devices()), KV_HEADS, capacity=2**20) as pool:  # 16 blocks
        slot, cache = pool.acquire(pool.cache(), 250)
        with pytest.raises(kvp.OutOfBlocks) as raised:
            pool.acquire(cache, [200, 200])
        assert (raised.value.wanted, raised.value.free) == (14, 8)
        if jax.process_index() == 1:  # only a device of this process has less
            last = pool._pool.shards[-1]
            last.resize(last.numbers().block_bytes * 9)
        before = _facts(pool)
        with pytest.raises(kvp.OutOfBlocks) as raised:
            pool.acquire(cache, 200)
        assert (raised.value.wanted, raised.value.free) == (7, 1)
        with pytest.raises(kvp.OutOfBlocks):
            pool.acquire(cache, 200, wait=True)
        assert _facts(pool) == before
        cache = pool.release(cache, slot)
        slot, cache = pool.acquire(cache, 250, wait=True)
        pool.check(pool.release(cache, slot))


def failed_programs() -> None:
    """A program that fails in one process fails in all; lengths are then the minimum."""
    with make_pool(len(jax.devices()), KV_HEADS) as pool:
        slot, cache = pool.acquire(pool.cache(), 32)
        cache = write(pool, cache, slot, range(10))
        pool.check(cache)
        assert pool.sharding is not None
        if jax.process_index() == 1:  # a call on this device alone makes its shard stale
            own = jax.tree.map(lambda x: x.addressable_shards[0].data, cache)
            own = kvp.KVCache(own.handle, own.epoch, own.lengths, pool.sharding.local)
            jax.block_until_ready(kvp.set_lengths(own, [slot], 10))
        wanted = (
            "stale|epoch" if jax.process_index() == 1 else "check: process 1: .*(stale|generation)"
        )
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=wanted):
            pool.check(write(pool, cache, slot, [1], commit=False))
        cache = pool.cache()
        assert [row.length for row in pool.slot_table(cache)] == [10]
        assert pool.committed(slot) == list(range(10))
        cache = write(pool, cache, slot, [77])
        check_written(cache, slot, [*range(10), 77])
        pool.release(cache, slot)  # does not run before the new generation
        slot, cache = pool.acquire(pool.cache(), 32)
        cache = write(pool, cache, slot, range(10))
        pool.check(pool.release(cache, slot))


def a_sum_behind_an_op_that_fails() -> None:
    """An op that fails in one process only leaves no other process waiting in a collective."""
    with make_pool(len(jax.devices()), KV_HEADS) as pool:
        assert pool.sharding is not None

        def run(cache: kvp.KVCache, x: jax.Array, batch: kvp.Batch) -> Any:
            for layer in range(2):
                out, cache = kvp.update_and_attend(x, x, x, cache, batch, layer=layer)
                x = x + jax.lax.psum(out.sum((1, 2)), "tp")[:, None, None]
            return x, kvp.advance(cache, batch)

        split = pool.sharding.split
        specs = {"in_specs": (split, HEADS, P()), "out_specs": (HEADS, split)}
        sums = jax.jit(jax.shard_map(run, mesh=pool.sharding.mesh, **specs))
        slot, cache = pool.acquire(pool.cache(), 32)
        x = place(pool, random(3, 1, KV_HEADS, HEAD_DIM), HEADS)
        batch = kvp.Batch.decode([slot])
        _, cache = sums(cache, x, batch)
        pool.check(cache)
        here = jax.process_index() == 1
        if here:
            pool._pool.shards[-1].retract(slot, 0, 0)
        out, cache = sums(cache, x, batch)
        assert all(np.isnan(shard.data).all() for shard in out.addressable_shards)
        why = f"update_and_attend: slot {slot}: 2 tokens wanted, 0 mapped"
        wanted = why if here else f"check: process 1: DeviceFault: .*{why}"
        with pytest.raises(jax.errors.JaxRuntimeError, match=wanted):
            pool.check(cache)
        cache = pool.cache()
        if here:
            pool._pool.shards[-1].extend([slot], [32])
        assert [row.length for row in pool.slot_table(cache)] == [1]
        out, cache = sums(cache, x, batch)
        assert all(np.isfinite(shard.data).all() for shard in out.addressable_shards)
        pool.check(pool.release(cache, slot))


def refusals() -> None:
    """Unsupported uses are refused with a clear message in every process."""
    here = jax.process_index()
    size = len(jax.devices())
    with make_pool(size, KV_HEADS, capacity=None) as pool:
        slots, cache = pool.acquire(pool.cache(), [16, 16])
        grow: dict[str, Any] = {
            "map_slots": lambda c: kvp.map_slots(c, slots, 20)[0],
            "grow": lambda c: kvp.grow(c, kvp.Batch.decode(slots))[0],
        }
        for name, op in grow.items():
            for call in (op, jax.jit(op)):
                with pytest.raises(ValueError, match=f"{name}: .*several processes.*pool.extend"):
                    call(cache)
        pool.check(pool.release(cache, slots))
    pool.close()  # closing twice is allowed
    for closed in (pool.cache, lambda: pool.extend(0, 3), lambda: pool.acquire(cache, 3)):
        with pytest.raises(kvp.PoolClosed):
            closed()
    if here:
        other = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("tp",))
        with pytest.raises(ValueError, match="none of its devices belongs to this process"):
            kvp.KVPool(make_spec(KV_HEADS), "1MiB", mesh=other, axis="tp")
    everywhere = jax.sharding.Mesh(np.asarray(jax.devices()), ("dp",))
    many = "slots can be split .data_axis. over the devices of one process only(?s:.)*max_slots=5"
    with pytest.raises(ValueError, match=many):
        kvp.KVPool(make_spec(KV_HEADS, max_slots=5), "1MiB", mesh=everywhere, data_axis="dp")
    # In one process, less memory is available, allocation fails, or the arguments differ.
    for name, error in (
        ("process_queue.total_bytes", ValueError("injected")),
        ("pools.NativePool", kvp.OutOfBlocks("injected", wanted=1, free=0)),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if here:
                patch.setattr(f"jax_kvpage.sharding.{name}", _raising(error))
            wanted = type(error) if here else jax.errors.JaxRuntimeError
            with pytest.raises(wanted, match="injected" if here else "process 1: .*injected"):
                make_pool(size, KV_HEADS)
    with pytest.raises(kvp.KVPageError, match=r"different calls.*0: KVPool\('1MiB.*1: KVPool\('2M"):
        make_pool(size, KV_HEADS, capacity=f"{here + 1}MiB")


def _raising(error: Exception) -> Any:
    def fail(*args: Any) -> Any:
        raise error

    return fail
