"""Meshes, pools and steps for the tests of pools over a mesh.

Imported in processes with several CPU devices (`EIGHT_DEVICES`), which tests start with
`run_python`; the test process itself has one device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_kvpage as kvp

EIGHT_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
HEAD_DIM = 32
HEADS = P(None, "tp", None)
COLLECTIVES = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")


def make_mesh(size: int, kind: str = "Auto") -> Mesh:
    types = (getattr(AxisType, kind),)
    return jax.make_mesh((size,), ("tp",), axis_types=types, devices=jax.devices()[:size])


def make_spec(kv_heads: int, **changes: Any) -> kvp.CacheSpec:
    arguments = {"max_slots": 4, "max_seq_len": 256, "dtype": jnp.float32, "block_tokens": 32}
    return kvp.CacheSpec(2, kv_heads, HEAD_DIM, **{**arguments, **changes})


def make_pool(
    size: int, kv_heads: int, *, kind: str = "Auto", capacity: Any = "8MiB", **changes: Any
) -> kvp.KVPool:
    mesh = make_mesh(size, kind)
    return kvp.KVPool(make_spec(kv_heads, **changes), capacity, mesh=mesh, axis="tp")


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def place(pool: kvp.KVPool, array: Any, spec: P) -> jax.Array:
    assert pool.sharding is not None
    return jax.device_put(array, NamedSharding(pool.sharding.mesh, spec))


def place_kv(pool: kvp.KVPool, array: Any) -> jax.Array:
    """Places keys or values as the model would: split, or on all devices."""
    assert pool.sharding is not None
    return place(pool, array, HEADS if pool.sharding.copies == 1 else P())


def step(cache: kvp.KVCache, q: Any, k: Any, v: Any, batch: kvp.Batch) -> tuple[Any, kvp.KVCache]:
    """Runs a step of a two-layer model; returns the attention outputs and the next cache."""
    outs = []
    for layer in range(2):
        out, lse, cache = kvp.update_and_attend(
            q + layer, k + layer, v, cache, batch, layer=layer, return_lse=True
        )
        outs.append((out, lse))
    return outs, kvp.advance(cache, batch)


def keys_of(cache: kvp.KVCache, ids: Sequence[int]) -> np.ndarray:
    """Returns keys (and values) that encode the id and the head: [tokens, heads, dim]."""
    heads = np.arange(cache.spec.num_kv_heads, dtype=np.float32)
    each = np.asarray(ids, np.float32)[:, None, None] + heads[None, :, None]
    return np.repeat(each, HEAD_DIM, axis=2)


def write(
    pool: kvp.KVPool, cache: kvp.KVCache, slot: int, ids: Sequence[int], *, commit: bool = True
) -> kvp.KVCache:
    """Writes a token for each id, with keys and values made from the id, and commits them."""
    batch = kvp.Batch.from_lengths([slot], [len(ids)])
    cache = append_in_layers(cache, keys_of(cache, ids), batch)
    if commit:
        pool.commit(slot, list(ids))
    return cache


def write_each(
    pool: kvp.KVPool, cache: kvp.KVCache, sequences: Mapping[int, Sequence[int]]
) -> kvp.KVCache:
    """Does the same for several slots, one after the other."""
    for slot, ids in sequences.items():
        cache = write(pool, cache, slot, ids)
    return cache


def check_written(cache: kvp.KVCache, slot: int, ids: Sequence[int]) -> None:
    """Asserts that a slot has the keys and values of these ids in every head."""
    found = written(cache, slot, len(ids))
    np.testing.assert_array_equal(found, np.repeat([ids], found.shape[1], 0).T)


@jax.jit
def append_in_layers(cache: kvp.KVCache, kv: jax.Array, batch: kvp.Batch) -> kvp.KVCache:
    for layer in range(2):
        cache = kvp.append_kv(cache, kv, kv, batch, layer=layer)
    return kvp.advance(cache, batch)


def written(cache: kvp.KVCache, slot: int, tokens: int) -> np.ndarray:
    """Returns the ids encoded in a slot's keys, per head: [tokens, heads]."""
    k, v = kvp.read_kv(cache, [slot], 1)
    np.testing.assert_array_equal(k, v)
    heads = np.arange(k.shape[2], dtype=np.float32)
    return np.asarray(k)[0, :tokens, :, 0] - heads


def check_equal(pool: kvp.KVPool) -> None:
    """Asserts that all shards have decided the same: slots, room, blocks."""
    shards = pool._pool.shards
    tables = []
    for shard in shards:
        rows = shard.rows()
        facts = [(r.slot, r.draining, r.blocks, r.reserved, r.committed) for r in rows]
        maps = [shard.block_map(r.slot) for r in rows if not r.draining]
        numbers = shard.numbers()
        free = numbers.blocks_free, numbers.blocks_parked, numbers.blocks_mapped
        tables.append((facts, maps, free))
    assert all(table == tables[0] for table in tables), tables


class Failing:
    """A shard with one failing call, which fails before or after the underlying pool has made
    it.
    """

    def __init__(self, shard: Any, name: str, error: BaseException) -> None:
        self._shard, self._name, self._error = shard, name, error
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        if name != self._name:
            return getattr(self._shard, name)

        def fail(*args: Any) -> Any:
            del args
            self.calls += 1
            raise self._error

        return fail
