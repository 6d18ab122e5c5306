"""The store below a pool's memory: what is there, bringing it back, and what has happened."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax_kvpage.prefix import namespace_key, one_sequence
from jax_kvpage.swapping import Swapped, SwappingCalls
from jax_kvpage.tickets import Ticket

__all__ = ["SpillStats", "SpillingCalls", "as_share"]


class SpillStats(NamedTuple):
    """What a pool has had from memory and from its store since it was made.

    Attributes:
        queries: tokens that requests of `acquire_prefix` have asked for.
        memory_hits: of these, tokens that were found where they had been computed.
        store_hits: tokens that were found because they had been read from the store; each counts
            at the first request that finds it.
        prefetches: calls of `prefetch` that have read something.
        tokens_fetched: tokens that they have brought into memory.
        bytes_fetched: their keys and values.
        fetch_seconds: how long these calls have taken together, from the call to the tokens being
            findable.
        longest_fetch_seconds: how long the slowest of them has taken.
        fetch_seconds_median: the median of the latest 512 of them; 0: none yet.
        fetch_seconds_p95: how long 95 in 100 of these took at most.
        missed: tokens that were stored and that `prefetch` has not brought, by reason: "slower"
            (than computing them), "no room", "evicted" (what comes before them, during the read),
            and those that `StoreStats.missed` has ("unreadable": a copy from host memory failed).
        read_bytes_per_second: of the store's latest reads; 0: none yet.
        tokens_written: written ahead (`KVPool(write_ahead=...)`).
        bytes_written: their keys and values.
        write_seconds: how long these writes have taken together; two may go on at a time.
        write_seconds_median: the median of the latest 512 of them, each of some blocks of a
            sequence; 0: none yet.
        write_seconds_p95: how long 95 in 100 of these took at most.
        failed_writes: runs of blocks that could not be written ahead; `StoreStats.last_error`, or
            that of `HostStoreStats.prefixes`, says why. Nothing is tried for a second then.
        tokens_dropped: evicted in whole blocks that had not been written.
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
    """The part of `KVPool` that reads back what its store has; without a store that is nothing."""

    def stored_prefix(self, token_ids: Any, namespace: str | None = None) -> int:
        """How many of the first tokens of a sequence the pool's store has, in whole blocks.

        The look-up is made in memory. `find_prefix` says how many the pool's memory has.

        Args:
            token_ids: ids of the sequence's tokens, int32[n] or a list of ints.
            namespace: as for `acquire_prefix`.

        Raises:
            ValueError: ids that int32 cannot hold.
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
        """Begins to read what the store has of a sequence, or a swapped sequence.

        Of a sequence that is given by its tokens, it reads what lies behind those in memory. Of one
        that `swap_out` has returned, it reads all that is in the store, so that `swap_in` need not
        wait; where it was not written yet it stays in memory.

        The call does not wait. The store's threads read into free blocks, for which unneeded
        memory and then the least valuable prefixes give way, as for `acquire_prefix`. Once the
        ticket is ready, `acquire_prefix` finds the tokens. Until then the blocks are taken. What
        cannot be read is a miss: `ticket.error` says why, and the blocks are free again.

        Args:
            token_ids: ids of the sequence's tokens, int32[n] or a list of ints; or what `swap_out`
                has returned, alone.
            namespace: as for `acquire_prefix`.
            prefill_tokens_per_second: how fast the caller computes the tokens instead. They are
                read only if 9 of 10 of the pool's latest reads, scaled to this size, would take
                less time. Where nothing has been read yet they are read all the same; and once in
                16 times that they would not be, they are read beside the caller, whose ticket is
                ready at once, so that a disk that has become faster is noticed. None: whatever is
                stored is read.

        Raises:
            ValueError: ids that int32 cannot hold, a speed that is none, a sequence that another
                pool has swapped.
            OutOfBlocks: not enough blocks for a swapped sequence; nothing has changed.
            KVPageError: a swapped sequence that was already swapped in or dropped.
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
        elif isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0:
            raise ValueError(
                f"prefetch: prefill_tokens_per_second: wanted a number above 0, got {rate!r}"
            )
        return Ticket(self._native.call(self._pool.prefetch, space, ids, float(rate)))

    def spill_stats(self) -> SpillStats:
        """What has come from memory and from the store, and what has not, and why.

        Raises:
            PoolClosed: the pool is closed.
        """
        self._native.refuse_mesh("spill_stats")
        numbers = self._native.call(self._pool.tier_numbers)
        return SpillStats(
            numbers.queries,
            numbers.memory_hits,
            numbers.store_hits,
            numbers.prefetches,
            numbers.tokens_fetched,
            numbers.bytes_fetched,
            numbers.fetch_seconds,
            numbers.longest_fetch_seconds,
            numbers.fetch_seconds_median,
            numbers.fetch_seconds_p95,
            numbers.missed,
            numbers.read_bytes_per_second,
            numbers.tokens_written,
            numbers.bytes_written,
            numbers.write_seconds,
            numbers.write_seconds_median,
            numbers.write_seconds_p95,
            numbers.failed_writes,
            numbers.unwritten_evictions * (self._native.spec.block_tokens or 1),
        )


def as_share(name: str, value: Any) -> float:
    """A number from 0 to 1.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name}: wanted a share from 0 to 1, got {value!r}")
    return float(value)
