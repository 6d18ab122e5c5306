"""The pool as the scheduler sees it."""

from jax_kvpage.pool import KVPool
from jax_kvpage.sharding.stripes import StripeSharding
from jax_kvpage.stats import PoolStats

__all__ = ["PoolMemory"]


class PoolMemory:
    """Answers the scheduler's questions from a pool, in blocks of all layers.

    Args:
        pool: the memory.

    Raises:
        ValueError: a pool whose sequences are spread over devices, or whose slots are split over
            replicas.
    """

    def __init__(self, pool: KVPool) -> None:
        if isinstance(pool.sharding, StripeSharding):
            raise ValueError(
                "Engine: the pool's sequences are spread over a mesh, which has no commit, forks "
                "or prefix cache: use a pool on one device, or with its heads spread (axis=...)"
            )
        if pool.replicas > 1:
            raise ValueError(
                f"Engine: pool: wanted one replica, got a pool with {pool.replicas} (data_axis): "
                "make a pool and an engine for each part of the mesh"
            )
        spec = pool.spec
        assert spec.block_tokens is not None
        self._pool = pool
        self._ranges = spec.num_ranges
        self._max_slots = spec.max_slots
        self.block_tokens = spec.block_tokens
        self.max_seq_len = spec.max_seq_len
        self._stats = pool.stats()
        self._is_old = False

    def look(self) -> None:
        """Has the next question answered from a new snapshot of the pool's accounts; to be called
        before each plan. Most plans have no questions.

        Raises:
            PoolClosed: the pool is closed. Questions are answered from the last snapshot.
        """
        self._is_old = True
        if self._pool.closed:
            self._pool.stats()  # raises

    def _look(self) -> PoolStats:
        if self._is_old and not self._pool.closed:
            self._is_old = False
            self._stats = self._pool.stats()
        return self._stats

    @property
    def capacity(self) -> int:
        """Blocks in all."""
        return self._look().blocks_total // self._ranges

    def free_blocks(self) -> int:
        """Free blocks, and what parked slots, the prefix cache and spare tails would give up."""
        stats = self._look()
        return (stats.blocks_free + stats.blocks_parked + stats.blocks_spare) // self._ranges

    def draining_blocks(self) -> int:
        """Blocks that come free without a decision."""
        return self._look().blocks_draining // self._ranges

    def free_slots(self) -> int:
        """Slots that can be acquired now."""
        stats = self._look()
        return self._max_slots - stats.slots_occupied - stats.slots_draining
