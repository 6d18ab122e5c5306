"""Failure tests of `test_replicas.py`, which run in a process with eight devices."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from mesh_rig import Failing, make_spec, written
from replica_rig import check_shards_equal, make_mesh, make_pool, rows_of, write

import jax_kvpage as kvp
from jax_kvpage import _native

_BROKEN = _native.StatusError(_native.Code.INTERNAL, _native.Reason.NONE, "injected")


def failures(replicas: int, parts: int) -> None:
    """A call that fails on one replica takes effect on none."""
    calls = {
        "acquire": lambda pool, cache, a, b: pool.acquire(cache, [40] * replicas),
        "extend": lambda pool, cache, a, b: pool.extend([a, b], [200, 90]),
        "commit": lambda pool, cache, a, b: pool.commit(b, [5, 6]),
        "fork": lambda pool, cache, a, b: pool.reorder(cache, [a, b], [0, 0, 1, 1]),
        "truncate": lambda pool, cache, a, b: pool.truncate(cache, [a, b], 3),
        "drop_before": lambda pool, cache, a, b: pool.drop_before(cache, [a, b], 33),
        "start_edits": lambda pool, cache, a, b: pool.release(cache, [a, b]),
        "acquire_prefix": lambda pool, cache, a, b: pool.acquire_prefix(
            cache, [range(i, 99) for i in range(replicas)]
        ),
        "resize": lambda pool, cache, a, b: pool.resize("4MiB"),
    }
    with make_pool(replicas, parts, max_slots=6 * replicas) as pool:
        slots, cache = pool.acquire(pool.cache(), [60] * replicas)
        a, b = slots[0], slots[-1]
        cache = write(pool, cache, {a: range(40), b: range(40)})
        inner = pool._pool.replicas
        before, total = rows_of(pool), pool.stats().blocks_total
        for name, call in calls.items():
            replica = inner[-1]
            for error in (_BROKEN, KeyboardInterrupt()):
                failing = inner[-1] = Failing(replica, name, error)
                wanted: Any = KeyboardInterrupt if error is not _BROKEN else kvp.KVPageError
                with pytest.raises(wanted) as raised:
                    call(pool, cache, a, b)
                inner[-1] = replica
                assert failing.calls == 1, name
                if error is _BROKEN:
                    first = 6 * (replicas - 1)
                    assert f"replica {replicas - 1}, whose slot 0 is slot {first}" in str(
                        raised.value
                    )
                assert rows_of(pool) == before, name
                assert pool.stats().blocks_total == total
                check_shards_equal(pool)
        # The same cache can still be used.
        c, cache = pool.acquire(cache, 100)
        pool.extend([a, b], 100)
        cache = write(pool, cache, {a: range(40, 60), b: range(70)[40:]})
        np.testing.assert_array_equal(written(cache, a, 60)[:, 1], range(60))
        np.testing.assert_array_equal(written(cache, b, 70)[:, 1], range(70))
        pool.check(pool.release(cache, [c, *slots]))


def broken_promises(replicas: int, parts: int) -> None:
    """If a replica has less room than it promised, its requests go elsewhere, and all are
    served.
    """

    class Promising:
        def __init__(self, replica: Any) -> None:
            self._replica = replica

        def can_acquire(self, num_tokens: list[int]) -> Any:
            return inner[0].can_acquire([1] * min(len(num_tokens), 1))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._replica, name)

    with make_pool(replicas, parts, max_slots=4 * replicas) as pool:
        inner = pool._pool.replicas
        taken, cache = pool.acquire(pool.cache(), [16] * (4 * replicas))
        # All slots of the last replica stay occupied; the others have less memory left.
        last = [slot for slot in taken if pool.replica_of(slot) == replicas - 1]
        cache = pool.release(cache, [slot for slot in taken if slot not in last])
        filler, cache = pool.acquire(cache, [250] * (replicas - 1))
        pool.check(cache)
        inner[-1] = Promising(inner[-1])
        for acquire in (
            lambda cache: pool.acquire(cache, [64] * replicas),
            lambda cache: pool.acquire_prefix(cache, [[i] * 64 for i in range(replicas)])[::2],
        ):
            slots, cache = acquire(cache)
            assert all(pool.replica_of(slot) < replicas - 1 for slot in slots)
            live = sorted(row.slot for row in pool.slot_table() if not row.draining)
            assert live == sorted([*last, *filler, *slots])
            cache = pool.release(cache, slots)
            pool.check(cache)
        pool.check(pool.release(cache, [*last, *filler]))


def failed_programs(replicas: int, parts: int) -> None:
    """After a program has failed on one device, the other replicas keep what they wrote."""
    with make_pool(replicas, parts) as pool:
        slots, cache = pool.acquire(pool.cache(), [32] * replicas)
        cache = write(pool, cache, {slot: range(10) for slot in slots})
        pool.check(cache)
        # A call on the last device alone makes its shard stale for the next step.
        assert pool.sharding is not None
        own = jax.tree.map(lambda x: x.addressable_shards[-1].data, cache)
        own = kvp.KVCache(own.handle, own.epoch, own.lengths, pool.sharding.local)
        jax.block_until_ready(kvp.set_lengths(own, [0], 10))
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=r"stale|epoch"):
            pool.check(write(pool, cache, {slot: [1] for slot in slots}, commit=False))
        cache = pool.cache()
        lengths = [row.length for row in pool.slot_table(cache)]
        assert lengths == [11] * (replicas - 1) + [10]
        check_shards_equal(pool)
        cache = write(pool, cache, {slots[-1]: [77], slots[0]: [78]}, commit=False)
        np.testing.assert_array_equal(written(cache, slots[-1], 11)[:, 3], [*range(10), 77])
        np.testing.assert_array_equal(written(cache, slots[0], 12)[:, 3], [*range(10), 1, 78])
        # Releases that did not run before a new generation.
        pool.release(cache, slots)
        slots, cache = pool.acquire(pool.cache(), [32] * 2 * replicas)
        pool.check(pool.release(cache, slots))


def _no_wait(kind: str) -> None:
    """With a head on several devices, absent parts are not gathered from a failed replica."""
    with make_pool(2, 4, 2, kind=kind) as pool:
        slots, cache = pool.acquire(pool.cache(), [32, 32])
        for parts in ([slots[0], 3], [slots[1], 1]):
            batch = kvp.spread(pool, parts, [0, 0]).batch
            with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="slot 1 is free"):
                jax.block_until_ready(kvp.read_kv(cache, batch, 0))
        keys, _ = kvp.read_kv(pool.cache(), kvp.spread(pool, slots, [0, 0]).batch, 0)
        assert keys.shape[2] == 2


def refusals() -> None:
    """Unsupported uses are refused with a clear message."""
    mesh, spec = make_mesh(2, 2), make_spec(4)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data_axis": "dp"}, "data_axis='dp': wanted a mesh too, got None"),
        ({"mesh": mesh}, "mesh and axis: wanted both .or mesh and data_axis"),
        ({"mesh": mesh, "data_axis": "x"}, "data_axis: the mesh has 'dp', 'tp', got 'x'"),
        ({"mesh": mesh, "axis": "dp", "data_axis": "dp"}, "wanted two axes of the mesh"),
        ({"mesh": mesh, "data_axis": "dp"}, r"axes \{'tp': 2\} are split too"),
    ]
    for arguments, wanted in cases:
        with pytest.raises(ValueError, match=wanted):
            kvp.KVPool(spec, "4MiB", **arguments)
    both = r"axis='tp' and data_axis='dp' and sequence_axis='tp': give one of them(?s:.)*device: "
    with pytest.raises(ValueError, match=both):
        kvp.KVPool(
            spec,
            "4MiB",
            jax.devices()[0],
            mesh=mesh,
            axis="tp",
            data_axis="dp",
            sequence_axis="tp",
        )
    with pytest.raises(ValueError, match=r"max_slots=5, those of all 2 replicas.*multiple of 2"):
        kvp.KVPool(make_spec(4, max_slots=5), "4MiB", mesh=mesh, axis="tp", data_axis="dp")
    with make_pool(2, 2) as pool:
        slots, cache = pool.acquire(pool.cache(), [32, 32])
        for call in (
            lambda: pool.extend(4, 10),
            lambda: pool.release(cache, [0, 4]),
            lambda: pool.commit(-1, 3),
            lambda: pool.fork(cache, 9, 1),
            lambda: pool.committed(4),
            lambda: pool.block_map(4),
            lambda: pool.replica_of(4),
            lambda: kvp.spread(pool, [0, 4]),
            lambda: kvp.set_lengths(cache, [4], 0),
            lambda: kvp.read_kv(cache, [-2], 0),
        ):
            with pytest.raises(ValueError, match=r"slots are 0\.\.3|slots of the pool, 0\.\.3"):
                call()
        with pytest.raises(kvp.KVPageError, match="replica 1, whose slot 0 is slot 2"):
            pool.release(cache, 3)
        # Does not wait for the failed replica.
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="slot 1 is free"):
            kvp.read_kv(cache, [slots[0], 3], 0)
        with pytest.raises(ValueError, match=r"read_kv: .*outside of jit, or inside"):
            jax.jit(kvp.read_kv, static_argnums=2)(cache, jax.numpy.asarray([0]), 0)
        cache = pool.cache()
        _no_wait("Auto")
        _no_wait("Explicit")
        for lengths, options, wanted in (
            ([1], {}, "2 slots, but 1 lengths"),
            ([1, -1], {}, "must not be negative"),
            ([3, 3], {"num_tokens": 2}, "replica 0 has 3: give 3"),
            ([3, 3], {"num_sequences": 0}, "replica 0 has 1"),
        ):
            with pytest.raises(ValueError, match=wanted):
                kvp.spread(pool, slots, lengths, **options)
        with pytest.raises(ValueError, match="each slot once"):
            kvp.spread(pool, [1, 1])
        with pytest.raises(ValueError, match="the batch has 2 new tokens"):
            kvp.spread(pool, slots).scatter([1, 2, 3])
        for refused in (
            lambda: pool.relocate(),
            lambda: pool.view(0),
            lambda: pool.export_blocks(slots[0]),
            lambda: pool.acquire(cache, 4, handover=True),
        ):
            with pytest.raises(
                ValueError, match=r"not supported yet on a pool over a mesh|each device of the"
            ):
                refused()
        pool.check(pool.release(cache, slots))
    with pytest.raises(kvp.PoolClosed):
        pool.cache()
    pool.close()
