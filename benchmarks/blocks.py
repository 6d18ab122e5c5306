"""Slots for measurements whose blocks lie in a row or scattered in physical memory."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import jax_kvpage as kvp

__all__ = ["acquire", "neighbouring_share"]


def acquire(pool: kvp.KVPool, contexts: Sequence[int], scattered: bool) -> tuple[Any, Any]:
    """Slots for all contexts, and the cache; scattered ones grow a block at a time in random turns,
    so that blocks that are neighbours in a slot are not neighbours in physical memory.

    A scattered pool needs one slot and room for the longest context more than its contexts.
    """
    cache = pool.cache()
    if not scattered:
        return pool.acquire(cache, list(contexts))
    step = pool.spec.block_tokens or 1
    # One more slot grows along, so that a single sequence is scattered too.
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
    """The share of blocks whose physical successor follows them in the slot too."""
    pairs = [
        b[0] == a[0] + 1
        for slot in slots
        for blocks in pool.block_map(slot)
        for a, b in itertools.pairwise(blocks)
    ]
    return sum(pairs) / max(len(pairs), 1)
