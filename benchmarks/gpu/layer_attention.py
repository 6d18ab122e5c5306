"""Decode attention over one layer of a deep pool, compared with block tables on the same tokens.

    python benchmarks/gpu/layer_attention.py [--platform cuda] [--dry-run] [--limit 60]

A pool of one layer with large blocks is a dense array. In a pool of 32 layers, the tokens of a
layer are far apart: in the fused layout, a page of 2 MiB has 64 KiB of each layer, and the GPU's
address translation determines the speed. Blocks are contiguous or shuffled, calls read data that is
not in the L2, and a copy is measured before and after. Prints one JSON object per line; `layers.py`
makes tables of them.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from blocks import acquire, neighbouring_share
from contenders.kvpage import KVPage
from filling import HEAD_DIM, KV_HEADS, fill_pages, fill_slots
from timing import measure

import jax_kvpage as kvp

_HEADS, _LAYERS, _PAGE = 32, 32, 64
_TOKEN_BYTES = 2 * 2 * KV_HEADS * HEAD_DIM  # of one layer
_SHAPES = ((64, 8192), (8, 8192), (1, 32768))
_DRY_SHAPES = ((2, 128), (1, 256))
_BY_TABLE = " + table"
# "+ table": through the pool's block table; "tables": through a block table over arrays of pages.
_VARIANTS = (
    ("fused", "contiguous"),
    ("fused", "shuffled"),
    ("tables", "shuffled"),
    ("per_layer", "contiguous"),
    ("per_layer", "shuffled"),
    ("fused + table", "contiguous"),
    ("fused + table", "shuffled"),
    ("per_layer + table", "shuffled"),
)
# Layers that take turns have at least this much together; the largest L2 has 60 MB.
_CYCLE_BYTES = 2**30
_CALLS = 8  # in a program
# Memory for JAX's allocator and programs, in addition to the pool.
_RESERVE = 10 * 10**9
# Relative to the largest output: bfloat16 has 8 bits of precision.
_TOLERANCE = 0.03


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _attend(
    calls: int,
    layers: int,
    addressing: Any,
    cache: kvp.KVCache,
    batch: kvp.Batch,
    q: jax.Array,
) -> Any:
    for i in range(calls):
        q = kvp.paged_attention(q, cache, batch, layer=i % layers, addressing=addressing)
    return q


@functools.partial(jax.jit, static_argnums=0)
def _attend_pages(
    calls: int, pages: Any, tables: jax.Array, lengths: jax.Array, offsets: jax.Array, q: jax.Array
) -> Any:
    for i in range(calls):
        k, v = pages[i % len(pages)]
        q = kvp.paged_attention_with_tables(q, k, v, tables, lengths, query_offsets=offsets)
    return q


def _free_bytes() -> float:
    """Free memory of the GPU, before this process uses any."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(run.stdout.splitlines()[0]) * 2**20


class _Shape:
    """A batch of sequences of equal length.

    Args:
        sequences: number of sequences.
        context: tokens of each, including the new one.
        free: bytes of device memory for a pool.
        layers: number of layers of the pool, if there is room.
    """

    def __init__(self, sequences: int, context: int, free: float, layers: int) -> None:
        self.sequences, self.context = sequences, context
        self.kv_bytes = sequences * context * _TOKEN_BYTES
        # Shuffled blocks need one more slot.
        self.layers = min(layers, int(free / (self.kv_bytes + context * _TOKEN_BYTES)))
        if self.layers < 1:
            raise ValueError(f"{free:.3g} bytes are too few for one layer")
        self.turns = min(math.ceil(_CYCLE_BYTES / self.kv_bytes), self.layers, _CALLS)
        self.q = jax.random.normal(jax.random.key(1), (sequences, _HEADS, HEAD_DIM), jnp.bfloat16)

    def about(self) -> dict[str, Any]:
        """The shape, for a record."""
        return {
            "shape": f"{self.sequences} x {self.context}",
            "layers": self.layers,
            "layers in turn": self.turns,
            "kv_bytes": self.kv_bytes,
        }


# run(calls, q), a function that frees the memory, and facts for the record.
_Setup = tuple[Callable[[int, jax.Array], jax.Array], Callable[[], None], dict[str, Any]]


def _slots(shape: _Shape, platform: str, layout: str, scattered: bool) -> _Setup:
    spec = kvp.CacheSpec(
        shape.layers,
        KV_HEADS,
        HEAD_DIM,
        shape.sequences + 1,
        shape.context,
        dtype=jnp.bfloat16,
        layout=layout.removesuffix(_BY_TABLE),
    ).resolve(platform)
    blocks = (shape.sequences + scattered) * spec.blocks_per_range * spec.num_ranges
    pool = kvp.KVPool(spec, blocks * spec.block_bytes)
    slots, cache = acquire(pool, [shape.context] * shape.sequences, scattered)
    cache = fill_slots(cache, slots, shape.context)
    batch = kvp.Batch.decode(slots)
    pool.check(cache)

    def close() -> None:
        pool.check(cache)  # a fault on the device must not count as a measurement
        pool.close()

    facts = {
        "block_tokens": spec.block_tokens,
        "block_bytes": spec.block_bytes,
        "neighbours": neighbouring_share(pool, slots),
    }
    addressing = "table" if layout.endswith(_BY_TABLE) else "slots"
    return (lambda calls, q: _attend(calls, shape.turns, addressing, cache, batch, q)), close, facts


def _tables(shape: _Shape) -> _Setup:
    per_sequence = shape.context // _PAGE
    order = np.random.default_rng(2).permutation(shape.sequences * per_sequence)
    tables = order.reshape(shape.sequences, per_sequence).astype(np.int32)
    pages = [fill_pages(tables, shape.context, _PAGE) for _ in range(shape.turns)]
    operands = [
        jnp.asarray(x, jnp.int32)
        for x in (tables, [shape.context] * shape.sequences, np.arange(shape.sequences + 1))
    ]
    facts = {"block_tokens": _PAGE, "block_bytes": _PAGE * _TOKEN_BYTES, "neighbours": 0.0}
    return (lambda calls, q: _attend_pages(calls, pages, *operands, q)), pages.clear, facts


class _Bench:
    """Measures shapes and prints the results."""

    def __init__(self, platform: str, seconds: float, deadline: float) -> None:
        self._platform, self._seconds, self._deadline = platform, seconds, deadline
        self._expected: dict[str, np.ndarray] = {}

    def measure(self, shape: _Shape, layout: str, blocks: str) -> None:
        """Measures one variant; a failure is reported, and the others continue."""
        about = shape.about() | {"layout": layout, "blocks": blocks}
        if time.monotonic() > self._deadline:
            say("left_out", **about, reason="out of time")
            return
        try:
            say("record", **about, **self._time(shape, layout, blocks))
        except Exception as problem:
            say("left_out", **about, reason=f"{type(problem).__name__}: {problem}"[:500])
        gc.collect()

    def _time(self, shape: _Shape, layout: str, blocks: str) -> dict[str, Any]:
        begin = time.monotonic()
        if layout == "tables":
            attend, close, facts = _tables(shape)
        else:
            attend, close, facts = _slots(shape, self._platform, layout, blocks == "shuffled")
        try:
            out = np.asarray(attend(1, shape.q), np.float32)
            expected = self._expected.setdefault(shape.about()["shape"], out)
            difference = float(np.abs(out - expected).max() / np.abs(expected).max())
            if not difference < _TOLERANCE:
                raise ValueError(f"other results than the first variant: {difference:.3g}")
            last = [shape.q]

            def run(times: int) -> None:
                for _ in range(times):
                    last[0] = attend(_CALLS, last[0])

            setup = time.monotonic() - begin
            result = measure(run, lambda: jax.block_until_ready(last[0]), _CALLS, self._seconds)
        finally:
            close()
        return result | facts | {"difference": difference, "setup_seconds": setup}


def say(kind: str, **values: Any) -> None:
    """Prints one JSON line."""
    print(json.dumps({"kind": kind, **values}), flush=True)


def main() -> int:
    """Measures all shapes, the most important ones first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each measurement")
    parser.add_argument("--limit", type=float, default=60, help="no variant begins after this")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu" if arguments.platform == "cpu" else "cuda,cpu")
    deadline = time.monotonic() + arguments.limit
    dry = arguments.dry_run
    free = 2**26 if arguments.platform == "cpu" else _free_bytes() - _RESERVE
    copies = KVPage(arguments.platform)
    say("copy", when="before", gbps=copies.copy_bandwidth() / 1e9)
    bench = _Bench(arguments.platform, 0.01 if dry else arguments.seconds, deadline)
    for sequences, context in _DRY_SHAPES if dry else _SHAPES:
        shape = _Shape(sequences, context, free, 4 if dry else _LAYERS)
        for layout, blocks in _VARIANTS:
            bench.measure(shape, layout, blocks)
    say("copy", when="after", gbps=copies.copy_bandwidth() / 1e9)
    return 0


if __name__ == "__main__":
    sys.exit(main())
