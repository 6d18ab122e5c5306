"""Programs of `test_mesh_maps.py`, which run in a process with eight devices."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from churning import Churn
from jax.sharding import PartitionSpec as P
from mesh_rig import (
    COLLECTIVES,
    HEAD_DIM,
    HEADS,
    check_equal,
    check_written,
    keys_of,
    make_pool,
    make_spec,
    place,
    random,
    write,
    write_each,
    written,
)

import jax_kvpage as kvp

_STEPS = 40
_HEADS = 8


def _capacity(blocks: int) -> int:
    """Returns the bytes of a pool with this many blocks of 32 tokens."""
    return int(blocks * 32 * make_spec(_HEADS).resolve("cpu").token_bytes)


def _sleep(seed: Any, device: Any, count: Any) -> np.ndarray:
    rng = np.random.default_rng([int(seed), int(device), int(count)])
    if rng.integers(4) == 0:
        time.sleep(float(rng.uniform(0, 0.004)))
    return np.zeros((), np.float32)


def _late(q: jax.Array, seed: int, count: Any) -> jax.Array:
    """Returns q, delayed differently on each device. Called inside `jax.shard_map`."""
    device = jax.lax.axis_index("tp")
    zero = jax.ShapeDtypeStruct((), jnp.float32)
    return q + jax.pure_callback(functools.partial(_sleep, seed), zero, device, count)


def _loop(cache: kvp.KVCache, q: Any, k: Any, v: Any, slots: Any, late: Any) -> Any:
    """A decode loop over [steps, tokens, heads, dim] that maps its own memory."""

    def body(cache: kvp.KVCache, xs: Any) -> Any:
        count, q, k, v = xs
        batch = kvp.Batch.decode(slots)
        cache, ok = kvp.grow(cache, batch)
        batch = batch.mask(ok)
        q, outs = late(q, count), []
        for layer in range(2):
            out, cache = kvp.update_and_attend(q, k + layer, v, cache, batch, layer=layer)
            outs.append(out)
        return kvp.advance(cache, batch), (jnp.stack(outs), ok)

    counts = jnp.arange(_STEPS, dtype=jnp.int32)
    return jax.lax.scan(body, cache, (counts, q, k, v))


def _operands() -> list[np.ndarray]:
    return [random(i, _STEPS, 3, _HEADS, HEAD_DIM) for i in range(3)]


def _alone(blocks: int) -> Any:
    """Returns the loop's results on one device, and the lengths afterwards."""
    with kvp.KVPool(make_spec(_HEADS), _capacity(blocks)) as pool:
        slots, cache = pool.acquire(pool.cache(), [1, 1, 1])
        loop = jax.jit(functools.partial(_loop, late=lambda q, count: q))
        cache, (out, ok) = loop(cache, *_operands(), jnp.asarray(slots))
        return np.asarray(out), np.asarray(ok), [r.length for r in pool.slot_table(cache)]


def decode_loops(kind: str, size: int, blocks: int) -> None:
    """A loop that maps its own blocks gives the same as on one device, in any order of devices.

    4 blocks of 32 tokens for 3 sequences of 40 run out during the loop.
    """
    out, ok, lengths = _alone(blocks)
    assert ok.all() == (blocks > 4)
    assert len(set(map(tuple, ok.T))) == 2 or blocks > 4  # different for different sequences
    for manual in (False, True):
        with make_pool(size, _HEADS, kind=kind, capacity=_capacity(blocks)) as pool:
            assert pool.sharding is not None
            mesh = pool.sharding.mesh
            assert pool.stats().blocks_total == blocks
            slots, cache = pool.acquire(pool.cache(), [1, 1, 1])
            operands = [place(pool, x, P(None, *HEADS)) for x in _operands()]
            seed = size + manual
            if manual:
                loop = jax.shard_map(
                    lambda cache, q, k, v, slots, seed=seed: _loop(
                        cache, q, k, v, slots, lambda q, count: _late(q, seed, count)
                    ),
                    mesh=mesh,
                    in_specs=(P("tp"), *[P(None, *HEADS)] * 3, P()),
                    out_specs=(P("tp"), (P(None, None, *HEADS), P())),
                    check_vma=False,
                )
            else:
                late = jax.shard_map(
                    lambda q, count, seed=seed: _late(q, seed, count),
                    mesh=mesh,
                    in_specs=(HEADS, P()),
                    out_specs=HEADS,
                    check_vma=False,
                )
                loop = functools.partial(_loop, late=late)
            run = jax.jit(loop).lower(cache, *operands, jnp.asarray(slots)).compile()
            assert not COLLECTIVES.search(run.as_text())
            cache, (got, told) = run(cache, *operands, jnp.asarray(slots))
            np.testing.assert_array_equal(told, ok)
            np.testing.assert_array_equal(got, out)
            assert [r.length for r in pool.slot_table(cache)] == lengths
            numbers = pool._pool.maps.numbers()
            assert (numbers.decisions, numbers.pending) == (_STEPS, 0)
            assert numbers.fetched == _STEPS * (size - 1)
            check_equal(pool)
            pool.check(pool.release(cache, slots))


def eager_and_types(kind: str) -> None:
    """Calls without jit, and inside shard_map with JAX's varying-axes checks."""
    with make_pool(4, 8, kind=kind) as pool:
        assert pool.sharding is not None
        slots, cache = pool.acquire(pool.cache(), [16, 16])
        cache, ok = kvp.map_slots(cache, slots, [40, 300])  # 300 is beyond max_seq_len
        assert ok.tolist() == [True, False]
        cache, ok = kvp.map_slots(cache, slots[1], 64)
        cache, ok = kvp.grow(cache, kvp.Batch.from_lengths(slots, [60, 3]))
        assert ok.tolist() == [True, True]
        mapped = jax.shard_map(
            lambda cache, n: kvp.map_slots(cache, jnp.asarray(slots), n),
            mesh=pool.sharding.mesh, in_specs=(P("tp"), P()), out_specs=P("tp"))  # fmt: skip
        cache, ok = jax.jit(mapped)(cache, jnp.asarray([90, 70]))
        assert ok.tolist() == [True, True] * 4  # the result on each device
        assert [row.reserved for row in pool._pool.rows()] == [90, 70]
        check_equal(pool)
        # Devices that request different things.
        differing = jax.shard_map(
            lambda cache: kvp.map_slots(cache, slots, 100 + jax.lax.axis_index("tp"))[0],
            mesh=pool.sharding.mesh, in_specs=P("tp"), out_specs=P("tp"))  # fmt: skip
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="different blocks"):
            pool.check(jax.jit(differing)(cache))
        cache, ok = kvp.map_slots(pool.cache(), slots, 128)
        assert ok.tolist() == [True, True]
        pool.check(pool.release(cache, slots))


def one_device_short(size: int) -> None:
    """If one device has too little memory, no device maps anything."""
    with make_pool(size, 8, capacity=_capacity(8)) as pool:
        slot, cache = pool.acquire(pool.cache(), 32)
        short = pool._pool.shards[size - 1]
        short.resize(short.numbers().block_bytes * 2)
        before = pool.slot_table(cache)
        cache, ok = kvp.map_slots(cache, [slot], [65])
        assert not ok[0]
        assert pool.slot_table(cache) == before
        cache, ok = kvp.map_slots(cache, [slot], [64])
        assert ok[0]
        maps = [shard.block_map(slot) for shard in pool._pool.shards]
        assert all(one == maps[0] for one in maps)
        pool.check(pool.release(cache, slot))


def failed_programs() -> None:
    """A program that fails on one device makes no other device wait, and loses nothing."""
    with make_pool(2, 4) as pool:
        assert pool.sharding is not None
        slot, cache = pool.acquire(pool.cache(), 32)
        cache = write(pool, cache, slot, range(10))
        pool.check(cache)
        # A call on the second device alone makes its shard stale for the next step.
        own = jax.tree.map(lambda x: x.addressable_shards[1].data, cache)
        own = kvp.KVCache(own.handle, own.epoch, own.lengths, pool.sharding.local)
        jax.block_until_ready(kvp.set_lengths(own, [slot], 10))
        stale, _ = jax.jit(kvp.map_slots)(cache, jnp.asarray([slot]), jnp.asarray([100]))
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=r"stale|epoch"):
            pool.check(stale)
        assert pool._pool.maps.numbers().pending == 1  # from the first device
        check_equal(pool)
        cache = pool.cache()
        assert pool._pool.maps.numbers().pending == 0
        assert [row.length for row in pool.slot_table(cache)] == [10]
        cache, ok = kvp.map_slots(cache, [slot], [140])
        assert ok[0]
        cache = write(pool, cache, slot, range(10, 135))
        np.testing.assert_array_equal(written(cache, slot, 135)[:, 3], range(135))
        check_equal(pool)
        pool.check(pool.release(cache, slot))


@jax.jit
def _append(cache: kvp.KVCache, kv: jax.Array, batch: kvp.Batch) -> Any:
    cache, ok = kvp.grow(cache, batch)
    batch = batch.mask(ok)
    for layer in range(2):
        cache = kvp.append_kv(cache, kv, kv, batch, layer=layer)
    return kvp.advance(cache, batch), ok


class _Mapping(Churn):
    """Requests whose memory is mapped by programs."""

    verbs = ("start", "grow", "grow", "grow", "extend", "end", "fork")
    unit, room = 10, None
    told: list[bool]  # results of `grow` that the host has seen

    def grow(self, slot: int, ids: list[int]) -> None:
        if len(self.live[slot]) >= 200:
            return
        batch = kvp.Batch.from_lengths([slot], [len(ids)])
        self.cache, ok = _append(self.cache, keys_of(self.cache, ids), batch)
        self.told.append(bool(ok[0]))
        if self.told[-1]:
            self.pool.commit(slot, ids)
            self.live[slot] = self.live[slot] + ids

    def extend(self, slot: int, ids: list[int]) -> None:
        del ids
        self.pool.extend(slot, min(len(self.live[slot]) + 40, 256))


def churn(size: int, steps: int) -> None:
    """Programs map memory while the host acquires, extends, forks and releases: shards never
    disagree, and tokens are kept.
    """
    with make_pool(size, _HEADS, max_slots=6, capacity=_capacity(14)) as pool:
        requests = _Mapping(pool, size, write=write_each, check=check_written, audit=check_equal)
        requests.told = []
        requests.run(steps)
        requests.end_all()
        assert 0 < sum(requests.told) < len(requests.told)
        assert pool._pool.maps.numbers().pending == 0


@contextlib.contextmanager
def _fault(at: int, code: int) -> Iterator[None]:
    from jax_kvpage import _native

    fake: Any = _native.fake_driver
    before = fake.faults
    fake.fail_any(at, code)
    yield
    fake.clear_faults()
    assert fake.faults == before + 1


def driver_faults(size: int) -> None:
    """If the driver refuses on one device, no device maps anything, and all get the same answer."""
    with make_pool(size, _HEADS, block_tokens=32) as pool:
        slot, cache = pool.acquire(pool.cache(), 16)
        cache = write(pool, cache, slot, range(10))
        pool.check(cache)
        before = pool.slot_table(cache)
        for at in (1, 3, 3 * size - 2, 3 * size):  # create, map and set access on each device
            with _fault(at, 2):
                cache, ok = kvp.map_slots(cache, [slot], [64])
                told = [bool(shard.data[0]) for shard in ok.addressable_shards]
            assert told == [False] * size
            assert pool.slot_table(cache) == before
            check_equal(pool)
            with _fault(at, 999):
                failed, ok = jax.jit(kvp.map_slots)(cache, jnp.asarray([slot]), jnp.asarray([64]))
                assert [bool(shard.data[0]) for shard in ok.addressable_shards] == [False] * size
                with pytest.raises(kvp.DeviceFault, match="map_slots"):
                    pool.check(failed)
            cache = pool.cache()
            assert pool.slot_table(cache) == before
            check_equal(pool)
        pool.extend(slot, 40)
        check_equal(pool)
        cache, ok = kvp.map_slots(cache, [slot], [200])
        assert ok[0]
        cache = write(pool, cache, slot, range(10, 180))
        np.testing.assert_array_equal(written(cache, slot, 180)[:, 3], range(180))
        check_equal(pool)
        pool.check(pool.release(cache, slot))
