"""The part of the sharing state machine (test_sharing_state_machine.py) for single sequences: the
pool and its model, room, tokens, views.
"""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from harness import RUN_TIME_ERRORS, append_all, input_dtype, make_batch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize
from sharing_model import DIM, HEADS, LAYERS, SharingModel

import jax_kvpage as kvp
from jax_kvpage import _native

HAS_FAKE_DRIVER = os.environ.get("JAX_KVPAGE_FAKE_DRIVER", "0") not in ("", "0")
BLOCK, SLOTS = 16, 7
MAX_SEQ_LEN = 96
NEW = 40  # tokens in one batch
_map_slots = jax.jit(kvp.map_slots)


class SequencesMachine(RuleBasedStateMachine):
    """The model tracks what must be shared; the blocks of free slots are up to the pool."""

    layout, dtype, debug = "fused", jnp.float32, False
    # Number of calls in which an injected driver fault struck, by machine name.
    faults: ClassVar[collections.Counter[str]] = collections.Counter()

    def __init__(self) -> None:
        super().__init__()
        self.spec = kvp.CacheSpec(
            LAYERS, HEADS, DIM, SLOTS, MAX_SEQ_LEN,
            dtype=self.dtype, layout=self.layout, block_tokens=BLOCK,
        ).resolve("cpu")  # fmt: skip
        assert self.spec.block_tokens == BLOCK
        self.ranges = 1 if self.layout == "fused" else 2 * LAYERS
        self.total = 20 * self.ranges
        self.pool = kvp.KVPool(
            self.spec, self.total * self.spec.block_bytes, poison=True, debug=self.debug
        )
        self.cache = self.pool.cache()
        self.model = SharingModel(BLOCK, self.dtype)
        self.views: list[tuple[int, Any]] = []
        self.slow: Any = None  # a value that queued programs wait for
        self.exact = False  # whether free slots have no blocks
        self.fault: tuple[int, int] | None = None  # fault of this step: (driver call, CUresult)
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
        """Returns what the sequences hold, without blocks beyond a reservation: those are spare,
        and a failing call may have taken some for other sequences.
        """
        rows = [(row.slot, row.reserved_tokens, row.committed_tokens)
                for row in self.pool.slot_table() if not row.draining]  # fmt: skip
        kept = {slot: self.model.count(reserved) for slot, reserved, _ in rows}
        maps = {s: [[b for b, _ in row[: kept[s]]] for row in m] for s, m in self._maps().items()}
        return rows, maps

    def _claim(self, blocks: int, slots: int, call: Callable[[kvp.KVCache], Any]) -> Any:
        """Returns the call's result, or None if it must fail and did, without changing anything.

        With programs in flight or views, it may also fail where it otherwise would not.
        """
        if self.slow is not None and self.slow.is_ready():
            self._settle()
        certain = self.slow is None and not self.views
        before = None
        if certain:
            jax.block_until_ready(self.cache)
            self.truncated.clear()
            before = self._account()
        left = self.total - self.ranges * self.model.distinct()
        fits = blocks * self.ranges <= left and slots <= SLOTS - len(self.live)
        try:
            result = self._call(call, before)
        except (kvp.OutOfBlocks, kvp.OutOfSlots):
            if certain and (fits or self._account() != before):
                raise
            return None
        assert fits, (blocks, left)
        self.exact = False
        return result

    def _call(self, call: Callable[[kvp.KVCache], Any], before: object) -> Any:
        """Returns the result of a call during which a driver call fails if this step has a fault.

        A refusal on the host changes nothing. A failed program is made up for by a new generation.
        In both cases a second call succeeds.
        """
        if self.fault is None or before is None:
            return call(self.cache)
        faults = _native.fake_driver.faults
        _native.fake_driver.fail_any(*self.fault)
        try:
            return jax.block_until_ready(call(self.cache))
        except RUN_TIME_ERRORS:
            if _native.fake_driver.faults == faults:
                raise
            _native.fake_driver.clear_faults()
            self.cache = self.pool.cache()
        except RuntimeError:
            if _native.fake_driver.faults == faults:
                raise
            assert self._account() == before
        finally:
            _native.fake_driver.clear_faults()
        self.faults[type(self).__name__] += 1
        return call(self.cache)

    def _batch(self, sequences: list[tuple[int, int]]) -> None:
        """Appends tokens to (slot, n) and advances."""
        k, v = np.zeros((2, LAYERS, NEW, HEADS, DIM), np.float32)
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
        """Models forks (donor, slot)."""
        for (donor, slot), n in zip(pairs, tokens, strict=True):
            shared = self.model.whole(n)
            if donor in self.truncated:
                # What is mapped and what is copied depends on whether the truncation has run by
                # now.
                self._settle()
                rows = zip(
                    self.pool.block_map(donor)[0], self.pool.block_map(slot)[0], strict=False
                )
                same = next((i for i, (a, b) in enumerate(rows) if a[0] != b[0]), 99)
                shared = min(shared, same * BLOCK)
            self.model.fork(donor, slot, n, shared)

    @initialize(share=st.floats(0, 1))
    def begin(self, share: float) -> None:
        self.start(share)
        self.start(1.0)

    # ---- room ----

    def acquire(self, tokens: int) -> None:
        call = functools.partial(self.pool.acquire, num_tokens=tokens)
        if (result := self._claim(self.model.count(tokens), 1, call)) is not None:
            slot, self.cache = result
            self.model.acquire(slot, tokens)

    def start(self, share: float) -> None:
        """Starts a sequence that is written and committed, as donors must be."""
        tokens = 1 + int(share * (NEW - 1))
        before = set(self.live)
        self.acquire(min(tokens + 20, MAX_SEQ_LEN))
        for slot in set(self.live) - before:
            self._batch([(slot, tokens)])
            self.commit(sorted(self.live).index(slot), 1.0)

    def extend(self, which: int, tokens: int) -> None:
        if not (self.live):
            return
        slot = self._pick(which)
        more = max(0, self.model.count(tokens) - len(self.live[slot].blocks))

        def call(_: kvp.KVCache) -> bool:
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
        left = self.total - self.ranges * self.model.distinct()
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

    def relocate(self, which: int, share: float) -> None:
        """Relocates; contents and sharing must not change, which is checked after every step."""
        slots = [self._pick(which)] if share > 0.8 and self.live else None
        if HAS_FAKE_DRIVER:
            return  # device memory, where every block is mapped separately
        report = self.pool.relocate(self.spec.block_bytes * (1 + int(share * 40)), slots)
        assert report.bytes_copied == report.blocks_moved * self.spec.block_bytes
        assert report.mappings_after <= report.mappings_before + 2 * report.blocks_moved

    def resize(self, share: float) -> None:
        self._settle()
        wanted = int(14 + 12 * share) * self.ranges
        fits = self.ranges * self.model.distinct() <= wanted
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
            (s, min(1 + int(share * (room[s] - 1)), NEW // 2)) for s in slots if room[s] > 0
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
        """Rolls back, but not into final tokens."""
        if not (self.live):
            return
        if self.slow is not None:
            self._settle()  # later commits apply to queued programs too
        slot = self._pick(which)
        seq = self.live[slot]
        lowest = min(seq.floor, len(seq.tokens))
        length = lowest + int(share * (len(seq.tokens) - lowest))
        self.cache = kvp.set_lengths(self.cache, [slot], [length])
        jax.block_until_ready(self.cache)
        del seq.tokens[length:]

    # ---- views ----

    def view(self, which: int, n: int) -> None:
        if not (
            self.live
            and self.layout == "per_layer"
            and len(self.views) < 3
            and not HAS_FAKE_DRIVER
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
            want[: self.live[slot].dropped] = 0
            np.testing.assert_array_equal(shown[: len(want)], want)

    def drop_views(self) -> None:
        if not (self.views):
            return
        self.views.clear()
