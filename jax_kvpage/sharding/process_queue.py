"""The implementation of a `KVPool` over the devices of several processes, in one of them.

All processes run the same program (`jax.distributed.initialize`) and make the same calls on the
pool. Each has the arenas of its own devices; the cache's arrays are global.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_kvpage._native import Code
from jax_kvpage._native_pool import PoolOptions
from jax_kvpage.cache import KVCache
from jax_kvpage.errors import KVPageError
from jax_kvpage.sharding.agreement import Agreement
from jax_kvpage.sharding.devices import total_bytes
from jax_kvpage.sharding.heads import HeadSharding
from jax_kvpage.sharding.pools import ShardedNativePool, ShardedQueue, resolved
from jax_kvpage.sharding.processes import ProcessPool, failure_of, raised_elsewhere
from jax_kvpage.spec import CacheSpec

__all__ = ["over_processes"]


def over_processes(
    spec: CacheSpec, capacity: Any, sharding: HeadSharding, options: PoolOptions
) -> tuple["_ProcessNativePool", "_ProcessQueue"]:
    """Creates the compiled pools and the queue of a pool over the devices of several processes.

    A capacity given as a share, or None, applies to the process with the least memory.

    Raises:
        ValueError: a capacity, spec or device cannot work, here or in another process.
        OutOfBlocks: the capacity exceeds the available memory, here or in another process.
        KVPageError: the processes create different pools, or one does not answer.
    """
    if not sharding.local_devices:
        raise ValueError(
            "KVPool: mesh: none of its devices belongs to this process "
            f"({jax.process_index()} of {jax.process_count()}): make the pool in the processes "
            f"{sharding.processes} only"
        )
    agreement = Agreement(sharding.processes)
    ids = [device.id for device in sharding.devices]
    agreement.record("KVPool", capacity, sharding.axis, ids, tuple(options), spec)
    try:
        total = total_bytes(capacity, sharding)
    except Exception as error:
        agreement.decide("KVPool", "failed", failure=failure_of(error))
        raise
    verdict = agreement.decide("KVPool", "done", numbers=[total])
    if verdict.kind == "failed":
        raise raised_elsewhere("KVPool", verdict)
    native = None
    try:
        parts = resolved(spec, sharding, verdict.least[0])
        native = _ProcessNativePool(*parts, options, agreement)
    except Exception as error:
        agreement.decide("KVPool", "failed", failure=failure_of(error))
        raise
    try:
        verdict = agreement.decide("KVPool", "done", told=repr(native.spec))
        if verdict.kind == "failed":
            raise raised_elsewhere("KVPool", verdict)
        if verdict.kind == "differ":
            raise KVPageError(
                f"KVPool: the processes would choose different layouts: {verdict.text}: give the "
                "spec block_tokens and layout"
            )
        return native, _ProcessQueue(native)
    except BaseException:
        native.pool.close()
        raise


class _ProcessNativePool(ShardedNativePool):
    """The compiled pools of this process's devices."""

    def __init__(
        self,
        spec: CacheSpec,
        sharding: HeadSharding,
        shard_bytes: int,
        options: PoolOptions,
        agreement: Agreement,
    ) -> None:
        self._agreement = agreement
        super().__init__(spec, sharding, shard_bytes, options)

    def joined(self, shards: Sequence[Any]) -> ProcessPool:
        """Joins the pools of this process's devices."""
        return ProcessPool(shards, self._agreement, self.sharding.size)


class _ProcessQueue(ShardedQueue):
    """Queues a pool's programs on this process's devices; the other processes do so on theirs."""

    def quiesce(self) -> None:
        """See `Queue`. Does nothing: a sum over the mesh would hang if a process did not call."""

    def put(self, array: np.ndarray) -> jax.Array:
        """Puts the array on all devices. `jax.device_put` would compare it among the processes."""
        parts = [array] * len(self._sharding.local_devices)
        return self._joined(array.shape, self._native.placement, parts)

    def _bounds(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pool: Any = self._native.pool
        least, most = pool.lengths
        return np.asarray(least, np.int32), np.asarray(most, np.int32)

    def claim(self, op: str, attempt: Any, wait: bool = False) -> Any:
        """See `Queue`. A decision has already waited for all that drains; `wait` is ignored."""
        del wait
        with self._lock:
            claim = self._native.call(attempt)
            if claim.ok:
                return claim
            failed = []
            if claim.code is Code.RESOURCE_EXHAUSTED and claim.draining:
                rows = self._native.call(self._native.pool.rows)
                failed = [row.slot for row in rows if row.draining]
            raise self._native.failed_claim(op, claim, failed=failed)

    def wait_for(self, cache: KVCache) -> None:
        """See `Queue`. All processes wait, and raise if the program failed in any of them."""
        pool: Any = self._native.pool
        wait_here = super().wait_for

        def wait() -> None:
            wait_here(cache)
            self._native.raise_fault()

        with self._lock:
            pool.meet(wait)
