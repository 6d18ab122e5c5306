"""A plain model of sequences that share blocks, for test_sharing_state_machine.py: tokens, lengths,
and which logical blocks of different slots are the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from reference_numpy import Array, rounded

HEADS, DIM, LAYERS = 1, 64, 2
HOLE = -1  # name of a dropped block


def stamped(stamp: int, position: int, layer: int) -> NDArray[np.float32]:
    """Returns key and value of one token, [2, heads, head_dim]; unique for each token, position and
    layer.
    """
    rng = np.random.default_rng((stamp, position, layer))
    return rng.standard_normal((2, HEADS, DIM), np.float32)


@dataclasses.dataclass
class Sequence:
    """One live slot.

    Attributes:
        reserved: Tokens for which room was requested.
        tokens: The stamp of each token up to the length.
        ids: Committed token ids.
        blocks: A name for each logical block; slots that map the same block have the same name.
        mark: Programs may not write below this position, because other slots share or shared it.
        dropped: Number of dropped tokens, in full blocks.
    """

    reserved: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    ids: list[int] = dataclasses.field(default_factory=list)
    blocks: list[int] = dataclasses.field(default_factory=list)
    mark: int = 0
    dropped: int = 0

    @property
    def floor(self) -> int:
        return max(self.mark, len(self.ids), self.dropped)


class SharingModel:
    """All live sequences of a pool."""

    def __init__(self, block_tokens: int, dtype: object) -> None:
        self.block, self.dtype = block_tokens, dtype
        self.live: dict[int, Sequence] = {}
        self._names = itertools.count()
        self._stamps = itertools.count(1)
        self._contents: dict[tuple[int, int, int], Array] = {}

    def count(self, tokens: int) -> int:
        return math.ceil(tokens / self.block)

    def distinct(self, without: Iterable[int] = ()) -> int:
        """Returns the number of logical blocks of all sequences, counting shared ones once."""
        slots = self.live.keys() - set(without)
        return len({name for slot in slots for name in self.live[slot].blocks} - {HOLE})

    def sharers(self, name: int) -> int:
        return sum(name in seq.blocks for seq in self.live.values())

    def _grow(self, seq: Sequence) -> None:
        while len(seq.blocks) < self.count(seq.reserved):
            seq.blocks.append(next(self._names))

    def acquire(self, slot: int, tokens: int) -> None:
        assert slot not in self.live, f"slot {slot} was handed out twice"
        self.live[slot] = Sequence(tokens)
        self._grow(self.live[slot])

    def extend(self, slot: int, tokens: int) -> None:
        seq = self.live[slot]
        seq.reserved = max(seq.reserved, tokens)
        self._grow(seq)

    def whole(self, tokens: int) -> int:
        return tokens - tokens % self.block

    def fork(self, donor: int, slot: int, tokens: int, shared: int, *, ran: bool = True) -> None:
        """Maps the donor's blocks of the first `shared` tokens.

        `ran`: Whether the queued program ran.
        """
        assert slot not in self.live, f"slot {slot} was handed out twice"
        parent = self.live[donor]
        length = tokens if ran else shared
        seq = Sequence(tokens, parent.tokens[:length], parent.ids[:length])
        seq.blocks = parent.blocks[: shared // self.block]
        seq.mark = shared
        if ran:
            parent.mark = max(parent.mark, shared)
        self._grow(seq)
        self.live[slot] = seq

    def copies(self, truncations: Iterable[tuple[int, int]]) -> int:
        """Returns the logical blocks that truncations (slot, tokens) in this order have to copy."""
        left: dict[int, int] = {}  # remaining slots that have a block
        copied = 0
        for slot, tokens in truncations:
            for name in self.live[slot].blocks[tokens // self.block :]:
                copied += left.setdefault(name, self.sharers(name)) > 1
                left[name] -= 1
        return copied

    def truncate(self, slot: int, tokens: int) -> None:
        seq = self.live[slot]
        first = tokens // self.block
        for i in range(first, len(seq.blocks)):
            if self.sharers(seq.blocks[i]) > 1:
                seq.blocks[i] = next(self._names)
        seq.mark = min(seq.mark, first * self.block)
        del seq.tokens[tokens:], seq.ids[tokens:]

    def drop(self, slot: int, tokens: int) -> None:
        seq = self.live[slot]
        seq.dropped = max(seq.dropped, self.whole(tokens))
        blocks = seq.dropped // self.block
        seq.blocks[:blocks] = [HOLE] * blocks

    def append(self, slot: int, n: int) -> NDArray[np.float32]:
        """Returns keys and values [layers, 2, n, heads, head_dim] of new tokens."""
        seq, new = self.live[slot], next(self._stamps)
        first = len(seq.tokens)
        seq.tokens += [new] * n
        values = np.zeros((LAYERS, 2, n, HEADS, DIM), np.float32)
        for layer, i in itertools.product(range(LAYERS), range(n)):
            values[layer, :, i] = stamped(new, first + i, layer)
            stored = rounded(values[layer, :, i], self.dtype)
            self._contents[new, first + i, layer] = stored
        return values

    def contents(self, slot: int, layer: int) -> Array:
        """Returns the stored contents, [2, tokens, heads, head_dim]."""
        tokens = [self._contents[s, i, layer] for i, s in enumerate(self.live[slot].tokens)]
        return np.stack(tokens, 1) if tokens else np.zeros((2, 0, HEADS, DIM))

    def check_blocks(
        self, maps: Mapping[int, list[list[tuple[int, int]]]], *, exact: bool
    ) -> set[int]:
        """Asserts that slots map the same block exactly where the model says so, and that every
        mapping is a reference.

        Args:
            maps: `KVPool.block_map` of every live slot.
            exact: Whether no free slot has any blocks.

        Returns:
            All physical blocks of live slots.
        """
        names: dict[int, tuple[int, int]] = {}
        mapped: dict[tuple[int, int], int] = {}
        references: dict[int, int] = {}
        for slot, ranges in maps.items():
            seq = self.live[slot]
            for r, row in enumerate(ranges):
                assert len(row) >= len(seq.blocks)
                hole = seq.dropped // self.block
                assert row[:hole] == [(-1, 0)] * hole
                for i, (block, count) in enumerate(row[hole:], hole):
                    # Beyond what it asked for, a slot may have blocks that it adopted.
                    name = seq.blocks[i] if i < len(seq.blocks) else -1 - slot * 1000 - i
                    assert names.setdefault(block, (name, r)) == (name, r), (slot, i)
                    assert mapped.setdefault((name, r), block) == block, (slot, i)
                    references[block] = references.get(block, 0) + 1
                    assert count >= 1
        for slot, ranges in maps.items():
            for row in ranges:
                for block, count in row:
                    if block < 0:
                        continue
                    wanted = references[block]
                    assert count == wanted if exact else count >= wanted, (slot, block, count)
        return set(references)
