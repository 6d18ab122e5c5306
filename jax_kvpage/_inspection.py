"""The read-only calls of KVPool: accounts, tables, views."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import jax

from jax_kvpage import views
from jax_kvpage._arrays import as_bool, host_int, host_ints
from jax_kvpage._cache_checks import host_lengths
from jax_kvpage._native import Code, Pool
from jax_kvpage._native_pool import NativePool
from jax_kvpage._queue import Queue
from jax_kvpage.cache import KVCache
from jax_kvpage.errors import wait_for
from jax_kvpage.sharding.calls import ReplicaCalls
from jax_kvpage.spec import CacheSpec
from jax_kvpage.stats import (
    BlockInfo,
    MemoryRange,
    PoolStats,
    SlotInfo,
    make_block_map,
    make_rows,
    make_stats,
)

__all__ = ["Inspection"]


class Inspection(ReplicaCalls):
    """Base class of KVPool: calls that change neither sequences nor their memory."""

    spec: CacheSpec
    _native: NativePool
    _pool: Pool
    _queue: Queue

    def can_acquire(self, num_tokens: int | Sequence[int]) -> bool:
        """Whether `acquire` with the same `num_tokens` would succeed now, for schedulers.

        Draining slots do not count: `acquire(..., wait=True)` may succeed when this returns False.
        Only the pool's accounts are consulted: `acquire` can still fail if the system has less
        memory than the capacity promises, or if another thread takes it first.

        Args:
            num_tokens: tokens to map room for, or a list with an entry for each slot.

        Raises:
            ValueError: num_tokens out of range.
            DeviceFault: an earlier program failed on the device.
            PoolClosed: the pool is closed.
        """
        wanted, _ = host_ints("can_acquire: num_tokens", num_tokens)
        claim = self._native.call(self._pool.can_acquire, wanted)
        if not claim.ok and claim.code is not Code.RESOURCE_EXHAUSTED:
            raise self._native.failed_claim("can_acquire", claim)
        return claim.ok

    def committed(self, slot: int) -> list[int]:
        """The token ids committed to a slot so far."""
        slot = host_int("committed: slot", slot)
        if not 0 <= slot < self.spec.max_slots:
            last = self.spec.max_slots - 1
            raise ValueError(f"committed: slot {slot} does not exist, slots are 0..{last}")
        return list(self._native.call(self._pool.committed, slot))

    def stats(self) -> PoolStats:
        """A snapshot of the pool's accounts."""
        return make_stats(self._native.call(self._pool.numbers), host_waits=self._queue.waits)

    def slot_table(self, cache: KVCache | None = None) -> list[SlotInfo]:
        """The valid slot table: a row for each occupied or draining slot.

        Args:
            cache: if given, the call waits for its lengths and the rows contain them.
        """
        lengths = None
        if cache is not None:
            self._queue.check_cache("slot_table", cache)
            wait_for(cache.lengths)
            lengths = host_lengths(cache)
            self._native.raise_fault()
        return make_rows(self._native.call(self._pool.rows), self._native.block_bytes, lengths)

    @overload
    def block_map(
        self, slot: int, *, owners: Literal[False] = False
    ) -> list[list[tuple[int, int]]]: ...

    @overload
    def block_map(self, slot: int, *, owners: Literal[True]) -> list[list[BlockInfo]]: ...

    def block_map(self, slot: int, *, owners: bool = False) -> Any:
        """The physical block of each logical block of a slot.

        Args:
            slot: an occupied slot.
            owners: also return which slots map each block, and which of them maps it for writing.

        Returns:
            For each range of the slot (one in the fused layout; K and V of layer 0, K and V of
            layer 1, ... in the per-layer layout) a list of (physical block, reference count), or
            of `BlockInfo` with `owners`; (-1, 0) for blocks that were dropped (`drop_before`).

        Raises:
            ValueError: a slot that does not exist.
            KVPageError: the slot is not occupied.
            PoolClosed: the pool is closed.
        """
        slot = host_int("block_map: slot", slot)
        if as_bool("block_map: owners", owners):
            return make_block_map(self._native.call(self._pool.block_owners, slot))
        return self._native.call(self._pool.block_map, slot)

    def memory_ranges(self, slot: int) -> list[MemoryRange]:
        """The memory of a slot's keys and values, for transports that register memory.

        NIXL and RDMA libraries need the address and length of what they send. Each range holds
        consecutive blocks of `spec.block_bytes` bytes in the pool's layout (see `CacheSpec`): the
        same bytes are a valid sequence in every pool of the same shape and platform.

        The ranges stay valid until the slot is released or its memory is changed by `truncate`,
        `drop_before` or `swap_out`; `extend` and programs that map memory make them longer, at the
        same addresses. Only read them: committed tokens, after the program that wrote them has
        finished (`check`). The pool cannot know about tokens written by others: put what a
        transport receives into a slot with `append_kv`.

        Args:
            slot: an occupied slot.

        Returns:
            The mapped memory of each range of the slot: one range in the fused layout; K and V of
            layer 0, K and V of layer 1, ... in the per-layer layout.

        Raises:
            KVPageError: the slot is not occupied.
            ValueError: a slot that does not exist, a pool over a mesh.
            PoolClosed: the pool is closed.
        """
        self._native.refuse_mesh("memory_ranges")
        slot = host_int("memory_ranges: slot", slot)
        found = self._native.call(self._pool.memory_ranges, slot)
        return [MemoryRange(address, num_bytes) for address, num_bytes in found]

    def view(self, layer: int, slot: int | None = None) -> tuple[jax.Array, jax.Array]:
        """Zero-copy arrays over one layer's keys and values, for dense kernels.

        The arrays have a constant shape and alias the cache: a program that takes them as arguments
        sees what earlier programs have written. Positions that are not mapped or not written read
        as zeros. A released slot keeps draining until its views are gone.

        A program that writes the cache and reads a view must read it with `read_views`. Reading it
        directly is wrong: XLA takes the view for a constant and may read it before the write,
        without an error. `jax.lax.optimization_barrier` does not help.

        Never donate a view, return it from a program or slice it outside of a program: XLA would
        copy the whole range.

        Args:
            layer: the layer's index.
            slot: an occupied slot; None for all slots.

        Returns:
            (k, v), each [max_seq_len, kv heads, head_dim], or [max_slots, max_seq_len, kv heads,
            head_dim] for all slots, in the storage dtype.

        Raises:
            ValueError: a pool on a GPU or over a mesh, the fused layout, quantized storage, a layer
                out of range, or (all slots) a max_seq_len that is not a multiple of block_tokens.
            KVPageError: the slot is not occupied.
        """
        return views.view(self._native, layer, slot)

    def check(self, cache: KVCache) -> None:
        """Waits for the program that returned a cache; raises if it or an earlier one failed.

        Raises:
            jax.errors.JaxRuntimeError: the program's error (on CUDA, and over a mesh with `axis` or
                `data_axis`, a DeviceFault).
        """
        self._queue.check_cache("check", cache)
        self._queue.wait_for(cache)
        self._native.raise_fault()
