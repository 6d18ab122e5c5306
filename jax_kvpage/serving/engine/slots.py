"""The pool as the scheduler sees it, and what its plans do to it.

Rows are the scheduler's, slots are the pool's. Calls that need the cache are made only when every
step has been read back: then all tokens of a sequence are known and can be committed for the prefix
cache before its slot goes, and a call never meets a step that failed. If the cache is of no use all
the same, a call is made once more from a new generation.
"""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from typing import Any, TypeVar

import jax
import numpy as np

from jax_kvpage.cache import KVCache
from jax_kvpage.errors import DeviceFault, OutOfBlocks
from jax_kvpage.pool import KVPool
from jax_kvpage.serving.engine.stats import SequenceMemory
from jax_kvpage.serving.engine.tracking import SequenceState
from jax_kvpage.serving.plan import Fork, StepPlan
from jax_kvpage.serving.request import Sequence
from jax_kvpage.serving.scheduler import Scheduler

__all__ = ["PoolMemory", "Slots"]

_T = TypeVar("_T")


class PoolMemory:
    """Answers the scheduler's questions from a pool, in blocks of all layers.

    Args:
        pool: the memory.
    """

    def __init__(self, pool: KVPool) -> None:
        spec = pool.spec
        assert spec.block_tokens is not None
        self._pool = pool
        self._ranges = spec.num_ranges
        self._max_slots = spec.max_slots
        self.block_tokens = spec.block_tokens
        self.max_seq_len = spec.max_seq_len
        self.look()

    def look(self) -> None:
        """Takes a snapshot of the pool's accounts; to be called before each plan."""
        self._stats = self._pool.stats()

    @property
    def capacity(self) -> int:
        """Blocks in all."""
        return self._stats.blocks_total // self._ranges

    def free_blocks(self) -> int:
        """Free blocks, and what parked slots, the prefix cache and spare tails would give up."""
        stats = self._stats
        return (stats.blocks_free + stats.blocks_parked + stats.blocks_spare) // self._ranges

    def draining_blocks(self) -> int:
        """Blocks that come free without a decision."""
        return self._stats.blocks_draining // self._ranges

    def free_slots(self) -> int:
        """Slots that can be acquired now."""
        return self._max_slots - self._stats.slots_occupied - self._stats.slots_draining


class Slots:
    """Gives slots to sequences and takes them back, as plans say.

    Args:
        pool: the memory.
        memory: the scheduler's view of it.
        num_rows: sequences at one time.
        prefix_caching: whether sequences are found by their tokens.

    Attributes:
        states: by row, the sequence that has it.
        slot: int32[rows], its slot.
        cache: the newest.
        recover: starts a new generation; set by the runner.
    """

    def __init__(
        self, pool: KVPool, memory: PoolMemory, num_rows: int, prefix_caching: bool
    ) -> None:
        self._pool = pool
        self._block_tokens = memory.block_tokens
        self._prefix_caching = prefix_caching
        self.states: list[SequenceState | None] = [None] * num_rows
        self.slot = np.full(num_rows, -1, np.int32)
        self.cache: KVCache = pool.cache()
        self.recover: Callable[[], None]

    def occupied(self) -> list[SequenceState]:
        """Sequences that have a row."""
        return [state for state in self.states if state is not None]

    def memory(self) -> list[SequenceMemory]:
        """What each sequence stores and has room for."""
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
        """Releases the slots of sequences whose row the scheduler has taken back."""
        everyone = enumerate(self.states)
        self.release(row for row, s in everyone if s is not None and s.is_dropped)

    def release(self, rows: Iterable[int]) -> None:
        """Commits what sequences have computed, and releases their slots. Nothing is in flight."""
        gone = [state for row in rows if (state := self.states[row]) is not None]
        if not gone:
            return
        for state in gone:
            self.commit(state)
        self._release(lambda: [state.slot for state in gone if state.slot >= 0])
        for state in gone:
            if state.row >= 0:
                self.leave(state)

    def leave(self, state: SequenceState) -> None:
        """Hears that the slot of a sequence is free."""
        self.states[state.row], self.slot[state.row] = None, -1
        state.slot = state.row = -1
        state.computed = state.committed = 0

    def abandon(self) -> None:
        """Forgets all slots: the pool is closed."""
        for state in self.occupied():
            self.leave(state)

    def claim(
        self, plan: StepPlan, scheduler: Scheduler, states: dict[Sequence, SequenceState]
    ) -> StepPlan:
        """Gets the memory of a plan; what is refused is left out.

        Args:
            plan: the last one.
            scheduler: which made it.
            states: of its sequences.

        Returns:
            The plan to run.
        """
        refused: list[Sequence] = []
        for fork in plan.forks:
            if states[fork.parent].computed < fork.num_tokens:
                continue  # the step that computed the prompt has failed, and its requests with it
            if not self._fork(fork, states):
                refused += fork.children
        for admission in plan.admissions:
            state = states[admission.sequence]
            if not self.acquire(state, admission.num_tokens):
                refused.append(admission.sequence)
            elif state.computed < admission.num_cached:  # the others were evicted in between
                plan = scheduler.found(plan, admission.sequence, state.computed)
        refused += self._extend(plan)
        if not refused:
            return plan
        new = [a.sequence for a in plan.admissions]
        new += [child for fork in plan.forks for child in fork.children]
        rows = {sequence: sequence.row for sequence in new}
        left = scheduler.refuse(plan, refused)
        groups = {sequence.group for sequence in refused}
        # Of a group that does not run, those that did get their memory.
        self.release(rows[s] for s in new if s.group in groups and states[s].row >= 0)
        return left

    def take_over(self, heirs: Items[tuple[SequenceState, SequenceState]]) -> None:
        """Gives sequences forks of others' slots in place of their own. Nothing is in flight.

        They need no more memory than they had: what a fork does not share, the slot before did not
        share either. But that one may have to drain first.

        Args:
            heirs: each sequence and the one whose tokens it takes over. Those keep theirs.
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
            _past_fault(lambda: self._pool.extend(slots, rooms))
        except OutOfBlocks:
            jax.block_until_ready(self.cache)
            _past_fault(lambda: self._pool.extend(slots, rooms))

    def find(self, state: SequenceState) -> int:
        """Tokens that `acquire` will find in memory, if nothing is evicted before."""
        ids = np.asarray(state.ids, np.int32)
        return _past_fault(lambda: self._pool.find_prefix(ids, state.request.namespace))

    def acquire(self, state: SequenceState, room: int) -> bool:
        """Gives a sequence a slot that starts with what is in memory of its tokens."""
        cached = 0
        try:
            if self._prefix_caching:
                ids, space = np.asarray(state.ids, np.int32), state.request.namespace
                slot, cached, self.cache = self._call(
                    lambda cache: self._pool.acquire_prefix(cache, ids, room, space)
                )
            else:
                slot, self.cache = self._call(
                    lambda cache: self._pool.acquire(cache, max(room, len(state.ids)))
                )
        except OutOfBlocks:
            return False
        self._enter(state, slot, cached, max(room, len(state.ids)))
        state.request.output.metrics.num_cached_tokens += cached
        return True

    def commit(self, state: SequenceState) -> None:
        """Tells the pool the tokens of a sequence whose keys and values exist."""
        if state.final > state.committed:
            ids = state.ids[state.committed : state.final]
            _past_fault(lambda: self._pool.commit(state.slot, ids))
            state.committed = state.final

    def commit_blocks(self, state: SequenceState) -> None:
        """Like `commit`, once a block is full, or the prompt is computed."""
        if state.slot < 0:
            return
        size, prompt = self._block_tokens, len(state.request.output.prompt_token_ids)
        full = state.final // size > state.committed // size
        if full or state.committed < prompt <= state.final:
            self.commit(state)

    def _call(self, verb: Callable[[KVCache], Any]) -> Any:
        """Makes a call that goes on from the newest cache; one that fails changes nothing."""
        try:
            return verb(self.cache)
        except (jax.errors.JaxRuntimeError, ValueError):
            self.recover()
            return verb(self.cache)

    def _reorder(self, states: list[SequenceState], parents: list[int]) -> list[int]:
        """New slots, which go on from those of `parents`."""
        slots, self.cache = self._call(
            lambda cache: self._pool.reorder(cache, [state.slot for state in states], parents)
        )
        return list(slots)

    def _release(self, slots: Callable[[], list[int]]) -> None:
        """Releases slots; asks again which ones they are after a recovery."""

        def release(cache: KVCache) -> KVCache:
            found = slots()
            return self._pool.release(cache, found) if found else cache

        self.cache = self._call(release)

    def _enter(self, state: SequenceState, slot: int, computed: int, room: int) -> None:
        # A recovery gives a slot to a sequence that may have lost its row to the scheduler since.
        row = state.row if state.row >= 0 else state.sequence.row
        state.slot, state.row, state.room = slot, row, room
        state.computed = state.committed = computed
        self.states[row], self.slot[row] = state, slot

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

    def _unused(self, slots: list[int]) -> list[int]:
        """Those of some slots that are acquired, and that no sequence has."""
        lengths = np.asarray(jax.device_get(self.cache.lengths))
        return [slot for slot in slots if lengths[slot] >= 0 and slot not in self.slot]

    def _extend(self, plan: StepPlan) -> list[Sequence]:
        """Maps more room; returns the sequences that got none."""
        rows, tokens = plan.extend_rows.tolist(), plan.extend_tokens.tolist()
        every = [self.states[row] for row in rows]
        pairs = [(s, n) for s, n in zip(every, tokens, strict=True) if s is not None]
        try:
            if pairs:
                slots, rooms = [s.slot for s, _ in pairs], [n for _, n in pairs]
                _past_fault(lambda: self._pool.extend(slots, rooms))
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


def _past_fault(call: Callable[[], _T]) -> _T:
    """Makes a call that needs no cache.

    On CUDA it may be the first to hear, once, that a step in flight has failed. That is dealt with
    when the step is read back.
    """
    try:
        return call()
    except DeviceFault:
        return call()
