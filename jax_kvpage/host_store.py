"""A store in host memory, for pools on a GPU."""

from typing import NamedTuple

from jax_kvpage import _native
from jax_kvpage._capacity import bytes_of
from jax_kvpage._closing import Closing
from jax_kvpage._native_pool import checked

__all__ = ["HostPrefixStats", "HostStore", "HostStoreStats"]


class HostPrefixStats(NamedTuple):
    """The evicted prefixes in a host store, and statistics about them.

    Attributes:
        runs: runs of consecutive blocks of a sequence in the store.
        bytes: bytes of their keys and values.
        bytes_written: bytes of keys and values copied from pools.
        bytes_read: bytes of keys and values copied back.
        read_bytes_per_second: rate of the latest reads, including waiting; 0: none yet.
        bytes_evicted: bytes removed because of the limit or for swapped sequences.
        refused_writes: runs that were not stored because there was no room, or because the system
            had no memory to pin.
        failed_writes: runs that could not be copied.
        failed_reads: copies back that failed; the store still has the data.
        last_error: the last error of a write or a read; "" if there was none.
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
    """The contents of a host store, and statistics since it was created.

    Attributes:
        limit: the most bytes that it may use.
        bytes: bytes used by swapped sequences and evicted prefixes.
        pinned: bytes of memory that it has pinned, in use or kept for later use.
        bytes_written: bytes of keys and values of swapped sequences copied from pools.
        bytes_read: bytes of those copied back.
        read_bytes_per_second: rate of the latest of these reads, including waiting; 0: none yet.
        refused_writes: sequences that stay in the pool's memory because the store had no room, or
            the system no memory to pin.
        failed_writes: sequences that stay there because they could not be copied.
        failed_reads: copies back that failed; the store still has the data.
        last_error: the last error of a write or a read; "" if there was none.
        swap_out_seconds_median: the median over the latest 512 sequences swapped out, from the
            release of the slot to the end of the copies; 0: none yet.
        swap_out_seconds_p95: the 95th percentile of the same.
        swap_in_seconds_median: the median of copies back, from `prefetch` or `swap_in`.
        swap_in_seconds_p95: the 95th percentile of the same.
        prefixes: the evicted prefixes.
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
    """Swapped sequences and evicted prefixes of pools on a GPU, in pinned host memory.

    With `KVPool(..., store=HostStore("16GiB"))`, `swap_out` moves sequences from GPU memory to the
    store, and prefixes are copied there before they are evicted: `acquire_prefix` reports how many
    more tokens are stored, and `prefetch` reads them back, as with a `BlockStore`. The store's
    threads make the copies, on streams that no program waits for. Memory is allocated as needed and
    kept until `close`. Several pools, also on several GPUs, may share a store; each finds only its
    own prefixes, and they are dropped when it is closed. The store works only in the process that
    made it, not in its forks, and is a context manager. It has no files: `save_prefixes` and
    `load_prefixes` need a `BlockStore`.

    Args:
        limit: the most bytes that it may use, as a number or as text ("16GiB"). The least recently
            used prefixes are evicted to make room for others and for swapped sequences; a sequence
            that still does not fit stays in the pool's memory.

    Raises:
        ValueError: an invalid limit.
    """

    def __init__(self, limit: int | str) -> None:
        self._limit = bytes_of("HostStore: limit", limit)
        self.native: _native.HostStore = checked(_native.HostStore, self._limit)

    @property
    def limit(self) -> int:
        """The most bytes that it may use."""
        return self._limit

    def stats(self) -> HostStoreStats:
        """The contents of the store, and statistics.

        Raises:
            PoolClosed: the store is closed, or belongs to a parent process.
        """
        numbers = checked(self.native.numbers)
        return HostStoreStats(
            limit=numbers.limit_bytes,
            bytes=numbers.used_bytes,
            pinned=numbers.pinned_bytes,
            bytes_written=numbers.bytes_written,
            bytes_read=numbers.bytes_read,
            read_bytes_per_second=numbers.read_bytes_per_second,
            refused_writes=numbers.refused_writes,
            failed_writes=numbers.failed_writes,
            failed_reads=numbers.failed_reads,
            last_error=numbers.last_error,
            swap_out_seconds_median=numbers.swap_out_seconds_median,
            swap_out_seconds_p95=numbers.swap_out_seconds_p95,
            swap_in_seconds_median=numbers.swap_in_seconds_median,
            swap_in_seconds_p95=numbers.swap_in_seconds_p95,
            prefixes=_prefix_stats(numbers.prefixes),
        )

    def close(self) -> None:
        """Ends its threads and frees its memory. Close it after its pools; safe to call again.

        The memory of sequences that are still swapped out is freed with them.
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
