"""Carries out the memory changes of the scheduler's plans on the pool."""

from collections.abc import Iterable
from collections.abc import Sequence as Items

import jax
import numpy as np

from jax_kvpage.cache import KVCache
from jax_kvpage.errors import KVPageError, OutOfBlocks
from jax_kvpage.pool import KVPool
from jax_kvpage.serving.engine.pool_memory import PoolMemory
from jax_kvpage.serving.engine.scheduling import AnyScheduler
from jax_kvpage.serving.engine.slot_calls import SlotCalls
from jax_kvpage.serving.engine.stats import SequenceMemory
from jax_kvpage.serving.engine.swapping import PoolSwap
from jax_kvpage.serving.engine.tracking import SequenceState
from jax_kvpage.serving.plan import Fork, StepPlan
from jax_kvpage.serving.request import Sequence, SequenceGroup
from jax_kvpage.swapping import Swapped

__all__ = ["Slots"]


class Slots(SlotCalls):
    """Acquires and releases the slots of sequences as plans require.

    Args:
        pool: the memory.
        memory: the scheduler's view of it.
        num_rows: maximum sequences of all replicas at one time.
        prefix_caching: whether sequences look for their tokens in the prefix cache.
        swap: where preempted sequences go; None recomputes them.
    """

    def __init__(
        self,
        pool: KVPool,
        memory: PoolMemory,
        num_rows: int,
        prefix_caching: bool,
        swap: PoolSwap | None = None,
    ) -> None:
        super().__init__(pool, memory, num_rows)
        self._swap = swap
        self._replica_rows = num_rows // pool.replicas
        self._prefix_caching = prefix_caching

    def memory(self) -> list[SequenceMemory]:
        """The memory that each sequence uses and has reserved."""
        size = self._block_tokens
        return [
            SequenceMemory(
                state.request.output.request_id,
                state.output.index,
                state.computed,
                -(-state.room // size) * size,
            )
            for state in self.occupied()
        ]

    def release_dropped(self) -> None:
        """Releases the slots of sequences that lost their scheduler row."""
        everyone = enumerate(self.states)
        self.release(row for row, s in everyone if s is not None and s.is_dropped)

    def swap_out(self, state: SequenceState) -> None:
        """Swaps out a preempted sequence; if that fails, leaves it to be released."""
        if self._swap is None or state.slot < 0 or state.ended:
            return
        self.commit(state)
        try:
            swapped, self.cache = self._call(lambda cache: self._pool.swap_out(cache, state.slot))
        except KVPageError:  # for example, the store was closed
            return
        self._swap.keep(state.sequence.group, swapped)
        self.leave(state)

    def release(self, rows: Iterable[int]) -> None:
        """Commits the tokens of sequences and releases their slots. Nothing may be in flight."""
        gone = [state for row in rows if (state := self.states[row]) is not None]
        if not gone:
            return
        for state in gone:
            self.commit(state)
        self._release(lambda: [state.slot for state in gone if state.slot >= 0])
        for state in gone:
            if state.row >= 0:
                self.leave(state)

    def claim(
        self, plan: StepPlan, scheduler: AnyScheduler, states: dict[Sequence, SequenceState]
    ) -> StepPlan:
        """Acquires the memory of a plan; sequences that were refused are left out.

        Args:
            plan: the last plan.
            scheduler: the scheduler that made it.
            states: states of its sequences.

        Returns:
            The plan to run.
        """
        if not (plan.forks or plan.admissions or plan.extend_rows.size):
            return plan
        refused: list[Sequence] = []
        for fork in plan.forks:
            if states[fork.parent].computed < fork.num_tokens:
                continue  # the step that computed the prompt failed, and with it the requests
            if not self._fork(fork, states):
                refused += fork.children
        for admission in plan.admissions:
            state = states[admission.sequence]
            if not self.acquire(state, admission.num_tokens):
                refused.append(admission.sequence)
            elif state.computed < admission.num_cached:  # blocks were evicted since
                plan = scheduler.found(plan, admission.sequence, state.computed)
        refused += self._extend(plan)
        if not refused:
            return plan
        new = [a.sequence for a in plan.admissions]
        new += [child for fork in plan.forks for child in fork.children]
        rows = {sequence: sequence.place for sequence in new}
        left = scheduler.refuse(plan, refused)
        groups = {sequence.group for sequence in refused}
        # Release the sequences that did get memory but whose group does not run.
        self.release(rows[s] for s in new if s.group in groups and states[s].row >= 0)
        return left

    def wait(self, draining: bool) -> None:
        """Waits briefly, or for programs in flight, until memory is freed; nothing else can run."""
        if draining:
            jax.block_until_ready(self.cache)  # lets released blocks drain
        if self._swap is not None:
            self._swap.wait()

    def forget(self, groups: Iterable[SequenceGroup]) -> None:
        """Drops what the store holds for ended groups."""
        if self._swap is not None:
            for group in groups:
                self._swap.forget(group)

    def take_over(self, heirs: Items[tuple[SequenceState, SequenceState]]) -> None:
        """Replaces the slots of sequences by forks of others. Nothing may be in flight.

        No more memory is needed than before: blocks that a fork does not share were not shared by
        the old slot either. But the old slot may have to drain first.

        Args:
            heirs: pairs of a sequence and the one whose tokens it takes over, which keeps its own
                slot.
        """
        donors = list(dict.fromkeys(donor for _, donor in heirs))
        parents = [*range(len(donors)), *(donors.index(donor) for _, donor in heirs)]
        for donor in donors:
            self.commit(donor)
        lost = [state for state, _ in heirs]
        rooms = [state.room for state in lost]
        try:
            slots = self._reorder([*donors, *lost], parents)
        except OutOfBlocks:
            self._release(lambda: [state.slot for state in lost if state.slot >= 0])
            for state in lost:
                self.leave(state)
            jax.block_until_ready(self.cache)
            slots = self._reorder(donors, parents)
        slots = slots[len(donors) :]
        for (state, donor), slot, room in zip(heirs, slots, rooms, strict=True):
            self._enter(state, slot, donor.computed, room)
            state.ids = list(donor.ids)
        try:
            self._past_fault(lambda: self._pool.extend([s.slot for s in lost], rooms))
        except OutOfBlocks:
            jax.block_until_ready(self.cache)
            self._past_fault(lambda: self._pool.extend([s.slot for s in lost], rooms))

    def find(self, state: SequenceState, replica: int = 0) -> int:
        """Tokens that `acquire` will find on a replica if nothing is evicted before."""
        ids = np.asarray(state.ids, np.int32)

        def find() -> int:
            with self._pool.on_replica(replica):
                return self._pool.find_prefix(ids, state.request.namespace)

        return self._past_fault(find)

    def acquire(self, state: SequenceState, room: int) -> bool:
        """Gives a sequence a slot that starts with those of its tokens that are in memory."""
        swapped = None if self._swap is None else self._swap.get(state.sequence.group)
        if swapped is not None:
            got = self._swap_in(state, room, swapped)
            if got is not None:
                return got
        try:
            slot, cached, self.cache = self._call(lambda cache: self._occupy(cache, state, room))
        except OutOfBlocks:
            return False
        self._enter(state, slot, cached, max(room, len(state.ids)))
        state.request.output.metrics.num_cached_tokens += cached
        return True

    def _occupy(self, cache: KVCache, state: SequenceState, room: int) -> tuple[int, int, KVCache]:
        """Acquires a slot on the replica that the scheduler chose: (slot, tokens found, cache)."""
        with self._pool.on_replica(state.sequence.group.first_row // self._replica_rows):
            if self._prefix_caching:
                ids, space = np.asarray(state.ids, np.int32), state.request.namespace
                slot, found, cache = self._pool.acquire_prefix(cache, ids, room, space)
                return slot, found, cache
            slot, cache = self._pool.acquire(cache, max(room, len(state.ids)))
            return slot, 0, cache

    def _swap_in(self, state: SequenceState, room: int, swapped: Swapped) -> bool | None:
        """Gives a swapped sequence a slot; returns None if it cannot be read."""
        assert self._swap is not None
        group, tokens = state.sequence.group, swapped.tokens
        try:
            slot, self.cache = self._call(lambda cache: self._pool.swap_in(cache, swapped))
        except OutOfBlocks:
            return False
        except KVPageError:
            self._swap.forget(group)
            return None
        self._swap.forget(group)
        self._enter(state, slot, tokens, max(room, len(state.ids)))
        try:
            self._past_fault(lambda: self._pool.extend(state.slot, state.room))
        except OutOfBlocks:
            self._release(lambda: [state.slot])
            self.leave(state)
            return False
        return True

    def _reorder(self, states: list[SequenceState], parents: list[int]) -> list[int]:
        """Returns new slots that continue those of `parents`."""
        slots, self.cache = self._call(
            lambda cache: self._pool.reorder(cache, [state.slot for state in states], parents)
        )
        return list(slots)

    def _fork(self, fork: Fork, states: dict[Sequence, SequenceState]) -> bool:
        parent, room = states[fork.parent], list(fork.room)
        slots: list[int] = []
        try:
            self.commit(parent)
            slots, self.cache = self._call(
                lambda cache: self._pool.fork(cache, parent.slot, len(room), fork.num_tokens)
            )
            self._pool.extend(slots, room)
        except BaseException as error:
            if slots:
                self._release(lambda: self._unused(slots))
            if not isinstance(error, OutOfBlocks):
                raise
            return False
        for child, slot, tokens in zip(fork.children, slots, room, strict=True):
            self._enter(states[child], slot, fork.num_tokens, tokens)
        return True

    def _extend(self, plan: StepPlan) -> list[Sequence]:
        """Maps more room; returns the sequences that were refused."""
        if not plan.extend_rows.size:
            return []
        rows, tokens = plan.extend_rows.tolist(), plan.extend_tokens.tolist()
        every = [self.states[row] for row in rows]
        pairs = [(s, n) for s, n in zip(every, tokens, strict=True) if s is not None]
        try:
            if pairs:
                rooms = [n for _, n in pairs]
                self._past_fault(lambda: self._pool.extend([s.slot for s, _ in pairs], rooms))
            got = pairs
        except OutOfBlocks:
            got = [pair for pair in pairs if self._extend_one(*pair)]
        for state, room in got:
            state.room = room
        lucky = {id(state) for state, _ in got}
        return [state.sequence for state, _ in pairs if id(state) not in lucky]

    def _extend_one(self, state: SequenceState, room: int) -> bool:
        try:
            self._pool.extend(state.slot, room)
        except OutOfBlocks:
            return False
        return True
