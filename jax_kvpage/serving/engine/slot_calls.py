"""The slots of sequences, and the pool calls that change them.

Rows belong to the scheduler, slots to the pool. Calls that need the cache are only made once every
step has been read back: then all tokens of a sequence are known and can be committed to the prefix
cache before its slot is released, and a call never meets a failed step. If the cache turns out to
be unusable nevertheless, the call is retried once from a new generation.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from jax_kvpage._cache_checks import host_lengths
from jax_kvpage.cache import KVCache
from jax_kvpage.errors import DeviceFault
from jax_kvpage.pool import KVPool
from jax_kvpage.serving.engine.pool_memory import PoolMemory
from jax_kvpage.serving.engine.tracking import SequenceState

__all__ = ["SlotCalls", "past_fault"]

_T = TypeVar("_T")


class SlotCalls:
    """Assigns slots to sequences, and makes the pool calls that change the assignment.

    Args:
        pool: the memory.
        memory: the scheduler's view of it.
        num_rows: maximum sequences at one time.

    Attributes:
        states: sequence of each row, or None.
        slot: int32[rows]: slot of each row, or -1.
        cache: the newest cache.
        recover: starts a new generation; set by the runner.
    """

    def __init__(self, pool: KVPool, memory: PoolMemory, num_rows: int) -> None:
        self._pool = pool
        self._block_tokens = memory.block_tokens
        self._commits = memory.shares
        self.states: list[SequenceState | None] = [None] * num_rows
        self.slot = np.full(num_rows, -1, np.int32)
        self.cache: KVCache = pool.cache()
        self.recover: Callable[[], None]

    def occupied(self) -> list[SequenceState]:
        """Sequences that have a row."""
        return [state for state in self.states if state is not None]

    def leave(self, state: SequenceState) -> None:
        """Marks the slot of a sequence as free."""
        self.states[state.row], self.slot[state.row] = None, -1
        state.slot = state.row = -1
        state.computed = state.committed = 0

    def abandon(self) -> None:
        """Forgets all slots, because the pool is closed."""
        for state in self.occupied():
            self.leave(state)

    def commit(self, state: SequenceState) -> None:
        """Commits the tokens of a sequence whose keys and values exist."""

        def commit() -> None:
            final = state.final
            if final > state.committed:
                self._pool.commit(state.slot, state.ids[state.committed : final])
                state.committed = final

        if state.final > state.committed and self._commits:
            self._past_fault(commit)

    def commit_blocks(self, state: SequenceState) -> None:
        """Like `commit`, but only if a block is full or the prompt is complete."""
        if state.slot < 0:
            return
        size, prompt = self._block_tokens, len(state.request.output.prompt_token_ids)
        before, final = state.committed, state.final
        if final // size > before // size or before < prompt <= final:
            self.commit(state)

    def _call(self, verb: Callable[[KVCache], Any]) -> Any:
        """Makes a call on the newest cache; if it fails, recovers and retries it."""
        try:
            return verb(self.cache)
        except (jax.errors.JaxRuntimeError, ValueError):
            self.recover()
            return verb(self.cache)

    def _past_fault(self, call: Callable[[], _T]) -> _T:
        """Like `past_fault`, but recovers if the fault is reported again.

        Over a mesh, all calls report it until there is a new generation. The call must take slots
        and tokens from the sequences, because recovering may change them.
        """
        try:
            return past_fault(call)
        except DeviceFault:
            self.recover()
            return call()

    def _release(self, slots: Callable[[], list[int]]) -> None:
        """Releases slots; calls `slots` again after a recovery."""

        def release(cache: KVCache) -> KVCache:
            found = slots()
            return self._pool.release(cache, found) if found else cache

        self.cache = self._call(release)

    def _enter(self, state: SequenceState, slot: int, computed: int, room: int) -> None:
        # A recovery may give a slot to a sequence that has lost its scheduler row since.
        row = state.row if state.row >= 0 else state.sequence.place
        state.slot, state.row, state.room = slot, row, room
        state.computed = state.committed = computed
        self.states[row], self.slot[row] = state, slot

    def _unused(self, slots: list[int]) -> list[int]:
        """Returns the given slots that are acquired but belong to no sequence."""
        lengths = host_lengths(self.cache)
        return [slot for slot in slots if lengths[slot] >= 0 and slot not in self.slot]


def past_fault(call: Callable[[], _T]) -> _T:
    """Makes a call that needs no cache.

    On CUDA, the call may be the first to report, once, that a step in flight has failed. That
    failure is handled when the step is read back, so the call is retried.
    """
    try:
        return call()
    except DeviceFault:
        return call()
