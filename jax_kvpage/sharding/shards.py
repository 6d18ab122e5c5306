"""ShardedPool: the compiled pools of all devices, called like one pool.

Each pool gets the same calls in the same order, so that all decide alike: slots and blocks have the
same numbers everywhere. If a call fails on one pool, it is undone on the previous ones; if results
differ, an error is raised.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax_kvpage import _native
from jax_kvpage._native import Reason
from jax_kvpage.errors import KVPageError
from jax_kvpage.ops.edit_slots import VACATE
from jax_kvpage.sharding.decisions import Edits, ShardedDecision, SwapCalls, claimed
from jax_kvpage.sharding.shard_table import ShardTable

__all__ = ["ShardedDecision", "ShardedPool"]


class ShardedPool(ShardTable, SwapCalls):
    """`_native.Pool` for several devices: the calls that make decisions.

    Args:
        shards: a pool for each device, new and with the same spec.
        mirrored: whether programs run on GPUs, asynchronously to the host's tables.

    Attributes:
        maps: makes programs map memory alike in all shards.
    """

    def __init__(self, shards: Sequence[Any], mirrored: bool = False) -> None:
        super().__init__(shards, mirrored)
        self.maps = _native.JointMaps(self.shards)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Keeps programs from mapping memory while a call goes from shard to shard.

        Nothing that a program waits for may happen inside.
        """
        self.maps.enter()
        try:
            yield
        finally:
            self.maps.leave()

    # ---- decisions, which can be undone ----

    def _alike(
        self,
        op: str,
        attempt: Callable[[int], Any],
        undo: Callable[[Sequence[int]], None],
        told: Callable[[int, Any], Any],
        settle: bool = True,
    ) -> Any:
        """Makes the same call on every shard; all or none.

        Args:
            op: name of the call.
            attempt: makes the call on a shard; a claim that is not ok counts as a failure.
            undo: undoes the call on the given shards.
            told: returns what must be equal on all shards, given a shard and its result.
            settle: whether the result depends on what programs have freed.
        """
        for last in (False, True):
            self.prepare(settle)
            done: list[int] = []
            results: list[Any] = []
            try:
                with self.together():
                    for i in range(len(self.shards)):
                        done.append(i)  # before the call, because a signal may come right after it
                        results.append(attempt(i))  # even if another shard has failed: see below
            except BaseException as error:
                undo(done)
                self._make_equal(done)
                self._forget_alike(error)
                raise
            failed = [result for result in results if not getattr(result, "ok", True)]
            if len(failed) == len(results):
                return results[0]  # and all have freed the same memory on the way
            if failed:
                undo(done)
                self._make_equal(done)
                self._forget_alike(failed[0])
                return failed[0]
            decided = [told(i, result) for i, result in enumerate(results)]
            if all(one == decided[0] for one in decided):
                return results[0]
            undo(done)
            if last:
                raise KVPageError(
                    f"{op}: the devices of the mesh would decide differently: {decided}. Nothing "
                    "has changed. Release the pool's slots, or make a new pool"
                )
            # Only the placement of blocks differs. Without blocks that nobody needs, they agree.
            self._make_equal(done, forget=True)
        raise AssertionError

    def _make_equal(self, done: Sequence[int], forget: bool = False) -> None:
        """Frees unneeded blocks on all shards, after a call that not all shards have made.

        Args:
            done: shards that were called.
            forget: whether to drop the prefix cache as well.
        """
        if len(done) >= 2:  # a call that failed on the first shard has changed nothing
            self._give_back(forget)

    def _give_back(self, forget: bool) -> None:
        self.keep_faults()
        with self.together():
            for shard in self.shards:
                try:
                    if forget:
                        shard.evict(2**62)
                    shard.trim()
                except _native.StatusError:
                    continue  # closed, or the system refused; a later decision compares again

    def _forget_alike(self, failed: Any) -> None:
        """After a call failed with a program's fault, discards the same fault on other devices.

        Args:
            failed: the exception of the call, or its claim that is not ok.
        """
        reason = getattr(failed, "reason", None)
        if isinstance(failed, _native.StatusError):
            reason = failed.args[1]
        if self.mirrored and reason is Reason.DEVICE_FAULT:
            with contextlib.suppress(_native.StatusError):
                self.take_fault()

    def _decide(self, op: str, decision: ShardedDecision, *args: Any, settle: bool = True) -> Any:
        return self._alike(
            op,
            lambda i: getattr(self.shards[i], op)(decision.parts[i], *args),
            lambda done: self.undo(decision),
            lambda i, claim: (decision.parts[i].edits, claim and claimed(claim)),
            settle,
        )

    def acquire(self, decision: ShardedDecision, num_tokens: list[int]) -> Any:
        """See `_native.Pool`."""
        return self._decide("acquire", decision, num_tokens)

    def fork(self, decision: ShardedDecision, *args: Any) -> Any:
        """See `_native.Pool`."""
        return self._decide("fork", decision, *args)

    def acquire_prefix(self, decision: ShardedDecision, *args: Any) -> Any:
        """See `_native.Pool`."""
        return self._decide("acquire_prefix", decision, *args)

    def truncate(self, decision: ShardedDecision, *args: Any) -> Any:
        """See `_native.Pool`."""
        return self._decide("truncate", decision, *args)

    def drop_before(self, decision: ShardedDecision, *args: Any) -> Any:
        """See `_native.Pool`."""
        return self._decide("drop_before", decision, *args)

    def start_edits(self, decision: ShardedDecision, verb: str, edits: Edits) -> None:
        """See `_native.Pool`."""
        self._decide("start_edits", decision, verb, edits, settle=False)

    def undo(self, decision: ShardedDecision) -> None:
        """See `_native.Pool`."""
        with self.together():
            for shard, part in zip(self.shards, decision.parts, strict=True):
                shard.undo(part)

    # ---- calls that `retract` undoes ----

    def _retract(self, slots: Sequence[int]) -> None:
        """Reduces these slots to the room and committed tokens that all shards have."""
        with self.together():
            tables = [{row.slot: row for row in shard.rows()} for shard in self.shards]
            for slot in slots:
                rows = [table[slot] for table in tables if slot in table]
                if len(rows) == len(tables) and not any(row.draining for row in rows):
                    least = [min(row.reserved for row in rows), min(row.committed for row in rows)]
                    for shard in self.shards:
                        with contextlib.suppress(_native.StatusError):  # it keeps the room
                            shard.retract(slot, *least)

    def extend(self, slots: list[int], num_tokens: list[int]) -> Any:
        """See `_native.Pool`."""
        return self._alike(
            "extend",
            lambda i: self.shards[i].extend(slots, num_tokens),
            lambda done: self._retract(slots),
            lambda i, claim: claim.ok,
        )

    def commit(self, slot: int, token_ids: list[int]) -> None:
        """See `_native.Pool`."""
        self._alike(
            "commit",
            lambda i: self.shards[i].commit(slot, token_ids),
            lambda done: self._retract([slot]),
            lambda i, result: None,
            settle=False,
        )

    def resize(self, capacity_bytes: int) -> Any:
        """Changes the budget, given in bytes of all devices."""
        before = self.shards[0].numbers()
        size = before.blocks_total * before.block_bytes

        def undo(done: Sequence[int]) -> None:
            for shard in map(self.shards.__getitem__, done):
                if shard.numbers().blocks_total != before.blocks_total:
                    shard.resize(size)

        return self._alike(
            "resize",
            lambda i: self.shards[i].resize(capacity_bytes // len(self.shards)),
            undo,
            lambda i, claim: claim.ok,
        )

    # ---- calls without an undo: what they change is not needed, and is compared ----

    def _each(self, op: str, *args: Any) -> Any:
        self.prepare()
        with self.together():
            results = [getattr(shard, op)(*args) for shard in self.shards]
        if any(result != results[0] for result in results):
            raise KVPageError(f"{op}: the devices of the mesh do not agree: {results}")
        return results[0]

    def find_prefix(self, *args: Any) -> int:
        """See `_native.Pool`."""
        return int(self._each("find_prefix", *args))

    def pin(self, *args: Any) -> int:
        """See `_native.Pool`."""
        return int(self._each("pin", *args))

    def unpin(self, *args: Any) -> None:
        """See `_native.Pool`."""
        self._each("unpin", *args)

    def hint(self, *args: Any) -> None:
        """See `_native.Pool`."""
        self._each("hint", *args)

    def evict(self, blocks: int) -> int:
        """See `_native.Pool`."""
        return int(self._each("evict", blocks))

    def trim(self) -> int:
        """See `_native.Pool`."""
        self.prepare()
        with self.together():
            return min(shard.trim() for shard in self.shards)

    # ---- the whole pool ----

    def new_generation(self) -> list[tuple[int, int, list[int]]]:
        """Returns generation, epoch and lengths of each shard."""
        generations = [shard.new_generation() for shard in self.shards]  # waits for programs
        if self.mirrored and self._release_torn([lengths for *_, lengths in generations]):
            generations = [shard.new_generation() for shard in self.shards]
        self.maps.begin([(number, epoch) for number, epoch, _ in generations])
        return generations

    def _release_torn(self, lengths: Sequence[list[int]]) -> bool:
        """Releases slots that are occupied on some devices only; returns whether there were any.

        A generation that starts while another thread acquires may overtake the acquire's program on
        one device but not on another.
        """
        torn = [slot for slot, each in enumerate(zip(*lengths, strict=True)) if -1 in each]
        any_held = False
        for shard, own in zip(self.shards, lengths, strict=True):
            if held := [(VACATE, slot, 0, -1) for slot in torn if own[slot] >= 0]:
                any_held = True
                self.keep_faults()
                shard.start_edits(_native.Decision(), "release", held)
        return any_held

    def cut(self, lengths: Sequence[int]) -> None:
        """Cuts committed tokens on all shards back to these lengths, the minima over shards."""
        for shard in self.shards:
            for row in shard.rows():
                if not row.draining and row.committed > max(lengths[row.slot], 0):
                    shard.retract(row.slot, row.reserved, max(lengths[row.slot], 0))
