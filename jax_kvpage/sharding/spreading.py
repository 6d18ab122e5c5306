"""spread: makes a batch with a part for each replica of a pool."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_kvpage._arrays import as_host_array, host_int, host_ints
from jax_kvpage.cache import Batch
from jax_kvpage.pool import KVPool

__all__ = ["Spread", "spread"]


@dataclasses.dataclass(frozen=True)
class Spread:
    """A batch for all replicas, and where its sequences went; made by `spread`.

    Attributes:
        batch: batch for the step. It has R equal parts, one for each replica: slots int32[R * S]
            with the replica's local numbers, query_offsets int32[R * (S + 1)], and num_tokens T,
            the rows of each part. `jax.shard_map` with in_specs `PartitionSpec(data_axis)` gives
            each replica its part.
        sequences: int32[n]: index of each sequence of the call among the R * S.
        rows: int32[tokens]: row of each new token, in the order of the call, among R * T.
        last_rows: int32[n]: row of each sequence's last new token; 0 if it has none.
    """

    batch: Batch
    sequences: np.ndarray
    rows: np.ndarray
    last_rows: np.ndarray

    def scatter(self, values: Any, fill: Any = 0) -> jax.Array:
        """Arranges per-token values, for instance token ids, as the step takes them.

        Args:
            values: [tokens, ...], host values, sequence by sequence in the order of the call.
            fill: value for padding.

        Returns:
            [R * T, ...], with each replica's part on its devices. Python integers become int32.

        Raises:
            ValueError: the number of tokens differs from the batch's, or an integer or `fill` does
                not fit.
        """
        values = np.asarray(values)
        if values.dtype in (np.int64, np.uint64):
            values = as_host_array("Spread.scatter: values", values)
        if np.issubdtype(values.dtype, np.integer):
            limits = np.iinfo(values.dtype)
            fill = host_int("Spread.scatter: fill", fill, int(limits.min), int(limits.max))
        if values.shape[:1] != self.rows.shape:
            raise ValueError(
                f"Spread.scatter: the batch has {len(self.rows)} new tokens, got values of shape "
                f"{list(values.shape)}"
            )
        parts = self.batch.query_offsets.shape[0] - self.batch.slots.shape[0]
        assert self.batch.num_tokens is not None
        out = np.full((parts * self.batch.num_tokens, *values.shape[1:]), fill, values.dtype)
        out[self.rows] = values
        return jax.device_put(out, self.batch.slots.sharding)


def spread(
    pool: KVPool,
    slots: Sequence[int],
    lengths: Sequence[int] | None = None,
    *,
    num_sequences: int | None = None,
    num_tokens: int | None = None,
) -> Spread:
    """Makes a batch for all replicas of a pool, with parts of equal size.

    One step then serves all replicas: under plain `jit`, the ops give each replica its part, and so
    does `jax.shard_map` with `PartitionSpec(data_axis)` for the batch and for everything with a row
    per token. A pool without `data_axis` has one replica.

    Args:
        pool: the pool.
        slots: slots of the sequences as returned by `acquire`, each at most once.
        lengths: number of new tokens of each sequence; None means one each (decode).
        num_sequences: S, the sequences per part, to keep shapes constant between steps; None uses
            the maximum over the replicas.
        num_tokens: T, the rows per part; None uses the maximum over the replicas.

    Raises:
        ValueError: a slot does not exist or occurs twice; lengths do not match or are negative; or
            a replica has more sequences or tokens than `num_sequences` or `num_tokens`.
    """
    numbers, _ = host_ints("spread: slots", slots)
    counts = [1] * len(numbers) if lengths is None else host_ints("spread: lengths", lengths)[0]
    if len(counts) != len(numbers):
        raise ValueError(f"spread: {len(numbers)} slots, but {len(counts)} lengths")
    if any(count < 0 for count in counts):
        raise ValueError(f"spread: lengths must not be negative, got {min(counts)}")
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"spread: slots: wanted each slot once, got {numbers}")
    replicas = pool.replicas
    owners = [pool.replica_of(slot) for slot in numbers]
    members = [[i for i, owner in enumerate(owners) if owner == r] for r in range(replicas)]
    size = _size("num_sequences", num_sequences, [len(own) for own in members])
    rows = _size("num_tokens", num_tokens, [sum(counts[i] for i in own) for own in members])

    local = np.full((replicas, size), -1, np.int32)
    offsets = np.zeros((replicas, size + 1), np.int32)
    sequences = np.zeros(len(numbers), np.int32)
    where: list[np.ndarray] = [np.zeros(0, np.int32)] * len(numbers)
    last = np.zeros(len(numbers), np.int32)
    for replica, own in enumerate(members):
        begin = 0
        for place, i in enumerate(own):
            local[replica, place] = numbers[i] % (pool.spec.max_slots // replicas)
            sequences[i] = replica * size + place
            first = replica * rows + begin
            where[i] = np.arange(first, first + counts[i], dtype=np.int32)
            last[i] = first + counts[i] - 1 if counts[i] else 0
            begin += counts[i]
            offsets[replica, place + 1 :] = begin
    placement: Any = pool.placement
    if pool.sharding is not None:
        placement = pool.sharding.placed(pool.sharding.rows)
    arrays = jax.device_put((local.reshape(-1), offsets.reshape(-1)), placement)
    batch = Batch(*arrays, num_tokens=rows)
    return Spread(batch, sequences, np.concatenate([*where, np.zeros(0, np.int32)]), last)


def _size(name: str, wanted: int | None, counts: list[int]) -> int:
    """Returns the size of each part."""
    if wanted is None:
        return max(counts)
    size = host_int(f"spread: {name}", wanted, low=0)
    if size < max(counts):
        replica = counts.index(max(counts))
        raise ValueError(
            f"spread: {name}={size}, but replica {replica} has {max(counts)}: give {max(counts)} "
            "or more, or leave sequences of that replica to the next step"
        )
    return size
