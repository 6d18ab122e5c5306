"""Programs of `test_mesh_attention.py`, which run in a process with eight devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from mesh_rig import (
    COLLECTIVES,
    HEAD_DIM,
    HEADS,
    make_pool,
    make_spec,
    place,
    place_kv,
    random,
    step,
)

import jax_kvpage as kvp

_PROMPTS = [5, 40]


def _batches(slots: list[int]) -> list[kvp.Batch]:
    """Returns the batches of a prefill and a decode step."""
    return [kvp.Batch.from_lengths(slots, _PROMPTS), kvp.Batch.decode(slots)]


def _operands(heads: int, kv_heads: int, tokens: int) -> tuple[np.ndarray, ...]:
    shapes = ((tokens, n, HEAD_DIM) for n in (heads, kv_heads, kv_heads))
    return tuple(random(tokens + i, *shape) for i, shape in enumerate(shapes))


def plain_jit(kind: str) -> None:
    """The attention of each head equals that of a pool on one device, and nothing is gathered."""
    for size, kv_heads, heads in ((2, 4, 8), (4, 4, 8), (8, 8, 8), (4, 2, 8), (8, 1, 16)):
        with make_pool(size, kv_heads, kind=kind) as pool:
            slots, cache = pool.acquire(pool.cache(), [64, 64])
            copies = max(size // kv_heads, 1)
            local = make_spec(max(kv_heads // size, 1))
            got = []
            for batch in _batches(slots):
                tokens = int(batch.query_offsets[-1])
                q, k, v = _operands(heads, kv_heads, tokens)
                q, (k, v) = place(pool, q, HEADS), (place_kv(pool, x) for x in (k, v))
                run = jax.jit(step).lower(cache, q, k, v, batch).compile()
                assert not COLLECTIVES.search(run.as_text())
                outs, cache = run(cache, q, k, v, batch)
                for out, lse in outs:
                    assert out.addressable_shards[0].data.shape == (
                        tokens, heads // size, HEAD_DIM)  # fmt: skip
                    assert lse.addressable_shards[0].data.shape == (tokens, heads // size)
                got.append(jax.tree.map(np.asarray, outs))
            assert [row.length for row in pool.slot_table(cache)] == [6, 41]
            for i in range(size):
                own = slice(i * heads // size, (i + 1) * heads // size)
                first = i // copies * local.num_kv_heads
                kv = slice(first, first + local.num_kv_heads)
                wanted = _alone(local, heads, own, kv, kv_heads)
                for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
                    np.testing.assert_array_equal(a[:, own], b)
            if copies == 1:  # same head groups as on one device: comparable with the whole cache
                whole = _alone(make_spec(kv_heads), heads, slice(None), slice(None), kv_heads)
                for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(whole), strict=True):
                    np.testing.assert_array_equal(a, b)
            pool.check(pool.release(cache, slots))


def _alone(spec: kvp.CacheSpec, heads: int, own: slice, kv: slice, kv_heads: int) -> list[Any]:
    results = []
    with kvp.KVPool(spec, "8MiB") as pool:
        slots, cache = pool.acquire(pool.cache(), [64, 64])
        for batch in _batches(slots):
            q, k, v = _operands(heads, kv_heads, int(batch.query_offsets[-1]))
            outs, cache = jax.jit(step)(cache, q[:, own], k[:, kv], v[:, kv], batch)
            results.append(jax.tree.map(np.asarray, outs))
        pool.check(pool.release(cache, slots))
    return results


def in_shard_map(kind: str) -> None:
    """Ops in a step that the caller maps: results vary over the axis, which JAX checks."""
    size, kv_heads, heads = 4, 4, 8
    q, k, v = _operands(heads, kv_heads, 2)
    with make_pool(size, kv_heads, kind=kind) as pool:
        assert pool.sharding is not None
        slots, cache = pool.acquire(pool.cache(), [16, 16])
        batch = kvp.Batch.decode(slots)

        def scanned(cache: kvp.KVCache, q: Any, k: Any, v: Any, batch: kvp.Batch) -> Any:
            def layer(carry: Any, index: Any) -> Any:
                cache, q = carry
                out, cache = kvp.update_and_attend(q, k, v, cache, batch, layer=index)
                return (kvp.after(cache, out), q + out), kvp.positions(cache, batch)

            (cache, out), positions = jax.lax.scan(layer, (cache, q), jnp.arange(2))
            return out, positions, kvp.advance(cache, batch)

        in_specs = (P("tp"), HEADS, HEADS, HEADS, P())
        mesh = pool.sharding.mesh
        out_specs = (HEADS, P(None, "tp"), P("tp"))
        run = jax.jit(jax.shard_map(scanned, mesh=mesh, in_specs=in_specs, out_specs=out_specs))
        operands = [place(pool, x, HEADS) for x in (q, k, v)]
        text = run.lower(cache, *operands, batch).compile().as_text()
        assert not COLLECTIVES.search(text)
        wrong = jax.shard_map(scanned, mesh=mesh, in_specs=in_specs, out_specs=P())
        with pytest.raises(ValueError, match=r"varying|replicat|vary"):
            jax.jit(wrong)(cache, *operands, batch)
        results = [run(cache, *operands, batch)]
        # The same under plain jit, where the cache may be donated, and on a pool on one device.
        plain = jax.jit(_scanned, donate_argnums=0)
        results.append(plain(results[0][2], *operands, batch))
        assert [row.length for row in pool.slot_table(results[1][2])] == [2, 2]
    with kvp.KVPool(make_spec(kv_heads), "8MiB") as alone:
        slots, cache = alone.acquire(alone.cache(), [16, 16])
        for got in results:
            out, positions, cache = jax.jit(_unscanned)(cache, q, k, v, kvp.Batch.decode(slots))
            np.testing.assert_array_equal(got[0], out)
            np.testing.assert_array_equal(np.asarray(got[1]).reshape(-1)[:2], positions)


def _scanned(cache: kvp.KVCache, q: Any, k: Any, v: Any, batch: kvp.Batch) -> Any:
    def layer(carry: Any, index: Any) -> Any:
        cache, q = carry
        out, cache = kvp.update_and_attend(q, k, v, cache, batch, layer=index)
        return (cache, q + out), kvp.positions(cache, batch)

    (cache, out), positions = jax.lax.scan(layer, (cache, q), jnp.arange(2))
    return out, positions, kvp.advance(cache, batch)


def _unscanned(cache: kvp.KVCache, q: Any, k: Any, v: Any, batch: kvp.Batch) -> Any:
    positions = kvp.positions(cache, batch)
    for layer in range(2):
        out, cache = kvp.update_and_attend(q, k, v, cache, batch, layer=layer)
        q = q + out
    return q, positions, kvp.advance(cache, batch)


def options(kind: str) -> None:
    """Padded batches, per-head values, windows, quantized storage, reading back, rollback."""
    heads, kv_heads = 8, 4
    q, k, v = (x.reshape(2, 6, -1, HEAD_DIM) for x in _operands(heads, kv_heads, 12))
    sinks, slopes = random(1, heads), np.abs(random(2, heads))

    def attend(cache: kvp.KVCache, q: Any, k: Any, v: Any, batch: Any, window: Any) -> Any:
        cache = kvp.append_kv(cache, k, v, batch, layer=1)
        out, lse = kvp.paged_attention(
            q, cache, batch, layer=1, sinks=jnp.asarray(sinks), alibi_slopes=jnp.asarray(slopes),
            sliding_window=window, return_lse=True, logits_soft_cap=20.0)  # fmt: skip
        cache = kvp.append_kv(cache, k, v, batch, layer=0)
        return out, lse, kvp.positions(cache, batch), kvp.advance(cache, batch)

    results = []
    dtype = jnp.int8 if kind == "Auto" else jnp.float32
    spec = make_spec(kv_heads, dtype=dtype)
    for pool in (make_pool(4, kv_heads, kind=kind, dtype=dtype), kvp.KVPool(spec, "8MiB")):
        with pool:
            slots, cache = pool.acquire(pool.cache(), [16, 16])
            batch = kvp.Batch.padded(slots, [6, 3], 6)
            operands: list[Any] = [q, k, v]
            if pool.sharding is not None:
                operands = [place(pool, x, P(None, *HEADS)) for x in operands]
            *out, cache = jax.jit(attend)(cache, *operands, batch, jnp.int32(3))
            cache = kvp.set_lengths(cache, slots, [4, 0])  # eager
            out.extend(kvp.read_kv(cache, [slots[0]], 1))
            results.append([*map(np.asarray, out), [r.length for r in pool.slot_table(cache)]])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def refusals(kind: str) -> None:
    """Unsupported uses are refused when they are traced."""
    with make_pool(4, 4, kind=kind) as pool:
        assert pool.sharding is not None
        slots, cache = pool.acquire(pool.cache(), [16, 16])
        batch = kvp.Batch.decode(slots)
        with pytest.raises(ValueError, match=r"after: .*inside jax.shard_map"):
            kvp.after(cache, jnp.zeros(3))
        with pytest.raises(ValueError, match=r"read_views: .*paged_attention"):
            kvp.read_views(cache, lambda x: x, jnp.zeros(3))
        q, k = random(0, 2, 6, HEAD_DIM), random(1, 2, 2, HEAD_DIM)
        with pytest.raises(ValueError, match=r"q: .*4 devices.*\s.*k: wanted 4 key/value"):
            kvp.update_and_attend(q, k, k, cache, batch, layer=0)
        with pytest.raises(ValueError, match="sinks: 3 heads"):
            kvp.paged_attention(
                random(0, 2, 8, HEAD_DIM), cache, batch, layer=0, sinks=random(1, 3)
            )
        with pytest.raises(ValueError, match="layer: wanted 0 to 1"):
            kvp.append_kv(cache, random(0, 2, 4, HEAD_DIM), random(1, 2, 4, HEAD_DIM), batch,
                          layer=2)  # fmt: skip
        with pytest.raises(ValueError, match=r"no array|each device of the mesh has a part"):
            pool.view(0)
        pool.check(pool.release(cache, slots))
