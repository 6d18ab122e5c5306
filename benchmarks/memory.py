"""Cost of the memory calls: mapping, extending, recycling, and mapping nothing.

    python benchmarks/memory.py [--quick] [--json]

On the host: `acquire` of new memory (the system zeroes it) and of blocks parked by an earlier
request (no system call), and `release`; `extend` with and without something to map. In programs:
`map_slots` with nothing to map, compared with a program that only changes an array.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jax_kvpage as kvp

__all__ = ["measure"]

# Llama-3-8B: 32 layers with 8 key/value heads of size 128 in bfloat16, 128 KiB per token.
_SPEC = kvp.CacheSpec(32, 8, 128, max_slots=64, max_seq_len=8192, dtype=jnp.bfloat16)
_TOKENS = 1024


def _row(name: str, times: list[float], calls: int, note: str) -> dict[str, Any]:
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {
        "what": name,
        "us": statistics.median(times) * 1e6,
        "us, quartiles": f"{low * 1e6:.1f} - {high * 1e6:.1f}",
        "system calls each": calls / max(len(times), 1),
        "note": note,
    }


class _Timer:
    """Times calls and counts the pool's system calls in them."""

    def __init__(self, pool: kvp.KVPool) -> None:
        self._pool = pool
        self.times: list[float] = []
        self.calls = 0

    def __call__(self, call: Callable[[], Any]) -> Any:
        before = self._pool.stats().system_calls
        begin = time.perf_counter()
        result = call()
        self.times.append(time.perf_counter() - begin)
        self.calls += self._pool.stats().system_calls - before
        return result

    def row(self, name: str, note: str) -> dict[str, Any]:
        return _row(name, self.times, self.calls, note)


def _requests(rounds: int) -> list[dict[str, Any]]:
    """Requests that come and go: the first ones allocate memory, later ones reuse it."""
    spec = _SPEC.resolve("cpu")
    blocks = -(-_TOKENS // (spec.block_tokens or 1))
    megabytes = blocks * spec.block_bytes / 2**20
    with kvp.KVPool(spec, (blocks * 4 + 1) * spec.block_bytes) as pool:
        fresh, parked, release = _Timer(pool), _Timer(pool), _Timer(pool)
        cache = pool.cache()
        for _ in range(rounds):
            slot, cache = fresh(functools.partial(pool.acquire, cache, _TOKENS))
            cache = pool.release(cache, slot)
            jax.block_until_ready(cache)
            slot, cache = parked(functools.partial(pool.acquire, cache, _TOKENS))
            cache = release(functools.partial(pool.release, cache, slot))
            jax.block_until_ready(cache)
            pool.trim()
    text = f"{_TOKENS} tokens, {blocks} blocks, {megabytes:.0f} MiB"
    return [
        fresh.row("acquire, memory from the system", text),
        parked.row("acquire, parked blocks adopted", text),
        release.row("release", text),
    ]


def _growth(rounds: int) -> list[dict[str, Any]]:
    """A growing sequence: with a new block each time, and with room that is already mapped."""
    with kvp.KVPool(_SPEC, 2**30) as pool:
        block = pool.spec.block_tokens or 1
        cold, warm, nothing = _Timer(pool), _Timer(pool), _Timer(pool)
        steps = range(2, min(rounds, pool.stats().blocks_total // 2, 8192 // block) + 1)
        cache = pool.cache()
        slot, cache = pool.acquire(cache, block)
        for n in steps:
            cold(functools.partial(pool.extend, slot, n * block))
            pool.extend(slot, n * block)  # brings the code path back into the core's caches
            nothing(functools.partial(pool.extend, slot, n * block))
        cache = pool.release(cache, slot)
        jax.block_until_ready(cache)
        # A second sequence takes blocks that are parked in another slot: no memory is allocated or
        # zeroed. That slot is reused by a small request, so that the rest of its blocks can be
        # taken.
        first, cache = pool.acquire(cache, len(steps) * block)
        cache = pool.release(cache, first)
        jax.block_until_ready(cache)
        pool.resize(max(len(steps) + 2, 4) * pool.spec.block_bytes)
        keep, cache = pool.acquire(cache, block)
        slot, cache = pool.acquire(cache, block)
        for n in steps:
            warm(functools.partial(pool.extend, slot, n * block))
        pool.release(cache, [keep, slot])
    text = f"one block of {block} tokens, {_kib(pool)} KiB"
    return [
        cold.row("extend, memory from the system", text),
        warm.row("extend, blocks parked elsewhere", text),
        nothing.row("extend, nothing to map", ""),
    ]


def _kib(pool: kvp.KVPool) -> int:
    return pool.spec.block_bytes // 1024


@jax.jit
def _map(cache: kvp.KVCache, slots: jax.Array, tokens: jax.Array) -> Any:
    return kvp.map_slots(cache, slots, tokens)


@jax.jit
def _plain(cache: kvp.KVCache, slots: jax.Array, tokens: jax.Array) -> Any:
    return cache.handle, cache.epoch + 1, cache.lengths, tokens > slots


@functools.partial(jax.jit, static_argnums=3)
def _map_often(cache: kvp.KVCache, slots: jax.Array, tokens: jax.Array, times: int) -> Any:
    for _ in range(times):
        cache, _ = kvp.map_slots(cache, slots, tokens)
    return cache


def _programs(rounds: int) -> list[dict[str, Any]]:
    """`map_slots` with nothing to map: per program, and per call inside a program."""
    inside = 64
    with kvp.KVPool(_SPEC, 2**30, on_stale="allow") as pool:
        slots, cache = pool.acquire(pool.cache(), [64] * 32)
        arguments = (cache, jnp.asarray(slots, jnp.int32), jnp.full(32, 64, jnp.int32))
        calls = {
            "program with map_slots, nothing to map": (lambda: _map(*arguments), 1),
            "program that adds 1 instead": (lambda: _plain(*arguments), 1),
            "map_slots inside a program, nothing to map": (
                lambda: _map_often(*arguments, inside),
                inside,
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call, _ in calls.values():
            jax.block_until_ready(call())
        for _ in range(rounds):
            for name, (call, count) in calls.items():
                begin = time.perf_counter()
                jax.block_until_ready(call())
                times[name].append((time.perf_counter() - begin) / count)
    return [_row(name, spent, 0, "32 slots") for name, spent in times.items()]


def measure(quick: bool) -> dict[str, Any]:
    """Runs all measurements; returns medians and quartiles in microseconds."""
    rounds = 5 if quick else 40
    rows = _requests(rounds) + _growth(2 * rounds) + _programs(50 * rounds)
    return {"tables": {"memory calls": rows}}


def main() -> None:
    """Prints one line per call, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    arguments = parser.parse_args()
    result = measure(arguments.quick)
    if not arguments.json:
        for row in result["tables"]["memory calls"]:
            print(
                f"{row['what']:<44}{row['us']:>10.1f} us  ({row['us, quartiles']})  {row['note']}"
            )
        return
    print(json.dumps(result))


if __name__ == "__main__":
    main()
