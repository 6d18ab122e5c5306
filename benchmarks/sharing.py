"""Cost of forks: a mapped block compared with bare mmap calls, a copied one with memcpy, and host
calls; and the memory that 32 forks save.

    python benchmarks/sharing.py [--quick] [--json]

All ratios are from a single run in which both sides take turns. Host calls and mappings are the
calling thread's CPU time: the median, and for mappings, which are short compared with what disturbs
them, the first decile. The time of a mapping is that of a fork less that of a fork of no
tokens. The time of the bare calls is that of the calls and a fork of no tokens, less that of such a
fork alone: a system call takes much longer if its code is not in the CPU's caches, and slows down
what follows it, wherever it is made. The page table entries are created by page faults in the
program that first reads the mapping; the second table compares these with bare calls that populate.
A copy runs on another thread: its time is the shortest time until a fork of a partial block has
run, less that of a fork that ends at a block boundary.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import script
from bare_runs import Runs, bare_calls

import jax_kvpage as kvp

__all__ = ["attention_step", "measure"]

_BLOCK, _KV_HEADS, _DIM = 16, 8, 128
_BEAMS = 4


@functools.partial(jax.jit, donate_argnums=0)
def _fill(cache: kvp.KVCache, k: jax.Array, batch: kvp.Batch) -> kvp.KVCache:
    for layer in range(cache.spec.num_layers):
        cache = kvp.append_kv(cache, k, k, batch, layer=layer)
    return kvp.advance(cache, batch)


def _donor(pool: kvp.KVPool, tokens: int) -> tuple[int, kvp.KVCache]:
    slot, cache = pool.acquire(pool.cache(), tokens)
    k = jnp.ones((tokens, _KV_HEADS, _DIM), pool.spec.dtype)
    cache = jax.block_until_ready(_fill(cache, k, kvp.Batch.from_lengths([slot], [tokens])))
    pool.commit(slot, range(tokens))
    return slot, cache


def _spec(layers: int, layout: str, slots: int, tokens: int) -> kvp.CacheSpec:
    return kvp.CacheSpec(
        layers,
        _KV_HEADS,
        _DIM,
        slots,
        tokens,
        dtype=jnp.bfloat16,
        layout=layout,
        block_tokens=_BLOCK,
    ).resolve("cpu")


def _empty_slot(pool: kvp.KVPool, cache: kvp.KVCache, slot: int) -> kvp.KVCache:
    """Unmaps what the previous fork left in its slot, which the next fork would do otherwise."""
    slots, cache = pool.fork(cache, slot, 1, 0)
    return jax.block_until_ready(pool.release(cache, slots))


def _fork(
    pool: kvp.KVPool, cache: kvp.KVCache, slot: int, tokens: int, num_bare: int, runs: Runs
) -> tuple[float, kvp.KVCache]:
    """Makes bare calls and a fork, and undoes them: CPU seconds of both together."""
    cache = _empty_slot(pool, cache, slot)
    begin = time.thread_time()
    runs.map(populate=False, count=num_bare)
    slots, cache = pool.fork(cache, slot, 1, tokens)
    seconds = time.thread_time() - begin
    jax.block_until_ready(cache)
    runs.unmap()
    return seconds, jax.block_until_ready(pool.release(cache, slots))


def _aliases(calls: ctypes.CDLL, rounds: int) -> list[dict[str, Any]]:
    """Mapping of shared blocks, by layout, layers and number of blocks."""
    rows = []
    for layout, layers in (("fused", 4), ("fused", 32), ("per_layer", 4), ("per_layer", 32)):
        for count in (1, 8, 64):
            spec = _spec(layers, layout, 4, 2048)
            capacity = 2 * spec.num_ranges * (count + 2) * spec.block_bytes
            with kvp.KVPool(spec, capacity) as pool:
                slot, cache = _donor(pool, count * _BLOCK + 1)
                runs = Runs(calls, pool, slot, count)
                cases = {"ours": (count * _BLOCK, 0), "bare": (0, runs.count), "neither": (0, 0)}
                orders = list(itertools.permutations(cases))
                times: dict[str, list[float]] = {name: [] for name in cases}
                for i in range(rounds):
                    for name in orders[i % len(orders)]:
                        seconds, cache = _fork(pool, cache, slot, *cases[name], runs)
                        times[name].append(seconds)
                # Apart, because they evict everything from the CPU's caches.
                populated = [runs.populate() for _ in range(min(rounds // 4, 60))]
                runs.close()
            lowest = {name: statistics.quantiles(times[name], n=10)[0] for name in cases}
            mapping = lowest["ours"] - lowest["neither"]
            bare = lowest["bare"] - lowest["neither"]
            rows.append(
                {
                    "layout": layout,
                    "layers": layers,
                    "blocks a range": count,
                    "mmap calls": runs.count,
                    "us mapping": mapping * 1e6,
                    "us bare": bare * 1e6,
                    "us populated": statistics.median(populated) * 1e6,
                    "ratio": mapping / bare,
                    "us a fork": statistics.median(times["ours"]) * 1e6,
                }
            )
    return rows


@functools.partial(jax.jit, donate_argnums=0)
def attention_step(
    cache: kvp.KVCache, q: jax.Array, k: jax.Array, batch: kvp.Batch
) -> tuple[kvp.KVCache, jax.Array]:
    """The attention of a decode step; each layer depends on the previous one."""
    for layer in range(cache.spec.num_layers):
        out, cache = kvp.update_and_attend(q, k, k, cache, batch, layer=layer)
        q = q + 0.001 * out
    return kvp.advance(cache, batch), q


def _first_steps(calls: ctypes.CDLL, rounds: int) -> list[dict[str, Any]]:
    """Wall time of a fork, of the first step that reads its blocks, and of the next step."""
    rows = []
    for layout, blocks, forks in itertools.product(("fused", "per_layer"), (8, 64), (1, 4)):
        spec = _spec(32, layout, 2 * _BEAMS, 2048)
        capacity = spec.num_ranges * (blocks + 2 + 3 * forks) * spec.block_bytes
        with kvp.KVPool(spec, capacity) as pool:
            slot, cache = _donor(pool, blocks * _BLOCK + 1)
            runs = Runs(calls, pool, slot, blocks)
            q = jnp.ones((forks, 4 * _KV_HEADS, _DIM), jnp.bfloat16)
            k = jnp.ones((forks, _KV_HEADS, _DIM), jnp.bfloat16)
            times: list[list[float]] = []
            populated = []
            for _ in range(rounds + 1):  # the first one compiles
                cache = _empty_slot(pool, cache, slot)
                marks = [time.perf_counter()]
                slots, cache = pool.fork(cache, slot, forks)
                marks.append(time.perf_counter())
                batch = kvp.Batch.from_lengths(slots, [1] * forks)
                for _ in range(2):
                    cache, _ = jax.block_until_ready(attention_step(cache, q, k, batch))
                    marks.append(time.perf_counter())
                times.append([end - begin for begin, end in itertools.pairwise(marks)])
                cache = jax.block_until_ready(pool.release(cache, slots))
                populated.append(runs.populate())
            runs.close()
        parts = zip(*times[1:], strict=True)
        fork, first, second = (1e6 * statistics.median(part) for part in parts)
        rows.append(
            {
                "layout": layout,
                "blocks a range": blocks,
                "forks": forks,
                "us a fork": fork,
                "us first step": first,
                "us second step": second,
                "us page faults": first - second,
                "us populating": forks * 1e6 * statistics.median(populated),
            }
        )
    return rows


def _until_run(
    pool: kvp.KVPool, cache: kvp.KVCache, slot: int, tokens: int
) -> tuple[float, kvp.KVCache]:
    """Forks and releases: seconds until the fork's program has run."""
    cache = _empty_slot(pool, cache, slot)
    begin = time.perf_counter()
    slots, cache = pool.fork(cache, slot, 1, tokens)
    jax.block_until_ready(cache)
    seconds = time.perf_counter() - begin
    return seconds, jax.block_until_ready(pool.release(cache, slots))


def _copies(calls: ctypes.CDLL, rounds: int) -> list[dict[str, Any]]:
    """The copy of a partial block (all tokens but one)."""
    rows = []
    for layout, layers in (("fused", 4), ("fused", 32), ("per_layer", 4), ("per_layer", 32)):
        spec = _spec(layers, layout, 4, 2048)
        with kvp.KVPool(spec, 8 * spec.num_ranges * spec.block_bytes) as pool:
            slot, cache = _donor(pool, 2 * _BLOCK)
            size = (_BLOCK - 1) * spec.token_bytes
            file_bytes = ctypes.c_int64(2 * _BLOCK * spec.token_bytes)
            zero, all_of = np.zeros(1, np.int64), np.full(1, file_bytes.value)
            fd = calls.make_blocks(
                zero.ctypes.data_as(ctypes.c_void_p),
                all_of.ctypes.data_as(ctypes.c_void_p),
                ctypes.c_int64(1),
                file_bytes,
            )
            partial, whole, bare = [], [], []
            for _ in range(rounds):
                seconds, cache = _until_run(pool, cache, slot, 2 * _BLOCK - 1)
                partial.append(seconds)
                bare.append(calls.copy_bytes(fd, file_bytes, ctypes.c_int64(size)))
                seconds, cache = _until_run(pool, cache, slot, _BLOCK)
                whole.append(seconds)
            calls.free_blocks(fd)
        copy = min(partial) - min(whole)
        rows.append(
            {
                "layout": layout,
                "layers": layers,
                "KiB copied": size / 1024,
                "us with its mapping": copy * 1e6,
                "us memcpy": min(bare) * 1e6,
                "ratio": copy / min(bare),
            }
        )
    return rows


def _calls(rounds: int) -> list[dict[str, Any]]:
    """CPU time of fork and reorder of 4 beams with 1025 tokens, two of which change parents."""
    rows = []
    for layout in ("fused", "per_layer"):
        spec = _spec(32, layout, 3 * _BEAMS, 2048)
        blocks = 1024 // _BLOCK + 3 * _BEAMS
        with kvp.KVPool(spec, spec.num_ranges * blocks * spec.block_bytes) as pool:
            slot, cache = _donor(pool, 1025)
            slots, cache = pool.fork(cache, slot, _BEAMS - 1)
            beams, same, moved, forks = [slot, *slots], [], [], []
            for _ in range(rounds):
                for parents, times in (([0, 1, 2, 3], same), ([0, 0, 1, 1], moved)):
                    begin = time.thread_time()
                    beams, cache = pool.reorder(cache, beams, parents)
                    times.append(time.thread_time() - begin)
                    jax.block_until_ready(cache)
                begin = time.thread_time()
                new, cache = pool.fork(cache, beams[0], _BEAMS)
                forks.append(time.thread_time() - begin)
                cache = jax.block_until_ready(pool.release(cache, new))
        rows.append(
            {
                "layout": layout,
                "us fork of 4": statistics.median(forks) * 1e6,
                "us reorder, 2 of 4 move": statistics.median(moved) * 1e6,
                "us reorder, none moves": statistics.median(same) * 1e6,
            }
        )
    return rows


def _memory() -> list[dict[str, Any]]:
    """32 forks of 2048 and of 2055 tokens: blocks in use over blocks that slots refer to."""
    rows = []
    for layout, tokens in itertools.product(("fused", "per_layer"), (2048, 2055)):
        spec = _spec(4, layout, 33, 4096)
        with kvp.KVPool(spec, 200 * spec.num_ranges * spec.block_bytes) as pool:
            slot, cache = _donor(pool, tokens)
            _, cache = jax.block_until_ready(pool.fork(cache, slot, 32))
            referenced = sum(row.num_blocks for row in pool.slot_table())
            used = pool.stats().blocks_mapped
        rows.append(
            {
                "layout": layout,
                "tokens": tokens,
                "blocks referenced": referenced,
                "blocks used": used,
                "saved": 1 - used / referenced,
            }
        )
    return rows


def measure(quick: bool) -> dict[str, Any]:
    """The five tables."""
    rounds = 15 if quick else 40
    with tempfile.TemporaryDirectory() as folder:
        calls = bare_calls(folder)
        return {
            "tables": {
                "shared blocks and the bare mmap calls": _aliases(calls, 90 if quick else 1200),
                "forks and the steps that read them": _first_steps(calls, rounds // 2),
                "a copied block and memcpy": _copies(calls, rounds),
                "host calls": _calls(rounds),
                "32 forks": _memory(),
            }
        }


if __name__ == "__main__":
    script.run(__doc__, measure)
