"""Swapping from GPU to host memory: its bandwidth, and how much it slows down running kernels.

    python benchmarks/gpu/swapping.py [--dry-run]

A sequence is swapped out and in again, alone and after ten queued decode steps of others (attention
over all layers); the same steps are also measured without a swap. The floor in each direction is a
copy between a JAX array and the host. Times include the release, the wait for it, copies and
mapping. Prints rows, JSON last. A dry run is tiny and says nothing about speed; with
JAX_KVPAGE_FAKE_DRIVER=cuda it needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scripts import print_tables

import jax_kvpage as kvp

_HEADS, _KV_HEADS, _DIM = 32, 8, 128


@jax.jit
def _append(cache: kvp.KVCache, rows: jax.Array, batch: kvp.Batch) -> kvp.KVCache:
    for layer in range(cache.spec.num_layers):
        cache = kvp.append_kv(cache, rows, rows, batch, layer=layer)
    return kvp.advance(cache, batch)


@jax.jit
def _step(cache: kvp.KVCache, q: jax.Array, batch: kvp.Batch) -> jax.Array:
    for layer in range(cache.spec.num_layers):
        q = kvp.paged_attention(q, cache, batch, layer=layer)
    return q


class _Bench:
    """A pool with sequences that decode, and one that is swapped."""

    def __init__(self, dry: bool, layout: str) -> None:
        layers, batch, context, self.rounds = (2, 2, 64, 2) if dry else (32, 8, 4096, 8)
        spec = kvp.CacheSpec(
            layers, _KV_HEADS, _DIM, batch + 1, context, dtype=jnp.bfloat16, layout=layout
        ).resolve("cuda")
        blocks = (batch + 1) * spec.blocks_per_range * spec.num_ranges
        self.store = kvp.HostStore(2 * spec.blocks_per_range * spec.num_ranges * spec.block_bytes)
        self.pool = kvp.KVPool(spec, blocks * spec.block_bytes, store=self.store)
        self.context, self.layout = context, layout
        slots, self.cache = self.pool.acquire(self.pool.cache(), [context] * (batch + 1))
        # Steps read the last token as if it were new.
        rows = jax.random.normal(jax.random.key(0), (context, _KV_HEADS, _DIM), jnp.bfloat16)
        for slot in slots:
            self.cache = _append(self.cache, rows, kvp.Batch.from_lengths([slot], [context]))
            self.pool.commit(slot, [0] * context)
        self.pool.check(self.cache)
        self.slot = slots[-1]
        self.batch = kvp.Batch.from_lengths(slots[:-1], [1] * batch)
        self.q = jax.random.normal(jax.random.key(1), (batch, _HEADS, _DIM), jnp.bfloat16)

    def steps(self, count: int) -> jax.Array:
        """Queues steps; returns the last one's output."""
        out = self.q
        lengths = jnp.maximum(self.cache.lengths - 1, -1)
        cache = dataclasses.replace(self.cache, lengths=lengths)
        for _ in range(count):
            out = _step(cache, out, self.batch)
        return out

    def swap(self) -> tuple[float, float]:
        """Swaps out and in; returns seconds until the blocks are in the store, and seconds in."""
        begin = time.perf_counter()
        swapped, self.cache = self.pool.swap_out(self.cache, self.slot)
        while not swapped.in_store:
            time.sleep(1e-5)
        middle = time.perf_counter()
        self.slot, self.cache = self.pool.swap_in(self.cache, swapped, wait=True)
        self.pool.check(self.cache)
        return middle - begin, time.perf_counter() - middle

    def rows(self) -> list[dict[str, Any]]:
        self.swap()  # pins the memory
        written = self.store.stats().bytes_written
        alone, beside, quiet, disturbed = [], [], [], []
        for _ in range(self.rounds):
            alone.append(self.swap())
            begin = time.perf_counter()
            jax.block_until_ready(self.steps(10))
            quiet.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            out = self.steps(10)
            beside.append(self.swap())
            jax.block_until_ready(out)
            disturbed.append(time.perf_counter() - begin)
        size = (self.store.stats().bytes_written - written) / (2 * self.rounds)

        def speed(times: list[tuple[float, float]], side: int) -> float:
            return size / statistics.median(each[side] for each in times) / 1e9

        return [
            {
                "layout": self.layout,
                "MB": size / 1e6,
                "GB/s out": speed(alone, 0),
                "GB/s in": speed(alone, 1),
                "GB/s in, behind steps": speed(beside, 1),
                "ms for 10 steps": statistics.median(quiet) * 1e3,
                "ms for 10 steps and a swap behind them": statistics.median(disturbed) * 1e3,
            }
        ]

    def close(self) -> None:
        self.pool.close()
        self.store.close()


def _floor(dry: bool) -> list[dict[str, Any]]:
    """Measures a plain copy by JAX in each direction."""
    array = jnp.zeros((1 << 16) if dry else (1 << 28), jnp.uint8)
    jax.block_until_ready(array)
    out, back = [], []
    for i in range(6):
        fresh = jax.block_until_ready(array + np.uint8(i))  # JAX caches an array's host copy
        begin = time.perf_counter()
        host = np.asarray(fresh)
        out.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        jax.block_until_ready(jax.device_put(host, array.device))
        back.append(time.perf_counter() - begin)
    size = array.nbytes / 1e9
    return [
        {
            "MB": size * 1e3,
            "GB/s out": size / statistics.median(out),
            "GB/s in": size / statistics.median(back),
        }
    ]


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny: whether it works")
    dry = parser.parse_args().dry_run
    rows: list[dict[str, Any]] = []
    for layout in ("fused", "per_layer"):
        bench = _Bench(dry, layout)
        rows += bench.rows()
        bench.close()
    tables = {"swapping to host memory": rows, "copies by JAX": _floor(dry)}
    print_tables(tables)
    print(json.dumps({"tables": tables}))


if __name__ == "__main__":
    main()
