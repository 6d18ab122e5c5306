"""Attention through a pool's block table compared with attention through its slots.

    python benchmarks/addressing.py [--quick] [--json]

Both read the same cache in turns, layer after layer. Times are medians over the turns, and the
ratio is the median of the turns' ratios. Blocks of 16 and of 128 tokens are scattered in memory.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from typing import Any

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import script

import jax_kvpage as kvp

__all__ = ["measure"]

_KV_HEADS, _HEADS, _DIM, _LAYERS = 8, 32, 128, 4
# (name, sequences, context, new tokens)
_CASES = [
    ("decode 1 x 8192", 1, 8192, 1),
    ("decode 8 x 2048", 8, 2048, 1),
    ("decode 64 x 256", 64, 256, 1),
    ("prefill 1 x 1024 behind 1024", 1, 1024, 1024),
]
_QUICK = [("decode 2 x 512", 2, 512, 1)]


@functools.partial(jax.jit, donate_argnums=0)
def _append(cache: kvp.KVCache, k: jax.Array, batch: kvp.Batch) -> kvp.KVCache:
    for layer in range(_LAYERS):
        cache = kvp.append_kv(cache, k, k, batch, layer=layer)
    return cache


_advance = jax.jit(kvp.advance, donate_argnums=0)


@functools.partial(jax.jit, static_argnames="addressing")
def _attend(q: jax.Array, cache: kvp.KVCache, batch: kvp.Batch, addressing: str) -> jax.Array:
    for layer in range(_LAYERS):
        q = kvp.paged_attention(q, cache, batch, layer=layer, addressing=addressing)
    return q


def _case(
    sequences: int, context: int, new: int, layout: str, dtype: str, block: int, seconds: float
) -> dict[str, Any]:
    length = context + new
    spec = kvp.CacheSpec(
        _LAYERS, _KV_HEADS, _DIM, sequences + 1, length,
        dtype=jnp.dtype(dtype), layout=layout, block_tokens=block,
    ).resolve("cpu")  # fmt: skip
    with kvp.KVPool(spec, spec.slot_bytes * (sequences + 1)) as pool:
        slots, cache = blocks.acquire(pool, [length] * sequences, scattered=True)
        rng = np.random.default_rng(0)
        for slot in slots:
            for begin in range(0, context, 512):
                count = min(512, context - begin)
                k = jnp.asarray(rng.standard_normal((count, _KV_HEADS, _DIM)), jnp.bfloat16)
                batch = kvp.Batch.from_lengths([slot], [count])
                cache = _advance(_append(cache, k, batch), batch)
        tokens = sequences * new
        batch = kvp.Batch.from_lengths(slots, [new] * sequences)
        k = jnp.asarray(rng.standard_normal((tokens, _KV_HEADS, _DIM)), jnp.bfloat16)
        cache = _append(cache, k, batch)
        q = jnp.asarray(rng.standard_normal((tokens, _HEADS, _DIM)), jnp.bfloat16)
        outs = [np.asarray(_attend(q, cache, batch, a)) for a in ("slots", "table")]  # warm, too
        assert outs[0].tobytes() == outs[1].tobytes()
        times: dict[str, list[float]] = {"slots": [], "table": []}
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(times["slots"]) < 5:
            for addressing, taken in times.items():
                begin_at = time.perf_counter()
                jax.block_until_ready(_attend(q, cache, batch, addressing))
                taken.append((time.perf_counter() - begin_at) / _LAYERS)
        ratios = [t / s for s, t in zip(times["slots"], times["table"], strict=True)]
        return {
            "slots, us a layer": 1e6 * statistics.median(times["slots"]),
            "table, us a layer": 1e6 * statistics.median(times["table"]),
            "table / slots": statistics.median(ratios),
        }


def measure(quick: bool = False) -> dict[str, Any]:
    """Measures the time per layer through slots and through the table.

    Args:
        quick: one small case, and a short time for each measurement.
    """
    rows = []
    for name, sequences, context, new in _QUICK if quick else _CASES:
        for layout in ("fused", "per_layer"):
            for dtype in ("bfloat16", "int8"):
                for block in (16, 128):
                    figures = _case(
                        sequences, context, new, layout, dtype, block, 0.2 if quick else 4.0
                    )
                    rows.append({"case": name, "layout": layout, "storage": dtype,
                                 "block_tokens": block, **figures})  # fmt: skip
    load = os.getloadavg()
    return {
        "tables": {"slots against table addressing": rows},
        "load": [round(x, 2) for x in load],
    }


if __name__ == "__main__":
    script.run(__doc__ or "", measure)
