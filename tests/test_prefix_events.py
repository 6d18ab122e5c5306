"""Events of the prefix index: replayed into a plain dict, they always give its full blocks."""

from __future__ import annotations

import numpy as np
from covering import num_cases
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jax_kvpage import _native

_BLOCK, _SLOTS = 2, 4

_slots = st.integers(0, _SLOTS - 1)
_tokens = st.lists(st.integers(-1, 1), min_size=1, max_size=9)
_spaces = st.integers(0, 1)


class _Events(RuleBasedStateMachine):
    @initialize(most=st.integers(1, 12))
    def start(self, most: int) -> None:
        self.index = _native.PrefixIndex(_BLOCK)
        self.index.namespace("other")
        self.slots: list[tuple[int, list[int]]] = [(0, []) for _ in range(_SLOTS)]
        self.blocks: dict[int, tuple[int, int, tuple[int, ...]]] = {}  # namespace, parent, tokens
        self.index.record_events(most)

    @rule(slot=_slots, more=_tokens, space=_spaces)
    def store(self, slot: int, more: list[int], space: int) -> None:
        held, tokens = self.slots[slot]
        self.slots[slot] = (held if tokens else space, tokens + more)
        space, tokens = self.slots[slot]
        blocks = np.zeros(len(tokens), np.int32)
        self.index.store(slot, np.asarray(tokens, np.int32), blocks, space)

    @rule(slot=_slots, share=st.floats(0, 1), keep=st.integers(0, 4))
    def cut(self, slot: int, share: float, keep: int) -> None:
        space, tokens = self.slots[slot]
        left = tokens[: int(share * len(tokens))]
        self.index.cut(slot, len(left), keep)
        self.slots[slot] = (space, left)

    @rule(slot=_slots)
    def detach(self, slot: int) -> None:
        self.index.detach(slot)
        self.slots[slot] = (0, [])

    @rule(blocks=st.integers(1, 6))
    def evict(self, blocks: int) -> None:
        self.index.evict(blocks)

    @rule(most=st.integers(0, 3))
    def record_again(self, most: int) -> None:
        """While nothing is recorded, events are lost; when recording resumes, the reader gets all
        blocks.
        """
        self.index.record_events(most)
        if most == 0:
            assert self.index.take_events() == []
            self.index.record_events(8)

    @invariant()
    def replaying_gives_the_index(self) -> None:
        for event in self.index.take_events():
            if event.kind == "cleared":
                self.blocks.clear()
            elif event.kind == "removed":
                del self.blocks[event.hash]
            else:
                assert event.kind == "stored"
                assert event.parent == 0 or event.parent in self.blocks
                assert event.hash not in self.blocks
                self.blocks[event.hash] = (event.space, event.parent, tuple(event.tokens))
        replayed = set()
        for space, parent, tokens in self.blocks.values():
            while parent:
                assert self.blocks[parent][0] == space
                tokens = self.blocks[parent][2] + tokens
                parent = self.blocks[parent][1]
            replayed.add((space, tokens))
        texts: dict[int, tuple[int, ...]] = {}
        whole = set()
        for space, entry, parent, block in self.index.entries():
            texts[entry] = texts.get(parent, ()) + tuple(block)
            if len(block) == _BLOCK:
                whole.add((space, texts[entry]))
        assert replayed == whole
        assert len(texts) == self.index.numbers.entries


_Events.TestCase.settings = settings(
    max_examples=num_cases(40, exhaustive=300), stateful_step_count=30
)
test_events = _Events.TestCase
