"""The store below the pool, as the scheduler sees it.

Preempted sequences and stored prompts are read before their requests start, while others run, and
only where that takes less time than to compute them, by the speeds that were measured.
"""

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from jax_kvpage.errors import KVPageError, OutOfBlocks
from jax_kvpage.host_store import HostStore
from jax_kvpage.pool import KVPool
from jax_kvpage.serving.engine.pace import Pace
from jax_kvpage.serving.engine.stored_prompts import StoredPrompts
from jax_kvpage.serving.request import SequenceGroup
from jax_kvpage.serving.swap import Fetched
from jax_kvpage.swapping import Swapped
from jax_kvpage.tickets import Ticket

__all__ = ["PoolSwap"]

_STORE_BYTES_PER_SECOND = 5e8  # until the store has measured its reads
_HOST_BYTES_PER_SECOND = 1e10  # the same of host memory: less than PCIe 4.0 moves
_PATIENCE = 8  # times that a read finds no blocks, until the sequence is computed again


@dataclasses.dataclass(slots=True)
class _Entry:
    swapped: Swapped
    ticket: Ticket | None = None
    refusals: int = 0


class PoolSwap:
    """The `SwapSpace` of a pool with a store.

    Args:
        pool: with a store.
        pace: of the engine.
        prompts: of other requests; None: they are not looked for.
    """

    def __init__(
        self,
        pool: KVPool,
        pace: Pace,
        prompts: StoredPrompts | None = None,
    ) -> None:
        spec = pool.spec
        assert spec.block_tokens is not None
        self._pool = pool
        self._pace = pace
        self._block_tokens = spec.block_tokens
        # Over a mesh the devices' parts are written and read beside each other.
        self._token_bytes = pool.sharding.local.token_bytes if pool.sharding else spec.token_bytes
        self._held: dict[SequenceGroup, _Entry] = {}
        self._prompts = prompts

    def keep(self, group: SequenceGroup, swapped: Swapped) -> None:
        """Takes a sequence that was swapped out."""
        self._held[group] = _Entry(swapped)

    def get(self, group: SequenceGroup) -> Swapped | None:
        """A sequence that was swapped out; None if the group's was not."""
        entry = self._held.get(group)
        return None if entry is None else entry.swapped

    def forget(self, group: SequenceGroup) -> None:
        """Gives up what is left of a group, if there is anything."""
        if self._prompts is not None:
            self._prompts.forget(group)
        entry = self._held.pop(group, None)
        if entry is not None:
            entry.swapped.close()

    def wait(self) -> None:
        """Waits a little for the store: nothing else can go on."""
        reads = [entry.ticket for entry in self._held.values() if entry.ticket is not None]
        reads += [] if self._prompts is None else self._prompts.reads()
        for ticket in reads:
            if not ticket.ready:
                ticket.wait(0.02)
                return
        if self._held:  # blocks are being written
            time.sleep(1e-3)

    def holds(self, group: SequenceGroup) -> bool:
        """See `SwapSpace`."""
        if group in self._held:
            return True
        return self._prompts is not None and self._prompts.find(group) > 0

    def cost(self, num_tokens: np.ndarray) -> np.ndarray:
        """See `SwapSpace`. Before any prompt was computed nothing is worth swapping."""
        pace = self._pace.tokens_per_second
        if not pace:
            return num_tokens
        speed = self._read_bytes_per_second()
        seconds = 2 * self._token_bytes / speed  # for a token: written, then read
        return np.ceil(num_tokens * seconds * pace).astype(np.int64)

    def _read_bytes_per_second(self) -> float:
        store = self._pool.store
        default = (
            _HOST_BYTES_PER_SECOND if isinstance(store, HostStore) else _STORE_BYTES_PER_SECOND
        )
        try:
            return (store and store.stats().read_bytes_per_second) or default
        except KVPageError:  # it was closed
            return default

    def find(self, group: SequenceGroup) -> tuple[int, int]:
        """See `SwapSpace`."""
        entry = self._held.get(group)
        if entry is None:
            return (0 if self._prompts is None else self._prompts.find(group)), 0
        tokens = entry.swapped.tokens
        blocks = 0 if entry.ticket is None else -(-tokens // self._block_tokens)
        return tokens, blocks

    def fetch(self, group: SequenceGroup) -> Fetched:
        """See `SwapSpace`."""
        entry = self._held.get(group)
        if entry is None:
            return "gone" if self._prompts is None else self._prompts.fetch(group)
        try:
            if entry.ticket is None:
                entry.ticket = self._pool.prefetch(entry.swapped)
        except OutOfBlocks:
            entry.refusals += 1
            if entry.refusals < _PATIENCE:
                return "coming"
            self.forget(group)
            return "gone"
        except KVPageError:
            self.forget(group)
            return "gone"
        if not entry.ticket.ready:
            return "coming"
        if entry.ticket.error is not None:
            self.forget(group)
            return "gone"
        return "here"

    def give_up(self) -> bool:
        """See `SwapSpace`."""
        groups = list(self._held)
        for group in groups:
            self.forget(group)
        return bool(groups)


def store_below(
    pool: KVPool,
    pace: Pace,
    tokens_of: Callable[[SequenceGroup], tuple[np.ndarray, str]] | None,
) -> PoolSwap | None:
    """What lies below a pool; None without a store, and for a pool with replicas: a sequence comes
    back to the replica that it left, while the scheduler places preempted requests anew.

    Args:
        pool: of the engine.
        pace: of the engine.
        tokens_of: see `StoredPrompts`; None: prompts are not looked for.
    """
    if pool.store is None or pool.replicas > 1:
        return None
    prompts = None
    if tokens_of is not None and pool.sharding is None:  # over a mesh none are stored
        prompts = StoredPrompts(pool, pace, tokens_of)
    return PoolSwap(pool, pace, prompts)
