"""The scheduler's view of the pool."""

import functools
from collections.abc import Callable

from jax_kvpage.pool import KVPool
from jax_kvpage.sharding.stripes import StripeSharding
from jax_kvpage.stats import PoolStats

__all__ = ["PoolMemory", "ReplicaMemory"]


class ReplicaMemory:
    """The scheduler's view of one replica, in blocks that cover all layers.

    Args:
        pool: the memory.
        accounts: returns the statistics of the replica.
    """

    def __init__(self, pool: KVPool, accounts: Callable[[], PoolStats]) -> None:
        spec = pool.spec
        assert spec.block_tokens is not None
        self._ranges = spec.num_ranges
        self._max_slots = spec.max_slots // pool.replicas
        self.block_tokens = spec.block_tokens
        if isinstance(pool.sharding, StripeSharding):  # one block on each device
            self.block_tokens *= pool.sharding.size
        self.max_seq_len = spec.max_seq_len
        self._accounts = accounts

    @property
    def capacity(self) -> int:
        """Total number of blocks."""
        return self._accounts().blocks_total // self._ranges

    def free_blocks(self) -> int:
        """Free blocks, plus what parked slots, the prefix cache and spare tails would free."""
        stats = self._accounts()
        return (stats.blocks_free + stats.blocks_parked + stats.blocks_spare) // self._ranges

    def draining_blocks(self) -> int:
        """Blocks that will become free by themselves."""
        return self._accounts().blocks_draining // self._ranges

    def free_slots(self) -> int:
        """Slots that can be acquired now."""
        stats = self._accounts()
        return self._max_slots - stats.slots_occupied - stats.slots_draining


class PoolMemory:
    """The memory of all replicas of a pool; a pool without `data_axis` has one.

    Args:
        pool: the memory.

    Attributes:
        replicas: memory of each replica.
        block_tokens: tokens per block.
        shares: whether sequences can share blocks. False if they are spread over devices
            (`sequence_axis`): then there are no forks and no prefix cache.
    """

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self.shares = not isinstance(pool.sharding, StripeSharding)
        self._accounts = self._snapshot()
        self._is_old = False
        self.replicas = [
            ReplicaMemory(pool, functools.partial(self._of_replica, replica))
            for replica in range(pool.replicas)
        ]
        self.block_tokens = self.replicas[0].block_tokens

    def look(self) -> None:
        """Takes a new snapshot of the pool's statistics at the next query.

        Call it before each plan. Most plans need no query.

        Raises:
            PoolClosed: the pool is closed. Queries return the last snapshot.
        """
        self._is_old = True
        if self._pool.closed:
            self._pool.stats()  # raises

    def _snapshot(self) -> list[PoolStats]:
        return [self._pool.stats()] if self._pool.replicas == 1 else self._pool.replica_stats()

    def _of_replica(self, replica: int) -> PoolStats:
        if self._is_old and not self._pool.closed:
            self._is_old = False
            self._accounts = self._snapshot()
        return self._accounts[replica]

    @property
    def is_draining(self) -> bool:
        """Whether blocks will become free by themselves."""
        return any(replica.draining_blocks() > 0 for replica in self.replicas)
