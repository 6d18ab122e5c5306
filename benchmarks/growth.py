"""How costs grow: of a decoded token with the context, and of an append with the size of the pool.

    python benchmarks/growth.py [--quick] [--json]

A decoded token should cost a constant plus the bytes of its context, without a jump where a new
block begins. An append should cost the same in a small pool and in a large one, and so should
growing into parked blocks, a refusal, and acquiring a slot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import script

import jax_kvpage as kvp

__all__ = ["measure"]

# Enough layers for the shortest context (100 MB) to be far larger than the caches.
_LAYERS, _KV_HEADS, _HEADS, _DIM = 24, 8, 32, 128
_CONTEXTS = (512, 1024, 2048, 3072, 4096, 6144, 8192)
_WALK_BATCH = 4


@functools.partial(jax.jit, donate_argnums=0)
def _fill(cache: kvp.KVCache, k: jax.Array, batch: kvp.Batch) -> kvp.KVCache:
    for layer in range(_LAYERS):
        cache = kvp.append_kv(cache, k, k, batch, layer=layer)
    return kvp.advance(cache, batch)


def _decode(cache: kvp.KVCache, q: jax.Array, k: jax.Array, batch: kvp.Batch) -> Any:
    cache, _ = kvp.map_slots(cache, batch.slots, cache.lengths[batch.slots] + 1)
    for layer in range(_LAYERS):
        q, cache = kvp.update_and_attend(q, k, k, cache, batch, layer=layer)
    return q, kvp.advance(cache, batch)


_repeat = jax.jit(_decode)
_step = jax.jit(_decode, donate_argnums=0)


def _tokens(batch: int) -> tuple[jax.Array, jax.Array]:
    return jnp.ones((batch, _HEADS, _DIM)), jnp.ones((batch, _KV_HEADS, _DIM))


def _contexts(rounds: int) -> list[dict[str, Any]]:
    """One sequence at growing contexts; each step is repeated."""
    spec = kvp.CacheSpec(_LAYERS, _KV_HEADS, _DIM, 1, max(_CONTEXTS) + 64, dtype=jnp.float32)
    q, k = _tokens(1)
    rows, previous = [], 0
    capacity = (max(_CONTEXTS) + 256) * spec.token_bytes
    with kvp.KVPool(spec, capacity, on_stale="allow") as pool:
        slot, cache = pool.acquire(pool.cache(), max(_CONTEXTS) + 1)
        batch = kvp.Batch.decode([slot])
        for context in _CONTEXTS:
            new = jnp.ones((context - previous, _KV_HEADS, _DIM))
            cache = _fill(cache, new, kvp.Batch.from_lengths([slot], [context - previous]))
            previous = context
            times = []
            for _ in range(rounds + 1):
                begin = time.perf_counter()
                jax.block_until_ready(_repeat(cache, q, k, batch))
                times.append(time.perf_counter() - begin)
            rows.append({"context": context, "us a token": statistics.median(times[1:]) * 1e6})
    slope, constant = np.polyfit(
        [r["context"] for r in rows], [r["us a token"] for r in rows], 1
    ).tolist()
    for row in rows:
        row["straight line"] = slope * row["context"] + constant
        row["off by"] = row["us a token"] / row["straight line"] - 1
    return rows


def _walk(steps: int) -> Iterator[tuple[int, float]]:
    """Yields (position in the block, seconds) for each step of a few growing sequences."""
    start = 1024
    spec = kvp.CacheSpec(_LAYERS, _KV_HEADS, _DIM, 8, 4096, dtype=jnp.float32).resolve("cpu")
    block = spec.block_tokens or 1
    blocks = _WALK_BATCH * (-(-start // block) + -(-(steps + block) // block))
    q, k = _tokens(_WALK_BATCH)
    with kvp.KVPool(spec, blocks * spec.block_bytes) as pool:
        # Other sequences end first, and these grow into their parked blocks, as in a server that
        # has been running for a while. No memory is allocated from the system.
        others, cache = pool.acquire(pool.cache(), [steps + block] * _WALK_BATCH)
        slots, cache = pool.acquire(cache, [start] * _WALK_BATCH)
        cache = pool.release(cache, others)
        jax.block_until_ready(cache)
        new = jnp.ones((start, _KV_HEADS, _DIM))
        for slot in slots:
            cache = _fill(cache, new, kvp.Batch.from_lengths([slot], [start]))
        batch = kvp.Batch.decode(slots)
        for i in range(steps):
            begin = time.perf_counter()
            out, cache = _step(cache, q, k, batch)
            jax.block_until_ready(out)
            if i:  # the first compiles
                yield (start + i) % block, time.perf_counter() - begin


def _boundaries(steps: int) -> list[dict[str, Any]]:
    inside: list[float] = []
    first: list[float] = []
    for position, seconds in _walk(steps):
        (inside if position else first).append(seconds)
    ratio = statistics.median(first) / statistics.median(inside)
    return [
        {
            "us a step inside blocks": statistics.median(inside) * 1e6,
            "us a step that maps blocks": statistics.median(first) * 1e6,
            "ratio": ratio,
            "steps": len(inside) + len(first),
        }
    ]


@dataclasses.dataclass
class _Pool:
    pool: kvp.KVPool
    call: Any
    times: list[float]


@jax.jit
def _append(cache: kvp.KVCache, k: jax.Array, batch: kvp.Batch) -> kvp.KVCache:
    for _ in range(4):
        for layer in range(_LAYERS):
            cache = kvp.append_kv(cache, k, k, batch, layer=layer)
    return cache


def _pools(rounds: int) -> list[dict[str, Any]]:
    """The same append in pools of different size."""
    pools = []
    for slots, capacity in ((8, 2**27), (64, 2**29), (512, 2**31)):
        spec = kvp.CacheSpec(_LAYERS, _KV_HEADS, _DIM, slots, 8192, dtype=jnp.float32)
        pool = kvp.KVPool(spec, capacity, on_stale="allow")
        mine, cache = pool.acquire(pool.cache(), [64] * 8)
        arguments = (cache, _tokens(8)[1], kvp.Batch.decode(mine))
        call = functools.partial(_append, *arguments)
        jax.block_until_ready(call())
        pools.append(_Pool(pool, call, []))
    for _ in range(rounds):
        for entry in pools:
            begin = time.perf_counter()
            jax.block_until_ready(entry.call())
            entry.times.append((time.perf_counter() - begin) / (4 * _LAYERS))
    rows = []
    for entry in pools:
        stats = entry.pool.stats()
        rows.append(
            {
                "capacity MiB": stats.capacity / 2**20,
                "virtual GiB": stats.reserved_virtual / 2**30,
                "slots": entry.pool.spec.max_slots,
                "us an append of 8 tokens": statistics.median(entry.times) * 1e6,
            }
        )
        entry.pool.close()
    for row in rows:
        row["against the smallest"] = (
            row["us an append of 8 tokens"] / rows[0]["us an append of 8 tokens"]
        )
    return rows


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    with contextlib.suppress(kvp.OutOfBlocks):
        call()
    return time.perf_counter() - begin


def _pressure(rounds: int) -> list[dict[str, Any]]:
    """Host calls in pools with more and more slots; no block is free, most are parked."""
    rows = []
    for slots in (1024, 8192, 65536):
        spec = kvp.CacheSpec(1, 1, 64, slots, 1024, dtype=jnp.float32, block_tokens=16)
        spec = spec.resolve("cpu")
        with kvp.KVPool(spec, 1024 * spec.block_bytes) as pool:
            mine, cache = pool.acquire(pool.cache(), [16] * 1024)
            cache = pool.release(cache, mine[rounds:])
            jax.block_until_ready(cache)
            grows = [_seconds(functools.partial(pool.extend, slot, 32)) for slot in mine[:rounds]]
            # More blocks than there are: nothing is mapped.
            refused = functools.partial(pool.extend, mine[:32], [1024] * 32)
            refusals = [_seconds(refused) for _ in range(rounds)]
        with kvp.KVPool(spec, 1024 * spec.block_bytes) as pool:
            cache = pool.cache()
            acquire = _seconds(functools.partial(pool.acquire, cache, [0] * slots))
        rows.append(
            {
                "slots": slots,
                "us a slot that grows": statistics.median(grows) * 1e6,
                "us a refusal of 32 slots": statistics.median(refusals) * 1e6,
                "us a slot to acquire all": acquire / slots * 1e6,
            }
        )
    return rows


def measure(quick: bool) -> dict[str, Any]:
    """The four tables."""
    return {
        "tables": {
            f"a decoded token, {_LAYERS} layers, float32": _contexts(3 if quick else 15),
            f"steps of {_WALK_BATCH} sequences from 1024 tokens": _boundaries(70 if quick else 330),
            "append_kv and the size of the pool": _pools(20 if quick else 400),
            "host calls under pressure and the number of slots": _pressure(40 if quick else 400),
        }
    }


if __name__ == "__main__":
    script.run(__doc__, measure)
