"""Saving and loading prefixes, compared with plain writes and reads of the same bytes.

    python benchmarks/store.py [--quick] [--json] [--folder /tmp]

A pool with bfloat16 blocks of 1 MiB is saved to files and loaded into another pool, from the page
cache and from the disk (the files are dropped from the page cache first). The floor is a
single-threaded loop that writes the same number of files with the same bytes (`pwrite` in pieces of
2 MiB, `fsync`), or reads them (`preadv` into memory that was touched before), with the store's
checksum of each piece. The store's times include the copy out of the pool, checksums, claims of
blocks and the index. Speeds are medians; "of the floor" is the median over the rounds of the ratio
in each round, where both run in succession, so that a period in which the disk is slow affects
both.
"""

from __future__ import annotations

import os
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
import script

import jax_kvpage as kvp
from jax_kvpage import _native

__all__ = ["measure", "read_plain", "write_plain"]

_LAYERS, _HEADS, _DIM, _STEP = 4, 8, 128, 2048
_PIECE, _FILE = 2 << 20, 64 << 20


def _spec(tokens: int, layout: str) -> kvp.CacheSpec:
    return kvp.CacheSpec(
        _LAYERS, _HEADS, _DIM, 2, tokens + 64, dtype=jnp.bfloat16, layout=layout, block_tokens=64
    )


@jax.jit
def _append(cache: kvp.KVCache, rows: jax.Array, batch: kvp.Batch) -> kvp.KVCache:
    for layer in range(_LAYERS):
        cache = kvp.append_kv(cache, rows, rows, batch, layer=layer)
    return kvp.advance(cache, batch)


def _filled(spec: kvp.CacheSpec, tokens: int) -> tuple[kvp.KVPool, kvp.KVCache]:
    """A pool with one long cached sequence."""
    pool = kvp.KVPool(spec, capacity=spec.token_bytes * (tokens + 64))
    ids = np.random.default_rng(0).integers(0, 32000, tokens, np.int32)
    slot, _, cache = pool.acquire_prefix(pool.cache(), ids)
    rows = jax.random.normal(jax.random.key(0), (_STEP, _HEADS, _DIM), jnp.bfloat16)
    for begin in range(0, tokens, _STEP):
        cache = _append(cache, rows, kvp.Batch.from_lengths([slot], [_STEP]))
        pool.commit(slot, ids[begin : begin + _STEP].tolist())
    cache = pool.release(cache, slot)
    pool.check(cache)
    return pool, cache


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def write_plain(folder: pathlib.Path, data: np.ndarray) -> None:
    """Writes the bytes to files of equal size, and computes the checksum of each piece."""
    for number, at in enumerate(range(0, len(data), _FILE)):
        part = memoryview(data[at : at + _FILE])
        fd = os.open(folder / f"{number}.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for offset in range(0, len(part), _PIECE):
            _native.store_checksum(data[at + offset : at + offset + _PIECE])
            os.pwrite(fd, part[offset : offset + _PIECE], offset)
        os.fsync(fd)
        os.close(fd)
        (folder / f"{number}.tmp").rename(folder / f"{number}.bin")


def read_plain(folder: pathlib.Path, data: np.ndarray) -> None:
    """Reads the files of `write_plain` into the same memory, and computes the checksums."""
    for number, at in enumerate(range(0, len(data), _FILE)):
        part = memoryview(data[at : at + _FILE])
        fd = os.open(folder / f"{number}.bin", os.O_RDONLY)
        for offset in range(0, len(part), _PIECE):
            os.preadv(fd, [part[offset : offset + _PIECE]], offset)
            _native.store_checksum(data[at + offset : at + offset + _PIECE])
        os.close(fd)


def _drop(folder: pathlib.Path) -> None:
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _row(root: pathlib.Path, layout: str, size: int, rounds: int) -> dict[str, Any]:
    tokens = size // (2 * _LAYERS * _HEADS * _DIM * 2)
    spec = _spec(tokens, layout)
    times: dict[str, list[float]] = {}

    def note(name: str, call: Callable[[], Any]) -> None:
        times.setdefault(name, []).append(_seconds(call))

    data = np.random.default_rng(0).integers(0, 255, size, np.uint8)
    pool, _cache = _filled(spec, tokens)
    other = kvp.KVPool(spec, capacity=spec.token_bytes * (tokens + 64))

    def load(folder: pathlib.Path) -> None:
        if other.load_prefixes(folder).tokens != tokens:
            raise AssertionError("not everything was loaded")

    plain, stored = root / "plain", root / "stored"
    calls: dict[str, list[tuple[str, Callable[[], Any]]]] = {
        "write": [
            ("write floor", lambda: write_plain(plain, data)),
            ("write", lambda: pool.save_prefixes(stored)),
        ],
    }
    for state in ("cached", "cold"):
        calls[f"read, {state}"] = [
            (f"read floor, {state}", lambda: read_plain(plain, data)),
            (f"read, {state}", lambda: load(stored)),
        ]
    for number in range(rounds):
        for folder in (plain, stored):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        for what, pair in calls.items():
            other.evict()
            if what == "read, cold":
                _drop(plain)
                _drop(stored)
            for name, call in pair if number % 2 == 0 else pair[::-1]:
                note(name, call)
    pool.close()
    other.close()
    row: dict[str, Any] = {"layout": layout, "MiB": size >> 20}
    for name in ("write", "read, cached", "read, cold"):
        what, _, state = name.partition(", ")
        floor = f"{what} floor" + (f", {state}" if state else "")
        row[f"MB/s {name}"] = size / statistics.median(times[name]) / 1e6
        ratios = [least / took for least, took in zip(times[floor], times[name], strict=True)]
        row[f"{name}: of the floor"] = statistics.median(ratios)
    return row


def measure(quick: bool, folder: str) -> dict[str, Any]:
    """One table: a row for each layout."""
    size, rounds = (64 << 20, 3) if quick else (512 << 20, 9)
    root = pathlib.Path(tempfile.mkdtemp(dir=folder))
    try:
        rows = [_row(root, layout, size, rounds) for layout in ("fused", "per_layer")]
    finally:
        shutil.rmtree(root)
    return {"tables": {"prefixes saved and loaded": rows}}


if __name__ == "__main__":
    script.run(__doc__, measure, folder=tempfile.gettempdir())
