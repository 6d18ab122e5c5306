"""Handing a sequence to another pool, compared with one memcpy of the same bytes.

    python benchmarks/handover.py [--quick] [--json]

A sequence is exported and then imported by another pool of this process, through a duplicate of its
descriptor like the one that a socket would make, so the kernel does the same work. `copied` is a
slot of `acquire`, whose blocks are copied into a memory file; `handover` is a slot of
`acquire(handover=True)`, whose file is sealed. `first read` is a pass over the mapped memory, which
creates the page table entries. The floors are `memcpy` into memory that was touched before, and
`memcpy, fresh` into memory that was not, which must be allocated and zeroed like that of a new
file. Figures are medians of interleaved runs, in microseconds per MiB of keys and values.
"""

from __future__ import annotations

import functools
import mmap
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import script

import jax_kvpage as kvp

__all__ = ["measure"]

_LAYERS, _HEADS, _DIM, _STEP = 4, 8, 128, 1024


@jax.jit
def _append(cache: kvp.KVCache, rows: jax.Array, batch: kvp.Batch) -> kvp.KVCache:
    for layer in range(_LAYERS):
        cache = kvp.append_kv(cache, rows, rows, batch, layer=layer)
    return kvp.advance(cache, batch)


class _Clock:
    """Seconds of all runs, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def time(self, name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result


def _fill(pool: kvp.KVPool, cache: kvp.KVCache, tokens: int, handover: bool) -> Any:
    slot, cache = pool.acquire(cache, tokens, handover=handover)
    rows = jax.random.normal(jax.random.key(0), (_STEP, _HEADS, _DIM), jnp.bfloat16)
    for _ in range(tokens // _STEP):
        cache = _append(cache, rows, kvp.Batch.from_lengths([slot], [_STEP]))
    pool.commit(slot, [1] * tokens)
    pool.check(cache)
    return slot, cache


def _floors(clock: _Clock, size: int) -> None:
    source = np.ones(size, np.uint8)
    touched = np.zeros(size, np.uint8)
    touched[:] = 2
    clock.time("memcpy", lambda: np.copyto(touched, source))
    with mmap.mmap(-1, size) as memory:
        clock.time("memcpy, fresh", lambda: np.copyto(np.frombuffer(memory, np.uint8), source))


@jax.jit
def _read(cache: kvp.KVCache, slots: jax.Array) -> jax.Array:
    return sum(jnp.sum(x) for x in kvp.read_kv(cache, slots, 0))


def _hand_over(clock: _Clock, spec: kvp.CacheSpec, tokens: int, name: str) -> int:
    """Exports and imports a sequence; returns its size in bytes."""
    capacity = spec.token_bytes * tokens + (1 << 20)
    with kvp.KVPool(spec, capacity) as sender, kvp.KVPool(spec, capacity) as receiver:
        slot, _ = _fill(sender, sender.cache(), tokens, name == "handover")
        sent = clock.time(f"export, {name}", lambda: sender.export_blocks(slot))
        with sent, os.fdopen(os.dup(sent.fileno()), "rb") as file:
            before = receiver.cache()
            start = functools.partial(receiver.import_blocks, before, file)
            back, cache = clock.time(f"import, {name}", start)
            receiver.check(cache)
            slots = jnp.asarray([back])
            clock.time(
                f"first read of a layer, {name}", lambda: _read(cache, slots).block_until_ready()
            )
            return sent.num_bytes


def _round(clock: _Clock, spec: kvp.CacheSpec, tokens: int) -> int:
    """Runs each measurement once; returns the size of the sequence in bytes."""
    size = _hand_over(clock, spec, tokens, "copied")
    _hand_over(clock, spec, tokens, "handover")
    _floors(clock, size)
    return size


def measure(quick: bool) -> dict[str, Any]:
    """Measures both layouts."""
    rows = []
    for layout in ("fused", "per_layer"):
        for tokens in [2048] if quick else [2048, 8192, 32768]:
            spec = kvp.CacheSpec(
                _LAYERS, _HEADS, _DIM, 2, tokens, dtype=jnp.bfloat16, layout=layout, block_tokens=64
            )
            _round(_Clock(), spec, tokens)  # compiles
            clock, size = _Clock(), 0
            for _ in range(2 if quick else 7):
                size = _round(clock, spec, tokens)
            row: dict[str, Any] = {"layout": layout, "tokens": tokens, "MiB": size / (1 << 20)}
            for name, seconds in clock.seconds.items():
                row[f"{name} us/MiB"] = statistics.median(seconds) * 1e6 / row["MiB"]
            rows.append(row)
    return {"tables": {"handover": rows}}


if __name__ == "__main__":
    script.run(__doc__, measure)
