"""The store below the pool: preempted sequences, and prefixes of requests that wait.

Both are read before their request starts, while others run, and only where that takes less time
than to compute them, by the speeds that were measured.
"""

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from jax_kvpage.errors import KVPageError, OutOfBlocks
from jax_kvpage.pool import KVPool
from jax_kvpage.serving.request import SequenceGroup
from jax_kvpage.serving.swap import Fetched
from jax_kvpage.swapping import Swapped
from jax_kvpage.tickets import Ticket

__all__ = ["Pace", "PoolSwap"]

_STORE_BYTES_PER_SECOND = 5e8  # until the store has measured its reads
_NEWEST = 0.3  # weight of the newest measurement
_PATIENCE = 8  # times that a read finds no blocks, until the sequence is computed again


class Pace:
    """How fast prompts are computed.

    Attributes:
        tokens_per_second: of steps that computed parts of prompts; 0 before the first.
    """

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        self._last = 0.0

    def read(self, num_prompt_tokens: int, launched: float) -> None:
        """Hears that a step was read back.

        Args:
            num_prompt_tokens: tokens that it ran beside those that decode.
            launched: when it was dispatched, in seconds of `time.monotonic`.
        """
        now = time.monotonic()
        seconds, self._last = now - max(launched, self._last), now
        if num_prompt_tokens and seconds > 0:
            measured, before = num_prompt_tokens / seconds, self.tokens_per_second
            self.tokens_per_second = before + _NEWEST * (measured - before) if before else measured


@dataclasses.dataclass(slots=True)
class _Entry:
    swapped: Swapped
    ticket: Ticket | None = None
    refusals: int = 0


@dataclasses.dataclass(slots=True)
class _Prefix:
    num_preemptions: int  # of the group, when it was looked for
    num_tokens: int  # stored; 0: no more than in memory, or read
    ticket: Ticket | None = None


class PoolSwap:
    """The `SwapSpace` of a pool with a store.

    A request that is not swapped counts as such while the store has more of its tokens than memory
    has. Once these are read it counts as lost: they are found in memory like any prefix.

    Args:
        pool: with a store.
        pace: of the engine.
        tokens_of: ids and namespace of a group that waits; None: prefixes are not looked for.
    """

    def __init__(
        self,
        pool: KVPool,
        pace: Pace,
        tokens_of: Callable[[SequenceGroup], tuple[np.ndarray, str]] | None = None,
    ) -> None:
        spec = pool.spec
        assert spec.block_tokens is not None
        self._pool = pool
        self._pace = pace
        self._block_tokens = spec.block_tokens
        self._token_bytes = spec.token_bytes
        self._held: dict[SequenceGroup, _Entry] = {}
        self._tokens_of = tokens_of
        self._prefixes: dict[SequenceGroup, _Prefix] = {}  # of groups that were looked for

    def keep(self, group: SequenceGroup, swapped: Swapped) -> None:
        """Takes a sequence that was swapped out."""
        self._held[group] = _Entry(swapped)

    def get(self, group: SequenceGroup) -> Swapped | None:
        """A sequence that was swapped out; None if the group's was not."""
        entry = self._held.get(group)
        return None if entry is None else entry.swapped

    def forget(self, group: SequenceGroup) -> None:
        """Gives up what is left of a group, if there is anything."""
        self._prefixes.pop(group, None)
        entry = self._held.pop(group, None)
        if entry is not None:
            entry.swapped.close()

    def wait(self) -> None:
        """Waits a little for the store: nothing else can go on."""
        reads = [entry.ticket for entry in self._held.values()]
        reads += [prefix.ticket for prefix in self._prefixes.values()]
        for ticket in reads:
            if ticket is not None and not ticket.ready:
                ticket.wait(0.02)
                return
        if self._held:  # blocks are being written
            time.sleep(1e-3)

    def holds(self, group: SequenceGroup) -> bool:
        """See `SwapSpace`."""
        return group in self._held or self._stored(group) > 0

    def cost(self, num_tokens: np.ndarray) -> np.ndarray:
        """See `SwapSpace`. Before any prompt was computed nothing is worth swapping."""
        pace = self._pace.tokens_per_second
        if not pace:
            return num_tokens
        speed = self._pool.spill_stats().read_bytes_per_second or _STORE_BYTES_PER_SECOND
        seconds = 2 * self._token_bytes / speed  # for a token: written, then read
        return np.ceil(num_tokens * seconds * pace).astype(np.int64)

    def find(self, group: SequenceGroup) -> tuple[int, int]:
        """See `SwapSpace`."""
        entry = self._held.get(group)
        if entry is None:
            return self._stored(group), 0
        tokens = entry.swapped.tokens
        blocks = 0 if entry.ticket is None else -(-tokens // self._block_tokens)
        return tokens, blocks

    def fetch(self, group: SequenceGroup) -> Fetched:
        """See `SwapSpace`."""
        entry = self._held.get(group)
        if entry is None:
            return self._fetch_prefix(group)
        try:
            if entry.ticket is None:
                entry.ticket = self._pool.prefetch(entry.swapped)
        except OutOfBlocks:
            entry.refusals += 1
            if entry.refusals < _PATIENCE:
                return "coming"
            self.forget(group)
            return "lost"
        except KVPageError:
            self.forget(group)
            return "lost"
        if not entry.ticket.ready:
            return "coming"
        if entry.ticket.error is not None:
            self.forget(group)
            return "lost"
        return "here"

    def give_up(self) -> bool:
        """See `SwapSpace`."""
        groups = list(self._held)
        for group in groups:
            self.forget(group)
        return bool(groups)

    def _stored(self, group: SequenceGroup) -> int:
        """Tokens that the store has of a waiting group; 0 if memory has as many."""
        if self._tokens_of is None:
            return 0
        prefix = self._prefixes.get(group)
        if prefix is None or prefix.num_preemptions < group.num_preemptions:
            ids, space = self._tokens_of(group)
            stored = self._pool.stored_prefix(ids, space)
            more = stored > 0 and stored > self._pool.find_prefix(ids, space)
            prefix = _Prefix(group.num_preemptions, stored if more else 0)
            self._prefixes[group] = prefix
        return prefix.num_tokens

    def _fetch_prefix(self, group: SequenceGroup) -> Fetched:
        assert self._tokens_of is not None
        prefix = self._prefixes[group]
        if prefix.ticket is None:
            pace = self._pace.tokens_per_second or None
            try:
                prefix.ticket = self._pool.prefetch(
                    *self._tokens_of(group), prefill_tokens_per_second=pace
                )
            except KVPageError:  # such as a store that was closed
                prefix.num_tokens = 0
                return "lost"
        if not prefix.ticket.ready:
            return "coming"
        prefix.num_tokens, prefix.ticket = 0, None
        return "lost"
