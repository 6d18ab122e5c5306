"""Host calls that distinguish the replicas of a pool."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from jax_kvpage import events as kv_events
from jax_kvpage._arrays import host_int
from jax_kvpage._native_pool import NativePool
from jax_kvpage._queue import Queue
from jax_kvpage.spec import CacheSpec
from jax_kvpage.stats import PoolStats, make_stats

__all__ = ["ReplicaCalls"]


class ReplicaCalls:
    """The part of `KVPool` for pools whose slots are split over a mesh axis (`data_axis`).

    Other pools have one replica.
    """

    spec: CacheSpec
    device: jax.Device
    _native: NativePool
    _pool: Any
    _queue: Queue

    @property
    def replicas(self) -> int:
        """The number of replicas that the slots are split over."""
        sharding = self._native.sharding
        return 1 if sharding is None else sharding.replicas

    def replica_of(self, slot: int) -> int:
        """Returns the replica of a slot, where its number is `slot % (max_slots // replicas)`.

        Raises:
            ValueError: the slot does not exist.
        """
        slot, count = host_int("replica_of: slot", slot), self.spec.max_slots
        if not 0 <= slot < count:
            raise ValueError(f"replica_of: slot {slot} does not exist, slots are 0..{count - 1}")
        return slot // (count // self.replicas)

    @contextlib.contextmanager
    def on_replica(self, replica: int) -> Iterator[None]:
        """A context in which this thread's requests go to one replica.

        For schedulers that place requests: `acquire`, `acquire_prefix` and `can_acquire` use no
        other replica, and `find_prefix` only searches this one.

        Args:
            replica: number of the replica.

        Raises:
            ValueError: the replica does not exist.
        """
        replica, count = host_int("on_replica: replica", replica), self.replicas
        if not 0 <= replica < count:
            raise ValueError(
                f"on_replica: replica {replica} does not exist, replicas are 0..{count - 1}"
            )
        with contextlib.nullcontext() if count == 1 else self._pool.placing_on(replica):
            yield

    def replica_stats(self) -> list[PoolStats]:
        """Returns the statistics of each replica; `stats` has their sums.

        `waits` only contains what the replica itself has counted; calls on all replicas are in
        `stats`.
        """
        return [make_stats(self._native.call(one.numbers), host_waits=0) for one in self._each()]

    def replica_events(self) -> list[list[kv_events.Event]]:
        """What the prefix cache of each replica stored and removed since the last call.

        Like `KVPool.events`, but a list for each replica: what one drops, another may still have.
        vLLM's readers tell them apart by `data_parallel_rank`.
        """
        medium = "CPU" if self.device.platform == "cpu" else "GPU"
        tokens = self.spec.block_tokens or 1
        return [
            kv_events.of_native(self._native.call(one.events), tokens, medium)
            for one in self._each()
        ]

    def _each(self) -> list[Any]:
        return list(getattr(self._pool, "replicas", [self._pool]))
