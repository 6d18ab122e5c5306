"""Random host calls on sequences that are swapped out and in, against their expected contents."""

from __future__ import annotations

import contextlib
import shutil
import tempfile

import covering
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prefix_rig import LAYERS, spec_of, text
from store_rig import soon
from swap_rig import SwapRig, swap_files

import jax_kvpage as kvp

_ROOM, _SLOTS = 96, 5
_TEXT = text(_ROOM)  # prompts share their beginning, so that the prefix cache finds something


class SwappingMachine(RuleBasedStateMachine):
    """A pool that is too small for all slots, above a disk with room for some of it."""

    layout, stored = "fused", 40

    def __init__(self) -> None:
        super().__init__()
        spec = spec_of(self.layout, max_slots=_SLOTS, max_seq_len=_ROOM).resolve("cpu")
        block = spec.block_bytes * (1 if self.layout == "fused" else 2 * LAYERS)
        self.folder = tempfile.mkdtemp()
        self.store = kvp.BlockStore(self.folder, limit=block * self.stored)
        self.pool = kvp.KVPool(spec, 20 * block, poison=True, store=self.store)
        self.rig = SwapRig(self.pool)

    def teardown(self) -> None:
        self.pool.close()
        self.store.close()
        shutil.rmtree(self.folder)

    def a_slot(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.rig.ids)))

    def a_swapped(self, data: st.DataObject) -> kvp.Swapped:
        return data.draw(st.sampled_from(list(self.rig.away)))

    @rule(tokens=st.integers(1, 60), known=st.booleans(), seed=st.integers(1, 3))
    def acquire(self, tokens: int, known: bool, seed: int) -> None:
        """Acquires a sequence, which the prefix cache may or may not know."""
        ids = _TEXT[: tokens // 2] + text(tokens - tokens // 2, seed)
        with contextlib.suppress(kvp.OutOfBlocks):
            self.rig.acquire(ids) if known else self.rig.begin(ids)

    @precondition(lambda self: self.rig.ids)
    @rule(data=st.data(), tokens=st.integers(1, 20), seed=st.integers(4, 6))
    def write(self, data: st.DataObject, tokens: int, seed: int) -> None:
        slot = self.a_slot(data)
        tokens = min(tokens, _ROOM - len(self.rig.ids[slot]))
        try:
            self.pool.extend(slot, len(self.rig.ids[slot]) + tokens)
        except kvp.OutOfBlocks:
            return
        self.rig.write(slot, text(tokens, seed))

    @precondition(lambda self: self.rig.ids)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        with contextlib.suppress(kvp.OutOfBlocks):
            self.rig.fork(self.a_slot(data))

    @precondition(lambda self: self.rig.ids)
    @rule(data=st.data(), tokens=st.integers(0, _ROOM))
    def truncate(self, data: st.DataObject, tokens: int) -> None:
        slot = self.a_slot(data)
        tokens = min(tokens, len(self.rig.ids[slot]))
        try:
            self.rig.cache = self.pool.truncate(self.rig.cache, slot, tokens)
        except kvp.OutOfBlocks:
            return
        self.rig.ids[slot] = self.rig.ids[slot][:tokens]

    @precondition(lambda self: self.rig.ids)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.rig.release(self.a_slot(data))

    @precondition(lambda self: self.rig.ids)
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        """Waits for the disk, full or not, so that what follows does not depend on its speed."""
        self.rig.swap_out(self.a_slot(data), to_disk=False)
        self.pool.check(self.rig.cache)
        assert soon(lambda: self.pool._pool.swap_writes() == 0)

    @precondition(lambda self: self.rig.ids)
    @rule(data=st.data())
    def swap_out_and_in(self, data: st.DataObject) -> None:
        """Swaps in before, while or after the sequence is written."""
        self.rig.swap_in(self.rig.swap_out(self.a_slot(data), to_disk=False))

    @precondition(lambda self: self.rig.away)
    @rule(data=st.data())
    def prefetch(self, data: st.DataObject) -> None:
        swapped = self.a_swapped(data)
        try:
            ticket = self.pool.prefetch(swapped)
        except kvp.OutOfBlocks:
            return
        assert ticket.wait(60)
        assert (ticket.tokens, ticket.error) == (len(self.rig.away[swapped]), None)

    @precondition(lambda self: self.rig.away)
    @rule(data=st.data(), wait=st.booleans())
    def swap_in(self, data: st.DataObject, wait: bool) -> None:
        refused = kvp.OutOfBlocks if wait else kvp.KVPageError  # it may be on disk
        with contextlib.suppress(refused):
            self.rig.swap_in(self.a_swapped(data), wait)

    @precondition(lambda self: self.rig.away)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        swapped = self.a_swapped(data)
        self.pool.drop_swapped(swapped)
        del self.rig.away[swapped]

    @rule()
    def evict(self) -> None:
        self.pool.evict()

    @rule()
    def a_new_generation(self) -> None:
        self.pool.check(self.rig.cache)
        self.rig.cache = self.pool.cache()

    @rule()
    def look(self) -> None:
        self.rig.check()

    @invariant()
    def accounts(self) -> None:
        stats = self.rig.audit()
        assert stats.slots_occupied == len(self.rig.ids)
        assert stats.sequences_swapped >= len(self.rig.away)
        # A write that is no longer wanted may continue for a moment.
        assert soon(lambda: len(list(swap_files())) <= len(self.rig.away))
        for swapped, ids in self.rig.away.items():
            assert (swapped.tokens, swapped.closed) == (len(ids), False)


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("stored", [40, 8])
def test_sequences_hold_what_was_written(layout: str, stored: int) -> None:
    name = f"{layout}_{stored}"
    machine = type(name, (SwappingMachine,), {"layout": layout, "stored": stored})
    test = covering.own_cases(name)(machine.TestCase)
    test.settings = settings(
        max_examples=covering.num_cases(8, exhaustive=60), stateful_step_count=30
    )
    test().runTest()
