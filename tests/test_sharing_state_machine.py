"""Random forks, reorders, truncations and other calls against a plain model: who shares which block
with whom, what each sequence holds, and that all accounts add up. On the fake driver
(test_fake_driver_suite.py), injected failures strike in the middle of calls.

Each step makes the same draws, so that none depends on how far a program in flight has got.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import num_cases, own_cases
from harness import RUN_TIME_ERRORS, input_dtype, make_batch
from harness import _busy_cpu as busy_rounds
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test
from mistakes import fails
from sharing_drops import DroppingMachine
from sharing_machine import BLOCK, HAS_FAKE_DRIVER, MAX_SEQ_LEN, NEW, SLOTS
from sharing_model import DIM, HEADS, LAYERS

import jax_kvpage as kvp

_VERBS = [
    *["fork"] * 4, *["truncate"] * 4, *["write"] * 4, *["commit"] * 3, "reorder", "reorder",
    "acquire", "start", "start", "extend", "extend", "map_slots", "release", "trim", "resize",
    "relocate", "relocate",
    "set_lengths", "view", "drop_views", "wait_for_something_slow", "wait_for_something_slow",
    "drop_before", "drop_before", "drop_before",
    "settle",
    "rewrite",
    "rewrite", "new_generation", "refused", "failing_program",
]  # fmt: skip
_read = jax.jit(lambda cache, slots: jnp.stack([
    jnp.stack(kvp.read_kv(cache, slots, layer)) for layer in range(LAYERS)
]))  # fmt: skip


@functools.partial(jax.jit, static_argnames="addressing")
def _attend(cache: kvp.KVCache, slots: jax.Array, addressing: str) -> jax.Array:
    """Returns the attention of each sequence's last token, in all layers."""
    has_tokens = (slots >= 0) & (cache.lengths[slots] > 0)
    batch = kvp.Batch.decode(jnp.where(has_tokens, slots, -1))
    before = dataclasses.replace(cache, lengths=cache.lengths - 1)
    q = jnp.ones((SLOTS, HEADS, DIM), jnp.float32)
    return jnp.stack([
        kvp.paged_attention(q, before, batch, layer=layer, addressing=addressing)
        for layer in range(LAYERS)
    ])  # fmt: skip


class SharingMachine(DroppingMachine):
    """Adds sharing between sequences, and programs in flight."""

    @rule(verb=st.sampled_from(_VERBS), seed=st.integers(0, 1 << 30))
    def act(self, verb: str, seed: int) -> None:
        """A single rule for all verbs, because Hypothesis disables a random subset of the rules in
        each run and prefers values at the ends of a range.
        """
        if not self.live:
            return self.start(0.7)
        rng = random.Random(seed)
        share = rng.random()
        arguments = {
            "which": rng.randrange(SLOTS),
            "several": {rng.randrange(SLOTS) for _ in range(rng.randint(1, 3))},
            "share": share,
            "n": rng.randrange(4),
            "tokens": int(rng.random() * MAX_SEQ_LEN),
            "verbs": rng.choices(
                ["fork", "truncate", "drop_before", "acquire", "release"], k=rng.randrange(4)
            ),
        }
        self.fault = None
        if HAS_FAKE_DRIVER:  # a driver call from now on runs out of memory or fails otherwise
            self.fault = 1 + int(12 * rng.random() ** 2), rng.choice([2, 999])
        method = getattr(self, verb)
        wanted = inspect.signature(method).parameters
        method(**{name: value for name, value in arguments.items() if name in wanted})

    # ---- sharing ----

    def fork(self, which: int, n: int, share: float) -> None:
        if not (self.live):
            return
        donor = self._pick(which)
        tokens = len(self.live[donor].ids)
        num_tokens = None if share > 0.5 else int(2 * share * tokens)
        tokens = tokens if num_tokens is None else num_tokens
        if self.live[donor].dropped:
            with pytest.raises(kvp.KVPageError, match="has dropped its tokens"):
                self.pool.fork(self.cache, donor, 1, num_tokens)
            return
        pending = donor in self.truncated and self.slow is not None
        blocks = n * (self.model.count(tokens) - tokens // BLOCK)
        if pending:
            self._try_pending(donor, n, tokens, num_tokens)
            return
        call = functools.partial(self.pool.fork, slot=donor, n=n, num_tokens=num_tokens)
        if (result := self._claim(blocks, n, call)) is not None:
            slots, self.cache = result
            assert len(slots) == n
            self._forked([(donor, slot) for slot in slots], [tokens] * n)

    def _try_pending(self, donor: int, n: int, tokens: int, num_tokens: int | None) -> None:
        """A fork after a queued truncation may have to copy more blocks."""
        try:
            slots, self.cache = self.pool.fork(self.cache, donor, n, num_tokens)
        except (kvp.OutOfBlocks, kvp.OutOfSlots):
            return
        self._forked([(donor, slot) for slot in slots], [tokens] * n)

    def reorder(self, which: int, share: float) -> None:
        if not (len(self.live) > 1):
            return
        beams = sorted(self.live)[: 2 + which % 2]
        parents = [int(share * 27) // 3**i % 3 % len(beams) for i in range(len(beams))]
        if self.truncated & set(beams):
            self._settle()
        forked = [p for i, p in enumerate(parents) if p in parents[:i]]
        if any(self.live[beams[p]].dropped for p in forked):
            with pytest.raises(kvp.KVPageError, match="has dropped its tokens"):
                self.pool.reorder(self.cache, beams, parents)
            return
        tokens = [len(self.live[beams[p]].ids) for p in forked]
        blocks = sum(self.model.count(n) - n // BLOCK for n in tokens)
        call = functools.partial(self.pool.reorder, slots=beams, parents=parents)
        if (result := self._claim(blocks, len(forked), call)) is None:
            return
        slots, self.cache = result
        new = [slots[i] for i, p in enumerate(parents) if p in parents[:i]]
        kept = [slots[i] for i, p in enumerate(parents) if p not in parents[:i]]
        assert kept == [beams[p] for i, p in enumerate(parents) if p not in parents[:i]]
        self._forked([(beams[p], s) for p, s in zip(forked, new, strict=True)], tokens)
        for slot in set(beams) - set(kept):
            del self.live[slot]

    def truncate(self, several: set[int], share: float, n: int) -> None:
        if not (self.live):
            return
        share = 1.0 if n == 3 else share
        slots = sorted({self._pick(i) for i in several})[: 1 + n]
        lengths = [int(share * len(self.live[slot].tokens)) for slot in slots]
        lengths = [max(n, self.live[slot].dropped) for n, slot in zip(lengths, slots, strict=True)]
        if self.truncated & set(slots):
            self._settle()
        pairs = list(zip(slots, lengths, strict=True))
        blocks = self.model.copies(pairs)
        call = functools.partial(self.pool.truncate, slot=slots, num_tokens=lengths)
        if (result := self._claim(blocks, 0, call)) is None:
            return
        self.cache = result
        self.truncated.update(slots)
        for slot, n in pairs:
            self.model.truncate(slot, n)

    # ---- programs in flight, and programs that fail ----

    def wait_for_something_slow(self, share: float) -> None:
        """From now on programs queue behind a slow one, and host calls run ahead of them."""
        if self.slow is not None:
            return
        self.slow = busy_rounds(20 + int(80 * share))
        self.cache = kvp.after(self.cache, self.slow)

    def rewrite(self, which: int, share: float) -> None:
        """Rolls back and rewrites behind a slow program, and forks tokens whose writes are only
        queued.
        """
        self._settle()
        self.wait_for_something_slow(share)
        slot = self._pick(which)
        self.truncate({which}, share, 0)
        if (room := self.live[slot].reserved - len(self.live[slot].tokens)) > 0:
            self._batch([(slot, min(room, NEW))])
        self.commit(which, 1.0)
        self.fork(which, 1, 1.0)

    def settle(self) -> None:
        self._settle()

    def new_generation(self) -> None:
        self._settle()
        self.cache = self.pool.cache()

    def refused(self, which: int, share: float) -> None:
        """Shared tokens can neither be rolled back nor be overwritten with a forged length."""
        if not (any(seq.mark for seq in self.live.values())):
            return
        self._settle()
        shared = sorted(slot for slot, seq in self.live.items() if seq.mark)
        slot = shared[which % len(shared)]
        seq = self.live[slot]
        below = int(share * (min(seq.mark, len(seq.tokens)) - 1))
        if len(seq.tokens) >= seq.mark:
            fails(
                "are shared with other slots or processes",
                lambda: kvp.set_lengths(self.cache, [slot], below).lengths,
            )
        forged = self.cache.lengths.at[slot].set(below)
        forged_cache = kvp.KVCache(self.cache.handle, self.cache.epoch, forged, self.cache.spec)
        x = jnp.full((1, HEADS, DIM), 9.0, input_dtype(self.spec))
        append = functools.partial(kvp.append_kv, forged_cache, x, x, layer=0)
        batch = make_batch([(slot, 1)])
        ends = "are shared with other slots or processes"
        fails(ends, lambda: append(batch=batch).epoch)

    def failing_program(self, which: int, verbs: list[str]) -> None:
        """Host calls queued after a failing program never run; the next generation compensates."""
        if not (self.live):
            return
        self._settle()
        queued = kvp.after(self.cache, busy_rounds(100))
        try:
            cache = kvp.set_lengths(queued, [self._pick(which)], [99])
        except RUN_TIME_ERRORS:  # it has already run
            return
        self.exact = False
        unborn: set[int] = set()  # forks that will not run
        dropping: set[int] = set()  # slots whose drop will not run
        for verb in verbs:
            if not self.live:
                break
            slot = self._pick(which)
            seq = self.live[slot]
            try:
                if verb == "fork":
                    tokens = len(seq.ids)
                    shared = self.model.whole(tokens)
                    if slot in self.truncated | unborn | dropping or seq.dropped:
                        continue
                    (new,), cache = self.pool.fork(cache, slot, 1)
                    self.model.fork(slot, new, tokens, shared, ran=False)
                    unborn.add(new)
                elif verb == "acquire":
                    new, cache = self.pool.acquire(cache, 30)
                    self.model.acquire(new, 30)
                elif verb == "drop_before":
                    cache = self.pool.drop_before(cache, slot, len(seq.tokens) // 4)
                    dropping.add(slot)
                elif verb == "release":
                    cache = self.pool.release(cache, slot)
                    del self.live[slot]
                else:
                    length = max(len(seq.tokens) // 2, seq.dropped)
                    cache = self.pool.truncate(cache, slot, length)
                    del seq.ids[length:]
                    self.truncated.add(slot)
            except (kvp.OutOfBlocks, kvp.OutOfSlots):
                pass
            except RUN_TIME_ERRORS:  # refused at once if the program has already failed
                break
        with pytest.raises(RUN_TIME_ERRORS):
            self.pool.check(cache)
        self.cache = self.pool.cache()  # forks that did not run are free in it
        for new in unborn & set(self.live):
            del self.live[new]
        self.truncated.clear()

    # ---- after every step ----

    @invariant()
    def accounts_add_up(self) -> None:
        stats = self.pool.stats()
        elsewhere = stats.blocks_parked + stats.blocks_draining + stats.blocks_free
        assert stats.blocks_total == self.total == stats.blocks_mapped + elsewhere
        assert stats.slots_occupied == len(self.live)
        rows = {row.slot: row for row in self.pool.slot_table() if not row.draining}
        assert rows.keys() == self.live.keys()
        for slot, seq in self.live.items():
            assert rows[slot].reserved_tokens == seq.reserved
            assert self.pool.committed(slot) == seq.ids

    @invariant()
    def blocks_are_shared_as_they_should(self) -> None:
        if self.slow is not None:
            return
        self._settle()
        maps, stats = self._maps(), self.pool.stats()
        blocks = self.model.check_blocks(maps, exact=self.exact)
        assert stats.blocks_mapped == len(blocks)  # no block is set aside any more
        shared = {b for rows in maps.values() for row in rows for b, count in row if count > 1}
        assert stats.blocks_shared >= len(shared)
        if self.exact:
            assert stats.blocks_shared == len(shared)
        for row in self.pool.slot_table():
            if not row.draining:
                counts = [count for line in maps[row.slot] for block, count in line if block >= 0]
                assert row.dropped_tokens == self.live[row.slot].dropped
                assert row.num_blocks == len(counts)
                assert row.shared_bytes == sum(c > 1 for c in counts) * self.spec.block_bytes

    @invariant()
    def every_token_is_where_it_belongs(self) -> None:
        if self.slow is not None:
            return
        slots = sorted(self.live)
        lengths = np.full(SLOTS, -1)
        lengths[slots] = [len(self.live[slot].tokens) for slot in slots]
        np.testing.assert_array_equal(np.asarray(self.cache.lengths), lengths)
        self.check_rests()
        slots = [slot for slot in slots if not self.live[slot].dropped]
        padded = jnp.asarray(slots + [-1] * (SLOTS - len(slots)), jnp.int32)
        found = np.asarray(_read(self.cache, padded))
        if not HAS_FAKE_DRIVER:
            by_slot, by_table = (_attend(self.cache, padded, a) for a in ("slots", "table"))
            assert np.asarray(by_slot).tobytes() == np.asarray(by_table).tobytes()
        for i, slot in enumerate(slots):
            for layer in range(LAYERS):
                want = self.model.contents(slot, layer)
                got = found[layer, :, i, : want.shape[1]]
                np.testing.assert_allclose(got, want, rtol=1e-6, err_msg=f"slot {slot}")


class PerLayerMachine(SharingMachine):
    layout = "per_layer"


class QuantizedMachine(SharingMachine):
    dtype = jnp.int8


class QuantizedPerLayerMachine(SharingMachine):
    layout, dtype, debug = "per_layer", jnp.int8, True


@pytest.mark.parametrize(
    "machine", [SharingMachine, PerLayerMachine, QuantizedMachine, QuantizedPerLayerMachine]
)
def test_sharing_against_a_model(machine: type[SharingMachine]) -> None:
    test = own_cases(machine.__name__)(machine)
    run_state_machine_as_test(
        test,
        settings=settings(
            phases=[Phase.generate],
            max_examples=num_cases(6 if HAS_FAKE_DRIVER else 12, exhaustive=30),
            stateful_step_count=40,
        ),
    )
    assert not HAS_FAKE_DRIVER or machine.faults[machine.__name__] > 5
