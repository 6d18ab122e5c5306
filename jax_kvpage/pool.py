"""KVPool: the host side of a KV cache.

The pool owns the memory; programs carry a `KVCache` that names it. Calls that change what programs
see (`acquire`, `release`) take the cache and return the next one: the accounting happens at once in
C++, and a small program that changes the cache value is queued behind running programs. Calls
that only add or give back memory (`extend`, `trim`, `resize`) need no cache and never disturb
running programs.
"""

import warnings
import weakref
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax

from jax_kvpage._arrays import as_bool, host_int, host_ints
from jax_kvpage._capacity import capacity_bytes
from jax_kvpage._closing import Closing
from jax_kvpage._compat import default_device
from jax_kvpage._cuda import place_of
from jax_kvpage._inspection import Inspection
from jax_kvpage._native_pool import NativePool, PoolOptions
from jax_kvpage._queue import Queue
from jax_kvpage.cache import KVCache
from jax_kvpage.errors import DeviceFault
from jax_kvpage.handover import HandoverCalls
from jax_kvpage.host_store import HostStore
from jax_kvpage.prefix import PrefixCalls
from jax_kvpage.relocation import RelocationCalls
from jax_kvpage.reuse import ReuseCalls
from jax_kvpage.saving import SavingCalls, check_store
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
    """Physical blocks, virtual slots, and the table that joins them.

    Args:
        spec: what the cache holds; resolved for the device's platform if it is not yet.
        capacity: physical memory for blocks, in bytes, as text ("2GiB"), or as a share ("80%") of
            what is available now: free memory of the card on CUDA; on CPU memory of the machine, or
            of the process's cgroup, that can be had without swapping. None: 80% on CUDA, 50% on
            CPU, but no more than full slots take or the system has memory mappings for. Rounded
            down to whole blocks. Memory is taken from the system on demand and kept for reuse.
        device: a `jax.Device` of platform cpu or cuda to live on; the default device if None.
        on_stale: "error" refuses an op that changes the cache from any but the newest cache;
            "allow" permits repeating a step from one cache as long as nothing destructive (acquire,
            release, rollback) came between, for timing loops.
        poison: test mode: memory that a request gets is filled with NaN first, so that a read of
            something never written shows. Views show zeros there all the same.
        debug: test mode: poison, and an append to a position that is already written in that layer
            is refused (a forgotten `advance`, a layer number used twice) unless `set_lengths` ran.
        store: what lies below memory; `swap_out` writes to it. Close it after the pool. On CPU a
            `BlockStore`: it gets whole blocks of released sequences before they are evicted,
            `acquire_prefix` says what is stored, `prefetch` brings it, and `save_prefixes` and
            `load_prefixes` use it unless given another. On a GPU a `HostStore`, which does the same
            but for saving and loading. Over a mesh, for swaps only: prefixes are neither written to
            it nor looked for.
        write_ahead: with a store, the share of the capacity that is to be free or written to
            the store: while there is less, its threads write what would be evicted next. Written
            blocks are evicted first. None: 0.25. 0: only `save_prefixes` writes; 1: everything is
            written as soon as its sequence is released.
        mesh: devices to spread the pool over, an arena on each; `capacity` is that of all. Other
            axes have one device. CPU devices, of one process or more; with `axis` alone also the
            GPUs of one process, where each card has its share. No `device`, and a `store` on CPU
            devices of one process only.
        axis: the axis that the heads are split over. Each device holds those that its query heads
            read: with fewer key/value heads than devices, several hold a copy.
        data_axis: the axis that the slots are split over: each replica, a row along it, has its
            part of `max_slots` and of the blocks, and a prefix cache. `spread` makes batches.
        sequence_axis: in place of both, the axis that the tokens of every sequence are spread over:
            stripes of 16 in turn. `max_seq_len` is a multiple of 16 times its devices. No `store`.

    Attributes:
        spec: the resolved spec, with all heads.
        device: where the cache's arrays live; with a mesh, its first device.
        sharding: how the cache is spread over the mesh; None without one.
        store: what lies below memory; None: nothing.

    Raises:
        ValueError: a capacity, spec, device or store that cannot work, with the numbers.
        KVPageError: the CUDA driver or the system refused; a store of the other platform's kind;
            processes that make different pools.
        PoolClosed: the store is closed.
        OutOfBlocks: more capacity than the machine (or its cgroup), or the card, has memory.
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
        # At exit programs may be in flight: memory is then left to the system.
        self._finalizer.atexit = False

    def __repr__(self) -> str:
        over = "" if self.sharding is None else f" and {self.sharding.size - 1} more"
        return f"<KVPool {self._pool.id} on {self.device}{over}>"

    def close(self) -> None:
        """Gives everything back. Waits for running ops; queued programs fail: `check` them before.

        What an op on a device of a mesh has failed with becomes a RuntimeWarning if no call has
        raised it.

        Memory that a zero-copy view still covers goes when the view does. Closing twice is fine; a
        wait that a signal handler ended goes on with the next call.
        """
        self._queue.quiesce()
        self._native.warn_untold()
        self._pool.close()
        self._finalizer.detach()

    @property
    def placement(self) -> jax.Device | jax.sharding.NamedSharding:
        """Where programs expect what all devices of the pool have: for `jax.device_put`."""
        return self._native.placement

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._pool.closed

    def cache(self) -> KVCache:
        """Starts a new generation of caches: waits for running ops, makes every older cache stale.

        May be called at any time, also after a program failed: occupied slots have the length that
        the last completed step left, released ones are free. On CUDA, a slot is also free if its
        acquire did not run on the device (it was refused, or overtaken by the new generation). On
        CUDA and over a mesh, faults of older generations that no call has raised yet become a
        RuntimeWarning.

        Returns:
            The cache to go on from.

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

        A free slot whose blocks are still mapped (parked) is adopted if one fits. All or nothing
        for a list. After a KeyboardInterrupt in here nothing is acquired; go on from `cache()`.

        Args:
            cache: the newest cache.
            num_tokens: tokens to map room for; a list of them acquires a slot for each.
            wait: wait for released slots to drain when there is too little otherwise. Slots that
                views hold, and slots whose release failed, are not waited for.
            handover: give each slot memory of its own, which `export_blocks` sends uncopied.

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
        """Maps room for `num_tokens` tokens in all; a no-op when there is room already.

        Args:
            slot: an occupied slot, or a list.
            num_tokens: tokens in all, or a list as long as slot's.

        Raises:
            OutOfBlocks: not enough physical blocks; nothing has changed.
            ValueError: beyond max_seq_len, or a slot that does not exist.
            KVPageError: the slot is free or draining.
            DeviceFault: an earlier program failed on the device; nothing has changed.
            PoolClosed: the pool is closed.
        """
        slots, _ = host_ints("extend: slot", slot)
        wanted, single = host_ints("extend: num_tokens", num_tokens)
        if single:
            wanted = wanted * len(slots)
        if len(slots) != len(wanted):
            raise ValueError(f"extend: {len(slots)} slots, but {len(wanted)} num_tokens")
        self._queue.claim("extend", lambda: self._pool.extend(slots, wanted))

    def release(self, cache: KVCache, slot: int | Sequence[int]) -> KVCache:
        """Ends a request. Its slot drains until programs queued before are done, then parks.

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

        The host thereby knows what a slot holds without reading anything back from the device.
        Commit what is final: `fork` and `reorder` share committed tokens, and a rollback
        (`set_lengths`) does not take them back. `truncate` does.

        Args:
            slot: an occupied slot.
            token_ids: ids that follow those committed before; or one id.

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
        """Gives all memory that no live request needs back to the system; returns its bytes."""
        return self._native.call(self._pool.trim) * self._native.block_bytes

    def resize(self, capacity: int | str | None) -> None:
        """Changes the budget while the pool is in use.

        Args:
            capacity: as for a new pool. A share, and None, are of what is available now and what
                the pool holds already.

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
