"""Preempted sequences in the store of the pool, and whether that is cheaper than computing them."""

import dataclasses
import time

import numpy as np

from jax_kvpage.errors import KVPageError, OutOfBlocks
from jax_kvpage.pool import KVPool
from jax_kvpage.serving.request import SequenceGroup
from jax_kvpage.serving.swap import Fetched
from jax_kvpage.swapping import Swapped
from jax_kvpage.tickets import Ticket

__all__ = ["Pace", "PoolSwap"]

_STORE_BYTES_PER_SECOND = 5e8  # until a read was measured
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
            self.tokens_per_second = _average(self.tokens_per_second, num_prompt_tokens / seconds)


@dataclasses.dataclass(slots=True)
class _Entry:
    swapped: Swapped
    ticket: Ticket | None = None
    begun: float = 0.0
    from_disk: bool = False
    refusals: int = 0


class PoolSwap:
    """The `SwapSpace` of a pool with a store.

    Args:
        pool: with a store.
        pace: of the engine.
    """

    def __init__(self, pool: KVPool, pace: Pace) -> None:
        spec = pool.spec
        assert spec.block_tokens is not None
        self._pool = pool
        self._pace = pace
        self._block_tokens = spec.block_tokens
        self._token_bytes = spec.token_bytes
        self._bytes_per_second = _STORE_BYTES_PER_SECOND
        self._held: dict[SequenceGroup, _Entry] = {}

    def keep(self, group: SequenceGroup, swapped: Swapped) -> None:
        """Takes a sequence that was swapped out."""
        self._held[group] = _Entry(swapped)

    def get(self, group: SequenceGroup) -> Swapped:
        """What `fetch` has found here."""
        return self._held[group].swapped

    def forget(self, group: SequenceGroup) -> None:
        """Gives up what is left of a group, if there is anything."""
        entry = self._held.pop(group, None)
        if entry is not None:
            entry.swapped.close()

    def wait(self) -> None:
        """Waits a little for the store: nothing else can go on."""
        for entry in self._held.values():
            if entry.ticket is not None and not entry.ticket.ready:
                entry.ticket.wait(0.02)
                return
        if self._held:  # blocks are being written
            time.sleep(1e-3)

    def holds(self, group: SequenceGroup) -> bool:
        """See `SwapSpace`."""
        return group in self._held

    def cost(self, num_tokens: np.ndarray) -> np.ndarray:
        """See `SwapSpace`. Before any prompt was computed nothing is worth swapping."""
        seconds = 2 * self._token_bytes / self._bytes_per_second  # for a token: written, then read
        pace = self._pace.tokens_per_second
        if not pace:
            return num_tokens
        return np.ceil(num_tokens * seconds * pace).astype(np.int64)

    def find(self, group: SequenceGroup) -> tuple[int, int]:
        """See `SwapSpace`."""
        entry = self._held[group]
        tokens = entry.swapped.tokens
        blocks = 0 if entry.ticket is None else -(-tokens // self._block_tokens)
        return tokens, blocks

    def fetch(self, group: SequenceGroup) -> Fetched:
        """See `SwapSpace`."""
        entry = self._held[group]
        try:
            if entry.ticket is None:
                entry.from_disk, entry.begun = entry.swapped.on_disk, time.monotonic()
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
        if entry.from_disk:
            seconds = max(time.monotonic() - entry.begun, 1e-6)
            speed = entry.swapped.tokens * self._token_bytes / seconds
            self._bytes_per_second = _average(self._bytes_per_second, speed)
            entry.from_disk = False
        return "here"

    def give_up(self) -> bool:
        """See `SwapSpace`."""
        groups = list(self._held)
        for group in groups:
            self.forget(group)
        return bool(groups)


def _average(before: float, measured: float) -> float:
    return before + _NEWEST * (measured - before) if before else measured
