"""Hit ratios of the prefix index on a public trace, by eviction policy and size of the cache.

    python benchmarks/prefix_hits.py [--quick] [--json] [--data DIR]

Replays the conversation trace of Mooncake (FAST'25), mooncake_conversation.jsonl.gz in DIR. A
request asks for its prompt once, when it arrives, and all of it is cached then, in blocks of 512
tokens. The ratio is cached tokens over all prompt tokens, with exact lengths; the last token of a
prompt never counts as cached. "clairvoyant" evicts the blocks whose next use is furthest away.
"""

from __future__ import annotations

import dataclasses
import gzip
import heapq
import json
import pathlib
from typing import Any

import numpy as np
import script

from jax_kvpage import _native

__all__ = ["measure", "read_requests"]

_FILE = "mooncake_conversation.jsonl.gz"
_BLOCK = 512
_POLICIES = ("lru", "segmented_lru", "frequency")


@dataclasses.dataclass(frozen=True)
class _Request:
    length: int  # tokens of the prompt
    blocks: list[int]  # equal numbers: equal tokens, behind equal prefixes

    def cached(self, blocks: int) -> int:
        """Tokens that count as cached when the first blocks are."""
        return min(blocks * _BLOCK, self.length - 1)


def read_requests(data: str) -> list[_Request]:
    """The requests of the trace, in order."""
    path = pathlib.Path(data) / _FILE
    if not path.exists():
        raise SystemExit(
            f"{path} is not there: give the folder of Mooncake's trace with --data "
            "(https://github.com/kvcache-ai/Mooncake, FAST25-release/traces)"
        )
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    return [_Request(row["input_length"], row["hash_ids"]) for row in rows]


def _replay(requests: list[_Request], policy: str, capacity: int) -> float:
    index = _native.PrefixIndex(_BLOCK, policy=policy)
    longest = max(len(request.blocks) for request in requests)
    within, physical = np.arange(_BLOCK, dtype=np.int32), np.zeros(longest, np.int32)
    cached = 0
    for request in requests:
        starts = np.asarray(request.blocks, np.int32) * _BLOCK
        tokens = (starts[:, None] + within).reshape(-1)[: request.length]
        cached += min(index.find(tokens).tokens, request.length - 1)
        index.touch(tokens)
        index.store(0, tokens, physical)
        index.evict(index.numbers.entries - capacity)
        index.detach(0)
    return cached / sum(request.length for request in requests)


def _clairvoyant(requests: list[_Request], capacity: int) -> float:
    following: dict[int, int] = {}
    uses: list[list[int]] = []  # for each request and block: the request that uses it next
    for number in reversed(range(len(requests))):
        blocks = requests[number].blocks
        uses.append([following.get(block, len(requests)) for block in blocks])
        following.update(dict.fromkeys(blocks, number))
    uses.reverse()
    next_use: dict[int, int] = {}  # of the blocks in the cache
    heap: list[tuple[int, int, int]] = []
    cached = 0
    for request, after in zip(requests, uses, strict=True):
        hits = 0
        while hits < len(request.blocks) and request.blocks[hits] in next_use:
            hits += 1
        cached += request.cached(hits)
        for depth, (block, use) in enumerate(zip(request.blocks, after, strict=True)):
            next_use[block] = use
            heapq.heappush(heap, (-use, -depth, block))
        while len(next_use) > capacity:
            use, _, block = heapq.heappop(heap)
            if next_use.get(block) == -use:
                del next_use[block]
    return cached / sum(request.length for request in requests)


def measure(quick: bool, data: str) -> dict[str, Any]:
    """One table: a row for each size of the cache, a column for each policy."""
    requests = read_requests(data)
    rows = []
    for capacity in (5000, 10_000) if quick else (1000, 5000, 10_000, 20_000):
        row: dict[str, Any] = {"blocks": capacity}
        row |= {policy: _replay(requests, policy, capacity) for policy in _POLICIES}
        row["clairvoyant"] = _clairvoyant(requests, capacity)
        rows.append(row)
    return {"tables": {"cached tokens of the conversation trace": rows}}


if __name__ == "__main__":
    script.run(__doc__, measure, data="../shared/data")
