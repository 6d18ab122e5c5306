"""The implementation of a `KVPool` over a mesh: its compiled pools, and the programs it queues."""

import dataclasses
import os
import threading
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from jax_kvpage import _native
from jax_kvpage._cache_checks import FIELDS, arrays_of, check_array
from jax_kvpage._compat import is_ready, no_mesh
from jax_kvpage._cuda import Place, place_of
from jax_kvpage._native_pool import NativePool, PoolOptions
from jax_kvpage._queue import PrefixRequest, Queue
from jax_kvpage._values import raise_all
from jax_kvpage.cache import KVCache
from jax_kvpage.ops.edit_slots import FOUND, OCCUPY
from jax_kvpage.ops.set_lengths import set_lengths
from jax_kvpage.sharding.decisions import joint_swapped
from jax_kvpage.sharding.devices import on_gpus, total_bytes
from jax_kvpage.sharding.heads import HeadSharding
from jax_kvpage.sharding.in_flight import wait_for_programs
from jax_kvpage.sharding.over_axis import AxisSharding
from jax_kvpage.sharding.shards import ShardedDecision, ShardedPool
from jax_kvpage.spec import CacheSpec

__all__ = ["ShardedNativePool", "ShardedQueue", "check_alone", "resolved", "sharded"]

_Sharding = TypeVar("_Sharding", bound=AxisSharding)

# Compiled, so that it neither waits nor raises failures of older generations' programs.
_lower = jax.jit(set_lengths)


def check_alone(
    mesh: Any, axis: Any, sequence_axis: Any = None, data_axis: Any = None, **others: Any
) -> None:
    """Refuses arguments of `KVPool` that cannot be combined with a mesh.

    Raises:
        ValueError: the mesh or all axes are missing, the axes cannot be combined, or one of the
            other arguments is given; lists all reasons.
    """
    reasons = []
    axes = {"axis": axis, "data_axis": data_axis, "sequence_axis": sequence_axis}
    named = [f"{name}={value!r}" for name, value in axes.items() if value is not None]
    if sequence_axis is not None and len(named) > 1:
        reasons.append(
            f"{' and '.join(named)}: give one of them, or axis and data_axis: a pool has either "
            "its heads and slots or its sequences spread over a mesh so far"
        )
    if mesh is None and named and axis is None:
        reasons.append(f"{' and '.join(named)}: wanted a mesh too, got None")
    elif mesh is None or not named:
        reasons.append(
            "mesh and axis: wanted both (or mesh and data_axis, or mesh and sequence_axis), got "
            f"{mesh!r} and {axis!r}"
        )
    given = [name for name, value in others.items() if value is not None]
    if given:
        reasons.append(
            f"{' and '.join(given)}: cannot be combined with mesh: the mesh selects the devices, "
            "and a store over a mesh holds swapped sequences only"
        )
    raise_all("KVPool", reasons)


def sharded(
    spec: CacheSpec, capacity: Any, sharding: HeadSharding, options: PoolOptions
) -> tuple["ShardedNativePool", "ShardedQueue"]:
    """Creates the compiled pools and the queue; see `KVPool` for the arguments.

    Raises:
        ValueError: a capacity, spec or device cannot work.
        OutOfBlocks: the capacity exceeds the available memory.
    """
    total = total_bytes(capacity, sharding)
    native = ShardedNativePool(*resolved(spec, sharding, total), options)
    return native, ShardedQueue(native)


def resolved(spec: CacheSpec, sharding: _Sharding, total: int) -> tuple[CacheSpec, _Sharding, int]:
    """Chooses block size and layout for a pool over a mesh.

    Args:
        spec: spec of the whole cache.
        sharding: unresolved sharding.
        total: bytes of all devices together.

    Returns:
        The spec of the whole cache, the sharding, and the bytes of each device.

    Raises:
        ValueError: a capacity or spec cannot work.
    """
    place = place_of(sharding.local_devices[0])
    # On CPU, as if one pool had the blocks of all devices: they share the process's memory
    # mappings.
    most = total // sharding.size if on_gpus(sharding) else total
    local = sharding.local.resolve(place.platform, capacity=most)
    whole = dataclasses.replace(
        spec, layout=local.layout, block_tokens=local.block_tokens, granule=local.granule
    )
    return whole, sharding.with_spec(local), total // sharding.size


class ShardedNativePool(NativePool):
    """The compiled pools of a `KVPool` over a mesh.

    Attributes:
        sharding: resolved sharding over the devices.

    Raises:
        ValueError: a spec or capacity cannot work.
        OutOfBlocks: the capacity exceeds the available memory.
    """

    pool: Any  # a ShardedPool, with the calls of `_native.Pool`

    def __init__(
        self, spec: CacheSpec, sharding: AxisSharding, shard_bytes: int, options: PoolOptions
    ) -> None:
        self.spec = spec
        self.sharding: AxisSharding = sharding
        self.device = sharding.local_devices[0]
        self.placement = sharding.placed()
        self.place: Place = place_of(self.device)
        self.block_bytes = sharding.parts * sharding.local.block_bytes
        shards: list[_native.Pool] = []
        try:
            for device in sharding.local_devices:
                one = NativePool(sharding.local, shard_bytes, device, place_of(device), options)
                shards.append(one.pool)
        except BaseException:
            for shard in shards:
                shard.close()
            raise
        if sharding.keeps_faults:
            # Other processes would take a call that fails only here for a different call.
            in_calls = sharding.local_devices == sharding.devices
            notes = map(self._where, range(len(shards)))
            _native.share_faults(list(zip(shards, notes, strict=True)), in_calls)
        self.pool = self.joined(shards)
        # Also held during calls to all shards.
        self.lock = threading.RLock()

    def _where(self, shard: int) -> str:
        """Returns a suffix for messages about this shard."""
        return f" (on {self.sharding.local_devices[shard]})"

    def raise_fault(self) -> None:
        """Raises the error of an op that has failed on a device."""
        if self.sharding.keeps_faults and not self.pool.closed:
            self.call(self.pool.shards[0].take_fault)

    def warn_untold(self) -> None:
        """See `NativePool`."""
        if self.pool.closed:
            return
        try:
            self.pool.shards[0].untold_fault()
        except _native.StatusError as error:
            _, reason, message = error.args
            if reason is _native.Reason.DEVICE_FAULT:  # otherwise it is not from this process
                text = f"the pool is closed, and no call has raised what failed before: {message}"
                warnings.warn(text, RuntimeWarning, stacklevel=3)

    def joined(self, shards: Sequence[Any]) -> ShardedPool:
        """Joins the pools of all devices."""
        return ShardedPool(shards, self.mirrored)

    def call(self, function: Any, *args: Any) -> Any:
        """See `NativePool`. One call at a time, so that all shards get them in the same order."""
        with self.lock:
            return super().call(function, *args)

    def decision(self) -> Any:
        """Creates an empty decision of all shards."""
        return ShardedDecision(len(self.sharding.local_devices))

    def swapped(self, store: Any) -> Any:
        """Creates a swapped sequence of all shards."""
        return joint_swapped(store, len(self.sharding.local_devices))


class ShardedQueue(Queue):
    """Queues the programs of a `KVPool` over a mesh, each on all devices.

    A host decision must not depend on the progress of a device, so the queue waits for programs
    that free blocks. Only one call decides at a time.
    """

    _native: ShardedNativePool

    def __init__(self, native: ShardedNativePool) -> None:
        self._sharding = native.sharding
        super().__init__(native)
        ids = [[shard.id, 0] for shard in native.pool.shards]
        self._own = self._split(np.asarray(ids, np.int32))
        self._markers: list[jax.Array] = []
        self._lock = native.lock
        self._process = os.getpid()
        native.pool.settle = self._settle

    def _split(self, rows: np.ndarray) -> jax.Array:
        """Makes an array [devices * n] with row i on this process's device i."""
        shape = (self._sharding.size * rows.shape[1],)
        return self._joined(shape, self._sharding.placed(self._sharding.split), rows)

    def _joined(self, shape: tuple[int, ...], placement: Any, parts: Any) -> jax.Array:
        """Joins the parts of this process's devices into an array over the mesh."""
        devices = self._sharding.local_devices
        arrays = [jax.device_put(*pair) for pair in zip(parts, devices, strict=True)]
        return jax.make_array_from_single_device_arrays(shape, placement, arrays)

    def quiesce(self) -> None:
        """See `Queue`. A refused program would leave other devices waiting in its next sum."""
        if os.getpid() == self._process and not self._native.pool.closed:
            wait_for_programs(self._sharding.mesh)

    def _settle(self) -> None:
        if not self._markers:
            return
        self.waits += not all(map(is_ready, self._markers))
        for marker in self._markers:
            try:
                marker.block_until_ready()
            except (RuntimeError, ValueError):
                continue  # reported to whoever waits for its cache
        self._markers.clear()

    def _marks(self, edits: Sequence[tuple[int, int, int, int]]) -> bool:
        return any(opcode not in (OCCUPY, FOUND) for opcode, *_ in edits)

    def _note(self, marker: jax.Array) -> None:
        self._markers.append(marker)

    def joined_cache(self, generation: list[tuple[int, int, list[int]]], lengths: Any) -> KVCache:
        """Returns the first cache of a generation with these lengths, [devices, max_slots]."""
        numbers, epochs, _ = zip(*generation, strict=True)
        shards = self._native.pool.shards
        handles = [[shard.id, n] for shard, n in zip(shards, numbers, strict=True)]
        return KVCache(
            handle=self._split(np.asarray(handles, np.int32)),
            epoch=self._split(np.asarray(epochs, np.uint32)[:, None]),
            lengths=self._split(np.asarray(lengths, np.int32)),
            spec=self._native.spec,
            sharding=self._sharding,
        )

    def first_cache(self, generation: list[tuple[int, int, list[int]]]) -> KVCache:
        """Returns the first cache of a generation. Lengths are minima over a replica's shards.

        Args:
            generation: number, epoch and lengths of each shard.
        """
        lengths = np.asarray([own for _, _, own in generation], np.int32)
        cache = self.joined_cache(generation, lengths)
        least, most = self._bounds(lengths)
        shorter = np.flatnonzero(least != most)
        if not shorter.size:
            return cache
        with self._lock, no_mesh():
            self._native.pool.cut(least.tolist())
            return _lower(cache, *map(self.put, (shorter.astype(np.int32), least[shorter])))

    def _bounds(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Minimum and maximum length of each slot over the shards."""
        each = lengths.reshape(self._sharding.replicas, -1, lengths.shape[1])
        return each.min(axis=1).reshape(-1), each.max(axis=1).reshape(-1)

    def _check_arrays(self, op: str, cache: KVCache) -> None:
        size = self._sharding.size
        if cache.sharding != self._sharding:
            raise ValueError(
                f"{op}: the cache is not that of a pool over this mesh: pass the cache that this "
                "pool's newest call, or a program outside of jax.shard_map, returned"
            )
        shapes = ((2 * size,), (size,), (size * self._sharding.local.max_slots,))
        wanted = self._sharding.placed(self._sharding.split)
        for name, array, shape in zip(FIELDS, arrays_of(cache), shapes, strict=True):
            check_array(op, name, array, shape)
            if not array.sharding.is_equivalent_to(wanted, 1):
                raise ValueError(
                    f"{op}: cache.{name}: wanted one part per device, "
                    f"{wanted.spec}, got {array.sharding}: give the step out_specs and "
                    f"out_shardings of {wanted.spec} for the cache"
                )

    # One decision at a time; its program is queued before the next decision.

    def claim(self, op: str, attempt: Any, wait: bool = False) -> Any:
        """See `Queue`."""
        with self._lock:
            return super().claim(op, attempt, wait)

    def acquire(
        self, cache: KVCache, num_tokens: list[int], wait: bool, handover: bool = False
    ) -> tuple[list[int], KVCache]:
        """See `Queue`."""
        with self._lock:
            return super().acquire(cache, num_tokens, wait, handover)

    def release(self, cache: KVCache, slots: Sequence[int]) -> KVCache:
        """See `Queue`."""
        with self._lock:
            return super().release(cache, slots)

    def fork(self, *args: Any) -> Any:
        """See `Queue`."""
        with self._lock:
            return super().fork(*args)

    def acquire_prefix(self, cache: KVCache, request: PrefixRequest) -> tuple[Any, KVCache]:
        """See `Queue`."""
        with self._lock:
            return super().acquire_prefix(cache, request)

    def truncate(self, cache: KVCache, slots: Sequence[int], num_tokens: Sequence[int]) -> KVCache:
        """See `Queue`."""
        with self._lock:
            return super().truncate(cache, slots, num_tokens)

    def drop_before(self, *args: Any) -> KVCache:
        """See `Queue`."""
        with self._lock:
            return super().drop_before(*args)
