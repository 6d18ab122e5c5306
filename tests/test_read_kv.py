"""read_kv returns what was written, according to the NumPy model of the cache, followed by
zeros.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Rig, make_batch

import jax_kvpage as kvp

_MAX = 96


def _rig(make_pool: Any, layout: str = "fused", dtype: Any = jnp.float32) -> Rig:
    spec = kvp.CacheSpec(2, 2, 32, 5, _MAX, dtype, layout)
    return Rig(make_pool(spec, poison=True))


def _want(rig: Rig, slots: list[int], layer: int) -> tuple[np.ndarray, np.ndarray]:
    dense = np.zeros((2, len(slots), _MAX, rig.spec.num_kv_heads, rig.spec.head_dim))
    for s, slot in enumerate(slots):
        if slot >= 0:
            for which, rows in enumerate(rig.model.context(slot, layer)):
                dense[which, s, : len(rows)] = rows
    return dense[0], dense[1]


@pytest.mark.covering(2)
@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("new", [False, True])
def test_equals_what_was_written(layout: str, dtype: Any, new: bool, make_pool) -> None:
    rig = _rig(make_pool, layout, dtype)
    slots = rig.acquire_scattered([_MAX, 40, 20])
    rig.write({slots[0]: _MAX - 4, slots[1]: 33})
    chosen: Any = [slots[1], -1, slots[2], slots[0]]
    asked: Any = chosen
    if new:
        sequences = [(slots[1], 7), (-1, 2), (slots[2], 0), (slots[0], 4)]
        rig.append(sequences)
        asked = make_batch(sequences)
    read = jax.jit(kvp.read_kv)
    for layer in range(2):
        got = read(rig.cache, asked, jnp.int32(layer))
        eager = kvp.read_kv(rig.cache, asked, layer)
        for one, two, want in zip(got, eager, _want(rig, chosen, layer), strict=True):
            assert one.shape == (4, _MAX, 2, 32)
            assert one.dtype == (jnp.float32 if rig.spec.quantized else dtype)
            np.testing.assert_array_equal(np.asarray(one, np.float32), np.float32(want))
            np.testing.assert_array_equal(one, two)


def test_attention_over_it_equals_the_op(make_pool) -> None:
    """In the same program as the append: the copies follow the write."""
    rig = _rig(make_pool)
    slots = [rig.acquire(40) for _ in range(3)]
    rig.write(dict(zip(slots, [5, 17, 30], strict=True)))
    batch = kvp.Batch.decode(slots)
    q, k = (jnp.asarray(rig.rng.standard_normal((3, 2, 32)), jnp.float32) for _ in range(2))

    @jax.jit
    def both(cache: kvp.KVCache) -> Any:
        cache = kvp.append_kv(cache, k, k, batch, layer=1)
        keys, values = kvp.read_kv(cache, batch, 1)
        lengths = cache.lengths[jnp.asarray(slots)] + 1
        dense = jax.nn.dot_product_attention(
            q[:, None], keys, values, key_value_seq_lengths=lengths
        )
        return dense[:, 0], kvp.paged_attention(q, cache, batch, layer=1)

    dense, paged = both(rig.cache)
    np.testing.assert_allclose(dense, paged, atol=2e-6)


def test_vmap_scan_and_one_slot(make_pool) -> None:
    rig = _rig(make_pool)
    slots = [rig.acquire(40) for _ in range(4)]
    rig.write(dict(zip(slots, [5, 17, 30, 1], strict=True)))
    pairs = jnp.asarray(slots).reshape(2, 2)
    k, v = jax.vmap(lambda s: kvp.read_kv(rig.cache, s, 0))(pairs)
    several = jax.tree.map(lambda x: x[None], rig.cache)
    with pytest.raises(ValueError, match=r"^vmap of read_kv:\n  - the cache is batched"):
        jax.vmap(lambda cache: kvp.read_kv(cache, pairs[0], 0))(several)
    want = kvp.read_kv(rig.cache, slots, 0)
    np.testing.assert_array_equal(k.reshape(want[0].shape), want[0])
    np.testing.assert_array_equal(v.reshape(want[1].shape), want[1])
    read = jax.jit(
        lambda c: jax.lax.scan(lambda _, n: (0, kvp.read_kv(c, slots[1], n)), 0, jnp.arange(2))
    )
    layers = read(rig.cache)[1]
    for layer in range(2):
        for got, right in zip(layers, _want(rig, [slots[1]], layer), strict=True):
            np.testing.assert_array_equal(got[layer], right)


def test_padded_batch(make_pool) -> None:
    rig = _rig(make_pool)
    slots = [rig.acquire(20) for _ in range(2)]
    rig.write(dict.fromkeys(slots, 3))
    k = jnp.asarray(rig.rng.standard_normal((2, 4, 2, 32)), jnp.float32)
    batch = kvp.Batch.padded(slots, [4, 1], 4)
    keys, _ = kvp.read_kv(kvp.append_kv(rig.cache, k, k, batch, layer=0), batch, 0)
    np.testing.assert_array_equal(keys[0, 3:7], k[0])
    np.testing.assert_array_equal(keys[1, 3], k[1, 3])
    assert not np.any(keys[1, 4:])


def test_refused(make_pool) -> None:
    rig = _rig(make_pool)
    with pytest.raises(
        ValueError, match=r"(?s)read_kv:.*layer: wanted 0 to 1.*batch\.slots: wanted"
    ):
        kvp.read_kv(rig.cache, [[0]], 2)
    with pytest.raises(ValueError, match=r"read_kv: slots: wanted an int32 array"):
        kvp.read_kv(rig.cache, {0}, 0)
    slot = rig.acquire(20)
    for asked, message in (
        ([slot + 1], "free"),
        ([slot, slot], "twice|slot"),
        (kvp.Batch.decode([slot]), "written"),
    ):
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
            jax.block_until_ready(kvp.read_kv(rig.cache, asked, 0))
