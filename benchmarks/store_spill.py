"""A store below a pool: bandwidth of writing ahead and reading back, and the gain in hits.

    python benchmarks/store_spill.py [--quick] [--json] [--folder /tmp] [--data DIR]

Bandwidth: sequences with bfloat16 blocks of 1 MiB are released in a pool that writes everything
ahead, evicted, and prefetched, compared with a single-threaded loop that writes and reads files
with the same bytes (`pwrite` in pieces of 2 MiB and `fsync`; `preadv`) and computes the store's
checksum of each piece. The pool's times include copies, checksums, claims of blocks and the index.
Ratios are of medians of interleaved runs, in the page cache.

Hits: the first requests of the conversation trace of Mooncake (FAST'25) run one after the other in
a pool with small keys and values, with and without a store. The ratio is cached tokens over prompt
tokens. Each request prefetches its prompt first; "unlimited" has memory for everything.
"""

from __future__ import annotations

import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import prefix_hits
import script
import store as plain

import jax_kvpage as kvp

__all__ = ["measure"]

_LAYERS, _HEADS, _DIM, _STEP = 4, 8, 128, 2048
_BLOCK = 512  # tokens in a block of the trace
_TRACE_STEP = 4096


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("the store does not get on")
        time.sleep(0.0005)


class _Requests:
    """Requests that run one after the other in a pool."""

    def __init__(self, pool: kvp.KVPool, step: int) -> None:
        self.pool, self.cache, self.step = pool, pool.cache(), step
        spec = pool.spec
        layers, shape = spec.num_layers, (step, spec.num_kv_heads, spec.head_dim)
        self.rows = jax.random.normal(jax.random.key(0), shape, spec.dtype)

        def append(cache: kvp.KVCache, rows: jax.Array, batch: kvp.Batch) -> kvp.KVCache:
            for layer in range(layers):
                cache = kvp.append_kv(cache, rows, rows, batch, layer=layer)
            return kvp.advance(cache, batch)

        self.append = jax.jit(append)

    def run(self, ids: np.ndarray) -> int:
        """Computes the tokens that are not cached, and returns how many were."""
        slot, cached, self.cache = self.pool.acquire_prefix(self.cache, ids)
        for begin in range(cached, len(ids), self.step):
            count = min(self.step, len(ids) - begin)
            batch = kvp.Batch(jnp.asarray([slot]), jnp.asarray([0, count]))
            self.cache = self.append(self.cache, self.rows, batch)
        self.pool.commit(slot, ids[cached:].tolist())
        self.cache = self.pool.release(self.cache, slot)
        self.pool.check(self.cache)
        return cached


def _bandwidth(root: pathlib.Path, layout: str, size: int, rounds: int) -> dict[str, Any]:
    tokens = size // (2 * _LAYERS * _HEADS * _DIM * 2)
    spec = kvp.CacheSpec(
        _LAYERS, _HEADS, _DIM, 2, tokens + 64, dtype=jnp.bfloat16, layout=layout, block_tokens=64
    )
    data = np.random.default_rng(0).integers(0, 255, size, np.uint8)
    times: dict[str, list[float]] = {}

    def note(name: str, call: Callable[[], Any]) -> None:
        begin = time.perf_counter()
        call()
        times.setdefault(name, []).append(time.perf_counter() - begin)

    (root / layout).mkdir()
    with (
        kvp.BlockStore(root / layout / "stored", limit=None) as store,
        kvp.KVPool(spec, spec.token_bytes * (tokens + 64), store=store, write_ahead=1) as pool,
    ):
        requests = _Requests(pool, _STEP)
        for number in range(rounds + 1):
            if number == 1:
                times.clear()  # the first round only touches the memory
            folder = root / layout / f"plain{number}"
            folder.mkdir()
            note("write floor", lambda folder=folder: plain.write_plain(folder, data))
            note("read floor", lambda folder=folder: plain.read_plain(folder, data))
            shutil.rmtree(folder)
            ids = np.random.default_rng(number).integers(0, 32000, tokens, np.int32)
            requests.run(ids)
            whole = (number + 1) * tokens
            # The write began just before, when the sequence was released.
            note("write", lambda n=whole: _until(lambda: pool.spill_stats().tokens_written == n))
            pool.evict()
            note("read", lambda ids=ids: pool.prefetch(ids).wait())
            if pool.find_prefix(ids, whole=True) != tokens:
                raise AssertionError("not everything was read")
            pool.evict()
    row: dict[str, Any] = {"layout": layout, "MiB": size >> 20}
    for name in ("write", "read"):
        took, least = statistics.median(times[name]), statistics.median(times[f"{name} floor"])
        row[f"MB/s {name}"] = size / took / 1e6
        row[f"{name}: of the floor"] = least / took
    return row


def _hits(root: pathlib.Path, data: str, count: int, blocks: int) -> list[dict[str, Any]]:
    head = prefix_hits.read_requests(data)[:count]
    within = np.arange(_BLOCK, dtype=np.int32)
    longest = max(request.length for request in head)
    spec = kvp.CacheSpec(
        1, 1, 16, 4, longest + _BLOCK, dtype=jnp.bfloat16, layout="fused", block_tokens=_BLOCK
    ).resolve("cpu")
    needed = len({block for request in head for block in request.blocks}) + 4 * count
    asked = sum(request.length for request in head)
    rows = []
    for name, room, share in (
        ("memory", blocks, None),
        ("memory and disk", blocks, 0.5),
        ("unlimited", needed, None),
    ):
        with kvp.BlockStore(root / name, limit=None) as store:
            below: dict[str, Any] = {} if share is None else {"store": store, "write_ahead": share}
            with kvp.KVPool(spec, spec.block_bytes * room, **below) as pool:
                requests, cached = _Requests(pool, _TRACE_STEP), 0
                for request in head:
                    starts = np.asarray(request.blocks, np.int32) * _BLOCK
                    ids = (starts[:, None] + within).reshape(-1)[: request.length]
                    pool.prefetch(ids).wait()
                    cached += requests.run(ids)
                stats = pool.spill_stats()
        rows.append({
            "tier": name,
            "blocks": room,
            "requests": count,
            "hits": cached / asked,
            "of these from disk": stats.store_hits / max(cached, 1),
            "tokens dropped unwritten": stats.tokens_dropped / asked,
        })  # fmt: skip
    return rows


def measure(quick: bool, folder: str, data: str) -> dict[str, Any]:
    """A table of bandwidths, and one of hits."""
    size, rounds, count = (64 << 20, 3, 400) if quick else (512 << 20, 5, 1000)
    root = pathlib.Path(tempfile.mkdtemp(dir=folder))
    try:
        bandwidth = [_bandwidth(root, layout, size, rounds) for layout in ("fused", "per_layer")]
        hits = _hits(root, data, count, blocks=2000)
    finally:
        shutil.rmtree(root)
    return {"tables": {"written ahead and prefetched": bandwidth, "hits of the trace": hits}}


if __name__ == "__main__":
    script.run(__doc__, measure, folder=tempfile.gettempdir(), data="../shared/data")
