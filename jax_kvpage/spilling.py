"""Host calls on the store below a pool's memory: look-up, prefetch, and statistics."""

import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax_kvpage._values import host_float
from jax_kvpage.prefix import namespace_key, one_sequence
from jax_kvpage.swapping import Swapped, SwappingCalls
from jax_kvpage.tickets import Ticket

__all__ = ["SpillStats", "SpillingCalls", "as_share"]


class SpillStats(NamedTuple):
    """How many tokens a pool got from memory and from its store since it was created.

    Attributes:
        queries: tokens requested by `acquire_prefix`.
        memory_hits: requested tokens that were found in memory without having been read back.
        store_hits: requested tokens that were found because they had been read from the store; each
            counts only for the first request that finds it.
        prefetches: calls of `prefetch` that read something.
        tokens_fetched: tokens that they read into memory.
        bytes_fetched: bytes of their keys and values.
        fetch_seconds: total time of these calls, until the tokens can be found.
        longest_fetch_seconds: time of the slowest of them.
        fetch_seconds_median: the median of the latest 512 of them; 0: none yet.
        fetch_seconds_p95: their 95th percentile.
        missed: stored tokens that `prefetch` did not read, by reason: "slower" (than computing
            them), "no room", "evicted" (the tokens before them were, during the read), and the
            reasons of `StoreStats.missed` ("unreadable": a copy from host memory failed).
        read_bytes_per_second: rate of the store's latest reads; 0: none yet.
        tokens_written: tokens written ahead (`KVPool(write_ahead=...)`).
        bytes_written: bytes of their keys and values.
        write_seconds: total time of these writes, of which two may run at a time.
        write_seconds_median: the median of the latest 512 of them, each of some blocks of a
            sequence; 0: none yet.
        write_seconds_p95: their 95th percentile.
        failed_writes: runs of blocks that could not be written ahead; `StoreStats.last_error`, or
            the one in `HostStoreStats.prefixes`, says why. After a failure, writes pause for a
            second.
        tokens_dropped: tokens evicted in full blocks that had not been written.
    """

    queries: int
    memory_hits: int
    store_hits: int
    prefetches: int
    tokens_fetched: int
    bytes_fetched: int
    fetch_seconds: float
    longest_fetch_seconds: float
    fetch_seconds_median: float
    fetch_seconds_p95: float
    missed: Mapping[str, int]
    read_bytes_per_second: float
    tokens_written: int
    bytes_written: int
    write_seconds: float
    write_seconds_median: float
    write_seconds_p95: float
    failed_writes: int
    tokens_dropped: int


class SpillingCalls(SwappingCalls):
    """The calls of `KVPool` that read from its store; without a store they find nothing."""

    def stored_prefix(self, token_ids: Any, namespace: str | None = None) -> int:
        """How many of the first tokens of a sequence the pool's store has, in full blocks.

        The look-up reads no files. `find_prefix` tells how many are in the pool's memory.

        Args:
            token_ids: the sequence's token ids, int32[n] or a list of ints.
            namespace: as for `acquire_prefix`.

        Raises:
            ValueError: ids that do not fit int32.
            DeviceFault: an earlier program failed on the device.
            PoolClosed: the pool is closed.
        """
        self._native.refuse_mesh("stored_prefix")
        ids = one_sequence("stored_prefix", token_ids)
        space = namespace_key("stored_prefix", namespace)
        return self._native.call(self._pool.stored_prefix, space, ids)

    def prefetch(
        self,
        token_ids: Any,
        namespace: str | None = None,
        *,
        prefill_tokens_per_second: float | None = None,
    ) -> Ticket:
        """Starts to read the stored part of a sequence, or a swapped sequence.

        Given token ids, it reads the stored tokens that follow those in memory. Given a result of
        `swap_out`, it reads everything that is in the store, so that `swap_in` need not wait;
        blocks that were not written yet stay in memory.

        The call does not wait. The store's threads read into free blocks; if there are too few,
        unneeded memory and then the least valuable prefixes are reclaimed, as for `acquire_prefix`.
        Until the ticket is ready, the blocks are in use, so other calls may raise OutOfBlocks.
        Afterwards `acquire_prefix` finds the tokens.
        What cannot be read is a miss: `ticket.error` says why, and the blocks are freed.

        Args:
            token_ids: the sequence's token ids, int32[n] or a list of ints; or a result of
                `swap_out`, without other arguments.
            namespace: as for `acquire_prefix`.
            prefill_tokens_per_second: how fast the caller could compute the tokens instead. They
                are read only if that would take longer than 9 of 10 of the pool's latest reads,
                scaled to this size, or if there were no reads yet. Every 16th time that this
                decides against a read, it is done in the background and the ticket is ready
                immediately, so that a faster disk is noticed. None: everything stored is read.

        Raises:
            ValueError: ids that do not fit int32, an invalid rate, a swapped sequence of another
                pool.
            OutOfBlocks: not enough blocks for a swapped sequence; nothing has changed.
            KVPageError: a swapped sequence that was swapped in or dropped.
            DeviceFault: an earlier program failed on the device.
            PoolClosed: the pool or its store is closed.
        """
        if isinstance(token_ids, Swapped):
            if namespace is not None or prefill_tokens_per_second is not None:
                raise ValueError("prefetch: a swapped sequence is given alone")
            return self._prefetch_swapped(token_ids)
        self._native.refuse_mesh("prefetch of token_ids")
        ids = one_sequence("prefetch", token_ids)
        space = namespace_key("prefetch", namespace)
        rate = prefill_tokens_per_second
        if rate is None:
            rate = 0.0
        else:
            name = "prefetch: prefill_tokens_per_second"
            rate = host_float(name, rate, sys.float_info.min, math.inf, "a number above 0")
        return Ticket(self._native.call(self._pool.prefetch, space, ids, rate))

    def spill_stats(self) -> SpillStats:
        """How many tokens came from memory and from the store, and why others did not.

        Raises:
            PoolClosed: the pool is closed.
        """
        self._native.refuse_mesh("spill_stats")
        numbers = self._native.call(self._pool.tier_numbers)
        return SpillStats(
            queries=numbers.queries,
            memory_hits=numbers.memory_hits,
            store_hits=numbers.store_hits,
            prefetches=numbers.prefetches,
            tokens_fetched=numbers.tokens_fetched,
            bytes_fetched=numbers.bytes_fetched,
            fetch_seconds=numbers.fetch_seconds,
            longest_fetch_seconds=numbers.longest_fetch_seconds,
            fetch_seconds_median=numbers.fetch_seconds_median,
            fetch_seconds_p95=numbers.fetch_seconds_p95,
            missed=numbers.missed,
            read_bytes_per_second=numbers.read_bytes_per_second,
            tokens_written=numbers.tokens_written,
            bytes_written=numbers.bytes_written,
            write_seconds=numbers.write_seconds,
            write_seconds_median=numbers.write_seconds_median,
            write_seconds_p95=numbers.write_seconds_p95,
            failed_writes=numbers.failed_writes,
            tokens_dropped=numbers.unwritten_evictions * (self._native.spec.block_tokens or 1),
        )


def as_share(name: str, value: Any) -> float:
    """Converts a number from 0 to 1 to float.

    Raises:
        ValueError: anything else.
    """
    return host_float(name, value, 0, 1, "a share from 0 to 1")
