"""Random requests on a pool, without waiting for its programs, checked against a plain
dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

import jax_kvpage as kvp

Write = Callable[[kvp.KVPool, kvp.KVCache, Mapping[int, Sequence[int]]], kvp.KVCache]
Check = Callable[[kvp.KVCache, int, Sequence[int]], None]


class Churn:
    """Requests that start, grow, fork, are truncated and end.

    Args:
        pool: A new pool, too small for everything that the requests may want.
        seed: Seed of the random choices.
        write: Writes and commits new tokens of slots.
        check: Asserts that a slot has the given tokens.
        audit: Asserts that the pool's per-device pools agree.

    Attributes:
        live: The tokens of each occupied slot.
        refused: Number of calls that failed for lack of room.
    """

    verbs: tuple[str, ...] = ("start", "start", "grow", "end", "fork", "cut")
    unit = 20  # sequences start with one to three times as many tokens
    room: int | None = 160  # tokens of room that a new request asks for; None: exactly its tokens

    def __init__(
        self,
        pool: kvp.KVPool,
        seed: int,
        *,
        write: Write,
        check: Check,
        audit: Callable[[kvp.KVPool], None],
    ) -> None:
        self.pool, self.cache = pool, pool.cache()
        self.live: dict[int, list[int]] = {}
        self.refused = 0
        self._rng = np.random.default_rng(seed)
        self._write, self._check, self._audit = write, check, audit

    def run(self, steps: int) -> None:
        for count in range(steps):
            self._step()
            if count % 20 == 19:
                self._verify()
        assert self.refused, "the pool was never short of memory"

    def end_all(self) -> None:
        self.pool.check(self.pool.release(self.cache, list(self.live)))
        self._audit(self.pool)

    def _step(self) -> None:
        verb = str(self._rng.choice(self.verbs))
        slot = int(self._rng.choice(list(self.live))) if self.live else None
        ids = self._rng.integers(1, 4, self.unit * (1 + int(self._rng.integers(3)))).tolist()
        try:
            if verb == "start" or slot is None:
                self.start(ids)
            else:
                getattr(self, verb)(slot, ids)
        except (kvp.OutOfBlocks, kvp.OutOfSlots):
            self.refused += 1
            if self.live:
                self.end(max(self.live, key=lambda one: len(self.live[one])), ids)

    def _verify(self) -> None:
        for slot, ids in self.live.items():
            self._check(self.cache, slot, ids)
        self.pool.check(self.cache)
        self._audit(self.pool)

    def start(self, ids: list[int]) -> None:
        room = [] if self.room is None else [self.room]
        slot, found, self.cache = self.pool.acquire_prefix(self.cache, ids, *room)
        self.live[slot] = ids
        self.cache = self._write(self.pool, self.cache, {slot: ids[found:]})

    def grow(self, slot: int, ids: list[int]) -> None:
        if len(self.live[slot]) >= 200:
            return
        ids = ids[: self.unit]
        self.pool.extend(slot, len(self.live[slot]) + len(ids))
        self.cache = self._write(self.pool, self.cache, {slot: ids})
        self.live[slot] = self.live[slot] + ids

    def fork(self, slot: int, ids: list[int]) -> None:
        del ids
        (child,), self.cache = self.pool.fork(self.cache, slot, 1)
        self.live[child] = self.live[slot]

    def cut(self, slot: int, ids: list[int]) -> None:
        del ids
        kept = self.live[slot][: len(self.live[slot]) // 2]
        self.cache = self.pool.truncate(self.cache, slot, len(kept))
        self.live[slot] = kept

    def end(self, slot: int, ids: list[int]) -> None:
        del ids
        self.cache = self.pool.release(self.cache, slot)
        del self.live[slot]
