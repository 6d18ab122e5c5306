"""Packs the operands of a step into one int32 array, because each transfer has a fixed cost.

If the pool has replicas, the array has a part for each, all of the same bucket. Each part contains
the sequences whose slots are on the replica, with replica-local slot and row numbers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["FIELDS", "Operands", "Packed", "Packer"]

FIELDS = 5  # per sequence, before its sampling parameters
_POSITIONS = 3  # which of them is the position


class Operands(NamedTuple):
    """Host operands of a step.

    Attributes:
        tokens: int32[t]: token ids; -1 - row for the newest token of a row, which is on the device.
        counts: int32[s]: tokens of each sequence.
        slots: int32[s]: slots of the pool.
        rows: int32[s]: rows across all replicas; the total number of rows for sequences that do not
            sample.
        positions: int32[s]: positions of the new tokens if all guesses are right.
        sampling: int32[NUM_FLOATS + NUM_INTS + num_banned, s]: sampling parameters, floats as bits.
        guesses: int32[s]: how many of the tokens are guesses; None without guesses.
    """

    tokens: np.ndarray
    counts: np.ndarray
    slots: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    sampling: np.ndarray
    guesses: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Packed:
    """Packed operands of a step, and where its sequences and tokens are in the results.

    Attributes:
        shape: bucket of each part.
        operands: int32[R * n] for R replicas.
        sequences: int[s]: index of each sequence among the R * S of the step.
        tokens: int[t]: index of each token among the R * T of the step.
        positions: int32[R * n]: 1 where the operands have the position of a sequence, else 0.
    """

    shape: tuple[int, int]
    operands: np.ndarray
    sequences: Sequence[int]
    tokens: np.ndarray
    positions: np.ndarray

    def moved(self) -> "Packed":
        """Returns the same step with all positions one higher."""
        operands = self.operands + self.positions
        return Packed(self.shape, operands, self.sequences, self.tokens, self.positions)


class Packer:
    """Packs steps.

    Args:
        num_rows: rows per replica.
        replicas: number of replicas of the pool.
        num_slots: slots per replica.
    """

    def __init__(self, num_rows: int, replicas: int = 1, num_slots: int = 0) -> None:
        self._num_rows = num_rows
        self._replicas = replicas
        self._num_slots = num_slots

    def pack(self, bucket: Callable[[int, int], tuple[int, int]], step: Operands) -> Packed:
        """Packs a step.

        Args:
            bucket: returns the shape for a number of tokens and of sequences.
            step: operands of the step.
        """
        num_tokens, size = len(step.tokens), len(step.slots)
        if self._replicas == 1:
            shape = bucket(num_tokens, size)
            places = np.arange(num_tokens)
            return self._packed(shape, self._part(shape, step), range(size), places)
        owners = step.slots // self._num_slots
        token_owners = np.repeat(owners, step.counts)
        members = [np.flatnonzero(owners == r) for r in range(self._replicas)]
        own_tokens = [np.flatnonzero(token_owners == r) for r in range(self._replicas)]
        shape = bucket(max(map(len, own_tokens)), max(map(len, members)))
        sequences, places = np.zeros(size, np.intp), np.zeros(num_tokens, np.intp)
        parts = []
        for replica, (own, ids) in enumerate(zip(members, own_tokens, strict=True)):
            sequences[own] = replica * shape[1] + np.arange(len(own))
            places[ids] = replica * shape[0] + np.arange(len(ids))
            first, mine = replica * self._num_rows, step.tokens[ids]
            part = Operands(
                np.where(mine < 0, mine + first, mine),
                step.counts[own],
                step.slots[own] % self._num_slots,
                np.minimum(step.rows[own] - first, self._num_rows),
                step.positions[own],
                step.sampling[:, own],
                None if step.guesses is None else step.guesses[own],
            )
            parts.append(self._part(shape, part))
        return self._packed(shape, np.concatenate(parts), sequences.tolist(), places)

    def _packed(
        self,
        shape: tuple[int, int],
        operands: np.ndarray,
        sequences: Sequence[int],
        tokens: np.ndarray,
    ) -> Packed:
        num_tokens, size = shape
        replica, place = np.divmod(np.asarray(sequences, np.intp), size)
        positions = np.zeros((self._replicas, operands.size // self._replicas), np.int32)
        positions[replica, num_tokens + 1 + _POSITIONS * size + place] = 1
        return Packed(shape, operands, sequences, tokens, positions.reshape(-1))

    def _part(self, shape: tuple[int, int], step: Operands) -> np.ndarray:
        """Packs the part of one replica, with local numbers, padded to a bucket."""
        num_tokens, size = shape
        t, s, fields = len(step.tokens), len(step.slots), step.sampling.shape[0]
        packed = np.zeros(num_tokens + 1 + (FIELDS + fields) * size, np.int32)
        packed[:t] = step.tokens
        # The 0 between tokens and table is the first offset.
        table = packed[num_tokens + 1 :].reshape(FIELDS + fields, size)
        step.counts.cumsum(out=table[0, :s])
        table[0, s:] = t
        table[1, :s], table[1, s:] = step.slots, -1
        table[2, :s], table[2, s:] = step.rows, self._num_rows
        table[_POSITIONS, :s] = step.positions
        if step.guesses is not None:
            table[4, :s] = step.guesses
        table[FIELDS:, :s] = step.sampling
        return packed
