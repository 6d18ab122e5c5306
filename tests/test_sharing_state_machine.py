"""Random forks, reorders, truncations and everything around them against a plain model: who shares
which block with whom, what each sequence holds, and that all accounts add up.

All draws are the same for each step, so that none depends on what a program in flight has got to.
"""

from __future__ import annotations

import functools
import inspect
import os
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import num_cases, own_cases
from harness import RUN_TIME_ERRORS, append_all, input_dtype, make_batch
from harness import _busy_cpu as busy_rounds
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from mistakes import fails
from sharing_model import DIM, HEADS, LAYERS, SharingModel

import jax_kvpage as kvp

_BLOCK, _MAX_SEQ_LEN, _SLOTS = 16, 96, 7
_SHARE = st.floats(0, 1)
_NEW = 40  # tokens in one batch
_VERBS = [
    *["fork"] * 4, *["truncate"] * 4, *["write"] * 4, *["commit"] * 3, "reorder", "reorder",
    "acquire", "start", "start", "extend", "extend", "map_slots", "release", "trim", "resize",
    "set_lengths", "view", "drop_views", "wait_for_something_slow", "wait_for_something_slow",
    "settle",
    "rewrite",
    "rewrite", "new_generation", "refused", "failing_program",
]  # fmt: skip
_HAS_VIEWS = os.environ.get("JAX_KVPAGE_FAKE_DRIVER", "0") in ("", "0")
_map_slots = jax.jit(kvp.map_slots)
_read = jax.jit(lambda cache, slots: jnp.stack([
    jnp.stack(kvp.read_kv(cache, slots, layer)) for layer in range(LAYERS)
]))  # fmt: skip


class SharingMachine(RuleBasedStateMachine):
    """The model knows what must be shared; blocks of free slots are the pool's own affair."""

    layout, dtype, debug = "fused", jnp.float32, False

    def __init__(self) -> None:
        super().__init__()
        self.spec = kvp.CacheSpec(
            LAYERS, HEADS, DIM, _SLOTS, _MAX_SEQ_LEN,
            dtype=self.dtype, layout=self.layout, block_tokens=_BLOCK,
        ).resolve("cpu")  # fmt: skip
        assert self.spec.block_tokens == _BLOCK
        self.ranges = 1 if self.layout == "fused" else 2 * LAYERS
        self.total = 20 * self.ranges
        self.pool = kvp.KVPool(
            self.spec, self.total * self.spec.block_bytes, poison=True, debug=self.debug
        )
        self.cache = self.pool.cache()
        self.model = SharingModel(_BLOCK, self.dtype)
        self.views: list[tuple[int, Any]] = []
        self.slow: Any = None  # a value that the queued programs wait for
        self.exact = False  # free slots have no blocks
        self.aside = False  # truncations that never ran may have left blocks set aside
        self.truncated: set[int] = set()  # slots whose truncation may not have run

    def teardown(self) -> None:
        self.views.clear()
        self.pool.close()

    # ---- what the rules share ----

    @property
    def live(self) -> dict[int, Any]:
        return self.model.live

    def _pick(self, which: int) -> int:
        return sorted(self.live)[which % len(self.live)]

    def _settle(self) -> None:
        self.pool.check(self.cache)
        self.slow = None
        self.truncated.clear()

    def _maps(self) -> dict[int, list[list[tuple[int, int]]]]:
        return {slot: self.pool.block_map(slot) for slot in self.live}

    def _account(self) -> object:
        rows = [(row.slot, row.num_blocks, row.reserved_tokens, row.committed_tokens)
                for row in self.pool.slot_table() if not row.draining]  # fmt: skip
        maps = {s: [[b for b, _ in row] for row in m] for s, m in self._maps().items()}
        return rows, maps

    def _claim(self, blocks: int, slots: int, call: Callable[[], Any]) -> Any:
        """The call's result, or None where it must and did fail; then nothing has changed.

        With programs in flight, views or blocks set aside it may fail where it would not otherwise.
        """
        if self.slow is not None and self.slow.is_ready():
            self._settle()
        certain = self.slow is None and not self.views and not self.aside
        before = None
        if certain:
            jax.block_until_ready(self.cache)
            self.truncated.clear()
            before = self._account()
        left = self.total - self.ranges * self.model.distinct() - self._set_aside()
        fits = blocks * self.ranges <= left and slots <= _SLOTS - len(self.live)
        try:
            result = call()
        except (kvp.OutOfBlocks, kvp.OutOfSlots):
            if certain and (fits or self._account() != before):
                raise
            return None
        assert fits, (blocks, left)
        self.exact = False
        return result

    def _set_aside(self) -> int:
        if not self.aside:
            return 0
        mapped = {b for rows in self._maps().values() for row in rows for b, _ in row}
        return max(self.pool.stats().blocks_mapped - len(mapped), 0)

    def _batch(self, sequences: list[tuple[int, int]]) -> None:
        """Appends tokens to (slot, n) and advances."""
        k, v = np.zeros((2, LAYERS, _NEW, HEADS, DIM), np.float32)
        done = 0
        for slot, n in sequences:
            values = self.model.append(slot, n)
            k[:, done : done + n], v[:, done : done + n] = values[:, 0], values[:, 1]
            done += n
        dtype = input_dtype(self.spec)
        self.cache = append_all(
            self.cache, jnp.asarray(k, dtype), jnp.asarray(v, dtype), make_batch(sequences, 2)
        )

    def _forked(self, pairs: list[tuple[int, int]], tokens: list[int]) -> None:
        """The model of forks (donor, slot)."""
        for (donor, slot), n in zip(pairs, tokens, strict=True):
            shared = self.model.whole(n)
            if donor in self.truncated:
                # Whether the truncation has run by now decides what is mapped and what is copied.
                self._settle()
                rows = zip(
                    self.pool.block_map(donor)[0], self.pool.block_map(slot)[0], strict=False
                )
                same = next((i for i, (a, b) in enumerate(rows) if a[0] != b[0]), 99)
                shared = min(shared, same * _BLOCK)
            self.model.fork(donor, slot, n, shared)

    @initialize(share=_SHARE)
    def begin(self, share: float) -> None:
        self.start(share)
        self.start(1.0)

    @rule(verb=st.sampled_from(_VERBS), seed=st.integers(0, 1 << 30))
    def act(self, verb: str, seed: int) -> None:
        """One rule for all: hypothesis leaves out a random part of the rules in each run, and
        prefers numbers at the ends of a range.
        """
        if not self.live:
            return self.start(0.7)
        rng = random.Random(seed)
        share = rng.random()
        arguments = {
            "which": rng.randrange(_SLOTS),
            "several": {rng.randrange(_SLOTS) for _ in range(rng.randint(1, 3))},
            "share": share,
            "n": rng.randrange(4),
            "tokens": int(rng.random() * _MAX_SEQ_LEN),
            "verbs": rng.choices(["fork", "truncate", "acquire", "release"], k=rng.randrange(4)),
        }
        method = getattr(self, verb)
        wanted = inspect.signature(method).parameters
        method(**{name: value for name, value in arguments.items() if name in wanted})

    # ---- room ----

    def acquire(self, tokens: int) -> None:
        call = functools.partial(self.pool.acquire, self.cache, tokens)
        if (result := self._claim(self.model.count(tokens), 1, call)) is not None:
            slot, self.cache = result
            self.model.acquire(slot, tokens)

    def start(self, share: float) -> None:
        """A sequence that is written and committed, as donors are."""
        tokens = 1 + int(share * (_NEW - 1))
        before = set(self.live)
        self.acquire(min(tokens + 20, _MAX_SEQ_LEN))
        for slot in set(self.live) - before:
            self._batch([(slot, tokens)])
            self.commit(sorted(self.live).index(slot), 1.0)

    def extend(self, which: int, tokens: int) -> None:
        if not (self.live):
            return
        slot = self._pick(which)
        more = max(0, self.model.count(tokens) - len(self.live[slot].blocks))

        def call() -> bool:
            self.pool.extend(slot, tokens)
            return True

        if self._claim(more, 0, call):
            self.model.extend(slot, tokens)

    def map_slots(self, which: int, tokens: int) -> None:
        if not (self.live and self.slow is None):
            return
        slot = self._pick(which)
        self.exact = False
        self.cache, ok = _map_slots(
            self.cache, jnp.asarray([slot], jnp.int32), jnp.asarray([tokens], jnp.int32)
        )
        more = max(0, self.model.count(tokens) - len(self.live[slot].blocks))
        left = self.total - self.ranges * self.model.distinct() - self._set_aside()
        if bool(ok[0]):
            assert more * self.ranges <= left
            self.model.extend(slot, tokens)
        else:
            assert more * self.ranges > left or self.views

    def release(self, several: set[int]) -> None:
        if not (self.live):
            return
        slots = sorted({self._pick(i) for i in several})[:2]
        self.cache = self.pool.release(self.cache, slots)
        self.exact = False
        for slot in slots:
            del self.live[slot]

    def trim(self) -> None:
        self._settle()
        self.pool.trim()
        if not self.views:
            assert self.pool.stats().blocks_parked == 0
            self.exact = True

    def resize(self, share: float) -> None:
        self._settle()
        wanted = int(14 + 12 * share) * self.ranges
        fits = self.ranges * self.model.distinct() + self._set_aside() <= wanted
        try:
            self.pool.resize(wanted * self.spec.block_bytes)
        except (ValueError, kvp.OutOfBlocks):
            assert not fits or self.views
        else:
            assert fits
            self.total = wanted

    # ---- tokens ----

    def write(self, several: set[int], share: float) -> None:
        if not (self.live):
            return
        slots = sorted({self._pick(i) for i in several})[:2]
        room = {s: self.live[s].reserved - len(self.live[s].tokens) for s in slots}
        sequences = [
            (s, min(1 + int(share * (room[s] - 1)), _NEW // 2)) for s in slots if room[s] > 0
        ]
        if sequences:
            self._batch(sequences)

    def commit(self, which: int, share: float) -> None:
        if not (self.live):
            return
        slot = self._pick(which)
        seq = self.live[slot]
        new = int(min(2 * share, 1) * (len(seq.tokens) - len(seq.ids)))
        ids = [7 * stamp % 1000 for stamp in seq.tokens[len(seq.ids) : len(seq.ids) + new]]
        self.pool.commit(slot, ids)
        seq.ids += ids

    def set_lengths(self, which: int, share: float) -> None:
        """A rollback behind what is final."""
        if not (self.live):
            return
        if self.slow is not None:
            self._settle()  # what is committed later binds programs that are queued
        slot = self._pick(which)
        seq = self.live[slot]
        lowest = min(seq.floor, len(seq.tokens))
        length = lowest + int(share * (len(seq.tokens) - lowest))
        self.cache = kvp.set_lengths(self.cache, [slot], [length])
        jax.block_until_ready(self.cache)
        del seq.tokens[length:]

    # ---- sharing ----

    def fork(self, which: int, n: int, share: float) -> None:
        if not (self.live):
            return
        donor = self._pick(which)
        tokens = len(self.live[donor].ids)
        num_tokens = None if share > 0.5 else int(2 * share * tokens)
        tokens = tokens if num_tokens is None else num_tokens
        pending = donor in self.truncated and self.slow is not None
        blocks = n * (self.model.count(tokens) - tokens // _BLOCK)
        if pending:
            self._try_pending(donor, n, tokens, num_tokens)
            return
        call = functools.partial(self.pool.fork, self.cache, donor, n, num_tokens)
        if (result := self._claim(blocks, n, call)) is not None:
            slots, self.cache = result
            assert len(slots) == n
            self._forked([(donor, slot) for slot in slots], [tokens] * n)

    def _try_pending(self, donor: int, n: int, tokens: int, num_tokens: int | None) -> None:
        """A fork behind a truncation that is queued may have to copy more blocks."""
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
        tokens = [len(self.live[beams[p]].ids) for p in forked]
        blocks = sum(self.model.count(n) - n // _BLOCK for n in tokens)
        call = functools.partial(self.pool.reorder, self.cache, beams, parents)
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
        if self.truncated & set(slots):
            self._settle()
        pairs = list(zip(slots, lengths, strict=True))
        blocks = sum(self.model.shared_behind(slot, n) for slot, n in pairs)
        call = functools.partial(self.pool.truncate, self.cache, slots, lengths)
        if (result := self._claim(blocks - self._spare_copies(slots), 0, call)) is None:
            return
        self.cache = result
        self.truncated.update(slots)
        for slot, n in pairs:
            self.model.truncate(slot, n)

    def _spare_copies(self, slots: list[int]) -> int:
        """Blocks that an earlier truncation, which never ran, has set aside: up to all of them."""
        return 10 * len(slots) if self.aside else 0

    # ---- views ----

    def view(self, which: int, n: int) -> None:
        if not (
            self.live
            and self.layout == "per_layer"
            and len(self.views) < 3
            and _HAS_VIEWS
            and self.dtype == jnp.float32
        ):
            return
        self._settle()
        self.exact = False
        every, layer = n > 1, n % LAYERS
        slot = self._pick(which)
        both = self.pool.view(layer, None if every else slot)
        self.views.append((slot, both))
        for kv, array in enumerate(both):
            shown = np.asarray(array[slot] if every else array)
            assert np.isfinite(shown).all()
            want = self.model.contents(slot, layer)[kv]
            np.testing.assert_array_equal(shown[: len(want)], want)

    def drop_views(self) -> None:
        if not (self.views):
            return
        self.views.clear()

    # ---- programs in flight, and programs that fail ----

    def wait_for_something_slow(self, share: float) -> None:
        """From now on programs queue behind this, and host calls run ahead of them."""
        if self.slow is not None:
            return
        self.slow = busy_rounds(20 + int(80 * share))
        self.cache = kvp.after(self.cache, self.slow)

    def rewrite(self, which: int, share: float) -> None:
        """Rolls back and writes again behind something slow, and forks what is only queued."""
        self._settle()
        self.wait_for_something_slow(share)
        slot = self._pick(which)
        self.truncate({which}, share, 0)
        if (room := self.live[slot].reserved - len(self.live[slot].tokens)) > 0:
            self._batch([(slot, min(room, _NEW))])
        self.commit(which, 1.0)
        self.fork(which, 1, 1.0)

    def settle(self) -> None:
        self._settle()

    def new_generation(self) -> None:
        self._settle()
        self.cache = self.pool.cache()

    def refused(self, which: int, share: float) -> None:
        """Nothing below what others have can be rolled back, nor written with a forged length."""
        if not (any(seq.mark for seq in self.live.values())):
            return
        self._settle()
        shared = sorted(slot for slot, seq in self.live.items() if seq.mark)
        slot = shared[which % len(shared)]
        seq = self.live[slot]
        below = int(share * (min(seq.mark, len(seq.tokens)) - 1))
        if len(seq.tokens) >= seq.mark:
            fails(
                "what other slots share of it ends at",
                lambda: kvp.set_lengths(self.cache, [slot], below).lengths,
            )
        forged = self.cache.lengths.at[slot].set(below)
        forged_cache = kvp.KVCache(self.cache.handle, self.cache.epoch, forged, self.cache.spec)
        x = jnp.full((1, HEADS, DIM), 9.0, input_dtype(self.spec))
        append = functools.partial(kvp.append_kv, forged_cache, x, x, layer=0)
        batch = make_batch([(slot, 1)])
        fails("what other slots share of it ends at", lambda: append(batch=batch).epoch)

    def failing_program(self, which: int, verbs: list[str]) -> None:
        """Host calls behind a program that fails never run; the next generation makes up for it."""
        if not (self.live):
            return
        self._settle()
        queued = kvp.after(self.cache, busy_rounds(100))
        try:
            cache = kvp.set_lengths(queued, [self._pick(which)], [99])
        except RUN_TIME_ERRORS:  # it has run at once
            return
        self.exact = False
        unborn: set[int] = set()  # forks that will not have run
        for verb in verbs:
            if not self.live:
                break
            slot = self._pick(which)
            seq = self.live[slot]
            try:
                if verb == "fork":
                    tokens = len(seq.ids)
                    shared = self.model.whole(tokens)
                    if slot in self.truncated | unborn:
                        continue
                    (new,), cache = self.pool.fork(cache, slot, 1)
                    self.model.fork(slot, new, tokens, shared, ran=False)
                    unborn.add(new)
                elif verb == "acquire":
                    new, cache = self.pool.acquire(cache, 30)
                    self.model.acquire(new, 30)
                elif verb == "release":
                    cache = self.pool.release(cache, slot)
                    del self.live[slot]
                else:
                    cache = self.pool.truncate(cache, slot, len(seq.tokens) // 2)
                    del seq.ids[len(seq.tokens) // 2 :]
                    self.truncated.add(slot)
                    self.aside = True
            except (kvp.OutOfBlocks, kvp.OutOfSlots):
                pass
            except RUN_TIME_ERRORS:  # a program that has failed by now is refused at once
                break
        with pytest.raises(RUN_TIME_ERRORS):
            self.pool.check(cache)
        self.cache = self.pool.cache()  # in which forks that did not run are free
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
        assert stats.blocks_mapped == len(blocks) + self._set_aside()
        if not self.aside:
            assert stats.blocks_mapped == len(blocks)
        shared = {b for rows in maps.values() for row in rows for b, count in row if count > 1}
        assert stats.blocks_shared >= len(shared)
        if self.exact:
            assert stats.blocks_shared == len(shared)
        for row in self.pool.slot_table():
            if not row.draining:
                counts = [count for line in maps[row.slot] for _, count in line]
                assert row.num_blocks == len(counts)
                assert row.shared_bytes == sum(c > 1 for c in counts) * self.spec.block_bytes

    @invariant()
    def every_token_is_where_it_belongs(self) -> None:
        if self.slow is not None:
            return
        slots = sorted(self.live)
        lengths = np.full(_SLOTS, -1)
        lengths[slots] = [len(self.live[slot].tokens) for slot in slots]
        np.testing.assert_array_equal(np.asarray(self.cache.lengths), lengths)
        padded = jnp.asarray(slots + [-1] * (_SLOTS - len(slots)), jnp.int32)
        found = np.asarray(_read(self.cache, padded))
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
def test_sharing_against_a_model(machine: Callable[[], SharingMachine]) -> None:
    test = own_cases(machine.__name__)(machine)
    run_state_machine_as_test(
        test,
        settings=settings(
            phases=[Phase.generate],
            max_examples=num_cases(12, exhaustive=30),
            stateful_step_count=40,
        ),
    )
