"""Random pool operations against a plain Python model: no block is lost, leaked or owned twice,
counts agree, and each request reads its own data.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import num_cases
from harness import Rig
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import jax_kvpage as kvp

_MAX_SEQ_LEN = 160
_TOKENS = st.integers(0, _MAX_SEQ_LEN)
_map_slots = jax.jit(kvp.map_slots)


class PoolMachine(RuleBasedStateMachine):
    """`reserved` is the model: the tokens requested for each live slot. The harness tracks lengths
    and contents.
    """

    layout = "fused"
    platform = "cpu"

    def __init__(self) -> None:
        super().__init__()
        self.spec = kvp.CacheSpec(
            2, 1, 32, 5, _MAX_SEQ_LEN, dtype=jnp.float32, layout=self.layout, block_tokens=32
        ).resolve(self.platform)
        self.ranges = 1 if self.layout == "fused" else 2 * self.spec.num_layers
        self.total = 11 * self.ranges
        self.pool = kvp.KVPool(self.spec, self.total * self.spec.block_bytes, poison=True)
        self.rig = Rig(self.pool, group=2, max_tokens=40, max_sequences=5)
        self.reserved: dict[int, int] = {}

    def teardown(self) -> None:
        self.pool.close()

    @initialize(seed=st.integers(0, 1000))
    def seed(self, seed: int) -> None:
        self.rig.rng = np.random.default_rng(seed)

    def _needed(self, tokens: int) -> int:
        return self.ranges * math.ceil(tokens / self.spec.block_tokens)

    def _owned(self) -> dict[int, int]:
        return {row.slot: row.num_blocks for row in self.pool.slot_table() if not row.draining}

    def _left(self) -> int:
        """Returns the number of blocks that no live request has asked for: free, parked, or adopted
        beyond what the owner wanted.
        """
        jax.block_until_ready(self.rig.cache)  # nothing is draining any more
        return self.total - sum(map(self._needed, self.reserved.values()))

    def _pick(self, which: int) -> int:
        return sorted(self.reserved)[which % len(self.reserved)]

    @rule(tokens=_TOKENS)
    def acquire(self, tokens: int) -> None:
        left = self._left()
        if len(self.reserved) == self.spec.max_slots:
            with pytest.raises(kvp.OutOfSlots):
                self.rig.acquire(tokens)
        elif self._needed(tokens) > left:
            with pytest.raises(kvp.OutOfBlocks) as caught:
                self.rig.acquire(tokens)
            error = caught.value
            assert error.wanted > error.free + error.reclaimable
            assert error.draining == 0
        else:
            slot = self.rig.acquire(tokens)
            self.reserved[slot] = tokens

    @rule(tokens=st.lists(_TOKENS, min_size=2, max_size=3))
    def acquire_many(self, tokens: list[int]) -> None:
        fits = sum(map(self._needed, tokens)) <= self._left()
        room = len(self.reserved) + len(tokens) <= self.spec.max_slots
        before = self._owned()
        if not (fits and room):
            with pytest.raises(kvp.OutOfBlocks):
                self.pool.acquire(self.rig.cache, tokens)
            assert self._owned() == before
            return
        slots, self.rig.cache = self.pool.acquire(self.rig.cache, tokens)
        for slot, n in zip(slots, tokens, strict=True):
            self.rig.model.acquire(slot)
            self.reserved[slot] = n

    @precondition(lambda self: self.reserved)
    @rule(which=st.integers(0, 4), tokens=_TOKENS)
    def extend(self, which: int, tokens: int) -> None:
        slot = self._pick(which)
        before = self._owned()
        if self._needed(tokens) - self._needed(self.reserved[slot]) > self._left():
            with pytest.raises(kvp.OutOfBlocks):
                self.pool.extend(slot, tokens)
            assert self._owned() == before
        else:
            self.pool.extend(slot, tokens)
            self.reserved[slot] = max(self.reserved[slot], tokens)

    @precondition(lambda self: self.reserved)
    @rule(tokens=st.lists(_TOKENS, min_size=5, max_size=5))
    def map_slots(self, tokens: list[int]) -> None:
        """Slots in ascending order, because the program serves them in order while blocks last."""
        slots = sorted(self.reserved) + [-1] * (5 - len(self.reserved))
        left = self._left()
        self.rig.cache, ok = _map_slots(
            self.rig.cache, jnp.asarray(slots, jnp.int32), jnp.asarray(tokens, jnp.int32)
        )
        for slot, n, fits in zip(slots, tokens, ok.tolist(), strict=True):
            if slot < 0:
                assert fits
                continue
            more = max(0, self._needed(n) - self._needed(self.reserved[slot]))
            assert fits == (more <= left), (slot, n, more, left)
            if fits:
                left -= more
                self.reserved[slot] = max(self.reserved[slot], n)

    @precondition(lambda self: self.reserved)
    @rule(which=st.sets(st.integers(0, 4), min_size=1))
    def release(self, which: set[int]) -> None:
        slots = sorted({self._pick(i) for i in which})
        self.rig.release(*slots)
        for slot in slots:
            del self.reserved[slot]

    @precondition(lambda self: self.reserved)
    @rule(share=st.floats(0, 1), num_slots=st.integers(1, 5))
    def write(self, share: float, num_slots: int) -> None:
        room = {
            slot: int(share * (self.reserved[slot] - self.rig.model.lengths[slot]))
            for slot in sorted(self.reserved)[:num_slots]
        }
        self.rig.write({slot: n for slot, n in room.items() if n > 0})

    @precondition(lambda self: self.reserved)
    @rule(one_call=st.booleans())
    def step(self, one_call: bool) -> None:
        """Reads everything ever written to each live slot, together with one new token where there
        is room.
        """
        sequences = [
            (slot, 1)
            for slot in self.reserved
            if self.reserved[slot] > self.rig.model.lengths[slot]
        ]
        if sequences:
            out, _, want, _ = self.rig.step(sequences, one_call=one_call)
            np.testing.assert_allclose(out, want, atol=1e-4)

    @precondition(lambda self: self.reserved)
    @rule(which=st.integers(0, 4), share=st.floats(0, 1))
    def truncate(self, which: int, share: float) -> None:
        slot = self._pick(which)
        length = int(share * self.rig.model.lengths[slot])
        self.rig.cache = kvp.set_lengths(
            self.rig.cache, jnp.asarray([slot], jnp.int32), jnp.asarray([length], jnp.int32)
        )
        self.rig.model.truncate(slot, length)

    @rule()
    def trim(self) -> None:
        jax.block_until_ready(self.rig.cache)
        self.pool.trim()
        assert self.pool.stats().blocks_parked == 0

    @rule(blocks=st.integers(6, 14))
    def resize(self, blocks: int) -> None:
        jax.block_until_ready(self.rig.cache)
        wanted = blocks * self.ranges
        if wanted < self.total - self._left():
            with pytest.raises((ValueError, kvp.OutOfBlocks)):
                self.pool.resize(wanted * self.spec.block_bytes)
        else:
            self.pool.resize(wanted * self.spec.block_bytes)
            self.total = wanted

    @rule()
    def new_generation(self) -> None:
        """Starts a new generation, which is allowed at any time, even without a failure.

        On a GPU it refuses programs that have not started, and the model cannot tell which ones.
        """
        if self.platform != "cpu":
            jax.block_until_ready(self.rig.cache)
        self.rig.cache = self.pool.cache()
        self.rig.check_lengths()

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        stats, owned = self.pool.stats(), self._owned()
        assert stats.blocks_total == self.total
        assert stats.blocks_mapped == sum(owned.values())
        elsewhere = stats.blocks_parked + stats.blocks_draining + stats.blocks_free
        assert stats.blocks_mapped + elsewhere == self.total
        assert stats.slots_occupied == len(self.reserved) == len(owned)
        seen: set[int] = set()
        for slot, reserved in self.reserved.items():
            rows = self.pool.block_map(slot)
            assert len(rows) == self.ranges
            blocks = [block for row in rows for block, _ in row]
            assert len(blocks) == owned[slot] >= self._needed(reserved)
            assert len(set(blocks)) == len(blocks)
            assert not seen & set(blocks)
            assert {count for row in rows for _, count in row} <= {1}
            seen |= set(blocks)

    @invariant()
    def lengths_agree(self) -> None:
        self.rig.check_lengths()
        for row in self.pool.slot_table():
            assert row.draining or row.reserved_tokens == self.reserved[row.slot]


class PerLayerMachine(PoolMachine):
    layout = "per_layer"


@pytest.mark.parametrize("machine", [PoolMachine, PerLayerMachine])
def test_pool_against_a_model(machine: Callable[[], PoolMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=num_cases(40, exhaustive=80), stateful_step_count=30),
    )
