"""Random host calls on the prefix cache against a plain model: which tokens were written by whom,
and which of them a request must find.
"""

from __future__ import annotations

import covering
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prefix_rig import BLOCK, PrefixRig, Replay, spec_of
from sharing_machine import HAS_FAKE_DRIVER

import jax_kvpage as kvp

_ROOM = 96
_SLOTS = 5
# A few texts with common beginnings, so that random requests find what others have left.
_TEXTS = [
    [7, *np.repeat(head, 20).tolist(), *np.repeat(tail, 40).tolist(), *range(tail, tail + 20)]
    for head in (1, 2)
    for tail in (3, 4)
]
_TOKENS = st.tuples(st.sampled_from(_TEXTS), st.integers(1, 80)).map(lambda x: x[0][: x[1]])
_SPACE = st.sampled_from([None, "other"])


def _common(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


class PrefixMachine(RuleBasedStateMachine):
    """`blocks` is either large enough for everything, so that nothing is evicted by itself, or
    small.
    """

    layout, blocks = "fused", 400

    def __init__(self) -> None:
        super().__init__()
        spec = spec_of(self.layout, max_slots=_SLOTS, max_seq_len=_ROOM)
        resolved = spec.resolve("cpu")
        ranges = resolved.slot_bytes // (resolved.block_bytes * (_ROOM // BLOCK))
        self.pool = kvp.KVPool(spec, resolved.block_bytes * self.blocks * ranges, poison=True)
        self.rig = PrefixRig(self.pool)
        self.replay = Replay()
        self.space: dict[int, str | None] = {}
        # Sequences ever written, by namespace: nothing else may be found.
        self.written: dict[str | None, list[list[int]]] = {None: [], "other": []}
        # Those of released slots, which must be found as long as nothing was cut or evicted.
        self.complete = True
        self.kept: dict[str | None, list[list[int]]] = {None: [], "other": []}

    def teardown(self) -> None:
        self.pool.close()

    @property
    def large(self) -> bool:
        return self.blocks >= 400

    def _slot(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.rig.ids)), label="slot")

    def _found(self, space: str | None, ids: list[int], every: bool) -> int:
        """Returns the tokens that a request finds: the maximum it may, or the minimum it must."""
        live = [
            ids
            for slot, ids in self.rig.ids.items()
            if self.space[slot] == space and not self.rig.dropped.get(slot)
        ]
        others = self.written[space] if every else self.kept[space] + live
        return min(max([_common(x, ids) for x in others], default=0), len(ids) - 1)

    # ---- requests ----

    @precondition(lambda self: len(self.rig.ids) < _SLOTS)
    @rule(ids=_TOKENS, space=_SPACE, extra=st.integers(0, 16))
    def acquire(self, ids: list[int], space: str | None, extra: int) -> None:
        must, may = self._found(space, ids, every=False), self._found(space, ids, every=True)
        probe = self.pool.find_prefix(ids, space)
        try:
            slot, cached = self.rig.acquire(ids, num_tokens=len(ids) + extra, namespace=space)
        except kvp.OutOfBlocks:
            assert not self.large
            return
        assert cached <= may
        assert cached <= probe if not self.large else cached == probe
        if self.large and self.complete:
            assert cached >= must, f"{cached} of {must} tokens found"
        if cached == len(ids) - 1:
            self._may_be_gone()  # blocks that an adopted slot had after its prompt
        self.space[slot] = space
        self.written[space].append(list(ids))

    @precondition(lambda self: len(self.rig.ids) < _SLOTS - 1)
    @rule(texts=st.lists(_TOKENS, min_size=2, max_size=2), space=_SPACE)
    def acquire_two(self, texts: list[list[int]], space: str | None) -> None:
        may = [self._found(space, ids, every=True) for ids in texts]
        try:
            got = self.pool.acquire_prefix(self.rig.cache, texts, namespace=space)
        except kvp.OutOfBlocks:
            assert not self.large
            return
        slots, cached, self.rig.cache = got
        taken = [slot for slot in slots if slot is not None]
        assert len(set(taken)) == len(taken)
        for i, (slot, ids) in enumerate(zip(slots, texts, strict=True)):
            if slot is None:
                assert got.wait_for[i] == 0
                continue
            assert cached[i] <= may[i]
            if cached[i] == len(ids) - 1:
                self._may_be_gone()
            self.rig.ids[slot] = ids[: cached[i]]
            self.space[slot] = space
        for slot, ids in zip(slots, texts, strict=True):
            if slot is not None:
                self.rig.write(slot, ids[len(self.rig.ids[slot]) :])
                self.written[space].append(list(ids))

    @precondition(lambda self: self.rig.ids)
    @rule(data=st.data(), n=st.integers(1, 12), token=st.integers(3, 4))
    def append(self, data: st.DataObject, n: int, token: int) -> None:
        slot = self._slot(data)
        n = min(n, _ROOM - len(self.rig.ids[slot]))
        try:
            self.rig.write(slot, [token] * n)
        except kvp.OutOfBlocks:
            assert not self.large
            return
        self.written[self.space[slot]].append(list(self.rig.ids[slot]))

    @precondition(lambda self: self.rig.ids)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = self._slot(data)
        space = self.space.pop(slot)
        if not self.rig.dropped.get(slot):
            self.kept[space].append(list(self.rig.ids[slot]))
        self.rig.release(slot)

    @precondition(lambda self: 0 < len(self.rig.ids) < _SLOTS)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        slot = self._slot(data)
        n = data.draw(st.integers(0, len(self.rig.ids[slot])), label="tokens")
        if self.rig.dropped.get(slot):
            with pytest.raises(kvp.KVPageError, match="has dropped its tokens"):
                self.pool.fork(self.rig.cache, slot, 1, n)
            return
        try:
            (new,), self.rig.cache = self.pool.fork(self.rig.cache, slot, 1, n)
        except kvp.OutOfBlocks:
            assert not self.large
            return
        self.rig.ids[new] = self.rig.ids[slot][:n]
        self.space[new] = self.space[slot]

    @precondition(lambda self: self.rig.ids)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        slot = self._slot(data)
        least = self.rig.dropped.get(slot, 0)
        n = data.draw(st.integers(least, len(self.rig.ids[slot])), label="tokens")
        try:
            self.rig.cache = self.pool.truncate(self.rig.cache, slot, n)
        except kvp.OutOfBlocks:
            assert not self.large
            return
        self.rig.ids[slot] = self.rig.ids[slot][:n]
        self._may_be_gone()

    @precondition(lambda self: self.rig.ids)
    @rule(data=st.data())
    def drop_before(self, data: st.DataObject) -> None:
        """Drops tokens; from then on nobody finds what only this slot had."""
        slot = self._slot(data)
        n = data.draw(st.integers(0, len(self.rig.ids[slot])), label="tokens")
        self.rig.drop(slot, n)
        if self.rig.dropped.get(slot):
            self._may_be_gone()

    # ---- what goes wrong ----

    @precondition(lambda self: len(self.rig.ids) < _SLOTS)
    @rule(ids=_TOKENS)
    def commit_what_is_not_written(self, ids: list[int]) -> None:
        """Commits unwritten tokens; after a new generation nobody may find them."""
        try:
            slot, cached, self.rig.cache = self.pool.acquire_prefix(self.rig.cache, ids)
        except kvp.OutOfBlocks:
            return
        self.pool.commit(slot, ids[cached:])
        self.rig.ids[slot] = ids[:cached]
        self.space[slot] = None
        self.generation()
        self._may_be_gone()

    @rule()
    def generation(self) -> None:
        self.pool.check(self.rig.cache)
        self.rig.cache = self.pool.cache()

    # ---- memory ----

    @rule(blocks=st.integers(0, 6))
    def evict(self, blocks: int) -> None:
        self.pool.evict(blocks * self.pool.spec.block_bytes)
        if blocks:
            self._may_be_gone()

    @rule()
    def trim(self) -> None:
        self.pool.trim()

    @rule(blocks=st.integers(1, 40))
    def relocate(self, blocks: int) -> None:
        if not HAS_FAKE_DRIVER:
            self.pool.relocate(blocks * self.pool.spec.block_bytes)

    @rule(ids=_TOKENS, space=_SPACE)
    def pin(self, ids: list[int], space: str | None) -> None:
        pinned = self.pool.pin(ids, space, max_share=0.1)
        self.pool.evict(2**40)
        assert self.pool.find_prefix(ids[:pinned], space, whole=True) == pinned
        self.pool.unpin(ids, space)
        self._may_be_gone()

    @rule(ids=_TOKENS, space=_SPACE, what=st.sampled_from(["retain", "drop"]))
    def hint(self, ids: list[int], space: str | None, what: str) -> None:
        self.pool.hint(ids, what, space)

    def _may_be_gone(self) -> None:
        """Entries were cut or evicted. The same tokens in other slots' private blocks are found
        again only after more tokens are committed to those slots.
        """
        self.complete = False

    # ---- what holds at all times ----

    @invariant()
    def contents(self) -> None:
        self.rig.check()

    @invariant()
    def accounts(self) -> None:
        stats = self.pool.stats()
        assert stats.blocks_total == (
            stats.blocks_mapped + stats.blocks_parked + stats.blocks_draining + stats.blocks_free
        )
        assert stats.slots_occupied == len(self.rig.ids)
        assert stats.blocks_cached <= stats.blocks_mapped + stats.blocks_parked
        for slot, ids in self.rig.ids.items():
            assert self.pool.committed(slot) == ids
        for row in self.pool.slot_table():
            assert row.dropped_tokens == self.rig.dropped.get(row.slot, 0)

    @invariant()
    def events(self) -> None:
        """The replayed events are exactly the full blocks that can be found."""
        self.replay.read(self.pool.events())
        replayed = self.replay.sequences()
        for space, ids in replayed:
            assert self.pool.find_prefix(ids, space, whole=True) == len(ids)
        for space, texts in self.written.items():
            for ids in texts:
                found = self.pool.find_prefix(ids, space, whole=True) // BLOCK * BLOCK
                assert found == 0 or (space, tuple(ids[:found])) in replayed


class SmallPool(PrefixMachine):
    blocks = 14


class PerLayer(PrefixMachine):
    layout = "per_layer"


class SmallPerLayer(SmallPool):
    layout = "per_layer"


@pytest.mark.parametrize("machine", [PrefixMachine, SmallPool, PerLayer, SmallPerLayer])
def test_prefix_cache(machine: type[PrefixMachine]) -> None:
    examples = 30 if covering.is_exhaustive() else 8
    test = machine.TestCase
    test.settings = settings(max_examples=examples, stateful_step_count=25)
    test().runTest()


def test_texts_share_beginnings() -> None:
    """A control: requests with these texts do find each other's blocks."""
    assert {_common(a, b) for a in _TEXTS for b in _TEXTS if a is not b} >= {1, 21}
    assert jnp.int32(len(_TEXTS[0])) >= 80
