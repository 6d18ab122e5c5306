"""Acquires slots for measurements, with contiguous or scattered blocks in physical memory."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import jax_kvpage as kvp

__all__ = ["acquire", "neighbouring_share"]


def acquire(pool: kvp.KVPool, contexts: Sequence[int], scattered: bool) -> tuple[Any, Any]:
    """Acquires slots for all contexts; returns them and the cache. To scatter blocks, the slots
    grow by a block at a time in random order, so that neighbouring blocks of a slot are not
    neighbours in physical memory.

    Scattering needs one more slot, and room for the longest context in it.
    """
    cache = pool.cache()
    if not scattered:
        return pool.acquire(cache, list(contexts))
    step = pool.spec.block_tokens or 1
    # Another slot grows at the same time, so that a single sequence is scattered too.
    targets = [*contexts, max(contexts)]
    slots, cache = pool.acquire(cache, [1] * len(targets))
    turns = [i for i, n in enumerate(targets) for _ in range(1, -(-n // step))]
    random.Random(0).shuffle(turns)
    have = [step] * len(targets)
    for i in turns:
        have[i] = min(have[i] + step, targets[i])
        pool.extend(slots[i], have[i])
    return slots[:-1], pool.release(cache, slots[-1])


def neighbouring_share(pool: kvp.KVPool, slots: Sequence[int]) -> float:
    """The share of pairs of successive blocks in a slot that are also adjacent in memory."""
    pairs = [
        b[0] == a[0] + 1
        for slot in slots
        for blocks in pool.block_map(slot)
        for a, b in itertools.pairwise(blocks)
    ]
    return sum(pairs) / max(len(pairs), 1)
