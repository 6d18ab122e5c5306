"""ReplicaTable: the owners of slots, and calls on all replicas that can be undone directly.

Slot numbers are those of the whole pool: replica r owns the `slots` slots starting at `r * slots`.
"""

import contextlib
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax_kvpage import _native
from jax_kvpage._native import Code, Reason
from jax_kvpage.spec import CacheSpec

__all__ = ["ReplicaTable", "plain", "replica_note"]


def plain(value: Any, **changes: Any) -> types.SimpleNamespace:
    """Copies a row or a claim of the compiled pool into an object that can be changed."""
    names = [name for name in dir(value) if not name.startswith("_")]
    return types.SimpleNamespace(**{name: getattr(value, name) for name in names} | changes)


def replica_note(replica: int, slots: int) -> str:
    """Returns a note that explains slot numbers in messages of a replica with `slots` slots."""
    return f" (in replica {replica}, whose slot 0 is slot {replica * slots} of the pool)"


def _of_several(replica: Any) -> bool:
    """Whether this is a `ShardedPool` rather than the compiled pool of one device."""
    return hasattr(replica, "shards")


class ReplicaTable:
    """The pools of all replicas, and the calls that make no decision.

    Args:
        replicas: a new pool for each replica: a `_native.Pool` or a `ShardedPool`.
        spec: resolved spec of one replica.

    Attributes:
        replicas: the pools.
        slots: slots per replica.
        shards: the compiled pools of all devices, in order.
    """

    def __init__(self, replicas: Sequence[Any], spec: CacheSpec) -> None:
        self.replicas = list(replicas)
        self.slots = spec.max_slots
        self._block_tokens = spec.block_tokens or 1
        self._ranges = spec.num_ranges
        self._settle: Callable[[], None] = lambda: None
        self._chosen = threading.local()  # the only replica for requests of this thread

    @property
    def shards(self) -> list[Any]:
        """See the class."""
        return [shard for one in self.replicas for shard in getattr(one, "shards", [one])]

    @property
    def settle(self) -> Callable[[], None]:
        """Function that waits for programs that free blocks, if replicas have several devices."""
        return self._settle

    @settle.setter
    def settle(self, settle: Callable[[], None]) -> None:
        self._settle = settle
        for replica in self.replicas:
            if _of_several(replica):
                replica.settle = settle

    # ---- where requests may go ----

    @contextlib.contextmanager
    def placing_on(self, replica: int) -> Iterator[None]:
        """See `ReplicaCalls.on_replica`."""
        before, self._chosen.replica = self._only, replica
        try:
            yield
        finally:
            self._chosen.replica = before

    @property
    def _only(self) -> int | None:
        return getattr(self._chosen, "replica", None)

    def _limits(self, count: int) -> list[int]:
        """Maximum requests for each replica, out of `count`."""
        only = self._only
        return [count if only in (None, replica) else 0 for replica in range(len(self.replicas))]

    # ---- slot owners ----

    def _owner(self, op: str, slot: int) -> tuple[int, int]:
        """Returns the replica of a slot, and the slot's number there."""
        count = self.slots * len(self.replicas)
        if not 0 <= slot < count:
            message = f"{op}: slot {slot} does not exist, slots are 0..{count - 1}"
            raise _native.StatusError(Code.OUT_OF_RANGE, Reason.NONE, message)
        return divmod(slot, self.slots)

    def _grouped(self, op: str, slots: Sequence[int]) -> dict[int, list[int]]:
        """Returns the indices of the slots of each replica; {0: []} without slots."""
        groups: dict[int, list[int]] = {}
        for index, slot in enumerate(slots):
            groups.setdefault(self._owner(op, slot)[0], []).append(index)
        return dict(sorted(groups.items())) or {0: []}

    def _note(self, replica: int) -> str:
        return replica_note(replica, self.slots)

    @contextlib.contextmanager
    def _on(self, replica: int) -> Iterator[Any]:
        """Yields the pool of a replica; errors get a note that explains their slot numbers."""
        try:
            yield self.replicas[replica]
        except _native.StatusError as error:
            code, reason, message = error.args
            if reason is Reason.DEVICE_FAULT:  # may be of any replica; the message names it
                raise
            raise _native.StatusError(code, reason, message + self._note(replica)) from None

    def _at(self, op: str, slot: int, *args: Any) -> Any:
        replica, own = self._owner(op, slot)
        with self._on(replica) as pool:
            return getattr(pool, op)(own, *args)

    def _told(self, replica: int, claim: Any) -> Any:
        note = "" if claim.reason is Reason.DEVICE_FAULT else self._note(replica)
        return plain(claim, message=claim.message + note)

    # ---- room and commitments ----

    def extend(self, slots: list[int], num_tokens: list[int]) -> Any:
        """See `_native.Pool`."""
        groups = self._grouped("extend", slots)
        before = {row.slot: row for row in self.rows()} if len(groups) > 1 else {}
        done: list[int] = []
        claim: Any = None
        try:
            for replica, indices in groups.items():
                done += indices  # before the call, because a signal may come right after it
                own = [slots[i] % self.slots for i in indices]
                with self._on(replica) as pool:
                    claim = pool.extend(own, [num_tokens[i] for i in indices])
                if not claim.ok:
                    self._retract(before, [slots[i] for i in done])
                    return self._told(replica, claim)
        except BaseException:
            self._retract(before, [slots[i] for i in done])
            raise
        return claim

    def _retract(self, before: dict[int, Any], slots: Sequence[int]) -> None:
        """Retracts slots to the room that they had before."""
        for slot in slots:
            row = before.get(slot)
            if row is not None and not row.draining:
                replica, own = divmod(slot, self.slots)
                self._retract_on(self.replicas[replica], own, row.reserved, row.committed)

    def _retract_on(self, replica: Any, slot: int, reserved: int, committed: int) -> None:
        if not _of_several(replica):
            replica.retract(slot, reserved, committed)
            return
        with replica.together():
            for shard in replica.shards:
                shard.retract(slot, reserved, committed)

    def commit(self, slot: int, token_ids: list[int]) -> None:
        """See `_native.Pool`."""
        self._at("commit", slot, token_ids)

    def cut(self, lengths: Sequence[int]) -> None:
        """Cuts committed tokens back to these lengths, in replicas with several devices."""
        for i, replica in enumerate(self.replicas):
            if _of_several(replica):
                replica.cut(lengths[i * self.slots : (i + 1) * self.slots])

    # ---- the prefix caches ----

    def find_prefix(self, *args: Any) -> int:
        """Returns the longest prefix on any replica that requests may go to."""
        only = self._only
        replicas = self.replicas if only is None else [self.replicas[only]]
        return max(int(replica.find_prefix(*args)) for replica in replicas)

    def pin(self, *args: Any) -> int:
        """Pins what is cached on every replica; returns the largest result."""
        return max(int(replica.pin(*args)) for replica in self.replicas)

    def unpin(self, *args: Any) -> None:
        """See `_native.Pool`."""
        for replica in self.replicas:
            replica.unpin(*args)

    def hint(self, *args: Any) -> None:
        """See `_native.Pool`."""
        for replica in self.replicas:
            replica.hint(*args)

    def evict(self, blocks: int) -> int:
        """Evicts equal parts on all replicas, then more from those that have more to evict."""
        freed = 0
        for _ in range(2):
            for left in range(len(self.replicas), 0, -1):
                if blocks > freed:
                    freed += int(self.replicas[-left].evict(-(-(blocks - freed) // left)))
        return freed

    def events(self) -> Any:
        """Raises an error: a block that one replica drops may still be found on another."""
        raise _native.StatusError(
            Code.INVALID_ARGUMENT,
            Reason.NONE,
            "events: each replica has a prefix cache of its own: read their events with "
            "replica_events(), a list for each replica",
        )

    # ---- memory ----

    def trim(self) -> int:
        """See `_native.Pool`."""
        return sum(int(replica.trim()) for replica in self.replicas)

    def resize(self, capacity_bytes: int) -> Any:
        """Changes the budget, given in bytes of all replicas; all or none."""
        share = capacity_bytes // len(self.replicas)
        before = [n.blocks_total * n.block_bytes for n in self.each_numbers()]
        done: list[int] = []
        claim: Any = None
        try:
            for i, replica in enumerate(self.replicas):
                done.append(i)
                with self._on(i):
                    claim = replica.resize(share)
                if not claim.ok:
                    break
            else:
                return claim
        except BaseException:
            self._resize_back(done, before)
            raise
        self._resize_back(done, before)
        return self._told(done[-1], claim)

    def _resize_back(self, done: Sequence[int], before: Sequence[int]) -> None:
        for i in done[:-1]:
            self.replicas[i].resize(before[i])

    # ---- queries ----

    @property
    def id(self) -> int:
        """Id of the first shard."""
        return int(self.shards[0].id)

    @property
    def closed(self) -> bool:
        """See `_native.Pool`."""
        return all(replica.closed for replica in self.replicas)

    def shares_behind(self, slot: int, num_tokens: int) -> bool:
        """See `_native.Pool`."""
        return bool(self._at("shares_behind", slot, num_tokens))

    def drops(self, slot: int, num_tokens: int) -> bool:
        """See `_native.Pool`."""
        return bool(self._at("drops", slot, num_tokens))

    def committed(self, slot: int) -> list[int]:
        """See `_native.Pool`."""
        return list(self._at("committed", slot))

    def block_map(self, slot: int) -> Any:
        """See `_native.Pool`. Block numbers are those of the replica."""
        return self._at("block_map", slot)

    def block_owners(self, slot: int) -> Any:
        """See `_native.Pool`. Block numbers are those of the replica."""
        begin = self._owner("block_map", slot)[0] * self.slots
        return [
            [
                plain(
                    row,
                    slots=[one + begin for one in row.slots],
                    owner=row.owner + begin if row.owner >= 0 else row.owner,
                )
                for row in blocks
            ]
            for blocks in self._at("block_owners", slot)
        ]

    def rows(self) -> list[Any]:
        """Row of each slot that a replica has."""
        return [
            plain(row, slot=row.slot + i * self.slots)
            for i, replica in enumerate(self.replicas)
            for row in replica.rows()
        ]

    def each_numbers(self) -> list[Any]:
        """Numbers of each replica."""
        return [replica.numbers() for replica in self.replicas]

    def numbers(self) -> Any:
        """Numbers summed over the replicas, except for the size of a block."""
        each = [plain(numbers) for numbers in self.each_numbers()]
        joined = {name: sum(getattr(n, name) for n in each) for name in vars(each[0])}
        return types.SimpleNamespace(**joined | {"block_bytes": each[0].block_bytes})

    def swap_writes(self) -> int:
        """See `_native.Pool`."""
        return sum(replica.swap_writes() for replica in self.replicas)

    # ---- the whole pool ----

    def new_generation(self) -> list[tuple[int, int, list[int]]]:
        """Returns generation, epoch and lengths of each shard."""
        return [
            generation
            for replica in self.replicas
            for own in (replica.new_generation(),)
            for generation in (own if _of_several(replica) else [own])
        ]

    def wait_for_drain(self, seconds: float) -> bool:
        """See `_native.Pool`. Checks one replica after the other."""
        draining = [r for r in self.replicas if any(row.draining for row in r.rows())]
        return any(replica.wait_for_drain(seconds / len(draining)) for replica in draining)

    def close(self) -> None:
        """See `_native.Pool`."""
        for replica in self.replicas:
            replica.close()
