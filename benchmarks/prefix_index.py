"""Host time of the prefix index: look-up, touch and store of a prompt of 50,000 tokens.

    python benchmarks/prefix_index.py [--quick] [--json]

The prompt is an int32 array that is fully cached, in one chain of blocks or in a deep tree, where
every block has a sibling; a million other tokens are cached too. "cold": 64 MiB of other memory are
read before each call. "compare" is NumPy's comparison of two such arrays, a lower bound of the cost
of a look-up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import script

from jax_kvpage import _native

__all__ = ["measure"]

_PROMPT = 50_000
_OTHERS = 200  # sequences of 5000 tokens


def _nothing() -> None: ...


def _microseconds(
    call: Callable[[], Any], rounds: int, before: Callable[[], Any] = _nothing
) -> float:
    """The median time of the call, on the calling thread's CPU clock."""
    times = []
    for _ in range(rounds):
        before()
        begin = time.thread_time_ns()
        call()
        times.append(time.thread_time_ns() - begin)
    return statistics.median(times) / 1e3


def _filled(
    block_tokens: int, blocks: np.ndarray, prompt: np.ndarray, deep: bool
) -> _native.PrefixIndex:
    """An index that has the prompt, in slot 0, among other sequences."""
    index = _native.PrefixIndex(block_tokens, len(blocks) // (_PROMPT // block_tokens + 1))
    random = np.random.default_rng(1)
    for number in range(_OTHERS):
        if number == _OTHERS // 2:
            index.store(0, prompt, blocks)
        index.store(1, random.integers(0, 128_000, 5000, np.int32), blocks)
        index.detach(1)
    for end in range(block_tokens, _PROMPT + 1, block_tokens) if deep else ():
        sibling = prompt[:end].copy()
        sibling[-1] += 1
        index.store(1, sibling, blocks)
        index.detach(1)
    return index


def _row(block_tokens: int, ranges: int, deep: bool, rounds: int) -> dict[str, Any]:
    prompt = np.random.default_rng(0).integers(0, 128_000, _PROMPT, np.int32)
    blocks = np.arange((_PROMPT // block_tokens + 1) * ranges, dtype=np.int32)
    index = _filled(block_tokens, blocks, prompt, deep)
    if index.find(prompt).tokens != _PROMPT:
        raise AssertionError("the prompt is not found as a whole")
    copy, other = prompt.copy(), np.zeros(8 << 20, np.int64)
    shared = np.concatenate([prompt[:2048], np.full(64, -1, np.int32)])
    new = prompt.copy()
    new[0] = -1
    return {
        "block": block_tokens,
        "ranges": ranges,
        "shape": "deep tree" if deep else "chain",
        "entries": index.numbers.entries,
        "us compare": _microseconds(lambda: np.array_equal(copy, prompt), rounds),
        "us find": _microseconds(lambda: index.find(prompt), rounds),
        "us find, cold": _microseconds(lambda: index.find(prompt), rounds // 4, other.sum),
        "us find 2048 + 64": _microseconds(lambda: index.find(shared), rounds),
        "us touch": _microseconds(lambda: index.touch(prompt), rounds),
        "us store, found": _microseconds(
            lambda: index.store(1, prompt, blocks), rounds // 4, lambda: index.detach(1)
        ),
        "us store, new": _microseconds(
            lambda: index.store(2, new, blocks), rounds // 4, lambda: index.cut(2, 0)
        ),
    }


def measure(quick: bool) -> dict[str, Any]:
    """One table: a row for each size of blocks and shape of the tree."""
    rounds = 40 if quick else 200
    shapes = [(16, 1), (32, 1), (64, 1), (16, 64)]
    rows = [_row(*shape, deep, rounds) for shape in shapes for deep in (False, True)]
    return {"tables": {"50,000 cached tokens": rows}}


if __name__ == "__main__":
    script.run(__doc__, measure)
