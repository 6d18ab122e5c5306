"""KVPool: the host side of a KV cache.

The pool owns the memory; programs carry a `KVCache` that names it. Calls that change what programs
see (`acquire`, `release`) take the cache and return the next one: the accounting is done
immediately in C++, and a small program that changes the cache value is queued behind running
programs. Calls that only add or free memory (`extend`, `trim`, `resize`) need no cache and do not
disturb running programs.
"""

import warnings
import weakref
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax

from jax_kvpage._arrays import as_bool, host_int, host_ints, per_slot
from jax_kvpage._capacity import capacity_bytes
from jax_kvpage._closing import Closing
from jax_kvpage._compat import default_device
from jax_kvpage._cuda import place_of
from jax_kvpage._inspection import Inspection
from jax_kvpage._native_pool import NativePool, PoolOptions
from jax_kvpage._queue import Queue
from jax_kvpage._store_checks import check_store
from jax_kvpage.cache import KVCache
from jax_kvpage.errors import DeviceFault
from jax_kvpage.handover import HandoverCalls
from jax_kvpage.host_store import HostStore
from jax_kvpage.prefix import PrefixCalls
from jax_kvpage.relocation import RelocationCalls
from jax_kvpage.reuse import ReuseCalls
from jax_kvpage.saving import SavingCalls
from jax_kvpage.sharding.devices import total_bytes
from jax_kvpage.sharding.opening import over_mesh
from jax_kvpage.sharding.over_axis import AxisSharding
from jax_kvpage.sharing import SharingCalls
from jax_kvpage.spec import CacheSpec
from jax_kvpage.spilling import SpillingCalls
from jax_kvpage.store import BlockStore

__all__ = ["KVPool"]


def _close(pool: Any, label: str) -> None:
    """Finalizer of a pool that was never closed."""
    if not pool.closed:
        warnings.warn(
            f"{label} was collected without being closed: call close() or use it in a `with` block",
            ResourceWarning,
            stacklevel=2,
        )
        pool.close()


class KVPool(
    Closing,
    HandoverCalls,
    PrefixCalls,
    RelocationCalls,
    ReuseCalls,
    SavingCalls,
    SharingCalls,
    SpillingCalls,
    Inspection,
):
    """Physical blocks, virtual slots, and the table that maps blocks to slots.

    Args:
        spec: the shape of the cache; resolved for the device's platform if it is not yet.
        capacity: physical memory for blocks, in bytes, as text ("2GiB"), or as a share ("80%") of
            the memory available now: free GPU memory on CUDA; on CPU, memory of the machine, or of
            the process's cgroup, that can be allocated without swapping. None: 80% on CUDA, 50% on
            CPU, but no more than full slots take or the system has memory mappings for. Rounded
            down to whole blocks. Memory is allocated on demand and kept for reuse.
        device: the `jax.Device` (platform cpu or cuda) of the pool; None: the default device.
        on_stale: "error" refuses an op that changes the cache unless it gets the newest cache;
            "allow" permits repeating a step from one cache, for timing loops, as long as nothing
            destructive (acquire, release, rollback) happened in between.
        poison: test mode: new memory of a request is filled with NaN, so that reads of positions
            that were never written show. Views still show zeros there.
        debug: test mode: poison, and an append to a position that is already written in that layer
            is refused (a forgotten `advance`, a layer number used twice) unless `set_lengths` ran.
        store: the storage tier below memory; `swap_out` writes to it. Close it after the pool. On
            CPU a `BlockStore`: it gets full blocks of released sequences before they are evicted,
            `acquire_prefix` reports what is stored, `prefetch` reads it, and `save_prefixes` and
            `load_prefixes` use it by default. On a GPU a `HostStore`, which does the same except
            saving and loading. Over a mesh it holds swapped sequences only, and no prefixes.
        write_ahead: with a store, the share of the capacity that should be free or already written
            to the store: below it, the store's threads write the blocks that would be evicted next.
            Written blocks are evicted first. None: 0.25. 0: only `save_prefixes` writes; 1:
            everything is written as soon as its sequence is released.
        mesh: devices to split the pool over, with an arena on each; `capacity` is the total. Axes
            not named below must have one device. CPU devices of one or several processes; with
            `axis` alone also GPUs of one process. Excludes `device`; `store` only on CPU devices of
            one process.
        axis: the mesh axis over which heads are split. Each device holds the heads that its query
            heads read: with fewer key/value heads than devices, several hold copies.
        data_axis: the mesh axis over which slots are split: each replica, a row along it, has its
            part of `max_slots` and of the blocks, and a prefix cache. `spread` makes batches.
        sequence_axis: instead of both, the mesh axis over which the tokens of every sequence are
            split, in stripes of 16. `max_seq_len` must be a multiple of 16 times its size. No
            `store`.

    Attributes:
        spec: the resolved spec, with all heads.
        device: where the cache's arrays live; with a mesh, its first device.
        sharding: how the cache is split over the mesh; None without one.
        store: the storage tier below memory, or None.

    Raises:
        ValueError: a capacity, spec, device or store that cannot work, with the numbers.
        KVPageError: the CUDA driver or the system refused; a store for another platform; processes
            that make different pools.
        PoolClosed: the store is closed.
        OutOfBlocks: the capacity exceeds the memory of the machine (or its cgroup) or of the GPU.
    """

    spec: CacheSpec
    device: jax.Device
    store: BlockStore | HostStore | None
    sharding: AxisSharding | None

    def __init__(
        self,
        spec: CacheSpec,
        capacity: int | str | None = None,
        device: jax.Device | None = None,
        *,
        on_stale: Literal["error", "allow"] = "error",
        poison: bool = False,
        debug: bool = False,
        store: BlockStore | HostStore | None = None,
        write_ahead: float | None = None,
        mesh: jax.sharding.Mesh | None = None,
        axis: str | None = None,
        data_axis: str | None = None,
        sequence_axis: str | None = None,
    ) -> None:
        if not isinstance(spec, CacheSpec):
            raise ValueError(f"spec must be a CacheSpec, got {spec!r}")
        options = PoolOptions.checked(on_stale, poison, debug)
        self.store, self.sharding = store, None
        if (axes := (mesh, axis, sequence_axis, data_axis)) != (None,) * 4:
            others = {"device": device, "write_ahead": write_ahead}
            self._open(*over_mesh(spec, capacity, options, *axes, store, **others))
            return
        if device is not None and not isinstance(device, jax.Device):
            raise ValueError(f"KVPool: device: wanted a jax.Device or None, got {device!r}")
        self.device = default_device() if device is None else device
        place = place_of(self.device)
        ahead = check_store(store, place, write_ahead)
        size = capacity_bytes("KVPool", capacity, spec, place)
        resolved = spec.resolve(place.platform, capacity=size)
        native = NativePool(resolved, size, self.device, place, options)
        if store is not None:
            native.call(native.pool.attach_store, store.native, ahead)
        self._open(native, Queue(native))

    def _open(self, native: NativePool, queue: Queue) -> None:
        self.spec, self.device = native.spec, native.device
        self.sharding = native.sharding
        self._native, self._pool, self._queue = native, native.pool, queue
        self._finalizer = weakref.finalize(self, _close, self._pool, repr(self))
        # At exit, programs may still be running: leave the memory to the system.
        self._finalizer.atexit = False

    def __repr__(self) -> str:
        over = "" if self.sharding is None else f" and {self.sharding.size - 1} more"
        return f"<KVPool {self._pool.id} on {self.device}{over}>"

    def close(self) -> None:
        """Frees everything. Waits for running ops; queued programs fail, so `check` them first.

        Over a mesh, an op's error that no call has raised becomes a RuntimeWarning.

        Memory covered by a zero-copy view is freed with the view. Safe to call again; if a signal
        handler interrupted the wait, the next call continues it.
        """
        self._queue.quiesce()
        self._native.warn_untold()
        self._pool.close()
        self._finalizer.detach()

    @property
    def placement(self) -> jax.Device | jax.sharding.NamedSharding:
        """The placement, for `jax.device_put`, of arrays that all devices of the pool need."""
        return self._native.placement

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._pool.closed

    def cache(self) -> KVCache:
        """Starts a new generation of caches: waits for running ops, makes all older caches stale.

        May be called at any time, also after a program failed: occupied slots have their length
        after the last completed step, released slots are free. On CUDA, a slot is also free if its
        acquire did not run on the device (it was refused, or overtaken by the new generation). On
        CUDA and over a mesh, faults of older generations that no call has raised yet become a
        RuntimeWarning.

        Returns:
            The first cache of the new generation.

        Raises:
            PoolClosed: the pool is closed or belongs to a parent process.
        """
        self._queue.quiesce()
        generation = self._native.call(self._pool.new_generation)
        self._queue.restart()
        if self._native.mirrored:  # programs of older generations are refused only when they run
            self._queue.settle()
        try:
            self._native.raise_fault()
        except DeviceFault as fault:
            warnings.warn(f"before this new generation: {fault}", RuntimeWarning, stacklevel=2)
        return self._queue.first_cache(generation)

    @overload
    def acquire(
        self, cache: KVCache, num_tokens: int, *, wait: bool = False, handover: bool = False
    ) -> tuple[int, KVCache]: ...

    @overload
    def acquire(
        self,
        cache: KVCache,
        num_tokens: Sequence[int],
        *,
        wait: bool = False,
        handover: bool = False,
    ) -> tuple[list[int], KVCache]: ...

    def acquire(
        self, cache: KVCache, num_tokens: Any, *, wait: bool = False, handover: bool = False
    ) -> tuple[Any, KVCache]:
        """Occupies a slot for a new request and maps room for its first tokens.

        A free slot whose blocks are still mapped (parked) is reused if one fits. All or nothing for
        a list. A KeyboardInterrupt in this call leaves nothing acquired; continue from `cache()`.

        Args:
            cache: the newest cache.
            num_tokens: tokens to map room for; a list acquires a slot for each entry.
            wait: wait for released slots to drain if there is too little otherwise. Slots held by
                views, and slots whose release failed, are not waited for.
            handover: give each slot separate memory, which `export_blocks` sends without copying.

        Returns:
            (slot, cache), or (slots, cache) for a list. The slot's length is 0.

        Raises:
            OutOfBlocks: not enough physical blocks; nothing has changed.
            OutOfSlots: not enough slots; nothing has changed.
            ValueError: num_tokens out of range, or a cache of another spec.
            DeviceFault: an earlier program failed on the device; nothing has changed.
            PoolClosed: the pool is closed.
        """
        self._queue.check_cache("acquire", cache)
        wanted, single = host_ints("acquire: num_tokens", num_tokens)
        wait = as_bool("acquire: wait", wait)
        handover = as_bool("acquire: handover", handover)
        slots, cache = self._queue.acquire(cache, wanted, wait, handover)
        return (slots[0] if single else slots), cache

    def extend(self, slot: int | Sequence[int], num_tokens: int | Sequence[int]) -> None:
        """Maps room for `num_tokens` tokens in total; does nothing if there is room already.

        Args:
            slot: an occupied slot, or a list.
            num_tokens: total number of tokens, or a list with an entry for each slot.

        Raises:
            OutOfBlocks: not enough physical blocks; nothing has changed.
            ValueError: beyond max_seq_len, or a slot that does not exist.
            KVPageError: the slot is free or draining.
            DeviceFault: an earlier program failed on the device; nothing has changed.
            PoolClosed: the pool is closed.
        """
        slots, wanted = per_slot("extend", slot, num_tokens)
        self._queue.claim("extend", lambda: self._pool.extend(slots, wanted))

    def release(self, cache: KVCache, slot: int | Sequence[int]) -> KVCache:
        """Ends a request. Its slot drains until programs queued earlier are done, then parks.

        Args:
            cache: the newest cache.
            slot: an occupied slot, or a list.

        Returns:
            The next cache, in which the slot is free.

        Raises:
            ValueError: a slot that does not exist, or one named twice, or a cache of another spec.
            KVPageError: the slot is not occupied.
            DeviceFault: an earlier program failed on the device; nothing has changed.
            PoolClosed: the pool is closed.
        """
        self._queue.check_cache("release", cache)
        slots, _ = host_ints("release: slot", slot)
        return self._queue.release(cache, slots)

    def commit(self, slot: int, token_ids: int | Sequence[int]) -> None:
        """Tells the pool the ids of the next tokens whose K and V are written.

        The host thus knows what a slot holds without reading anything back from the device. Commit
        only final tokens: `fork` and `reorder` share committed tokens, and a rollback with
        `set_lengths` does not undo a commit, but `truncate` does.

        Args:
            slot: an occupied slot.
            token_ids: the ids that follow those already committed; or one id.

        Raises:
            ValueError: more tokens than the slot has room for, or a slot that does not exist.
            KVPageError: the slot is not occupied.
            DeviceFault: an earlier program failed on the device; nothing has changed.
            PoolClosed: the pool is closed.
        """
        slot = host_int("commit: slot", slot)
        ids, _ = host_ints("commit: token_ids", token_ids)
        self._native.call(self._pool.commit, slot, ids)

    def trim(self) -> int:
        """Frees all memory that no live request needs; returns the number of bytes freed."""
        return self._native.call(self._pool.trim) * self._native.block_bytes

    def resize(self, capacity: int | str | None) -> None:
        """Changes the capacity while the pool is in use.

        Args:
            capacity: as for a new pool. A share, or None, refers to the memory available now plus
                what the pool holds already.

        Raises:
            OutOfBlocks: live requests hold more than the new capacity; nothing has changed.
            ValueError: a capacity that cannot work.
        """
        stats, place = self.stats(), self._native.place
        now = stats.physical, stats.blocks_total
        if self.sharding is not None and self._native.mirrored:
            size = total_bytes(capacity, self.sharding, "resize", *now)
        else:
            size = capacity_bytes("resize", capacity, self.spec, place, *now)
        self._queue.claim("resize", lambda: self._pool.resize(size))
