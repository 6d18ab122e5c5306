"""The scheduler's view of memory, and a counted budget for simulations.

Blocks here are logical: one holds `block_tokens` tokens of a sequence in all layers, regardless of
how many physical blocks the layout uses for it.
"""

from typing import Protocol

import numpy as np

from jax_kvpage.serving.plan import StepPlan

__all__ = ["BlockBudget", "Memory"]


class Memory(Protocol):
    """The scheduler's view of memory. The engine implements it on its pool.

    Read once at the start of each step, after the previous plan was carried out.

    Attributes:
        block_tokens: tokens per block.
        max_seq_len: maximum tokens per sequence.
        capacity: total number of blocks.
    """

    @property
    def block_tokens(self) -> int:
        """Tokens per block."""

    @property
    def max_seq_len(self) -> int:
        """Maximum tokens per sequence."""

    @property
    def capacity(self) -> int:
        """Total number of blocks."""

    def free_blocks(self) -> int:
        """Blocks that a plan may take now, including those that a cache would evict."""

    def draining_blocks(self) -> int:
        """Blocks of released sequences that become free when running programs end."""

    def free_slots(self) -> int:
        """Sequences that can get a slot now."""


class BlockBudget:
    """Counted blocks and stored tokens. Carries out plans in simulations.

    Args:
        capacity: total number of blocks.
        block_tokens: tokens per block.
        max_seq_len: maximum tokens per sequence.
        max_slots: maximum number of sequences.
        drain_steps: steps after which released blocks and slots become free.

    Attributes:
        stored: tokens whose keys and values are in blocks; shared tokens count once.
    """

    def __init__(
        self,
        capacity: int,
        block_tokens: int,
        max_seq_len: int,
        max_slots: int,
        drain_steps: int = 0,
    ) -> None:
        self.capacity = capacity
        self.block_tokens = block_tokens
        self.max_seq_len = max_seq_len
        self.stored = 0
        self._free = capacity
        self._slots = max_slots
        self._draining: list[tuple[int, int]] = [(0, 0)] * drain_steps
        self._blocks, self._tokens = np.zeros((2, max_slots), np.int64)  # not shared
        self._owners: dict[int, list[int]] = {}  # row -> [blocks shared, rows that share them]
        self._held = 0

    def free_blocks(self) -> int:
        """Blocks without an owner."""
        return self._free

    def draining_blocks(self) -> int:
        """Released blocks that are not free yet."""
        return sum(blocks for blocks, _ in self._draining)

    def free_slots(self) -> int:
        """Rows without an owner."""
        return self._slots - self._held - sum(slots for _, slots in self._draining)

    def blocks_of(self, num_tokens: int) -> int:
        """Blocks needed for this many tokens."""
        return -(-num_tokens // self.block_tokens)

    def carry_out(self, plan: StepPlan) -> None:
        """Carries out a plan's memory changes in order."""
        self.release(plan.release)
        for fork in plan.forks:
            rows = tuple(child.row for child in fork.children)
            self.fork(fork.parent.row, rows, fork.num_tokens)
            self.extend(np.asarray(rows), np.asarray(fork.room))
        for admission in plan.admissions:
            self.acquire(admission.sequence.row, admission.num_tokens)
        self.extend(plan.extend_rows, plan.extend_tokens)
        self.compute(plan.rows, plan.counts)

    def release(self, rows: tuple[int, ...]) -> None:
        """Releases a step's rows; blocks released `drain_steps` steps ago become free."""
        index = list(rows)
        blocks = int(self._blocks[index].sum())
        self.stored -= int(self._tokens[index].sum())
        self._blocks[index] = self._tokens[index] = 0
        for row in rows:
            shared = self._owners.pop(row, None)
            if shared is not None:
                shared[1] -= 1
                if not shared[1]:
                    blocks += shared[0]
                    self.stored -= shared[0] * self.block_tokens
        self._held -= len(rows)
        self._draining.append((blocks, len(rows)))
        self._free += self._draining.pop(0)[0]

    def acquire(self, row: int, num_tokens: int) -> None:
        """Gives a row room for `num_tokens` tokens."""
        self._held += 1
        self._take(row, self.blocks_of(num_tokens))

    def fork(self, parent: int, rows: tuple[int, ...], num_tokens: int) -> None:
        """Shares the full blocks of a row's first tokens with others; a partial block is copied."""
        whole = num_tokens // self.block_tokens
        self._blocks[parent] -= whole
        self._tokens[parent] -= whole * self.block_tokens
        shared = [whole, 1 + len(rows)]
        self._owners[parent] = shared
        for row in rows:
            self._owners[row] = shared
            self._take(row, self.blocks_of(num_tokens) - whole)
            self._tokens[row] = num_tokens - whole * self.block_tokens
            self.stored += int(self._tokens[row])
        self._held += len(rows)

    def extend(self, rows: np.ndarray, num_tokens: np.ndarray) -> None:
        """Gives rows room for more tokens; both arrays are [n]."""
        for row, tokens in zip(rows.tolist(), num_tokens.tolist(), strict=True):
            shared = self._owners.get(row, (0, 0))[0]
            self._take(row, max(self.blocks_of(tokens) - shared - int(self._blocks[row]), 0))

    def compute(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Records the tokens that rows run; both arrays are [n]."""
        self._tokens[rows] += counts
        self.stored += int(counts.sum())

    def _take(self, row: int, blocks: int) -> None:
        if blocks > self._free:
            raise RuntimeError(f"row {row} takes {blocks} blocks, but {self._free} are free")
        self._free -= blocks
        self._blocks[row] += blocks
