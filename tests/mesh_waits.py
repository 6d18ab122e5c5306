"""Programs of `test_mesh_pool.py`: what the host waits for on a pool over a mesh."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from mesh_rig import check_equal, check_written, make_mesh, make_pool, write

import jax_kvpage as kvp


def generations_beside_steps(size: int, rounds: int) -> None:
    """`cache` and `close` during steps with collectives leave no device alone in a collective."""
    layers, mesh = 8, make_mesh(size)
    spec = kvp.CacheSpec(layers, size, 16, max_slots=2, max_seq_len=64, dtype=jnp.float32)

    def step(cache: kvp.KVCache, x: jax.Array, batch: kvp.Batch) -> tuple[jax.Array, kvp.KVCache]:
        for layer in range(layers):
            q = jnp.broadcast_to(x[:, None, None], (*x.shape, 1, 16))
            out, cache = kvp.update_and_attend(q, q, q, cache, batch, layer=layer)
            x = jax.lax.psum(out.mean((1, 2)), "tp") / size
        return x, cache

    split, whole = PartitionSpec("tp"), PartitionSpec()
    specs = {"in_specs": (split, whole, whole), "out_specs": (whole, split)}
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
    batch = kvp.Batch.from_lengths([0], [4])
    pool = kvp.KVPool(spec, "1MiB", mesh=mesh, axis="tp")
    slot, cache = pool.acquire(pool.cache(), 4)
    assert slot == 0
    for _ in range(rounds):
        out, _ = mapped(cache, jnp.ones(4), batch)
        cache = pool.cache()
        np.testing.assert_allclose(np.asarray(out), np.ones(4), atol=1e-6)
    out, _ = mapped(cache, jnp.ones(4), batch)
    pool.close()
    np.testing.assert_allclose(np.asarray(out), np.ones(4), atol=1e-6)


def _wait_on_last(size: int, device: Any) -> np.ndarray:
    if int(device) == size - 1:
        time.sleep(0.3)
    return np.zeros((), np.uint32)


def releases_on_a_late_device(size: int) -> None:
    """A decision waits until every device has run the earlier releases, so that all decide alike
    and no cached block needs to be evicted.
    """
    mesh, ids = make_mesh(size), np.arange(1, 101, dtype=np.int32)
    zero = jax.ShapeDtypeStruct((), jnp.uint32)

    def late(epoch: jax.Array) -> jax.Array:
        wait = functools.partial(_wait_on_last, size)
        return epoch + jax.pure_callback(wait, zero, jax.lax.axis_index("tp"))

    split = PartitionSpec("tp")
    delayed = jax.jit(jax.shard_map(late, mesh=mesh, in_specs=split, out_specs=split))
    with make_pool(size, 4) as pool:
        (kept, slot), _, cache = pool.acquire_prefix(pool.cache(), [ids + 100, ids])
        cache = write(pool, cache, kept, (ids + 100).tolist())
        cache = write(pool, cache, slot, ids.tolist())
        cache = pool.release(cache, kept)
        pool.check(cache)
        cache = pool.release(dataclasses.replace(cache, epoch=delayed(cache.epoch)), slot)
        again, found, cache = pool.acquire_prefix(cache, [*ids, 7])
        assert (again, found) == (slot, 100)  # adopted, which a draining slot cannot be
        assert pool.find_prefix(ids + 100) == 99
        check_written(cache, again, ids.tolist())
        check_equal(pool)
