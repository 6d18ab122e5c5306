"""Decode steps of two sequences over a small pool and their results in float64, for tests of JAX's
transformations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from harness import make_batch
from numpy.typing import NDArray
from reference_numpy import attend

import jax_kvpage as kvp

LAYERS, KV_HEADS, HEADS, DIM, STEPS = 3, 2, 4, 64, 5


def make_spec(layout: str) -> kvp.CacheSpec:
    return kvp.CacheSpec(LAYERS, KV_HEADS, DIM, 4, 256, dtype=jnp.float32, layout=layout)


def random_tokens(seed: int = 0, steps: int = STEPS) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k, v of two sequences for some steps: [steps, layers, 2, heads, dim]."""
    rng = np.random.default_rng(seed)

    def draw(heads: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((steps, LAYERS, 2, heads, DIM), np.float32))

    return draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)


def reference(q: jax.Array, k: jax.Array, v: jax.Array) -> NDArray[np.float64]:
    """Decodes both sequences from an empty cache, in float64."""
    want = np.zeros(q.shape)
    for layer in range(LAYERS):
        for s in range(2):
            want[:, layer, s] = attend(q[:, layer, s], k[:, layer, s], v[:, layer, s], 0)[0]
    return want


def start(pool: kvp.KVPool) -> tuple[kvp.KVCache, kvp.Batch]:
    slots, cache = pool.acquire(pool.cache(), [STEPS, STEPS])
    return cache, make_batch([(slot, 1) for slot in slots])


def unrolled(
    cache: kvp.KVCache, q: jax.Array, k: jax.Array, v: jax.Array, batch: kvp.Batch
) -> tuple[kvp.KVCache, jax.Array]:
    """Runs one step, layer by layer: q, k, v [layers, 2, heads, dim]."""
    outs = []
    for layer in range(LAYERS):
        out, cache = kvp.update_and_attend(q[layer], k[layer], v[layer], cache, batch, layer=layer)
        outs.append(out)
    return kvp.advance(cache, batch), jnp.stack(outs)


def scanned_layers(
    cache: kvp.KVCache, q: jax.Array, k: jax.Array, v: jax.Array, batch: kvp.Batch
) -> tuple[kvp.KVCache, jax.Array]:
    """The same step with a traced layer number."""

    def body(
        cache: kvp.KVCache, x: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    ) -> tuple[kvp.KVCache, jax.Array]:
        layer, q, k, v = x
        cache = kvp.append_kv(cache, k, v, batch, layer=layer)
        return cache, kvp.paged_attention(q, cache, batch, layer=layer)

    cache, outs = jax.lax.scan(body, cache, (jnp.arange(LAYERS), q, k, v))
    return kvp.advance(cache, batch), outs
