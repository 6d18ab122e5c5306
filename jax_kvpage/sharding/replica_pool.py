"""ReplicatedPool: the compiled pools of all replicas, called like one pool.

Each call goes to the replicas whose slots it names, and each request to the replica chosen by
`placement`. A call that fails on one replica is undone on those called before it.
"""

import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_kvpage._native import Code, Reason
from jax_kvpage.ops.edit_slots import SWAP_IN
from jax_kvpage.sharding.decisions import Edits
from jax_kvpage.sharding.placement import Request, place
from jax_kvpage.sharding.replica_table import ReplicaTable, plain

__all__ = ["ReplicaSwapped", "ReplicatedDecision", "ReplicatedPool"]


class ReplicatedDecision:
    """The decisions of all replicas.

    Args:
        make: creates an empty decision of one replica.
        replicas: number of replicas.
        slots: slots per replica.

    Attributes:
        parts: decision of each replica.
    """

    def __init__(self, make: Callable[[], Any], replicas: int, slots: int) -> None:
        self._make, self._slots = make, slots
        self.parts = [make() for _ in range(replicas)]

    def renew(self) -> None:
        """Starts over after the parts were undone."""
        self.parts = [self._make() for _ in self.parts]

    @property
    def edits(self) -> Edits:
        """Edits of all replicas, with slot numbers of the whole pool."""
        edits = []
        for replica, part in enumerate(self.parts):
            begin = replica * self._slots
            for opcode, slot, length, donor in part.edits:
                is_slot = donor >= 0 and opcode != SWAP_IN  # there it is a number of tokens
                edits.append((opcode, slot + begin, length, donor + begin * is_slot))
        return edits


class ReplicaSwapped:
    """A swapped sequence, which belongs to the replica of its former slot.

    Args:
        make: creates the object that a replica's `swap_out` fills; other attributes are delegated
            to it.
        slots: slots per replica.

    Attributes:
        replica: the replica; None before `assign`.
        own: the object filled by the replica's pool.
    """

    def __init__(self, make: Callable[[], Any], slots: int) -> None:
        self._slots = slots
        self.replica: int | None = None
        self.own = make()

    def assign(self, replica: int) -> Any:
        """Sets the replica that it belongs to; returns `own`."""
        self.replica = replica
        return self.own

    @property
    def slot(self) -> int:
        """Its slot, as a number of the whole pool."""
        return int(self.own.slot) + (self.replica or 0) * self._slots

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


class ReplicatedPool(ReplicaTable):
    """`_native.Pool` for several replicas: the calls that make decisions."""

    # ---- placing requests ----

    def _placed(
        self,
        decision: ReplicatedDecision,
        requests: Sequence[Request],
        attempt: Callable[[int, list[int]], Any],
    ) -> Any:
        """Claims memory for each request on the replica where it is placed; all or none.

        Args:
            decision: empty decision of the call.
            requests: requests to place.
            attempt: claims the given requests (indices) on a replica.
        """
        limits = self._limits(len(requests))
        failed: list[Any] = []
        while True:
            where = self._places(requests, limits)
            if where is None:  # the closest attempt says why
                return max(failed, key=lambda claim: (claim.draining > 0, claim.free))
            done: list[tuple[int, list[int], Any]] = []
            for replica in sorted(set(where)):
                members = [i for i, at in enumerate(where) if at == replica]
                with self._on(replica):
                    claim = attempt(replica, members)
                if not claim.ok:
                    break
                done.append((replica, members, claim))
            else:
                return self._joined(len(requests), done)
            self.undo(decision)
            decision.renew()
            if claim.code is not Code.RESOURCE_EXHAUSTED:
                return self._told(replica, claim)
            failed.append(self._told(replica, claim))
            limits[replica] = len(members) - 1

    def _places(
        self, requests: Sequence[Request], limits: list[int], sure: bool = False
    ) -> list[int] | None:
        """Returns the replica of each request, with at most `limits` requests on each.

        If the pools' statistics promise no room anywhere, tries nevertheless, unless `sure`: the
        claim that fails then says what is missing.
        """
        numbers = self.each_numbers()
        loads = [n.blocks_mapped * self._block_tokens // self._ranges for n in numbers]

        def promised(replica: int, members: list[int], missing: list[int]) -> bool:
            if len(members) > limits[replica]:
                return False
            claim = self.replicas[replica].can_acquire([max(tokens, 0) for tokens in missing])
            return claim.ok or claim.code is not Code.RESOURCE_EXHAUSTED

        where = place(requests, loads, self._block_tokens, promised)
        if where is not None or sure:
            return where
        return place(
            requests, loads, self._block_tokens, lambda replica, m, _: len(m) <= limits[replica]
        )

    def _joined(self, count: int, done: Sequence[tuple[int, list[int], Any]]) -> Any:
        """Joins the claims of the replicas into one, with slot numbers of the whole pool."""
        joined: dict[str, list[Any]] = {
            name: [-1 if name in ("sources", "leaders") else 0] * count
            for name in ("slots", "tokens", "shared", "sources", "leaders", "stored")
        }
        for replica, members, claim in done:
            begin = replica * self.slots
            for name, values in joined.items():
                own = getattr(claim, name)
                for index, value in zip(members, own, strict=False):  # some claims lack some
                    if name in ("slots", "sources") and value >= 0:
                        value += begin
                    if name == "leaders" and value >= 0:
                        value = members[value]
                    values[index] = value
        return types.SimpleNamespace(ok=True, code=Code.OK, reason=Reason.NONE, **joined)

    def _plain_requests(self, num_tokens: Sequence[int]) -> list[Request]:
        nothing = [0] * len(self.replicas)
        return [Request(tokens, tokens, nothing) for tokens in num_tokens]

    def acquire(self, decision: ReplicatedDecision, num_tokens: list[int]) -> Any:
        """See `_native.Pool`. Each request goes to the replica with the most free blocks."""

        def attempt(replica: int, members: list[int]) -> Any:
            wanted = [num_tokens[i] for i in members]
            return self.replicas[replica].acquire(decision.parts[replica], wanted)

        return self._placed(decision, self._plain_requests(num_tokens), attempt)

    def can_acquire(self, num_tokens: list[int]) -> Any:
        """See `_native.Pool`."""
        requests = self._plain_requests(num_tokens)
        wrong = self.replicas[0].can_acquire(num_tokens)
        if not wrong.ok and wrong.code is not Code.RESOURCE_EXHAUSTED:
            return wrong
        ok = self._places(requests, self._limits(len(requests)), sure=True) is not None
        return plain(wrong, ok=ok)

    def acquire_prefix(
        self,
        decision: ReplicatedDecision,
        ids: list[np.ndarray],
        num_tokens: list[int],
        space: str,
        whole: bool,
        unit: int,
        least: int,
    ) -> Any:
        """See `_native.Pool`. Each request goes to the replica where it costs least."""

        def attempt(replica: int, members: list[int]) -> Any:
            own_ids, own_tokens = [ids[i] for i in members], [num_tokens[i] for i in members]
            part = decision.parts[replica]
            return self.replicas[replica].acquire_prefix(
                part, own_ids, own_tokens, space, whole, unit, least
            )

        requests = []
        for own, tokens in zip(ids, num_tokens, strict=True):
            cached = [
                replica.find_prefix(space, own, whole) // unit * unit for replica in self.replicas
            ]
            found = [count if count >= least else 0 for count in cached]
            requests.append(Request(len(own), tokens, found, own))
        return self._placed(decision, requests, attempt)

    # ---- decisions about slots ----

    def undo(self, decision: ReplicatedDecision) -> None:
        """See `_native.Pool`."""
        for replica, part in zip(self.replicas, decision.parts, strict=True):
            replica.undo(part)

    def fork(
        self,
        decision: ReplicatedDecision,
        verb: str,
        requests: Sequence[tuple[int, int]],
        released: Sequence[int],
    ) -> Any:
        """See `_native.Pool`. A fork stays on the replica of its donor."""
        groups = self._grouped(verb, [*[donor for donor, _ in requests], *released])
        done = []
        for replica, indices in groups.items():
            members = [i for i in indices if i < len(requests)]
            own = [(requests[i][0] % self.slots, requests[i][1]) for i in members]
            dead = [released[i - len(requests)] % self.slots for i in indices[len(members) :]]
            with self._on(replica) as pool:
                claim = pool.fork(decision.parts[replica], verb, own, dead)
            if not claim.ok:
                self.undo(decision)
                decision.renew()
                return self._told(replica, claim)
            done.append((replica, members, claim))
        return self._joined(len(requests), done)

    def _decide(
        self, op: str, decision: ReplicatedDecision, slots: Sequence[int], *args: Any
    ) -> Any:
        """Makes a call with slots and one value per slot on their replicas; all or none."""
        values, *rest = args
        claim: Any = None
        for replica, indices in self._grouped(op, slots).items():
            own = [slots[i] % self.slots for i in indices]
            with self._on(replica) as pool:
                claim = getattr(pool, op)(
                    decision.parts[replica], own, [values[i] for i in indices], *rest
                )
            if claim is not None and not claim.ok:
                self.undo(decision)
                decision.renew()
                return self._told(replica, claim)
        return claim

    def truncate(self, decision: ReplicatedDecision, *args: Any) -> Any:
        """See `_native.Pool`."""
        return self._decide("truncate", decision, *args)

    def drop_before(self, decision: ReplicatedDecision, *args: Any) -> None:
        """See `_native.Pool`."""
        self._decide("drop_before", decision, *args)

    # ---- swapped sequences: they stay on their replica ----

    def swap_out(self, decision: ReplicatedDecision, swapped: ReplicaSwapped, slot: int) -> None:
        """See `_native.Pool`."""
        replica, own = self._owner("swap_out", slot)
        with self._on(replica) as pool:
            pool.swap_out(decision.parts[replica], swapped.assign(replica), own)

    def prefetch_swapped(self, swapped: ReplicaSwapped) -> Any:
        """See `_native.Pool`."""
        assert swapped.replica is not None
        with self._on(swapped.replica) as pool:
            claim = pool.prefetch_swapped(swapped.own)
        return claim if claim.ok else self._told(swapped.replica, claim)

    def swap_in(self, decision: ReplicatedDecision, swapped: ReplicaSwapped, recover: bool) -> Any:
        """See `_native.Pool`."""
        replica = swapped.replica
        assert replica is not None
        with self._on(replica) as pool:
            claim = pool.swap_in(decision.parts[replica], swapped.own, recover)
        return self._joined(1, [(replica, [0], claim)]) if claim.ok else self._told(replica, claim)

    def start_edits(self, decision: ReplicatedDecision, verb: str, edits: Edits) -> None:
        """See `_native.Pool`."""
        for replica, indices in self._grouped(verb, [slot for _, slot, *_ in edits]).items():
            own = [
                (opcode, slot % self.slots, length, donor % self.slots if donor >= 0 else donor)
                for opcode, slot, length, donor in (edits[i] for i in indices)
            ]
            with self._on(replica) as pool:
                pool.start_edits(decision.parts[replica], verb, own)
