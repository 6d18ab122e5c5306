"""A program of `test_mesh_pool.py` that begins generations while steps run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from mesh_rig import make_mesh

import jax_kvpage as kvp


def generations_beside_steps(size: int, rounds: int) -> None:
    """`cache` and `close` while steps run whose devices sum: no device is left alone in a sum."""
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
