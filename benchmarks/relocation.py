"""Savings of `KVPool.relocate`: memory mappings of a fragmented pool, and the cost of an alias.

    python benchmarks/relocation.py [--quick] [--json]

Sequences of 2048 tokens grow in turns, so that no two blocks of a sequence are adjacent, and are
parked. One of them is then found again and forked: a fork of all its tokens maps them in another
slot, and the first decode step that reads them takes the page faults. The same pool is measured in
its original state, after `relocate`, and after `relocate(huge_pages=True)`. Each fork is released
before the next one, and a fork of no tokens then takes its slot and unmaps its blocks. Times are
medians of CPU time, because other programs may be running: of the calling thread for calls, of the
process for steps. The cost of page faults is the difference between the first and the second step.
Ratios are relative to the original state.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import script
from sharing import attention_step

import jax_kvpage as kvp

__all__ = ["measure"]

_TOKENS, _BLOCK, _KV_HEADS, _DIM, _SEQUENCES = 2048, 16, 8, 128, 4


@functools.partial(jax.jit, donate_argnums=0)
def _fill(cache: kvp.KVCache, k: jax.Array, batch: kvp.Batch) -> kvp.KVCache:
    for layer in range(cache.spec.num_layers):
        cache = kvp.append_kv(cache, k, k, batch, layer=layer)
    return kvp.advance(cache, batch)


def _ids(sequence: int, count: int) -> list[int]:
    return [sequence, *range(1, count)]


def _grow(pool: kvp.KVPool) -> kvp.KVCache:
    """Fragments the pool: sequences that grew in turns, all parked."""
    cache, slots = pool.cache(), []
    for sequence in range(_SEQUENCES):
        slot, _, cache = pool.acquire_prefix(cache, _ids(sequence, _BLOCK))
        slots.append(slot)
    k = jnp.ones((_SEQUENCES * _BLOCK, _KV_HEADS, _DIM), pool.spec.dtype)
    batch = kvp.Batch.from_lengths(slots, [_BLOCK] * _SEQUENCES)
    for end in range(_BLOCK, _TOKENS + 1, _BLOCK):
        for sequence, slot in enumerate(slots):
            pool.extend(slot, end)
            pool.commit(slot, _ids(sequence, _TOKENS)[end - _BLOCK : end])
        cache = _fill(cache, k, batch)
    cache = pool.release(cache, slots)
    pool.check(cache)
    return cache


def _aliases(pool: kvp.KVPool, cache: kvp.KVCache, rounds: int) -> tuple[Any, kvp.KVCache]:
    """Seconds of a fork of no tokens, which unmaps the previous fork, of a fork of all tokens, and
    of the first and second step that read its blocks.
    """
    slot, found, cache = pool.acquire_prefix(cache, [*_ids(0, _TOKENS), 7])
    assert found == _TOKENS
    q = jnp.ones((1, 4 * _KV_HEADS, _DIM), pool.spec.dtype)
    k = jnp.ones((1, _KV_HEADS, _DIM), pool.spec.dtype)
    times: list[list[float]] = []
    for _ in range(rounds + 1):  # the first one compiles
        seconds = []
        for tokens in (0, _TOKENS):
            begin = time.thread_time()
            (fork,), cache = pool.fork(cache, slot, 1, tokens)
            seconds.append(time.thread_time() - begin)
            jax.block_until_ready(cache)
            if tokens == 0:
                cache = pool.release(cache, fork)
                pool.check(cache)
        pool.extend(fork, _TOKENS + 2)
        for _ in range(2):
            begin = time.process_time()
            cache, _ = jax.block_until_ready(attention_step(cache, q, k, kvp.Batch.decode([fork])))
            seconds.append(time.process_time() - begin)
        times.append(seconds)
        cache = pool.release(cache, fork)
        pool.check(cache)
    cache = pool.release(cache, slot)
    pool.check(cache)
    return [statistics.median(part) for part in zip(*times[1:], strict=True)], cache


def measure(quick: bool) -> dict[str, Any]:
    """Mappings, and the cost of an alias, before and after."""
    rounds, rows, moves = (5 if quick else 25), [], []
    for layout, layers in (("fused", 16), ("per_layer", 16)):
        spec = kvp.CacheSpec(
            layers, _KV_HEADS, _DIM, 8, 8192,
            dtype=jnp.bfloat16, layout=layout, block_tokens=_BLOCK,
        ).resolve("cpu")  # fmt: skip
        capacity = (_SEQUENCES + 2) * _TOKENS * spec.token_bytes
        with kvp.KVPool(spec, capacity) as pool:
            cache = _grow(pool)
            base: list[float] = []
            for state in ("as it grew", "relocated", "huge pages"):
                if state != "as it grew":
                    begin = time.perf_counter()
                    report = pool.relocate("8GiB", huge_pages=state == "huge pages")
                    seconds = time.perf_counter() - begin
                    moves.append(
                        {
                            "layout": layout,
                            "call": state,
                            "MiB copied": report.bytes_copied / 2**20,
                            "seconds": seconds,
                            "mappings before": report.mappings_before,
                            "mappings after": report.mappings_after,
                            "huge pages": report.huge_pages,
                            "refused": report.huge_refused,
                        }
                    )
                (unmap, fork, first, second), cache = _aliases(pool, cache, rounds)
                faults = max(first - second, 0.0)
                base = base or [fork, unmap + fork + faults]
                rows.append(
                    {
                        "layout": layout,
                        "pool": state,
                        "us fork": fork * 1e6,
                        "us unmapping it": unmap * 1e6,
                        "us first step": first * 1e6,
                        "us second step": second * 1e6,
                        "us page faults": faults * 1e6,
                        "fork ratio": fork / base[0],
                        "all three ratio": (unmap + fork + faults) / base[1],
                    }
                )
    return {"tables": {"relocation": moves, "a fork of 2048 tokens": rows}}


if __name__ == "__main__":
    script.run(__doc__, measure)
