"""KVPool: the host side of a KV cache.

The pool owns the memory; programs carry a `KVCache` that names it. Calls that change what programs
see (`acquire`, `release`) take the cache and return the next one: the accounting happens at once in
C++, and a small program that changes the cache value is queued behind whatever is running. Calls
that only add or give back memory (`extend`, `trim`, `resize`) need no cache and never disturb
running programs.
"""

import types
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, Literal, Self, overload

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpage import _native
from jax_kvpage._compat import default_device, is_ready
from jax_kvpage._cuda import memory_hint, place_of
from jax_kvpage._host import (
    RESOURCE_EXHAUSTED,
    as_list,
    device_fault,
    exception,
    native_call,
    out_of,
    parse_bytes,
)
from jax_kvpage.cache import KVCache
from jax_kvpage.errors import DeviceFault, OutOfBlocks
from jax_kvpage.ops.edit_slots import OCCUPY, VACATE, edit_slots
from jax_kvpage.spec import CacheSpec
from jax_kvpage.stats import PoolStats, SlotInfo, make_stats

__all__ = ["KVPool"]

# A wait looks up this often (seconds), so that Ctrl-C works and failed programs are noticed.
_WAIT_SLICE = 0.1


def _close(native: Any, label: str) -> None:
    """Finalizer of a pool that was never closed."""
    if not native.closed:
        warnings.warn(
            f"{label} was collected without being closed: call close() or use it in a `with` block",
            ResourceWarning,
            stacklevel=2,
        )
        native.close()


@jax.jit
def _occupy(cache: KVCache, own: jax.Array, edits: jax.Array, copies: jax.Array) -> KVCache:
    return edit_slots(cache, own, edits, copies, "acquire")


@jax.jit
def _vacate(
    cache: KVCache, own: jax.Array, edits: jax.Array, copies: jax.Array
) -> tuple[KVCache, jax.Array]:
    cache = edit_slots(cache, own, edits, copies, "release")
    # The host asks this array whether the program has run: the cache itself may be donated on.
    return cache, cache.epoch + jnp.uint32(0)


class KVPool:
    """Physical blocks, virtual slots, and the table that joins them.

    Args:
        spec: what the cache holds; resolved for the device's platform if it is not yet.
        capacity: physical memory for blocks, in bytes or as text ("2GiB"). Rounded down to whole
            blocks. Memory is taken from the system as it is needed and kept for reuse.
        device: a `jax.Device` of platform cpu or cuda to live on; the default device if None.
        on_stale: "error" refuses an op that changes the cache from any but the newest cache;
            "allow" permits repeating a step from one cache as long as nothing destructive (acquire,
            release, rollback) came between, for timing loops.
        poison: test mode: memory that a request gets is filled with NaN first, so that a read of
            something never written shows.

    Attributes:
        spec: the resolved spec.
        device: where the cache's arrays live.

    Raises:
        ValueError: a capacity, spec or device that cannot work, with the numbers.
        KVPageError: the CUDA driver refused.
        OutOfBlocks: more capacity than the machine (or the process's cgroup), or the card, has
            memory.
    """

    spec: CacheSpec
    device: jax.Device

    def __init__(
        self,
        spec: CacheSpec,
        capacity: int | str,
        device: jax.Device | None = None,
        *,
        on_stale: Literal["error", "allow"] = "error",
        poison: bool = False,
    ) -> None:
        if not isinstance(spec, CacheSpec):
            raise ValueError(f"spec must be a CacheSpec, got {spec!r}")
        if on_stale not in ("error", "allow"):
            raise ValueError(f"on_stale must be 'error' or 'allow', got {on_stale!r}")
        self.device = default_device() if device is None else device
        self._place = place_of(self.device)
        size = parse_bytes(capacity)
        self.spec = spec.resolve(self._place.platform, capacity=size)
        try:
            self._native = native_call(
                _native.Pool,
                self.spec.as_ints(),
                self.spec.block_bytes,
                size,
                on_stale == "allow",
                poison,
                self._place.backend,
                self._place.ordinal,
            )
        except OutOfBlocks as error:
            raise self._explained(error) from None
        self._own = self._put(np.asarray([self._native.id, 0], np.int32))
        self._no_copies = self._put(np.zeros((0, 4), np.int32))
        self._releases: list[jax.Array] = []
        self._waits = 0
        self._finalizer = weakref.finalize(self, _close, self._native, repr(self))
        # At exit programs may be in flight: memory is then left to the system.
        self._finalizer.atexit = False

    def __repr__(self) -> str:
        return f"<KVPool {self._native.id} on {self.device}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives everything back. Waits for running ops; programs queued behind it fail.

        Memory that a zero-copy view still covers goes when the view does. Closing twice is fine.
        """
        self._finalizer.detach()
        self._native.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return bool(self._native.closed)

    def _explained(self, error: OutOfBlocks) -> OutOfBlocks:
        """The same error, with what JAX holds of the card when it is the card that is full."""
        if self._place.backend == "cuda" and "JAX" in str(error):
            error.args = (f"{error}. {memory_hint(self.device)}",)
        return error

    def _raise_fault(self) -> None:
        """Raises what a program on the device could not. On CPU JAX raises it by itself."""
        fault = device_fault(self._native) if self._place.backend == "cuda" else None
        if fault is not None:
            raise fault

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, self.device)

    def _check_cache(self, op: str, cache: KVCache) -> None:
        if not isinstance(cache, KVCache):
            raise ValueError(
                f"{op}: cache must be a KVCache (from pool.cache()), got {type(cache)}"
            )
        if isinstance(cache.epoch, jax.core.Tracer):
            raise ValueError(
                f"{op} is a host call and cannot be traced: call it outside of jit; inside a "
                "program map_slots makes room, and set_lengths and batch.mask change who takes part"
            )
        if cache.epoch.is_deleted():
            raise ValueError(
                f"{op}: this cache was donated to a program and is gone: pass the cache that the "
                "program returned, or start a new generation with pool.cache()"
            )
        if cache.spec != self.spec:
            raise ValueError(
                f"{op}: the cache has another spec than {self!r}: {cache.spec} against "
                f"{self.spec}; pass the cache that this pool's newest call returned"
            )

    def _edits(self, opcode: int, slots: list[int]) -> jax.Array:
        """One edit a slot, padded to a power of two: few programs are compiled."""
        size = 1 << max(len(slots) - 1, 0).bit_length()
        rows = [(opcode, slot, 0) for slot in slots] + [(0, -1, 0)] * (size - len(slots))
        return self._put(np.asarray(rows, np.int32))

    def cache(self) -> KVCache:
        """Starts a new generation of caches: waits for running ops, makes every older cache stale.

        May be called at any time, also after a program failed: occupied slots have the length that
        the last completed step left, released ones are free. On CUDA, faults of older generations
        that no call has raised yet become a RuntimeWarning.

        Returns:
            The cache to go on from.

        Raises:
            PoolClosed: the pool is closed or belongs to a parent process.
        """
        generation, epoch, lengths = native_call(self._native.new_generation)
        self._releases.clear()
        try:
            self._raise_fault()
        except DeviceFault as fault:
            warnings.warn(f"before this new generation: {fault}", RuntimeWarning, stacklevel=2)
        return KVCache(
            handle=self._put(np.asarray([self._native.id, generation], np.int32)),
            epoch=self._put(np.asarray([epoch], np.uint32)),
            lengths=self._put(np.asarray(lengths, np.int32)),
            spec=self.spec,
        )

    @overload
    def acquire(
        self, cache: KVCache, num_tokens: int, *, wait: bool = False
    ) -> tuple[int, KVCache]: ...

    @overload
    def acquire(
        self, cache: KVCache, num_tokens: Sequence[int], *, wait: bool = False
    ) -> tuple[list[int], KVCache]: ...

    def acquire(
        self, cache: KVCache, num_tokens: Any, *, wait: bool = False
    ) -> tuple[Any, KVCache]:
        """Occupies a slot for a new request and maps room for its first tokens.

        A free slot whose blocks are still mapped (parked) is adopted if one fits. All or nothing
        for a list.

        Args:
            cache: the newest cache.
            num_tokens: tokens to map room for; a list of them acquires a slot for each.
            wait: wait for released slots to drain when there is too little otherwise.

        Returns:
            (slot, cache), or (slots, cache) for a list. The slot's length is 0.

        Raises:
            OutOfBlocks: not enough physical blocks; nothing has changed.
            OutOfSlots: not enough slots; nothing has changed.
            ValueError: num_tokens out of range, or a cache of another spec.
            DeviceFault: an earlier program failed on the device; nothing has changed.
            PoolClosed: the pool is closed.
        """
        self._check_cache("acquire", cache)
        self._raise_fault()
        wanted, single = as_list(num_tokens, "num_tokens")
        claim = self._claim("acquire", lambda: self._native.acquire(wanted), wait)
        slots = list(claim.slots)
        if slots:
            try:
                cache = _occupy(cache, self._own, self._edits(OCCUPY, slots), self._no_copies)
            except BaseException:
                self._native.undo_acquire(slots)
                raise
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
        self._raise_fault()
        slots, _ = as_list(slot, "slot")
        wanted, single = as_list(num_tokens, "num_tokens")
        if single:
            wanted = wanted * len(slots)
        if len(slots) != len(wanted):
            raise ValueError(f"extend: {len(slots)} slots, but {len(wanted)} num_tokens")
        self._claim("extend", lambda: self._native.extend(slots, wanted), False)

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
        self._check_cache("release", cache)
        self._raise_fault()
        slots, _ = as_list(slot, "slot")
        native_call(self._native.start_release, slots)
        if not slots:
            return cache
        try:
            edits = self._edits(VACATE, slots)
            cache, marker = _vacate(cache, self._own, edits, self._no_copies)
        except BaseException:
            self._native.undo_release(slots)
            raise
        self._releases = [m for m in self._releases if not is_ready(m)] + [marker]
        return cache

    def commit(self, slot: int, token_ids: Sequence[int]) -> None:
        """Tells the pool the ids of the next tokens whose K and V are written.

        The host thereby knows what a slot holds without reading anything back from the device.

        Args:
            slot: an occupied slot.
            token_ids: ids that follow those committed before.

        Raises:
            ValueError: more tokens than the slot has room for, or a slot that does not exist.
            KVPageError: the slot is not occupied.
        """
        self._raise_fault()
        ids, _ = as_list(token_ids, "token_ids")
        native_call(self._native.commit, slot, ids)

    def committed(self, slot: int) -> list[int]:
        """The token ids committed to a slot so far."""
        return list(native_call(self._native.committed, slot))

    def stats(self) -> PoolStats:
        """A snapshot of the pool's accounts."""
        return make_stats(native_call(self._native.numbers), host_waits=self._waits)

    def slot_table(self, cache: KVCache | None = None) -> list[SlotInfo]:
        """The valid slot table: a row for each occupied or draining slot.

        Args:
            cache: when given, the rows carry its lengths, which are waited for.
        """
        lengths = None
        if cache is not None:
            self._check_cache("slot_table", cache)
            lengths = np.asarray(cache.lengths)
            self._raise_fault()
        return [
            SlotInfo(
                slot=row.slot,
                num_blocks=row.blocks,
                bytes=row.blocks * self.spec.block_bytes,
                reserved_tokens=row.reserved,
                committed_tokens=row.committed,
                draining=row.draining,
                length=None if lengths is None else int(lengths[row.slot]),
            )
            for row in native_call(self._native.rows)
        ]

    def block_map(self, slot: int) -> list[list[tuple[int, int]]]:
        """Which physical block each logical block of a slot is.

        Returns:
            For each range of the slot (one in the fused layout; K and V of layer 0, K and V of
            layer 1, ... in the per-layer layout) a list of (physical block, reference count).
        """
        return native_call(self._native.block_map, slot)

    def view(self, layer: int, slot: int | None = None) -> tuple[jax.Array, jax.Array]:
        """Zero-copy arrays over one layer's keys and values, for dense kernels.

        The arrays have a constant shape and alias the cache: programs may take them as operands
        alongside the cache and see what is written. What is not mapped or not written reads as
        zeros. Never donate them, return them from a program or slice them outside of one: XLA would
        copy the whole range. A slot with views stays draining after its release until they are
        gone.

        Args:
            layer: which layer.
            slot: an occupied slot; None for all slots.

        Returns:
            (k, v), each [max_seq_len, kv heads, head_dim], or [max_slots, max_seq_len, kv heads,
            head_dim] for all slots, in the storage dtype.

        Raises:
            ValueError: a pool in device memory, the fused layout, quantised storage, a layer out of
                range, or (all slots) a max_seq_len that is not a multiple of block_tokens.
            KVPageError: the slot is not occupied.
        """
        spec = self.spec
        if self._place.backend != "cpu" and not self.closed:
            raise ValueError(
                f"view: {self!r} lies in device memory, where the part of a slot that is not "
                "mapped cannot be read, so no array may stand for it: read the cache with "
                "paged_attention, or use a pool on a CPU device for views"
            )
        if spec.quantized:
            raise ValueError(
                f"view: {spec.dtype} storage keeps the scales of a block's tokens behind them, so "
                "a slot is not one dense array: use float32, bfloat16 or float16 storage for "
                "views, or read the cache with paged_attention"
            )
        if spec.layout != "per_layer":
            raise ValueError(
                "view: one layer's keys are one dense array in the 'per_layer' layout only, this "
                f"pool has {spec.layout!r}: make it with CacheSpec(..., layout='per_layer')"
            )
        if slot is None and spec.blocks_per_range * (spec.block_tokens or 1) != spec.max_seq_len:
            raise ValueError(
                f"view: slots lie max_seq_len={spec.max_seq_len} tokens apart only if that is a "
                f"multiple of block_tokens={spec.block_tokens}: view one slot at a time, or change "
                "one of them"
            )
        place = -1 if slot is None else slot
        if place < -1 or (slot is not None and slot < 0):
            raise ValueError(f"view: slot {slot} does not exist")
        k, v = (native_call(self._native.view, layer, kv, place) for kv in (0, 1))
        return jax.dlpack.from_dlpack(k), jax.dlpack.from_dlpack(v)

    def trim(self) -> int:
        """Gives all memory that no live request needs back to the system.

        Returns:
            Bytes given back.
        """
        self._raise_fault()
        return int(native_call(self._native.trim)) * self.spec.block_bytes

    def resize(self, capacity: int | str) -> None:
        """Changes the budget while the pool is in use.

        Raises:
            OutOfBlocks: live requests hold more than the new capacity; nothing has changed.
            ValueError: a capacity that cannot work.
        """
        self._raise_fault()
        size = parse_bytes(capacity)
        self._claim("resize", lambda: self._native.resize(size), False)

    def check(self, cache: KVCache) -> None:
        """Waits for the program that made a cache, and raises if it or one before it failed.

        Raises:
            jax.errors.JaxRuntimeError: what the program failed with (on CUDA a DeviceFault).
        """
        self._check_cache("check", cache)
        jax.block_until_ready((cache.epoch, cache.lengths))
        self._raise_fault()

    def _claim(self, op: str, attempt: Any, wait: bool) -> Any:
        waited = False
        while True:
            claim = attempt()
            if claim.code == 0:
                return claim
            if claim.code != RESOURCE_EXHAUSTED:
                raise exception(claim.code, claim.message)
            if not wait or claim.draining == 0:
                raise self._explained(out_of(op, claim, self._native.rows(), self.spec))
            self._waits += not waited
            waited = True
            # A release whose program failed would drain for ever: say so instead of waiting.
            for marker in [m for m in self._releases if is_ready(m)]:
                jax.block_until_ready(marker)
            self._raise_fault()
            self._native.wait_for_drain(_WAIT_SLICE)
