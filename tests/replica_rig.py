"""Pools whose slots are split over a mesh axis, and steps on them, for tests.

Imported in processes with several CPU devices (`mesh_rig.EIGHT_DEVICES`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_rig import append_in_layers, keys_of, make_spec

import jax_kvpage as kvp

# (replicas, devices per replica)
SHAPES = ((2, 1), (2, 2), (4, 1), (4, 2), (2, 4), (8, 1))


def make_mesh(replicas: int, parts: int, kind: str = "Auto") -> Mesh:
    types = (getattr(AxisType, kind),) * 2
    devices = jax.devices()[: replicas * parts]
    return jax.make_mesh((replicas, parts), ("dp", "tp"), axis_types=types, devices=devices)


def make_pool(
    replicas: int,
    parts: int,
    kv_heads: int = 4,
    *,
    kind: str = "Auto",
    capacity: Any = None,
    **changes: Any,
) -> kvp.KVPool:
    """Makes a pool, by default with two slots and 64 blocks of 32 tokens per replica."""
    changes = {"max_slots": 2 * replicas} | changes
    spec = make_spec(kv_heads, **changes)
    size = replicas * 64 * 32 * spec.token_bytes * max(parts // kv_heads, 1)
    axis = "tp" if parts > 1 else None
    return kvp.KVPool(
        spec, capacity or size, mesh=make_mesh(replicas, parts, kind), axis=axis, data_axis="dp"
    )


def place(pool: kvp.KVPool, array: Any, spec: P) -> jax.Array:
    assert pool.sharding is not None
    return jax.device_put(array, NamedSharding(pool.sharding.mesh, spec))


def heads(pool: kvp.KVPool, *, kv: bool = False) -> P:
    """Returns the sharding of q (or of k and v): [rows, heads, dim]."""
    assert pool.sharding is not None
    axis = None if kv and pool.sharding.copies > 1 else pool.sharding.axis
    return P("dp", axis, None)


def write(
    pool: kvp.KVPool,
    cache: kvp.KVCache,
    sequences: dict[int, Sequence[int]],
    *,
    commit: bool = True,
) -> kvp.KVCache:
    """Writes and commits a token for each id of each slot, with keys and values made from the
    id.
    """
    made = kvp.spread(pool, list(sequences), [len(ids) for ids in sequences.values()])
    ids = [float(one) for each in sequences.values() for one in each]
    rows = np.asarray(made.scatter(np.asarray(ids, np.float32)))
    cache = append_in_layers(cache, keys_of(cache, rows), made.batch)
    if commit:
        for slot, own in sequences.items():
            pool.commit(slot, list(own))
    return cache


def rows_of(pool: kvp.KVPool) -> list[Any]:
    """Returns the host's records of its slots, and last the number of blocks that they use."""
    stats = pool.stats()
    rows = [row for row in pool.slot_table() if not row.draining]
    facts = [(row.slot, row.reserved_tokens, pool.committed(row.slot)) for row in rows]
    return [*facts, stats.blocks_mapped - stats.blocks_spare]


def check_shards_equal(pool: kvp.KVPool) -> None:
    """Asserts that the devices of each replica have decided the same: slots, room, blocks."""
    for replica in pool._pool.replicas:
        tables = []
        for shard in getattr(replica, "shards", [replica]):
            rows = shard.rows()
            facts = [(r.slot, r.draining, r.blocks, r.reserved, r.committed) for r in rows]
            maps = [shard.block_map(r.slot) for r in rows if not r.draining]
            tables.append((facts, maps, shard.numbers().blocks_free))
        assert all(table == tables[0] for table in tables), tables
