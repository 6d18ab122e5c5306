"""Costs and savings of the prefix cache: host calls, system calls, copied bytes, time to the first
token, and blocks.

    python benchmarks/prefix.py [--quick] [--json]

Host calls are medians of the calling thread's CPU time, for requests of 2112 tokens of which 2048
are shared. "compiled" is the call into C++ (look-up, reuse of a slot, and mapping of blocks, if
any); "before the program" is `acquire_prefix` up to the queued program, "call" all of it. Times to
the first token are wall times, measured in turns with and without the prefix cache.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import script
from numpy.typing import NDArray

import jax_kvpage as kvp

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

from llama.arguments import BUNDLED
from llama.checkpoint import load_model
from llama.programs import Programs
from llama.sampling import Sampling

__all__ = ["measure"]

_LAYERS, _HEADS, _DIM, _BLOCK = 4, 8, 128, 16
_SHARED, _OWN = 2048, 64
_LAYOUTS = ("fused", "per_layer")
_REQUESTS = 32

Ids = NDArray[np.int32]


def _ids(count: int, seed: int) -> Ids:
    return np.random.default_rng(seed).integers(2, 2048, count, dtype=np.int32)


def _request(seed: int, shared: int = _SHARED) -> Ids:
    return np.concatenate([_ids(shared, 0), _ids(_OWN, 1 + seed)])


@functools.partial(jax.jit, donate_argnums=0)
def _fill(cache: kvp.KVCache, k: jax.Array, batch: kvp.Batch) -> kvp.KVCache:
    for layer in range(cache.spec.num_layers):
        cache = kvp.append_kv(cache, k, k, batch, layer=layer)
    return kvp.advance(cache, batch)


class _Rig:
    """A pool, its newest cache, and times of its calls."""

    def __init__(self, layout: str, blocks: int = 700) -> None:
        spec = kvp.CacheSpec(
            _LAYERS,
            _HEADS,
            _DIM,
            _REQUESTS + 2,
            4096,
            dtype=jnp.bfloat16,
            layout=layout,
            block_tokens=_BLOCK,
        ).resolve("cpu")
        self.pool = kvp.KVPool(spec, blocks * spec.num_ranges * spec.block_bytes)
        self.cache = self.pool.cache()
        self.compiled, self.before = 0.0, 0.0
        queue = self.pool._queue
        self._run = queue.run
        queue.run = self._run_noted
        queue._native = _Timed(queue._native, self)

    def _run_noted(self, verb: str, *arguments: Any) -> Any:
        self.before = time.thread_time() - self._begin
        return self._run(verb, *arguments)

    def acquire(
        self, ids: Ids | list[int], num_tokens: int | None = None, whole: bool = False
    ) -> tuple[int, int]:
        """Acquires a slot for a request; returns it and the number of cached tokens."""
        self._begin = time.thread_time()
        got = self.pool.acquire_prefix(self.cache, ids, num_tokens, whole=whole)
        self.call = time.thread_time() - self._begin
        slot, cached, self.cache = got
        jax.block_until_ready(self.cache)
        return slot, cached

    def write(self, slot: int, ids: Ids) -> None:
        k = jnp.ones((len(ids), _HEADS, _DIM), jnp.bfloat16)
        batch = kvp.Batch.from_lengths([slot], [len(ids)])
        self.cache = jax.block_until_ready(_fill(self.cache, k, batch))
        self.pool.commit(slot, ids)

    def release(self, slots: int | Sequence[int]) -> None:
        self.cache = jax.block_until_ready(self.pool.release(self.cache, slots))
        self.pool.can_acquire(1)  # unmaps released forks here instead of in the next call


class _Timed:
    """Records the CPU time of the compiled call of `acquire_prefix`."""

    def __init__(self, native: Any, rig: _Rig) -> None:
        self._native, self._rig = native, rig

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def call(self, function: Any, *arguments: Any) -> Any:
        begin = time.thread_time()
        result = self._native.call(function, *arguments)
        self._rig.compiled = time.thread_time() - begin
        return result


def _host_calls(rounds: int) -> list[dict[str, Any]]:
    """Requests by what the call does for them. "bare": without private tokens, so that only shared
    blocks are mapped."""
    rows = []
    cases = ("repeated prompt", "second turn", "alias", "bare alias", "fork", "bare fork", "miss")
    for layout, case, as_list in itertools.product(_LAYOUTS, cases, (False, True)):
        rig = _Rig(layout)
        first = _request(-1) if case != "second turn" else _request(-1)[:_SHARED]
        slot, _ = rig.acquire(first)
        rig.write(slot, first)
        if "fork" not in case:
            rig.release(slot)
        times: list[tuple[float, float, float]] = []
        for i in range(rounds):
            ids = _request(i)
            if case == "repeated prompt":
                ids = first
            elif case == "miss":
                ids = _ids(_SHARED + _OWN, i + 99)
            elif "bare" in case:
                ids = ids[:_SHARED]
            calls = rig.pool.stats().system_calls
            slot, cached = rig.acquire(ids.tolist() if as_list else ids, whole="bare" in case)
            calls = rig.pool.stats().system_calls - calls
            times.append((rig.compiled, rig.before, rig.call))
            rig.release(slot)
        compiled, before, call = (1e6 * statistics.median(t) for t in zip(*times, strict=True))
        rows.append(
            {
                "layout": layout,
                "request": case,
                "ids": "list" if as_list else "int32",
                "cached": cached,
                "system calls": calls,
                "us compiled": compiled,
                "us before the program": before,
                "us call": call,
            }
        )
        rig.pool.close()
    return rows


def _moves() -> list[dict[str, Any]]:
    """System calls and copied bytes of requests whose slot is still parked."""
    rows = []
    for layout, case in itertools.product(_LAYOUTS, ("repeated prompt", "turn", "turn that grows")):
        rig = _Rig(layout)
        first, own = _request(0), _ids(_OWN, 7)
        # Growth is counted separately: in "turn", the slot has room for the new tokens.
        slot, _ = rig.acquire(first, 2300 if case == "turn" else None)
        rig.write(slot, first)
        blocks = rig.pool.block_map(slot)
        rig.release(slot)
        calls = rig.pool.stats().system_calls
        slot, cached = rig.acquire(first if case == "repeated prompt" else np.r_[first, own])
        calls = rig.pool.stats().system_calls - calls
        # Tokens that are still in the blocks to which they were written were not copied.
        count = -(-cached // _BLOCK)
        kept = sum(
            old[:count] == new[:count]
            for old, new in zip(blocks, rig.pool.block_map(slot), strict=True)
        )
        copied = (len(blocks) - kept) * count * rig.pool.spec.block_bytes
        rows.append(
            {
                "layout": layout,
                "request": case,
                "cached": cached,
                "system calls": calls,
                "copied bytes": copied,
            }
        )
        rig.pool.close()
    return rows


class _Llama:
    """The shipped model on a pool; requests run one after the other."""

    def __init__(self, cached: bool, programs: Programs, shared: int) -> None:
        end = shared + _OWN + _BLOCK
        spec = kvp.CacheSpec(
            5, 2, 32, _REQUESTS + 1, end, dtype=jnp.float32, block_tokens=_BLOCK
        ).resolve("cpu")
        blocks = spec.num_ranges * 4 * (end // _BLOCK + 1)
        self.pool = kvp.KVPool(spec, blocks * spec.block_bytes)
        self.cache, self._cached, self._programs = self.pool.cache(), cached, programs

    def first_token(self, ids: Ids) -> tuple[float, int]:
        """Seconds from the request to its first token on the host, and that token."""
        begin = time.perf_counter()
        if self._cached:
            slot, known, self.cache = self.pool.acquire_prefix(self.cache, ids)
        else:
            slot, self.cache = self.pool.acquire(self.cache, len(ids))
            known = 0
        tokens, self.cache = self._programs.prefill(self.cache, [(slot, ids[known:], 0)], 1)
        token = int(tokens[0])
        seconds = time.perf_counter() - begin
        if self._cached:
            self.pool.commit(slot, ids[known:])
        self.cache = jax.block_until_ready(self.pool.release(self.cache, slot))
        return seconds, token


def _first_tokens(quick: bool) -> list[dict[str, Any]]:
    """32 requests with a common prefix, with and without the cache, on the shipped Llama."""
    rows = []
    programs = Programs(
        load_model(BUNDLED, dtype=jnp.dtype("float32")), Sampling(0.0, 0, 1.0, 0), ()
    )
    for shared in (1024,) if quick else (1024, 2048):
        sides = [_Llama(cached, programs, shared) for cached in (True, False)]
        for side in sides:  # compiles
            side.first_token(_ids(shared + _OWN, 999))
            side.first_token(np.r_[_ids(shared, 999), _ids(_OWN, 998)])
        first, others = [], []
        for i in range(_REQUESTS):
            times, tokens = zip(
                *(side.first_token(_request(i, shared)) for side in sides), strict=True
            )
            assert tokens[0] == tokens[1], "the cache changed a token"
            (others if i else first).append(times)
        cached, plain = (statistics.median(t) for t in zip(*others, strict=True))
        total = [sum(t) for t in zip(*first, *others, strict=True)]
        rows.append(
            {
                "common tokens": shared,
                "own tokens": _OWN,
                "ms cached": cached * 1e3,
                "ms without": plain * 1e3,
                "ratio": plain / cached,
                "ratio of all 32, the first one included": total[1] / total[0],
            }
        )
        for side in sides:
            side.pool.close()
    return rows


def _blocks() -> list[dict[str, Any]]:
    """32 live requests with 2048 common tokens: blocks in use, compared with the blocks of one
    prefix and 32 tails."""
    rows = []
    for layout in _LAYOUTS:
        rig = _Rig(layout)
        for i in range(_REQUESTS):
            slot, cached = rig.acquire(_request(i))
            rig.write(slot, _request(i)[cached:])
        ranges = rig.pool.spec.num_ranges
        stats = rig.pool.stats()
        rows.append(
            {
                "layout": layout,
                "requests": stats.slots_occupied,
                "blocks used": stats.blocks_mapped,
                "one prefix and the tails": ranges * (_SHARED + _REQUESTS * _OWN) // _BLOCK,
                "blocks without sharing": ranges * _REQUESTS * (_SHARED + _OWN) // _BLOCK,
            }
        )
        rig.pool.close()
    return rows


def measure(quick: bool) -> dict[str, Any]:
    """The four tables."""
    return {
        "tables": {
            "host calls, 2048 shared tokens and 64 own": _host_calls(15 if quick else 60),
            "requests whose slot is parked": _moves(),
            "time to the first token, 32 requests": _first_tokens(quick),
            "32 live requests": _blocks(),
        }
    }


if __name__ == "__main__":
    script.run(__doc__, measure)
