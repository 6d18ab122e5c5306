"""Decode attention of sequences that share a prefix: one call, which reads the prefix once for all
of them, compared with a call for each sequence, and with the limits of the machine.

    python benchmarks/shared_prefix.py [--quick] [--json]

"one by one" reads the same blocks as attention without grouping would, and includes the dispatch of
the additional calls; shared blocks may stay in the last level cache. "copies" has the same tokens
without sharing. The bound is the slower of reading every block once (floor.py) and decode's
arithmetic on keys and values in the second-level cache. All of them take turns; times are medians,
ratios are medians over the turns. "cpu" is the ratio of the process's CPU times, which are less
affected by other programs on the machine.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import floor
import jax
import jax.numpy as jnp
import numpy as np
import script

import jax_kvpage as kvp

__all__ = ["measure"]

_KV_HEADS, _GROUP, _DIM, _BLOCK = 8, 4, 128, 16
_FILL = 512  # tokens that one call appends
_SPAN = 512  # tokens of the small context that stays in the second-level cache


@functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
def _append(cache: kvp.KVCache, batch: kvp.Batch, tokens: int) -> kvp.KVCache:
    spec = cache.spec
    shape = (tokens, spec.num_kv_heads, spec.head_dim)
    # The same for all sequences, because copies must compute the same as forks.
    dtype = jnp.float32 if spec.quantized else spec.dtype
    k = jax.random.normal(jax.random.key(0), shape, dtype)
    for layer in range(spec.num_layers):
        cache = kvp.append_kv(cache, k, k, batch, layer=layer)
    return kvp.advance(cache, batch)


@functools.partial(jax.jit, static_argnums=3)
def _attend(cache: kvp.KVCache, q: jax.Array, batch: kvp.Batch, alone: bool) -> jax.Array:
    """Runs all layers, each on the previous one's output; `alone`: a call for each sequence."""
    for layer in range(cache.spec.num_layers):
        if not alone:
            q = kvp.paged_attention(q, cache, batch, layer=layer)
            continue
        outs = []
        for i in range(q.shape[0]):
            one = kvp.Batch.from_lengths(batch.slots[i : i + 1], [1])
            outs.append(kvp.paged_attention(q[i : i + 1], cache, one, layer=layer))
        q = jnp.concatenate(outs)
    return q


@dataclasses.dataclass(frozen=True)
class _Shape:
    layout: str
    dtype: str
    sequences: int
    shared: int
    own: int
    layers: int = 4
    kv_heads: int = _KV_HEADS

    def spec(self) -> kvp.CacheSpec:
        return kvp.CacheSpec(
            self.layers,
            self.kv_heads,
            _DIM,
            self.sequences + 1,
            self.shared + self.own + _BLOCK,
            dtype=self.dtype,
            layout=self.layout,
            block_tokens=_BLOCK,
        ).resolve("cpu")


def _fill(pool: kvp.KVPool, cache: kvp.KVCache, slot: int, tokens: int) -> kvp.KVCache:
    at = int(np.asarray(cache.lengths)[slot])
    pool.extend(slot, at + tokens)
    for begin in range(0, tokens, _FILL):
        count = min(_FILL, tokens - begin)
        cache = _append(cache, kvp.Batch.from_lengths([slot], [count]), count)
    return cache


class _Case:
    """Sequences of one shape, and the time of attention over them."""

    def __init__(self, shape: _Shape, *, copies: bool = False) -> None:
        spec = shape.spec()
        tails = -(-(shape.own + 1) // _BLOCK) + 1
        shared = -(-shape.shared // _BLOCK)
        blocks = shape.sequences * (tails + (shared if copies else 0)) + shared
        self.pool = kvp.KVPool(spec, blocks * spec.num_ranges * spec.block_bytes)
        cache = self.pool.cache()
        if copies:
            slots = []
            for _ in range(shape.sequences):
                slot, cache = self.pool.acquire(cache, shape.shared + shape.own + 1)
                cache = _fill(self.pool, cache, slot, shape.shared)
                slots.append(slot)
        else:
            slot, cache = self.pool.acquire(cache, shape.shared)
            cache = _fill(self.pool, cache, slot, shape.shared)
            self.pool.commit(slot, range(shape.shared))
            slots, cache = self.pool.fork(cache, slot, shape.sequences - 1)
            slots = [slot, *slots]
        for slot in slots:
            cache = _fill(self.pool, cache, slot, shape.own)
        # One more token does the attention; its keys and values are appended but not advanced over.
        for slot in slots:
            self.pool.extend(slot, shape.shared + shape.own + 1)
        self._batch = kvp.Batch.from_lengths(slots, [1] * len(slots))
        one = jnp.ones((len(slots), shape.kv_heads, _DIM), jnp.float32)
        one = one if spec.quantized else one.astype(spec.dtype)
        for layer in range(spec.num_layers):
            cache = kvp.append_kv(cache, one, one, self._batch, layer=layer)
        self._cache = jax.block_until_ready(cache)
        query = jnp.bfloat16 if spec.quantized else spec.dtype
        heads = shape.kv_heads * _GROUP
        self._q = jax.random.normal(jax.random.key(1), (len(slots), heads, _DIM), query)
        self._layers = spec.num_layers

    def seconds(self, *, alone: bool = False) -> tuple[float, float]:
        """Wall and CPU time of a layer."""
        begin, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(_attend(self._cache, self._q, self._batch, alone))
        return (
            (time.perf_counter() - begin) / self._layers,
            (time.process_time() - cpu) / self._layers,
        )

    def out(self, *, alone: bool = False) -> np.ndarray:
        out = _attend(self._cache, self._q, self._batch, alone)
        return np.asarray(out.astype(jnp.float32))

    def close(self) -> None:
        self._cache = None
        self.pool.close()


def _turns(
    rounds: int, calls: dict[str, Callable[[], tuple[float, float]]]
) -> dict[str, list[tuple[float, float]]]:
    for call in calls.values():
        call()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(call())
    return times


def _row(shape: _Shape, rounds: int, reader: floor.Floor, copies: bool) -> dict[str, Any]:
    spec = shape.spec()
    case = _Case(shape)
    if not np.array_equal(case.out(), case.out(alone=True)):
        raise AssertionError(f"{shape}: attention of all sequences differs from that of each")
    # One KV head whose context fits in the second-level cache, and sequences for all threads.
    held = dataclasses.replace(shape, sequences=32, shared=_SPAN - 16, own=15, kv_heads=1)
    cases = {"held": _Case(held)}
    calls = {
        "together": case.seconds,
        "one by one": functools.partial(case.seconds, alone=True),
        "held": cases["held"].seconds,
    }
    if copies:
        cases["copies"] = _Case(dataclasses.replace(shape, layers=1), copies=True)
        calls["copies"] = cases["copies"].seconds
    times = _turns(rounds, calls)
    for other in (case, *cases.values()):
        other.close()

    def median(name: str) -> float:
        return statistics.median(wall for wall, _ in times[name])

    def ratio(name: str, which: int) -> float:
        pairs = zip(times[name], times["together"], strict=True)
        return statistics.median(a[which] / b[which] for a, b in pairs)

    tokens = shape.shared + shape.sequences * (shape.own + 1)
    unique = tokens * spec.token_bytes // spec.num_layers
    read = unique / reader.measure(unique)
    # As many rows times tokens as the call has.
    work = shape.sequences * (shape.shared + shape.own + 1) * shape.kv_heads
    scale = work / (held.sequences * (held.shared + held.own + 1))
    bound = max(read, scale * median("held"))
    return {
        "layout": shape.layout,
        "dtype": shape.dtype,
        "sequences": shape.sequences,
        "shared": shape.shared,
        "own": shape.own,
        "ms": median("together") * 1e3,
        "ms one by one": median("one by one") * 1e3,
        "ms copies": median("copies") * 1e3 if copies else None,
        "ms read once": read * 1e3,
        "ms arithmetic": scale * median("held") * 1e3,
        "of the bound": bound / median("together"),
        "cpu of arithmetic": scale * ratio("held", 1),
        "faster": ratio("one by one", 0),
        "faster, cpu": ratio("one by one", 1),
        "than copies": ratio("copies", 0) if copies else None,
    }


def measure(quick: bool) -> dict[str, Any]:
    """Measures the shape of the goal, then shapes for which no gain is expected."""
    rounds = 5 if quick else 25
    reader = floor.Floor()
    layouts = ("fused", "per_layer")
    large, small = [], []
    for dtype in ("float32", "bfloat16") if quick else ("float32", "bfloat16", "int8"):
        for layout in layouts:
            copies = not quick and layout == "fused"
            large.append(_row(_Shape(layout, dtype, 32, 4096, 64), rounds, reader, copies))
            for sequences, shared in ((32, 128), (2, 4096), (2, 512)):
                shape = _Shape(layout, dtype, sequences, shared, 64)
                small.append(_row(shape, 3 * rounds, reader, copies=False))
    return {"tables": {"32 sequences, one prefix": large, "short prefixes, two sequences": small}}


if __name__ == "__main__":
    script.run(__doc__, measure)
