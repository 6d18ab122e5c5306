"""A store in memory of the host, for pools on a GPU."""

from typing import NamedTuple

from jax_kvpage import _native
from jax_kvpage._capacity import bytes_of
from jax_kvpage._closing import Closing
from jax_kvpage._native_pool import checked

__all__ = ["HostStore", "HostStoreStats"]


class HostStoreStats(NamedTuple):
    """What a host store holds, and what it has done since it was made.

    Attributes:
        limit: the most bytes that it may take.
        bytes: of these, those that swapped sequences take.
        pinned: those that it has taken from the system and pinned, in use or kept for later use.
        bytes_written: keys and values copied from pools.
        bytes_read: keys and values copied back.
        read_bytes_per_second: of the latest reads, waiting included; 0: none yet.
        refused_writes: sequences for which there was no room, or for which the system had no memory
            to pin; they stay in the pool's memory.
        failed_writes: sequences that could not be copied; they stay there too.
        failed_reads: copies back that failed; the store still has what they were to bring.
        last_error: of a write or a read; "" if there was none.
    """

    limit: int
    bytes: int
    pinned: int
    bytes_written: int
    bytes_read: int
    read_bytes_per_second: float
    refused_writes: int
    failed_writes: int
    failed_reads: int
    last_error: str


class HostStore(Closing):
    """Swapped sequences of pools on a GPU, in pinned memory of the host.

    `KVPool(..., store=HostStore("16GiB"))` gives `swap_out` somewhere to put what it takes out of
    the card's memory. Threads of the store make the copies, on streams that no program waits for.
    Memory is taken as it is needed and kept for later use until `close`. Several pools, on several
    cards, may share a store. It works in the process that made it, not in its forks, and is a
    context manager. It keeps no prefixes: `save_prefixes`, `prefetch` of token ids and
    `write_ahead` need a `BlockStore`.

    Args:
        limit: the most bytes that it may take, as a number or as text ("16GiB"). A sequence that
            does not fit stays in the pool's memory, as where a disk is full.

    Raises:
        ValueError: a limit that is none.
    """

    def __init__(self, limit: int | str) -> None:
        self._limit = bytes_of("HostStore: limit", limit)
        self.native: _native.HostStore = checked(_native.HostStore, self._limit)

    @property
    def limit(self) -> int:
        """The most bytes that it may take."""
        return self._limit

    def stats(self) -> HostStoreStats:
        """What the store holds and has done.

        Raises:
            PoolClosed: the store is closed, or belongs to a parent process.
        """
        numbers = checked(self.native.numbers)
        return HostStoreStats(
            numbers.limit_bytes,
            numbers.used_bytes,
            numbers.pinned_bytes,
            numbers.bytes_written,
            numbers.bytes_read,
            numbers.read_bytes_per_second,
            numbers.refused_writes,
            numbers.failed_writes,
            numbers.failed_reads,
            numbers.last_error,
        )

    def close(self) -> None:
        """Ends its threads and gives its memory back. Close it after its pools; safe to call again.

        Memory of sequences that are still swapped out goes when these do.
        """
        self.native.close()

    def __repr__(self) -> str:
        return f"HostStore({self._limit})"
