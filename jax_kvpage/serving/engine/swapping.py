"""The scheduler's view of the pool's store.

Preempted sequences and stored prompts are read before their requests start, while others run, and
only if measured speeds say that this is faster than computing them.
"""

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from jax_kvpage.errors import KVPageError, OutOfBlocks
from jax_kvpage.host_store import HostStore
from jax_kvpage.pool import KVPool
from jax_kvpage.serving.engine.prefill_rate import PrefillRate
from jax_kvpage.serving.engine.stored_prompts import StoredPrompts
from jax_kvpage.serving.request import SequenceGroup
from jax_kvpage.serving.swap import Fetched
from jax_kvpage.swapping import Swapped
from jax_kvpage.tickets import Ticket

__all__ = ["PoolSwap"]

_STORE_BYTES_PER_SECOND = 5e8  # until the store has measured its reads
_HOST_BYTES_PER_SECOND = 1e10  # same for host memory; below PCIe 4.0 bandwidth
_PATIENCE = 8  # reads that find no blocks before the sequence is recomputed


@dataclasses.dataclass(slots=True)
class _Entry:
    swapped: Swapped
    ticket: Ticket | None = None
    refusals: int = 0


class PoolSwap:
    """The `SwapSpace` of a pool with a store.

    Args:
        pool: a pool with a store.
        prefill_rate: measured speed of the engine.
        prompts: stored prompts of other requests; None ignores them.
    """

    def __init__(
        self,
        pool: KVPool,
        prefill_rate: PrefillRate,
        prompts: StoredPrompts | None = None,
    ) -> None:
        spec = pool.spec
        assert spec.block_tokens is not None
        self._pool = pool
        self._prefill_rate = prefill_rate
        self._block_tokens = spec.block_tokens
        # On a mesh, the devices write and read their parts in parallel.
        self._token_bytes = pool.sharding.local.token_bytes if pool.sharding else spec.token_bytes
        self._held: dict[SequenceGroup, _Entry] = {}
        self._prompts = prompts

    def keep(self, group: SequenceGroup, swapped: Swapped) -> None:
        """Records a sequence that was swapped out."""
        self._held[group] = _Entry(swapped)

    def get(self, group: SequenceGroup) -> Swapped | None:
        """Returns the swapped-out sequence of a group, or None."""
        entry = self._held.get(group)
        return None if entry is None else entry.swapped

    def forget(self, group: SequenceGroup) -> None:
        """Drops whatever is stored for a group."""
        if self._prompts is not None:
            self._prompts.forget(group)
        entry = self._held.pop(group, None)
        if entry is not None:
            entry.swapped.close()

    def wait(self) -> None:
        """Waits briefly for the store; called when nothing else can run."""
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
        """See `SwapSpace`. Until a prompt has been computed, nothing is worth swapping."""
        rate = self._prefill_rate.tokens_per_second
        if not rate:
            return num_tokens
        speed = self._read_bytes_per_second()
        seconds = 2 * self._token_bytes / speed  # per token: written, then read
        return np.ceil(num_tokens * seconds * rate).astype(np.int64)

    def _read_bytes_per_second(self) -> float:
        store = self._pool.store
        default = (
            _HOST_BYTES_PER_SECOND if isinstance(store, HostStore) else _STORE_BYTES_PER_SECOND
        )
        try:
            return (store and store.stats().read_bytes_per_second) or default
        except KVPageError:  # the store was closed
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
    prefill_rate: PrefillRate,
    tokens_of: Callable[[SequenceGroup], tuple[np.ndarray, str]] | None,
) -> PoolSwap | None:
    """Returns the swap space of a pool; None without a store or with several replicas.

    A swapped sequence can only return to the replica that it left, but the scheduler places
    preempted requests again.

    Args:
        pool: pool of the engine.
        prefill_rate: measured speed of the engine.
        tokens_of: see `StoredPrompts`; None ignores stored prompts.
    """
    if pool.store is None or pool.replicas > 1:
        return None
    prompts = None
    if tokens_of is not None and pool.sharding is None:  # on a mesh, prompts are not stored
        prompts = StoredPrompts(pool, prefill_rate, tokens_of)
    return PoolSwap(pool, prefill_rate, prompts)
