"""drop_before over a long decode, as with Mistral's sliding window."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Rig, make_batch
from sharing_rig import pool_of, spec_of

import jax_kvpage as kvp

_BLOCK = 16


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn])
def test_a_long_decode_in_bounded_memory(make_pool, layout: str, dtype: object) -> None:
    """A sequence many times as long as its window, in the memory of the window, equals one that
    keeps everything, bit for bit.
    """
    window, length, every = 40, 400, 24
    spec = spec_of(layout, dtype, max_seq_len=length, max_slots=2)
    ranges = spec.resolve("cpu").slot_bytes // (spec.resolve("cpu").block_bytes * length // _BLOCK)

    def decode(blocks: int, *, drop: bool) -> list[bytes]:
        pool = pool_of(make_pool, spec, blocks * ranges, poison=True)
        rig = Rig(pool, group=2, max_tokens=30)
        slot = rig.acquire(30)
        outs, n = [], 0
        while n < length:
            new = min(30 if n == 0 else 8, length - n)
            pool.extend(slot, n + new)
            k, v = rig.random_kv(30)
            q = rig.random_q(30)
            out = _step(rig, (slot, new), q, k, v, window)
            outs.append(np.asarray(out)[:, :new].tobytes())
            n += new
            if drop and n // every > (n - new) // every:
                rig.cache = pool.drop_before(rig.cache, slot, n - window + 1)
        jax.block_until_ready(rig.cache)
        assert pool.stats().peak <= blocks * ranges * pool.spec.block_bytes
        return outs

    # The window, the tokens between two drops, and a block at either end.
    few = (window + every) // _BLOCK + 3
    assert decode(few, drop=True) == decode(length // _BLOCK, drop=False)


@jax.jit
def _program(
    cache: kvp.KVCache, q: jax.Array, k: jax.Array, v: jax.Array, batch: kvp.Batch, window: int
) -> tuple[jax.Array, kvp.KVCache]:
    outs = []
    for layer in range(q.shape[0]):
        out, cache = kvp.update_and_attend(
            q[layer], k[layer], v[layer], cache, batch, layer=layer, sliding_window=window
        )
        outs.append(out)
    return jnp.stack(outs), kvp.advance(cache, batch)


def _step(rig: Rig, sequence: tuple[int, int], q, k, v, window: int) -> jax.Array:
    dtype = jnp.float32 if rig.spec.quantized else rig.spec.dtype
    k, v = jnp.asarray(k, dtype), jnp.asarray(v, dtype)
    out, rig.cache = _program(rig.cache, q, k, v, make_batch([sequence]), jnp.int32(window))
    return out
