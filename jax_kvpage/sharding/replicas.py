"""The implementation of a `KVPool` whose slots are split over a mesh axis (data parallelism).

Each replica, a row of the mesh along that axis, has its own slots, blocks and prefix cache. The
cache is one value, and every step is one program for all replicas. A program that the host queues
has a part for each replica with its changes, padded to the same size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_kvpage import _native
from jax_kvpage._edit_rows import edit_rows
from jax_kvpage._native_pool import NativePool, PoolOptions
from jax_kvpage.ops.edit_slots import SWAP_IN
from jax_kvpage.sharding.decisions import joint_swapped
from jax_kvpage.sharding.devices import total_bytes
from jax_kvpage.sharding.heads import HeadSharding
from jax_kvpage.sharding.pools import ShardedNativePool, ShardedQueue, resolved
from jax_kvpage.sharding.replica_pool import (
    ReplicaSwapped,
    ReplicatedDecision,
    ReplicatedPool,
)
from jax_kvpage.sharding.replica_table import replica_note
from jax_kvpage.sharding.shards import ShardedDecision, ShardedPool
from jax_kvpage.spec import CacheSpec

__all__ = ["ReplicatedNativePool", "ReplicatedQueue", "replicated"]

_Rows = Sequence[tuple[int, int, int, int]]


def replicated(
    spec: CacheSpec, capacity: Any, sharding: HeadSharding, options: PoolOptions
) -> tuple["ReplicatedNativePool", "ReplicatedQueue"]:
    """Creates the compiled pools and the queue; see `KVPool` for the arguments.

    Raises:
        ValueError: a capacity, spec or device cannot work.
        OutOfBlocks: the capacity exceeds the available memory.
    """
    total = total_bytes(capacity, sharding)
    native = ReplicatedNativePool(*resolved(spec, sharding, total), options)
    return native, ReplicatedQueue(native)


class ReplicatedNativePool(ShardedNativePool):
    """The compiled pools of all replicas."""

    def _where(self, shard: int) -> str:
        """Returns a suffix for messages about this shard."""
        return replica_note(shard // self.sharding.parts, self.sharding.local.max_slots)

    def joined(self, shards: Sequence[Any]) -> Any:
        """Joins the pools of all replicas."""
        parts = self.sharding.parts
        replicas = [
            shards[i] if parts == 1 else ShardedPool(shards[i : i + parts])
            for i in range(0, len(shards), parts)
        ]
        return ReplicatedPool(replicas, self.sharding.local)

    def decision(self) -> Any:
        """Creates an empty decision of all replicas."""
        sharding = self.sharding

        def make() -> Any:
            alone = sharding.parts == 1
            return _native.Decision() if alone else ShardedDecision(sharding.parts)

        return ReplicatedDecision(make, sharding.replicas, sharding.local.max_slots)

    def swapped(self, store: Any) -> Any:
        """Creates a swapped sequence of one replica, which is not known yet."""
        sharding = self.sharding

        def make() -> Any:
            alone = sharding.parts == 1
            return _native.Swapped(store) if alone else joint_swapped(store, sharding.parts)

        return ReplicaSwapped(make, sharding.local.max_slots)

    def failed_claim(self, op: str, claim: Any, *args: Any, **kwargs: Any) -> Exception:
        """See `NativePool`. Reports the numbers of the replica that came closest."""
        error = NativePool.failed_claim(self, op, claim, *args, **kwargs)
        if claim.code is not _native.Code.RESOURCE_EXHAUSTED:
            return error
        note = (
            f"; the pool has {self.sharding.replicas} replicas of {self.sharding.local.max_slots} "
            "slots, and these are the numbers of the one that came closest. A sequence, and its "
            "forks, stay on their replica: to have it placed again, release it and pass its "
            "tokens to acquire_prefix"
        )
        error.args = (f"{error.args[0]}{note}", *error.args[1:])
        return error


class ReplicatedQueue(ShardedQueue):
    """Queues one program for all replicas, with a part for each."""

    def _marks(self, edits: _Rows) -> bool:
        # A replica on one device decides from its own statistics, like a pool on one device.
        return self._sharding.parts > 1 and super()._marks(edits)

    def _note(self, marker: Any) -> None:
        if self._sharding.parts > 1:
            super()._note(marker)

    def _edit_rows(self, rows: _Rows, slots_of: Callable[[Any], Sequence[int]]) -> np.ndarray:
        """Converts rows for `edit_slots`: those of each replica, padded to equal parts.

        Args:
            rows: rows with slot numbers of the whole pool.
            slots_of: returns which numbers of a row are slots; the first of them is never negative.
        """
        count, size = self._sharding.replicas, self._sharding.local.max_slots
        parts: list[list[tuple[int, ...]]] = [[] for _ in range(count)]
        for row in rows:
            slots = slots_of(row)
            own = [
                value % size if i in slots and value >= 0 else value for i, value in enumerate(row)
            ]
            parts[row[slots[0]] // size].append(tuple(own))
        most = max(map(len, parts))
        filled = [part + [(-1,) * 4] * (most - len(part)) for part in parts]
        return np.concatenate([edit_rows(part, 4) for part in filled])

    def _rows(self, edits: _Rows, copies: _Rows) -> tuple[np.ndarray, np.ndarray]:
        # For SWAP_IN the last number is a token count, not a donor.
        edited = self._edit_rows(edits, lambda row: (1,) if row[0] == SWAP_IN else (1, 3))
        return edited, self._edit_rows(copies, lambda row: (0, 1))
