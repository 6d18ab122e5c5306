"""Does mapping memory slow down kernels that are running, and do running kernels slow down mapping?

    python benchmarks/gpu/mapping.py [--platform cuda] [--dry-run]

Decode steps (attention over 32 layers) are queued while another thread grows other slots block by
block, or frees memory. Quiet and disturbed rounds alternate. Prints rows, JSON last.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_kvpage as kvp

_HEADS, _KV_HEADS, _DIM = 32, 8, 128


@functools.partial(jax.jit, donate_argnums=0)
def _fill(cache: kvp.KVCache, k: jax.Array, batch: kvp.Batch) -> kvp.KVCache:
    def body(layer: jax.Array, cache: kvp.KVCache) -> kvp.KVCache:
        return kvp.append_kv(cache, k, k, batch, layer=layer)

    cache = jax.lax.fori_loop(0, cache.spec.num_layers, body, cache)
    return kvp.advance(cache, kvp.Batch(batch.slots, jnp.maximum(batch.query_offsets - 1, 0)))


@jax.jit
def _step(cache: kvp.KVCache, q: jax.Array, batch: kvp.Batch) -> jax.Array:
    for layer in range(cache.spec.num_layers):
        q = kvp.paged_attention(q, cache, batch, layer=layer)
    return q


class _Disturber:
    """Calls `action` repeatedly in a thread, `pause` seconds apart, until it returns False or
    the block ends.
    """

    def __init__(self, action: Callable[[], bool], pause: float) -> None:
        self._action, self._pause = action, pause
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.times: list[float] = []
        self.problem: BaseException | None = None

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._pause):
                begin = time.perf_counter()
                going = self._action()
                self.times.append(time.perf_counter() - begin)
                if not going:
                    return
        except BaseException as problem:
            self.problem = problem

    def __enter__(self) -> _Disturber:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.problem:
            raise self.problem


class _Growth:
    """Slots that grow a block at a time, taking turns."""

    def __init__(self, pool: kvp.KVPool, slots: list[int]) -> None:
        self._pool, self._slots = pool, slots
        self._step = pool.spec.block_tokens or 1
        self._have = dict.fromkeys(slots, self._step)
        self.blocks = 0

    def extend(self) -> bool:
        """Adds a block to the shortest slot; returns False when all are full."""
        slot = min(self._slots, key=self._have.__getitem__)
        if self._have[slot] >= self._pool.spec.max_seq_len:
            return False
        self._have[slot] = min(self._have[slot] + self._step, self._pool.spec.max_seq_len)
        self._pool.extend(slot, self._have[slot])
        self.blocks += 1
        return True


def _microseconds(times: list[float]) -> dict[str, float]:
    if not times:
        return {"calls": 0, "us": 0.0, "us, 99th percentile": 0.0}
    return {
        "calls": len(times),
        "us": statistics.median(times) * 1e6,
        "us, 99th percentile": float(np.percentile(times, 99)) * 1e6,
    }


class _Bench:
    """A pool with decoding sequences, and room for others to grow."""

    def __init__(self, platform: str, dry: bool) -> None:
        layers, batch, context, growing = (2, 2, 64, 2) if dry else (32, 16, 8192, 4)
        self.rounds, self.steps = (2, 2) if dry else (6, 10)
        spec = kvp.CacheSpec(
            layers, _KV_HEADS, _DIM, batch + growing, 2 * context, dtype=jnp.bfloat16
        ).resolve(platform)
        size = spec.block_tokens or 1
        blocks = batch * -(-(context + 1) // size) + growing * spec.blocks_per_range
        self.growing, self.spec = growing, spec
        self.pool = kvp.KVPool(spec, blocks * spec.block_bytes, on_stale="allow")
        slots, self.cache = self.pool.acquire(self.pool.cache(), [context] * batch)
        k = jax.random.normal(jax.random.key(0), (context, _KV_HEADS, _DIM), jnp.bfloat16)
        for slot in slots:
            self.cache = _fill(self.cache, k, kvp.Batch.from_lengths([slot], [context]))
        self.batch = kvp.Batch.decode(slots)
        self.q = jax.random.normal(jax.random.key(1), (batch, _HEADS, _DIM), jnp.bfloat16)
        self.pool.check(self.cache)
        jax.block_until_ready(_step(self.cache, self.q, self.batch))

    def steps_seconds(self) -> float:
        """Queues steps; returns seconds per step."""
        begin = time.perf_counter()
        out = self.q
        for _ in range(self.steps):
            out = _step(self.cache, self.q, self.batch)
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) / self.steps

    def compare(self, what: str, action: Callable[[], bool], pause: float) -> dict[str, Any]:
        """Compares steps with and without the action running at the same time."""
        quiet, disturbed, calls = [], [], []
        for _ in range(self.rounds):
            quiet.append(self.steps_seconds())
            with _Disturber(action, pause) as disturber:
                disturbed.append(self.steps_seconds())
            calls += disturber.times
        before, after = statistics.median(quiet), statistics.median(disturbed)
        return {
            "beside the steps": what,
            "ms a step, quiet": before * 1e3,
            "ms a step, disturbed": after * 1e3,
            "ratio": after / before,
            "spread of quiet": max(quiet) / min(quiet) - 1,
            **_microseconds(calls),
        }

    def alone(self, what: str, action: Callable[[], bool], times: int) -> dict[str, Any]:
        """Times the action while the device is idle."""
        taken = []
        for _ in range(times):
            begin = time.perf_counter()
            if not action():
                break
            taken.append(time.perf_counter() - begin)
        return {"alone": what, **_microseconds(taken)}

    def grown(self) -> _Growth:
        """Acquires new slots with a block each."""
        slots, self.cache = self.pool.acquire(self.cache, [1] * self.growing)
        return _Growth(self.pool, slots)

    def give_back(self, growth: _Growth) -> None:
        """Releases the slots; their blocks are parked, and later freed by `trim`."""
        self.cache = self.pool.release(self.cache, growth._slots)
        jax.block_until_ready(self.cache)


def measure(platform: str, dry: bool) -> dict[str, Any]:
    """The two tables."""
    bench = _Bench(platform, dry)
    beside: list[dict[str, Any]] = []
    alone: list[dict[str, Any]] = []
    for pause, name in ((0.002, "a block every 2 ms"), (0.0, "as fast as it can")):
        growth = bench.grown()
        beside.append(bench.compare(f"new blocks, {name}", growth.extend, pause))
        alone.append(bench.alone("a new block", growth.extend, 100))
        bench.give_back(growth)
        if not pause:
            continue
        # The blocks of the first round are parked: this round reuses them, in place or elsewhere.
        growth = bench.grown()
        beside.append(bench.compare(f"parked blocks, {name}", growth.extend, pause))
        alone.append(bench.alone("a parked block", growth.extend, 100))
        bench.give_back(growth)

        def trim_once() -> bool:
            bench.pool.trim()
            return False

        beside.append(bench.compare("trim: all parked blocks", trim_once, 0.001))
    waits = bench.pool.stats().waits
    bench.pool.check(bench.cache)
    bench.pool.close()
    return {"tables": {"mapping beside running kernels": beside, "mapping alone": alone}} | {
        "waits": waits,
        "block_bytes": bench.spec.block_bytes,
    }


def main() -> int:
    """Prints one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu" if arguments.platform == "cpu" else "cuda,cpu")
    result = measure(arguments.platform, arguments.dry_run)
    for name, rows in result["tables"].items():
        print(name)
        for row in rows:
            cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items())
            print("  ", ", ".join(cells))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
