"""Programs of `test_mesh_pool.py`, which run in a process with eight devices."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from churning import Churn
from jax.sharding import Mesh
from mesh_rig import (
    Failing,
    check_equal,
    check_written,
    make_mesh,
    make_pool,
    make_spec,
    write,
    write_each,
    written,
)

import jax_kvpage as kvp
from jax_kvpage import _native
from jax_kvpage._cuda import Place


def verbs(size: int) -> None:
    """Growth, forks, beams, truncation, dropping and prefixes use equal blocks on all devices."""
    with make_pool(size, 4, max_slots=6) as pool:
        slot, cache = pool.acquire(pool.cache(), 10)
        ids = list(range(100, 170))
        cache = write(pool, cache, slot, ids[:10])
        pool.extend(slot, 70)
        cache = write(pool, cache, slot, ids[10:])
        check_equal(pool)
        np.testing.assert_array_equal(written(cache, slot, 70), np.repeat([ids], 4, 0).T)

        (one, two), cache = pool.fork(cache, slot, 2, 40)
        assert pool.stats().blocks_shared == 1
        pool.extend([one, two], 50)
        cache = write(pool, cache, one, [7, 8])
        np.testing.assert_array_equal(written(cache, one, 42)[:, 0], [*ids[:40], 7, 8])
        check_equal(pool)

        beams, cache = pool.reorder(cache, [one, two], [0, 0])
        for beam in beams:
            assert pool.committed(beam) == [*ids[:40], 7, 8]
            np.testing.assert_array_equal(written(cache, beam, 42)[:, 0], [*ids[:40], 7, 8])
        check_equal(pool)

        cache = pool.truncate(cache, slot, 20)
        cache = write(pool, cache, slot, [1, 2, 3])
        np.testing.assert_array_equal(written(cache, slot, 23)[:, 3], [*ids[:20], 1, 2, 3])
        np.testing.assert_array_equal(written(cache, beams[1], 42)[:, 3], [*ids[:40], 7, 8])
        pool.check(cache)
        check_equal(pool)

        cache = pool.drop_before(cache, beams[0], 33)
        pool.check(cache)
        assert [row.dropped_tokens for row in pool.slot_table() if row.slot == beams[0]] == [32]
        cache = pool.release(cache, [slot, *beams])
        pool.check(cache)
        check_equal(pool)
        assert pool.stats().slots_occupied == pool.stats().slots_draining == 0
        pool.trim()
        assert pool.stats().blocks_parked == 0
        check_equal(pool)


def prefixes(size: int) -> None:
    """Sequences are found by their tokens, adopted, shared and evicted."""
    ids = np.arange(1, 101, dtype=np.int32)
    with make_pool(size, 4) as pool:
        slot, found, cache = pool.acquire_prefix(pool.cache(), ids)
        assert found == 0
        cache = write(pool, cache, slot, ids.tolist())
        assert pool.find_prefix(ids) == 99
        assert pool.pin(ids[:64], max_share=0.9) == 64
        other, found, cache = pool.acquire_prefix(cache, [*ids[:80], 5, 6, 7])
        assert found == 80
        cache = write(pool, cache, other, [5, 6, 7])
        np.testing.assert_array_equal(written(cache, other, 83)[:, 1], [*ids[:80], 5, 6, 7])
        check_equal(pool)
        cache = pool.release(cache, [slot, other])
        # This waits until the release has run on every device.
        again, found, cache = pool.acquire_prefix(cache, [*ids, 9])
        assert found == 100
        np.testing.assert_array_equal(written(cache, again, 100)[:, 2], ids)
        pool.hint(ids, "drop")
        pool.unpin(ids[:64])
        pool.check(pool.release(cache, again))
        assert pool.evict() > 0
        assert pool.find_prefix(ids) == 0
        check_equal(pool)


def churn(size: int, steps: int) -> None:
    """Shards never disagree, and tokens are kept."""
    with make_pool(size, 4, max_slots=8, capacity=2 * 2**20) as pool:
        requests = Churn(pool, size, write=write_each, check=check_written, audit=check_equal)
        requests.run(steps)
        requests.end_all()


def memory() -> None:
    """Every device has the memory of its heads; stats cover all devices."""
    tokens = 64
    one = kvp.KVPool(make_spec(8), "8MiB")
    for size, kv_heads in ((2, 8), (4, 8), (8, 8), (8, 4)):
        with make_pool(size, kv_heads) as pool:
            slot, cache = pool.acquire(pool.cache(), tokens)
            cache = write(pool, cache, slot, range(tokens))
            pool.check(cache)
            stats = pool.stats()
            copies = max(size // kv_heads, 1)
            assert stats.mapped == tokens * pool.spec.token_bytes * copies
            assert stats.capacity == stats.block_bytes * stats.blocks_total <= 8 * 2**20
            for shard in pool._pool.shards:
                numbers = shard.numbers()
                heads = max(kv_heads // size, 1)
                own = tokens * pool.spec.token_bytes * heads // kv_heads
                assert numbers.blocks_mapped * numbers.block_bytes == own
                assert numbers.physical_bytes == own
            assert [row.bytes for row in pool.slot_table()] == [stats.mapped]
            assert pool.spec.num_kv_heads == cache.spec.num_kv_heads == kv_heads
            pool.resize(stats.capacity // 2)
            assert pool.stats().blocks_total == stats.blocks_total // 2
            check_equal(pool)
            pool.check(pool.release(cache, slot))
    one.close()
    with make_pool(4, 4, capacity=None, block_tokens=None) as pool:
        slots, cache = pool.acquire(pool.cache(), [256] * 4)  # the size of full slots
        pool.check(pool.release(cache, slots))
    with make_pool(4, 4, capacity="1%", layout="per_layer", block_tokens=None) as pool:
        slots, cache = pool.acquire(pool.cache(), [16] * 4)
        pool.check(pool.release(cache, slots))


_BROKEN = _native.StatusError(_native.Code.INTERNAL, _native.Reason.NONE, "injected")


def _facts(pool: kvp.KVPool) -> Any:
    return pool.slot_table(), [pool.committed(row.slot) for row in pool.slot_table()]


def failures(size: int) -> None:
    """A call that fails on one device takes effect on none."""
    calls = {
        "acquire": lambda pool, cache, a, b: pool.acquire(cache, [40, 8]),
        "extend": lambda pool, cache, a, b: pool.extend([a, b], [200, 90]),
        "commit": lambda pool, cache, a, b: pool.commit(a, [5, 6]),
        "fork": lambda pool, cache, a, b: pool.fork(cache, a, 2),
        "truncate": lambda pool, cache, a, b: pool.truncate(cache, a, 3),
        "drop_before": lambda pool, cache, a, b: pool.drop_before(cache, a, 33),
        "start_edits": lambda pool, cache, a, b: pool.release(cache, [a, b]),
        "acquire_prefix": lambda pool, cache, a, b: pool.acquire_prefix(cache, range(9)),
        "resize": lambda pool, cache, a, b: pool.resize("4MiB"),
    }
    with make_pool(size, 4, max_slots=6) as pool:
        (a, b), cache = pool.acquire(pool.cache(), [50, 60])
        cache = write(pool, cache, a, range(40))
        shards = pool._pool.shards
        before, total = _facts(pool), pool.stats().blocks_total
        for name, call in calls.items():
            for at in {1, size - 1}:
                shard = shards[at]
                for error in (_BROKEN, KeyboardInterrupt()):
                    failing = shards[at] = Failing(shard, name, error)
                    wanted = KeyboardInterrupt if error is not _BROKEN else kvp.KVPageError
                    with pytest.raises(wanted):
                        call(pool, cache, a, b)
                    shards[at] = shard
                    assert failing.calls == 1, name
                    assert _facts(pool) == before, name
                    assert pool.stats().blocks_total == total
                    check_equal(pool)
        # The same cache can still be used.
        c, cache = pool.acquire(cache, 100)
        pool.extend(a, 100)
        cache = write(pool, cache, a, range(40, 60))
        np.testing.assert_array_equal(written(cache, a, 60)[:, 1], range(60))
        check_equal(pool)
        pool.check(pool.release(cache, [a, b, c]))


def out_of_blocks() -> None:
    """Too little memory, on all devices or on one, raises OutOfBlocks and changes nothing."""
    with make_pool(4, 4, capacity=2**20) as pool:  # 16 blocks of 32 tokens
        assert pool.stats().blocks_total == 16
        slot, cache = pool.acquire(pool.cache(), 250)
        with pytest.raises(kvp.OutOfBlocks) as raised:
            pool.acquire(cache, [200, 200])
        assert (raised.value.wanted, raised.value.free) == (14, 8)
        last = pool._pool.shards[3]
        last.resize(last.numbers().block_bytes * 9)  # only this device has less
        assert not pool.can_acquire(200)
        before = _facts(pool)
        with pytest.raises(kvp.OutOfBlocks):
            pool.acquire(cache, 200)
        assert _facts(pool) == before
        cache = pool.release(cache, slot)
        slot, cache = pool.acquire(cache, 250, wait=True)
        pool.check(pool.release(cache, slot))


def failed_programs() -> None:
    """After a failed program, lengths are the minimum over the shards."""
    with make_pool(2, 4) as pool:
        slot, cache = pool.acquire(pool.cache(), 32)
        cache = write(pool, cache, slot, range(10))
        pool.check(cache)
        # A call on the second device alone makes its shard stale for the next step.
        assert pool.sharding is not None
        own = jax.tree.map(lambda x: x.addressable_shards[1].data, cache)
        own = kvp.KVCache(own.handle, own.epoch, own.lengths, pool.sharding.local)
        jax.block_until_ready(kvp.set_lengths(own, [slot], 10))
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=r"stale|epoch"):
            pool.check(write(pool, cache, slot, [1], commit=False))
        cache = pool.cache()
        assert [row.length for row in pool.slot_table(cache)] == [10]
        assert pool.committed(slot) == list(range(10))
        cache = write(pool, cache, slot, [77])
        np.testing.assert_array_equal(written(cache, slot, 11)[:, 3], [*range(10), 77])
        check_equal(pool)
        # Releases that did not run before a new generation.
        pool.release(cache, slot)
        slot, cache = pool.acquire(pool.cache(), 32)
        cache = write(pool, cache, slot, range(10))
        pool.check(pool.release(cache, slot))


def refusals() -> None:
    """Unsupported uses are refused with a clear message."""
    mesh, spec = make_mesh(4), make_spec(4)
    wide = jax.make_mesh((2, 2), ("dp", "tp"), devices=jax.devices()[:4])
    arguments: dict[str, Any]
    for arguments, wanted in (
        ({"mesh": mesh}, "mesh and axis: wanted both"),
        ({"axis": "tp"}, "mesh and axis: wanted both"),
        ({"mesh": mesh, "axis": "dp"}, "axis: the mesh has 'tp', got 'dp'"),
        ({"mesh": "tp=4", "axis": "tp"}, "mesh: wanted a jax.sharding.Mesh"),
        ({"mesh": wide, "axis": "tp"}, "spread over one axis"),
        (
            {"mesh": mesh, "axis": "tp", "device": jax.devices()[0]},
            "device: cannot be combined with mesh",
        ),
    ):
        with pytest.raises(ValueError, match=wanted):
            kvp.KVPool(spec, "4MiB", **arguments)
    with pytest.raises(ValueError, match="num_kv_heads=6 cannot be split over 4 devices"):
        kvp.KVPool(make_spec(6), "4MiB", mesh=mesh, axis="tp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax_kvpage.sharding.devices.place_of", lambda device: Place("cuda", "cuda"))
        for name in ("sequence_axis", "data_axis"):
            axes: dict[str, Any] = {name: "tp"}
            with pytest.raises(ValueError, match=rf"{name}: on CPU devices only .*one KVPool on"):
                kvp.KVPool(spec, "4MiB", mesh=mesh, **axes)
        patch.setattr(
            "jax_kvpage.sharding.devices.place_of",
            lambda device: Place("cuda", "cuda") if device.id else Place("cpu", "cpu"),
        )
        with pytest.raises(ValueError, match=r"is a GPU and .* is not: wanted devices of one"):
            kvp.KVPool(spec, "4MiB", mesh=mesh, axis="tp")
    one = jax.make_mesh((1, 2, 1), ("a", "tp", "b"), devices=jax.devices()[:2])
    with kvp.KVPool(spec, "4MiB", mesh=one, axis="tp") as pool:  # axes of size one are fine
        slot, cache = pool.acquire(pool.cache(), 16)
        cache = write(pool, cache, slot, [1, 2])
        np.testing.assert_array_equal(written(cache, slot, 2)[:, 3], [1, 2])
        with kvp.KVPool(spec, "4MiB") as alone:
            with pytest.raises(ValueError, match=r"another spec|not that of a pool over this mesh"):
                pool.acquire(alone.cache(), 16)
            with pytest.raises(ValueError, match=r"lies on|wanted int32"):
                alone.acquire(cache, 16)
        spread = jax.tree.map(lambda x: jax.device_put(np.asarray(x), _everywhere(one)), cache)
        with pytest.raises(ValueError, match="wanted one part per device"):
            pool.acquire(spread, 16)
        for call in (pool.save_prefixes, pool.load_prefixes):
            with pytest.raises(ValueError, match="a pool over a mesh keeps no prefixes in a store"):
                call("/nowhere")
        for refused in (
            lambda: pool.relocate(),
            lambda: pool.prefetch([1, 2]),
            lambda: pool.stored_prefix([1, 2]),
            lambda: pool.spill_stats(),
            lambda: pool.reuse_segment(cache, slot, slot, 0, 1, inv_freq=[0.0]),
        ):
            with pytest.raises(ValueError, match="not supported yet on a pool over a mesh"):
                refused()
        with pytest.raises(ValueError, match=r"has no store: make it with KVPool\(store=...\)"):
            pool.swap_out(cache, slot)
        pool.check(pool.release(cache, slot))
    with pytest.raises(kvp.PoolClosed):
        pool.cache()
    pool.close()


def _everywhere(mesh: Mesh) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def disagreement() -> None:
    """Shards that would decide differently are brought into agreement, or the call says so."""
    with make_pool(4, 4, max_slots=6) as pool:
        slots, cache = pool.acquire(pool.cache(), [32, 64])
        cache = pool.release(cache, slots)
        pool.check(cache)
        pool._pool.shards[2].trim()  # else the others adopt the second slot, this shard the first
        slot, cache = pool.acquire(cache, 64)
        check_equal(pool)
        slots, cache = pool.acquire(cache, [16, 64])
        check_equal(pool)
        cache = write(pool, cache, slots[1], [4])
        pool.check(cache)
        pool._pool.shards[1].acquire(_native.Decision(), [16])  # a request that no other shard has
        before = pool.stats().blocks_mapped
        with pytest.raises(kvp.KVPageError, match="would decide differently"):
            pool.acquire(cache, 16)
        assert pool.stats().blocks_mapped == before
        pool.check(pool.release(cache, [slot, *slots]))
