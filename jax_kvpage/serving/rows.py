"""Per-row arrays of the sequences that have memory; rows are reused when a sequence leaves.

All per-token bookkeeping is done with NumPy on these arrays; Python code only touches sequences and
groups whose state changes.
"""

import numpy as np

from jax_kvpage.serving.preemption import Candidates
from jax_kvpage.serving.request import Sequence, SequenceGroup

__all__ = ["Rows"]


class Rows:
    """Token counts by row, and block counts by running group.

    Args:
        size: number of rows.
        block_tokens: tokens per block.
        first: index of row 0 among the rows of all replicas.

    Attributes:
        known: int32[rows]: tokens whose ids exist, or will once the last plan has run.
        computed: int32[rows]: tokens whose keys and values exist, or will once the last plan has
            run.
        room: int32[rows]: tokens that fit into mapped blocks.
        limit: int32[rows]: number of known tokens at which the sequence ends.
        prompt: int32[rows]: prompt tokens.
        drafts: int32[rows]: speculated tokens that the next step verifies.
        has_drafts: whether any row may have drafts.
        decoding: bool[rows]: computed == known - 1.
        sequences: sequence of each row; None in free rows.
        groups: group of each group index; None where free.
        shared: int32[groups]: blocks that all sequences of the group share.
        promised: int32[groups]: blocks kept free for sequences that are not forked yet.
        arrival: int64[groups]: order of arrival.
        priority: int64[groups]: lower numbers go first.
        preemptable: bool[groups]: whether the index is in use and its group may be preempted.
    """

    def __init__(self, size: int, block_tokens: int, first: int = 0) -> None:
        self.block_tokens = block_tokens
        self.first = first
        counts = np.zeros((6, size), np.int32)
        self._known, self._computed, self.room, self.limit, self.prompt, self.drafts = counts
        self._uncounted = 0  # tokens of each decoding row that are not in the arrays yet
        self.has_drafts = False
        self.decoding = np.zeros(size, bool)
        self.sequences: list[Sequence | None] = [None] * size
        self.groups: list[SequenceGroup | None] = [None] * size
        self.shared, self.promised = np.zeros((2, size), np.int32)
        self.arrival, self.priority = np.zeros((2, size), np.int64)
        self.preemptable = np.zeros(size, bool)
        self._group = np.zeros(size, np.int32)  # group index of each row
        self._occupied = np.zeros(size, bool)
        self._free_rows = list(range(size - 1, -1, -1))
        self._free_groups = list(range(size - 1, -1, -1))
        self._decodes: tuple[np.ndarray, tuple[Sequence, ...]] | None = None

    @property
    def known(self) -> np.ndarray:
        """See the class."""
        if self._uncounted:
            self._count()
        return self._known

    @property
    def computed(self) -> np.ndarray:
        """See the class."""
        if self._uncounted:
            self._count()
        return self._computed

    @property
    def num_free(self) -> int:
        """Rows without a sequence."""
        return len(self._free_rows)

    def blocks(self, num_tokens: int) -> int:
        """Blocks needed for this many tokens."""
        return -(-num_tokens // self.block_tokens)

    def add_group(self, group: SequenceGroup, shared: int, preemptable: bool) -> None:
        """Gives a group an index.

        Args:
            group: a group without an index.
            shared: blocks that its sequences will share.
            preemptable: whether it may be preempted.
        """
        index = group.index = self._free_groups.pop()
        group.first_row = self.first
        self.groups[index] = group
        self.shared[index], self.promised[index] = shared, 0
        self.arrival[index], self.priority[index] = group.arrival, group.request.priority
        self.preemptable[index] = preemptable

    def remove_group(self, group: SequenceGroup) -> None:
        """Frees the index of a group."""
        self.groups[group.index] = None
        self.preemptable[group.index] = False
        self._free_groups.append(group.index)
        group.index = -1

    def add(self, sequence: Sequence, computed: int, room: int) -> None:
        """Gives a sequence a row.

        Args:
            sequence: sequence of a group that has an index.
            computed: tokens already in its slot.
            room: tokens to map room for.
        """
        row = sequence.row = self._free_rows.pop()
        group = sequence.group
        self.sequences[row] = sequence
        self.known[row], self.computed[row] = sequence.num_tokens, computed
        self.room[row] = self.blocks(room) * self.block_tokens
        self.limit[row], self.prompt[row] = group.limit, group.request.num_prompt_tokens
        self.drafts[row] = 0
        self._group[row] = group.index
        self._occupied[row] = True

    def remove(self, sequence: Sequence) -> int:
        """Frees the row of a sequence and returns it."""
        row, sequence.row = sequence.row, -1
        sequence.num_tokens = int(self.known[row])
        self.set_decoding(row, False)
        self.sequences[row] = None
        self._occupied[row] = False
        self._free_rows.append(row)
        return row

    def set_decoding(self, row: int, decoding: bool) -> None:
        """Sets whether the sequence in a row runs one token per step."""
        if self.decoding[row] != decoding:
            if self._uncounted:
                self._count()
            self.decoding[row] = decoding
            self._decodes = None

    def advance_decodes(self) -> None:
        """Counts one more token, known and computed, for all decoding rows.

        The arrays change when they are read next: most steps of a steady decode do not need them,
        and NumPy calls are slow when the model has displaced their code from the CPU's caches.
        """
        self._uncounted += 1

    def _count(self) -> None:
        rows, more = self.decodes()[0], self._uncounted
        self._uncounted = 0
        self._known[rows] += more
        self._computed[rows] += more

    def own_blocks(self, row: int) -> int:
        """Blocks that only this row holds."""
        return int(self.room[row]) // self.block_tokens - int(self.shared[self._group[row]])

    def short(self) -> np.ndarray:
        """Decoding rows that need another block in this step."""
        return (self.decoding & (self.computed + self.drafts >= self.room)).nonzero()[0]

    def set_drafts(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Sets the speculated tokens that rows verify in the next step."""
        self.drafts[rows], self.has_drafts = counts, True

    def drop_drafts(self) -> None:
        """Discards all speculated tokens."""
        if self.has_drafts:
            self.drafts[:], self.has_drafts = 0, False

    def trim_drafts(self, budget: int, pending: int) -> None:
        """Drops drafts that exceed a sequence's limit or the token budget.

        Args:
            budget: token budget of the step.
            pending: prompt tokens that wait to be computed. Up to half of the budget left by
                decoding sequences is kept for them, so that drafts cannot starve them.
        """
        drafts = np.minimum(self.drafts, self.limit - self.known - 1)
        drafts[~self.decoding] = 0
        np.maximum(drafts, 0, out=drafts)
        spare = budget - int(np.count_nonzero(self.decoding))
        spare -= min(pending, spare - spare // 2)
        drafts[np.cumsum(drafts) > spare] = 0
        self.drafts[:] = drafts

    def num_computed(self, group: SequenceGroup) -> int:
        """Tokens that the group has computed; shared tokens count once."""
        rows = [sequence.row for sequence in group.sequences if sequence.row >= 0]
        shared = int(self.shared[group.index]) * self.block_tokens
        return int(self.computed[rows].sum()) - max(len(rows) - 1, 0) * shared

    def decodes(self) -> tuple[np.ndarray, tuple[Sequence, ...]]:
        """Decoding rows, int32[s], and their sequences; recomputed only after changes."""
        if self._decodes is None:
            rows = np.flatnonzero(self.decoding).astype(np.int32)
            rows.flags.writeable = False
            self._decodes = rows, self.at(rows)
        return self._decodes

    def at(self, rows: np.ndarray) -> tuple[Sequence, ...]:
        """Sequences in the given rows, which must be occupied."""
        every = self.sequences
        return tuple([every[row] for row in rows.tolist()])

    def groups_of(self, rows: np.ndarray) -> np.ndarray:
        """Group index of each row."""
        return self._group[rows]

    def occupied(self) -> np.ndarray:
        """Rows with a sequence."""
        return np.flatnonzero(self._occupied)

    def candidates(self, indices: np.ndarray, needs: np.ndarray) -> Candidates:
        """Costs and benefits of preempting groups.

        Args:
            indices: [g] group indices.
            needs: int[size]: blocks that each group, by index, needs in this step.
        """
        rows = self.occupied()
        group, size = self._group[rows], len(self.groups)
        shared = self.shared[group]
        own = np.bincount(group, self.room[rows] // self.block_tokens - shared, size)
        tokens = np.bincount(group, self.computed[rows] - shared * self.block_tokens, size)
        blocks = own[indices] + self.shared[indices] + self.promised[indices] + needs[indices]
        cost = tokens[indices] + self.shared[indices] * self.block_tokens
        arrival = self.arrival[indices]
        return Candidates(arrival, cost.astype(np.int64), blocks.astype(np.int64))
