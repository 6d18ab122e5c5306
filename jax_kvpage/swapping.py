"""Host calls that swap sequences out to a store and back in."""

import functools
import weakref
from typing import Any

from jax_kvpage._arrays import as_bool, host_int
from jax_kvpage._native_pool import NativePool
from jax_kvpage._queue import WAIT_SLICE, Queue
from jax_kvpage.cache import KVCache
from jax_kvpage.errors import KVPageError, wait_for
from jax_kvpage.host_store import HostStore
from jax_kvpage.sharding.over_axis import AxisSharding
from jax_kvpage.store import BlockStore
from jax_kvpage.tickets import Ticket

__all__ = ["Swapped", "SwappingCalls"]


class Swapped:
    """A sequence that `KVPool.swap_out` has removed from its slot.

    It lasts until `KVPool.swap_in`, `KVPool.drop_swapped`, `close`, garbage collection or the end
    of the pool; then its data in the store and its references to shared blocks are freed.
    """

    def __init__(self, native: Any, pool: NativePool) -> None:
        """For `KVPool.swap_out` only."""
        self._native = native
        self._pool = weakref.ref(pool)

    def of_pool(self, pool: NativePool) -> bool:
        """Whether it was swapped out of this pool."""
        return self._pool() is pool

    @property
    def tokens(self) -> int:
        """The number of tokens; fewer than were committed if programs had not written all of them
        when the slot had drained."""
        return self._native.length

    @property
    def on_disk(self) -> bool:
        """Whether its private blocks are on disk and no longer in memory."""
        return self._native.stored and self._native.place == "on disk"

    @property
    def in_store(self) -> bool:
        """Whether its private blocks are in the pool's store, on disk or in host memory, and no
        longer in the pool's memory."""
        return self._native.stored

    @property
    def closed(self) -> bool:
        """Whether it was swapped in or dropped."""
        return self._native.gone

    def close(self) -> None:
        """Drops the sequence. Safe to call again."""
        self._native.drop()

    def __repr__(self) -> str:
        where = "closed" if self.closed else self._native.place if self.in_store else "in memory"
        return f"<Swapped {self.tokens} tokens, {where}>"


class SwappingCalls:
    """The calls of `KVPool` that swap sequences."""

    _native: NativePool
    _pool: Any
    _queue: Queue
    store: BlockStore | HostStore | None
    sharding: AxisSharding | None

    def swap_out(self, cache: KVCache, slot: int) -> tuple[Swapped, KVCache]:
        """Removes a sequence from its slot until `swap_in`, so that others can use its memory.

        Its committed tokens are kept; others are lost, as in a fork. Blocks shared with other slots
        stay in memory, and are not written. The store's threads write its private blocks once
        programs queued earlier have run; the blocks count as draining until they are written.
        Nothing waits for the disk or, on a GPU, for the copies to host memory. If the disk or the
        store is full, the blocks stay in memory.

        Over a mesh, every device stores its part separately, and either all parts are stored or
        none: if one cannot be written, all stay in memory.

        Args:
            cache: the newest cache.
            slot: an occupied slot.

        Returns:
            The swapped sequence, and the next cache, in which the slot is free.

        Raises:
            ValueError: the pool has no store, or cannot have one (`sequence_axis`, devices of
                several processes); a slot that does not exist, a cache of another spec.
            KVPageError: the slot is not occupied, or has dropped its beginning (`drop_before`).
            PoolClosed: the pool or its store is closed.
        """
        self._queue.check_cache("swap_out", cache)
        slot = host_int("swap_out: slot", slot)
        if self.store is None:
            mesh = "" if self.sharding is None else ", without sequence_axis and in one process"
            raise ValueError(
                f"swap_out: the pool has no store: make it with KVPool(store=...){mesh}"
            )
        native = self._native.swapped(self.store.native)
        swapped = Swapped(native, self._native)
        decision = self._native.decision()
        with self._native.lock:
            try:
                self._queue.forget_release(slot)
                self._native.call(self._pool.swap_out, decision, native, slot)
                return swapped, self._queue.run("swap_out", cache, decision.edits)
            except BaseException:
                self._pool.undo(decision)
                raise

    def _prefetch_swapped(self, swapped: Swapped) -> Ticket:
        """See `KVPool.prefetch`."""
        native = self._checked("prefetch", swapped)
        self._queue.claim("prefetch", lambda: self._pool.prefetch_swapped(native))
        return Ticket(native)

    def swap_in(
        self, cache: KVCache, swapped: Swapped, wait: bool = False, *, recover: bool = False
    ) -> tuple[int, KVCache]:
        """Puts a swapped sequence into a slot again, the same or another.

        Its keys and values are the same bits, at the same positions. The slot has room for the
        tokens that it has.

        Args:
            cache: the newest cache.
            swapped: the result of `swap_out` of this pool.
            wait: wait for programs queued before `swap_out`, for the store, and for draining slots
                and blocks.
            recover: if the file of the sequence cannot be read in full, use the first tokens that
                can be read; the slot's length says how many.

        Returns:
            (slot, cache). The slot's length is `swapped.tokens`, which are committed.

        Raises:
            OutOfBlocks: not enough physical blocks; nothing has changed.
            OutOfSlots: no free slot; nothing has changed.
            ValueError: a sequence of another pool, a cache of another spec.
            KVPageError: not ready, without `wait`; or stored data cannot be read: the message says
                how many tokens are recoverable; or the sequence was already swapped in or dropped.
            PoolClosed: the pool is closed.
        """
        self._queue.check_cache("swap_in", cache)
        native = self._checked("swap_in", swapped)
        wait = as_bool("swap_in: wait", wait)
        recover = as_bool("swap_in: recover", recover)
        if wait:
            self._queue.claim("swap_in", lambda: self._pool.prefetch_swapped(native), wait)
            while not native.wait(WAIT_SLICE):
                self._check_release(native)
        decision = self._native.decision()
        with self._native.lock:
            try:
                attempt = functools.partial(self._pool.swap_in, decision, native, recover)
                claim = self._queue.claim("swap_in", attempt, wait)
                cache = self._queue.run("swap_in", cache, decision.edits)
                return claim.slots[0], cache
            except BaseException:
                self._pool.undo(decision)
                raise

    def _checked(self, op: str, swapped: Any) -> Any:
        native = _native_of(op, swapped)
        if not swapped.of_pool(self._native):
            raise ValueError(f"{op}: swapped: this sequence was not swapped out of this pool")
        return native

    def _check_release(self, native: Any) -> None:
        """Raises if the program that frees a swapped sequence's slot has failed."""
        marker = self._queue.released(native.slot)
        if marker is None or not native.queued:
            return
        wait_for(marker)  # raises its error
        raise KVPageError(
            f"swap_in: the program that was to free slot {native.slot} failed: start a new "
            "generation with pool.cache()"
        )

    def drop_swapped(self, swapped: Swapped) -> None:
        """Drops a swapped sequence: frees its data in the store and its references to blocks.

        Does nothing if it was already swapped in or dropped.

        Args:
            swapped: the result of `swap_out`.

        Raises:
            ValueError: not a swapped sequence.
        """
        _native_of("drop_swapped", swapped).drop()


def _native_of(op: str, swapped: Any) -> Any:
    if not isinstance(swapped, Swapped):
        raise ValueError(f"{op}: swapped: wanted what swap_out returns, got {swapped!r}")
    return swapped._native
