"""The part of KVPool that only looks: accounts, tables, views."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import jax

from jax_kvpage import views
from jax_kvpage._arrays import host_int, host_ints
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
    """Base class of KVPool: calls without side effects."""

    spec: CacheSpec
    _native: NativePool
    _pool: Pool
    _queue: Queue

    def can_acquire(self, num_tokens: int | Sequence[int]) -> bool:
        """Whether `acquire` of the same would succeed now, for schedulers. Changes nothing.

        Slots that are draining do not count: `acquire(..., wait=True)` may succeed where this is
        False. The pool's own accounts are asked: `acquire` can still fail where the system has less
        memory than the capacity promises, or where another thread takes it first.

        Args:
            num_tokens: tokens to map room for, or a list of them, a slot for each.

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
            cache: when given, the rows carry its lengths, which are waited for.
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
        """Which physical block each logical block of a slot is.

        Args:
            slot: an occupied slot.
            owners: tell for each block which slots map it, and which one for writing.

        Returns:
            For each range of the slot (one in the fused layout; K and V of layer 0, K and V of
            layer 1, ... in the per-layer layout) a list of (physical block, reference count), or
            with `owners` of `BlockInfo`; (-1, 0) for blocks that were dropped (`drop_before`).

        Raises:
            ValueError: a slot that does not exist.
            KVPageError: the slot is not occupied.
            PoolClosed: the pool is closed.
        """
        slot = host_int("block_map: slot", slot)
        if owners:
            return make_block_map(self._native.call(self._pool.block_owners, slot))
        return self._native.call(self._pool.block_map, slot)

    def memory_ranges(self, slot: int) -> list[MemoryRange]:
        """Where a slot's keys and values are, for a transport that registers memory.

        NIXL and RDMA libraries want address and length of what they send. The ranges hold
        blocks of `spec.block_bytes` bytes, one after the other, in the pool's layout (see
        `CacheSpec`): the same bytes are a sequence in every pool of the same shape and platform.

        They stay valid until the slot is released, or its memory changes by `truncate`,
        `drop_before` or `swap_out`; `extend` and programs that map memory make them longer, at the
        same addresses. They are for reading: committed tokens, once the program that wrote them has
        ended (`check`). The pool cannot know of tokens that something else writes there: what a
        transport receives goes into a slot with `append_kv`.

        Args:
            slot: an occupied slot.

        Returns:
            What is mapped, one piece for each range of the slot: one in the fused layout; K and V
            of layer 0, K and V of layer 1, ... in the per-layer layout.

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
        sees what earlier programs have written. What is not mapped or not written reads as zeros. A
        slot with views stays draining after its release until they are gone.

        A program that writes the cache and reads a view must read it with `read_views`. A direct
        read there is wrong: XLA takes the view for a constant and may read it before the write,
        without an error. `jax.lax.optimization_barrier` does not help.

        Never donate a view, return it from a program or slice it outside of one: XLA would copy the
        whole range.

        Args:
            layer: which layer.
            slot: an occupied slot; None for all slots.

        Returns:
            (k, v), each [max_seq_len, kv heads, head_dim], or [max_slots, max_seq_len, kv heads,
            head_dim] for all slots, in the storage dtype.

        Raises:
            ValueError: a pool in device memory, the fused layout, quantized storage, a layer out of
                range, or (all slots) a max_seq_len that is not a multiple of block_tokens.
            KVPageError: the slot is not occupied.
        """
        return views.view(self._native, layer, slot)

    def check(self, cache: KVCache) -> None:
        """Waits for the program that made a cache, and raises if it or one before it failed.

        Raises:
            jax.errors.JaxRuntimeError: what the program failed with (on CUDA, and over a mesh with
                `axis` or `data_axis`, a DeviceFault).
        """
        self._queue.check_cache("check", cache)
        self._queue.wait_for(cache)
        self._native.raise_fault()
