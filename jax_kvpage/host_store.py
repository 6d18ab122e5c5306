"""A store in memory of the host, for pools on a GPU."""

from typing import NamedTuple

from jax_kvpage import _native
from jax_kvpage._capacity import bytes_of
from jax_kvpage._closing import Closing
from jax_kvpage._native_pool import checked

__all__ = ["HostPrefixStats", "HostStore", "HostStoreStats"]


class HostPrefixStats(NamedTuple):
    """What a host store holds of evicted prefixes, and what it has done with them.

    Attributes:
        runs: of consecutive blocks of a sequence.
        bytes: their keys and values.
        bytes_written: keys and values copied from pools.
        bytes_read: keys and values copied back.
        read_bytes_per_second: of the latest reads, waiting included; 0: none yet.
        bytes_evicted: removed to keep the limit, or for swapped sequences.
        refused_writes: runs for which there was no room, or for which the system had no memory to
            pin.
        failed_writes: runs that could not be copied.
        failed_reads: copies back that failed; the store still has what they were to bring.
        last_error: of a write or a read; "" if there was none.
    """

    runs: int
    bytes: int
    bytes_written: int
    bytes_read: int
    read_bytes_per_second: float
    bytes_evicted: int
    refused_writes: int
    failed_writes: int
    failed_reads: int
    last_error: str


class HostStoreStats(NamedTuple):
    """What a host store holds, and what it has done since it was made.

    Attributes:
        limit: the most bytes that it may take.
        bytes: of these, those that swapped sequences and evicted prefixes take.
        pinned: those that it has taken from the system and pinned, in use or kept for later use.
        bytes_written: keys and values of swapped sequences copied from pools.
        bytes_read: those copied back.
        read_bytes_per_second: of the latest of these reads, waiting included; 0: none yet.
        refused_writes: sequences for which there was no room, or for which the system had no memory
            to pin; they stay in the pool's memory.
        failed_writes: sequences that could not be copied; they stay there too.
        failed_reads: copies back that failed; the store still has what they were to bring.
        last_error: of a write or a read; "" if there was none.
        swap_out_seconds_median: the median time of the latest 512 sequences that were swapped out,
            from the release of their slot to the end of the copies; 0: none yet.
        swap_out_seconds_p95: how long 95 in 100 of these took at most.
        swap_in_seconds_median: the same of copies back, from `prefetch` or `swap_in`.
        swap_in_seconds_p95: the same.
        prefixes: what it has of evicted prefixes.
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
    swap_out_seconds_median: float
    swap_out_seconds_p95: float
    swap_in_seconds_median: float
    swap_in_seconds_p95: float
    prefixes: HostPrefixStats


class HostStore(Closing):
    """Swapped sequences and evicted prefixes of pools on a GPU, in pinned memory of the host.

    `KVPool(..., store=HostStore("16GiB"))` gives `swap_out` somewhere to put what it takes out of
    the card's memory, and prefixes somewhere to go before they are evicted: `acquire_prefix` says
    how many more tokens are there, `prefetch` brings them back, as with a `BlockStore`. Threads of
    the store make the copies, on streams that no program waits for. Memory is taken as it is needed
    and kept for later use until `close`. Several pools, on several cards, may share a store; each
    finds its own prefixes only, and they go when it is closed. The store works in the process that
    made it, not in its forks, and is a context manager. It has no files: `save_prefixes` and
    `load_prefixes` need a `BlockStore`.

    Args:
        limit: the most bytes that it may take, as a number or as text ("16GiB"). Prefixes that were
            used least recently give way to others and to swapped sequences; a sequence that does
            not fit even so stays in the pool's memory, as where a disk is full.

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
            numbers.swap_out_seconds_median,
            numbers.swap_out_seconds_p95,
            numbers.swap_in_seconds_median,
            numbers.swap_in_seconds_p95,
            _prefix_stats(numbers.prefixes),
        )

    def close(self) -> None:
        """Ends its threads and gives its memory back. Close it after its pools; safe to call again.

        Memory of sequences that are still swapped out goes when these do.
        """
        self.native.close()

    def __repr__(self) -> str:
        return f"HostStore({self._limit})"


def _prefix_stats(numbers: _native.HostPrefixNumbers) -> HostPrefixStats:
    return HostPrefixStats(
        numbers.runs,
        numbers.bytes,
        numbers.bytes_written,
        numbers.bytes_read,
        numbers.read_bytes_per_second,
        numbers.bytes_evicted,
        numbers.refused_writes,
        numbers.failed_writes,
        numbers.failed_reads,
        numbers.last_error,
    )
