"""Decode attention with a shared prefix: read once, read once per sequence, and without sharing.

    python benchmarks/gpu/shared_prefix.py [--platform cuda] [--dry-run] [--limit 60]

"together" are forks of one sequence: their common prefix is read once for all rows of a group if
that saves enough. "each" are the same forks with a sliding window that excludes their first token,
so that they are not grouped: the prefix is read from the second-level cache at best. "copies" have
the same tokens in separate memory. Shapes that share little show the cost of grouping without a
gain. Prints one JSON object last.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import pathlib
import sys
import time
from typing import Any

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from filling import HEAD_DIM, KV_HEADS, fill_slots
from scripts import print_tables
from timing import measure

import jax_kvpage as kvp

_HEADS, _LAYERS, _CALLS = 32, 8, 8
# Sequences, shared tokens, private tokens of each; the most important shape first.
_SHAPES = ((32, 4096, 64), (2, 4096, 64), (32, 128, 64), (2, 512, 64), (64, 8192, 512))
_DRY_SHAPES = ((4, 64, 16),)
_LAYOUTS = ("fused", "per_layer")


@functools.partial(jax.jit, static_argnums=(3, 4))
def _attend(
    cache: kvp.KVCache, batch: kvp.Batch, q: jax.Array, layers: int, window: int | None
) -> jax.Array:
    for i in range(_CALLS):
        q = kvp.paged_attention(q, cache, batch, layer=i % layers, sliding_window=window)
    return q


def _fill(pool: kvp.KVPool, shape: tuple[int, int, int], copies: bool) -> Any:
    """Fills the sequences; returns their slots, each with its last token new, and the cache."""
    sequences, shared, own = shape
    slots, cache = pool.acquire(pool.cache(), [shared + own] * (sequences if copies else 1))
    for slot in slots:  # one by one, so that all have the same tokens
        cache = fill_slots(cache, [slot], shared)
    # `fill_slots` does not advance over the last token.
    cache = jax.jit(kvp.advance)(cache, kvp.Batch.from_lengths(slots, [1] * len(slots)))
    if not copies:
        pool.commit(slots[0], range(shared))
        forks, cache = pool.fork(cache, slots[0], sequences - 1)
        pool.extend(forks, [shared + own] * len(forks))
        slots = [*slots, *forks]
    return slots, fill_slots(cache, slots, own)


class _Bench:
    def __init__(self, platform: str, dry: bool, seconds: float) -> None:
        self._platform, self._seconds = platform, seconds
        self._layers = 2 if dry else _LAYERS

    def _pool(self, shape: tuple[int, int, int], layout: str) -> kvp.KVPool:
        sequences, shared, own = shape
        spec = kvp.CacheSpec(
            self._layers,
            KV_HEADS,
            HEAD_DIM,
            sequences,
            shared + own,
            dtype=jnp.bfloat16,
            layout=layout,
        ).resolve(self._platform)
        blocks = sequences * spec.blocks_per_range * spec.num_ranges
        return kvp.KVPool(spec, blocks * spec.block_bytes)

    def _time(self, cache: kvp.KVCache, batch: kvp.Batch, window: int | None) -> tuple[float, Any]:
        """Seconds per call, and the bits of its result."""
        q = jax.random.normal(
            jax.random.key(1), (batch.slots.shape[0], _HEADS, HEAD_DIM), jnp.bfloat16
        )
        last = [q]

        def run(times: int) -> None:
            for _ in range(times):
                last[0] = _attend(cache, batch, last[0], self._layers, window)

        times = measure(run, lambda: jax.block_until_ready(last[0]), _CALLS, self._seconds)
        out = np.asarray(_attend(cache, batch, q, self._layers, window), np.float32)
        return times["seconds"], out.tobytes()

    def measure(self, shape: tuple[int, int, int], layout: str) -> dict[str, Any]:
        """Measures a row of the table."""
        sequences, shared, own = shape
        seconds: dict[str, float] = {}
        bits = {}
        for copies in (True, False):
            pool = self._pool(shape, layout)
            try:
                slots, cache = _fill(pool, shape, copies)
                batch = kvp.Batch.decode(slots)
                name = "copies" if copies else "together"
                seconds[name], bits[name] = self._time(cache, batch, None)
                if not copies:
                    seconds["each"], _ = self._time(cache, batch, shared + own - 1)
                pool.check(cache)  # a fault on the device must not count as a measurement
            finally:
                pool.close()
            gc.collect()
        return {
            "sequences": sequences,
            "shared": shared,
            "own": own,
            "layout": layout,
            **{f"us {name}": 1e6 * value for name, value in seconds.items()},
            "speed against each": seconds["each"] / seconds["together"],
            "speed against copies": seconds["copies"] / seconds["together"],
            "same bits": bits["copies"] == bits["together"],
        }


def main() -> int:
    """Measures all shapes in both layouts; returns 1 if a result differs from that of copies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each measurement")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which none begins")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.limit
    jax.config.update("jax_platforms", "cpu" if arguments.platform == "cpu" else "cuda,cpu")
    dry = arguments.dry_run
    bench = _Bench(arguments.platform, dry, 0.01 if dry else arguments.seconds)
    rows, left_out = [], []
    for shape in _DRY_SHAPES if dry else _SHAPES:
        for layout in _LAYOUTS:
            if time.monotonic() > deadline:
                left_out.append({"shape": shape, "layout": layout, "reason": "out of time"})
            else:
                rows.append(bench.measure(shape, layout))
    tables = {"decode of sequences that share a prefix": rows}
    print_tables(tables)
    print(json.dumps({"tables": tables, "left_out": left_out}))
    return 0 if all(row["same bits"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
