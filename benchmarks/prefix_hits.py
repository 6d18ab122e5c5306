"""Hit ratios of the prefix index on a public trace, by eviction policy, size and store size.

    python benchmarks/prefix_hits.py [--quick] [--json] [--data DIR] [--disk-blocks N[,N...]]

Replays the conversation trace of Mooncake (FAST'25), mooncake_conversation.jsonl.gz in DIR. A
request looks up its prompt once, when it arrives; then the entire prompt is cached, in blocks of
512 tokens. The ratio is cached tokens over all prompt tokens, with exact lengths; the last token of
a prompt never counts as cached. "clairvoyant" evicts the blocks whose next use is furthest away.

The second table has a store with a limited number of blocks below a cache with the default policy.
A full block is written to the store before it is evicted, after the blocks that it continues. The
store removes the least recently written or read blocks, leaves first, one at a time (a BlockStore
removes files). No read is refused for being slow. "memory" counts cached tokens in memory; "store"
those only in the store, which `prefetch` reads before the request.
"""

from __future__ import annotations

import collections
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
    blocks: list[int]  # equal numbers have equal tokens and equal prefixes

    def cached(self, blocks: int) -> int:
        """The number of cached tokens if the first `blocks` blocks are cached."""
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


class _Store:
    """A store of full blocks below memory.

    Attributes:
        written: number of blocks written so far.
    """

    def __init__(self, capacity: int, parents: dict[int, int | None]) -> None:
        self.written = 0
        self._capacity = capacity
        self._parents = parents
        self._used: dict[int, int] = {}  # time of last use of each stored block
        self._children: collections.Counter[int] = collections.Counter()
        self._heap: list[tuple[int, int]] = []  # leaves, and outdated entries
        self._now = 0

    def find(self, blocks: list[int]) -> int:
        """How many of the first blocks are stored."""
        return next((i for i, block in enumerate(blocks) if block not in self._used), len(blocks))

    def read(self, blocks: list[int]) -> None:
        """Marks stored blocks as used."""
        self._now += 1
        for block in blocks:
            self._use(block)

    def write(self, block: int) -> None:
        """Stores a block, and missing blocks that it continues."""
        path: list[int] = []
        at: int | None = block
        while at is not None and at not in self._used:
            path.append(at)
            at = self._parents[at]
        self._now += 1
        for new in reversed(path):
            parent = self._parents[new]
            if parent is not None:
                self._children[parent] += 1
            self._use(new)
        self.written += len(path)
        while len(self._used) > self._capacity:
            used, leaf = heapq.heappop(self._heap)
            if self._used.get(leaf) != used or self._children[leaf]:
                continue
            del self._used[leaf]
            parent = self._parents[leaf]
            if parent is not None:
                self._children[parent] -= 1
                heapq.heappush(self._heap, (self._used[parent], parent))

    def _use(self, block: int) -> None:
        self._used[block] = self._now
        heapq.heappush(self._heap, (self._now, block))


def _replay_with_store(requests: list[_Request], capacity: int, blocks: int) -> dict[str, Any]:
    parents: dict[int, int | None] = {}
    for request in requests:
        parents.update(zip(request.blocks, [None, *request.blocks], strict=False))
    index, store = _native.PrefixIndex(_BLOCK), _Store(blocks, parents)
    index.record_events(2**31)
    index.take_events()
    longest = max(len(request.blocks) for request in requests)
    within, physical = np.arange(_BLOCK, dtype=np.int32), np.zeros(longest, np.int32)
    named: dict[int, int] = {}  # the block of each hash
    memory = below = 0
    for request in requests:
        starts = np.asarray(request.blocks, np.int32) * _BLOCK
        tokens = (starts[:, None] + within).reshape(-1)[: request.length]
        found = min(index.find(tokens).tokens, request.length - 1)
        stored = store.find(request.blocks)
        store.read(request.blocks[found // _BLOCK : stored])
        memory += found
        below += max(request.cached(stored) - found, 0)
        index.touch(tokens)
        index.store(0, tokens, physical)
        index.evict(index.numbers.entries - capacity)
        index.detach(0)
        for event in index.take_events():
            if event.kind == "stored":
                named[event.hash] = event.tokens[0] // _BLOCK
            else:
                store.write(named.pop(event.hash))
    asked = sum(request.length for request in requests)
    return {
        "blocks": capacity,
        "blocks of the store": blocks,
        "memory": memory / asked,
        "store": below / asked,
        "together": (memory + below) / asked,
        "blocks written": store.written,
    }


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


def measure(quick: bool, data: str, disk_blocks: str) -> dict[str, Any]:
    """Measures hit ratios by policy and size of the cache, and by size of the store."""
    requests = read_requests(data)
    sizes = [int(size) for size in disk_blocks.split(",")]
    rows = []
    for capacity in (5000, 10_000) if quick else (1000, 5000, 10_000, 20_000):
        row: dict[str, Any] = {"blocks": capacity}
        row |= {policy: _replay(requests, policy, capacity) for policy in _POLICIES}
        row["clairvoyant"] = _clairvoyant(requests, capacity)
        rows.append(row)
    below = [
        _replay_with_store(requests, capacity, blocks)
        for capacity in ((5000,) if quick else (1000, 5000, 10_000))
        for blocks in sizes
    ]
    return {
        "tables": {
            "cached tokens of the conversation trace": rows,
            "the same with a store below memory": below,
        }
    }


if __name__ == "__main__":
    script.run(__doc__, measure, data="../shared/data", disk_blocks="10000,50000,100000")
