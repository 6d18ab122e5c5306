"""Host calls that share blocks between sequences, or drop some of them."""

from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from jax_kvpage._arrays import host_int, host_ints, per_slot
from jax_kvpage._native_pool import NativePool
from jax_kvpage._queue import Queue
from jax_kvpage.cache import KVCache
from jax_kvpage.errors import OutOfSlots, wait_for
from jax_kvpage.spec import CacheSpec

__all__ = ["SharingCalls"]


class SharingCalls:
    """The calls of `KVPool` that fork, reorder and shorten sequences.

    A fork maps the full blocks of committed tokens in both slots, without copying or allocating.
    The last, partial block is copied. Neither sequence can write what the other reads: writes to
    positions in shared blocks are refused. Block sharing and copy-on-write follow vLLM's
    PagedAttention (Kwon et al., 2023), but are done by the page table, so that kernels see
    contiguous slots.
    """

    spec: CacheSpec
    _native: NativePool
    _pool: Any
    _queue: Queue

    def fork(
        self, cache: KVCache, slot: int, n: int, num_tokens: int | None = None
    ) -> tuple[list[int], KVCache]:
        """Makes `n` new sequences that begin with the first tokens of another.

        Does not wait for the device. Each new slot has room for the tokens that it starts with;
        `extend` or `map_slots` maps room for more, in private blocks.

        Args:
            cache: the newest cache.
            slot: an occupied slot, the donor.
            n: the number of new sequences.
            num_tokens: how many tokens they start with, at most those committed (`commit`) to the
                donor; None: all of these. Their keys and values must have been written when the
                queued program runs; otherwise it fails, and the donor is unchanged.

        Returns:
            (slots, cache). The slots have length `num_tokens` and the donor's committed ids.

        Raises:
            OutOfBlocks: no blocks for the copies of partial blocks; nothing has changed.
            OutOfSlots: not enough slots; nothing has changed.
            ValueError: more tokens than are committed, a slot that does not exist, a cache of
                another spec.
            KVPageError: the slot is not occupied, or the process has no memory mappings left.
            DeviceFault: an earlier program failed on the device; nothing has changed.
            PoolClosed: the pool is closed.
        """
        self._queue.check_cache("fork", cache)
        slot = host_int("fork: slot", slot)
        n = host_int("fork: n", n)
        if n < 0:
            raise ValueError(f"fork: n is {n}, wanted 0 or more new sequences")
        if n == 0:
            host_int("fork: slot", slot, 0, self.spec.max_slots - 1)
        if n > self.spec.max_slots:  # before lists of this length are made
            raise OutOfSlots(
                f"fork: {n} slots wanted, {self.spec.max_slots} in all: make the pool with a "
                "larger max_slots",
                wanted=n,
            )
        tokens = -1 if num_tokens is None else host_int("fork: num_tokens", num_tokens)
        if num_tokens is not None and tokens < 0:
            raise ValueError(f"fork: num_tokens is {tokens}, wanted 0 or more")
        return self._queue.fork("fork", cache, [(slot, tokens)] * n, [])

    def reorder(
        self, cache: KVCache, slots: Sequence[int], parents: Sequence[int]
    ) -> tuple[list[int], KVCache]:
        """Reorders beams: sequence i of the result continues sequence `parents[i]`.

        A parent's first child keeps its slot, its other children are forks of it with all its
        committed tokens, and sequences without children are released. The forks need free slots
        before the released ones have drained: w beams take up to 2w slots.

        Args:
            cache: the newest cache.
            slots: the beams' slots, each once.
            parents: for each beam of the result, an index into `slots`.

        Returns:
            (slots, cache): a slot for each entry of `parents`.

        Raises:
            OutOfBlocks: no blocks for the copies of partial blocks; nothing has changed.
            OutOfSlots: not enough slots; nothing has changed.
            ValueError: a parent that does not exist, a slot named twice, a cache of another spec.
            KVPageError: a slot is not occupied, or the process has no memory mappings left.
            DeviceFault: an earlier program failed on the device; nothing has changed.
            PoolClosed: the pool is closed.
        """
        self._queue.check_cache("reorder", cache)
        beams, _ = host_ints("reorder: slots", slots)
        origins, _ = host_ints("reorder: parents", parents)
        if len(set(beams)) != len(beams):
            raise ValueError(f"reorder: slots: wanted each slot once, got {beams}")
        for parent in origins:
            if not 0 <= parent < len(beams):
                raise ValueError(
                    f"reorder: parents: {parent} is not an index into the {len(beams)} slots"
                )
        first = {parent: i for i, parent in reversed(list(enumerate(origins)))}
        forked = [i for i, parent in enumerate(origins) if first[parent] != i]
        dead = [slot for i, slot in enumerate(beams) if i not in first]
        requests = [(beams[origins[i]], -1) for i in forked]

        def arrange(new: list[int]) -> list[int]:
            result = [beams[parent] for parent in origins]
            for i, slot in zip(forked, new, strict=True):
                result[i] = slot
            return result

        return self._queue.fork("reorder", cache, requests, dead, arrange)

    @overload
    def truncate(self, cache: KVCache, slot: int, num_tokens: int) -> KVCache: ...

    @overload
    def truncate(
        self, cache: KVCache, slot: Sequence[int], num_tokens: int | Sequence[int]
    ) -> KVCache: ...

    def truncate(self, cache: KVCache, slot: Any, num_tokens: Any) -> KVCache:
        """Rolls sequences back to fewer tokens, including committed ones.

        Unlike `set_lengths` in a program, this may remove tokens that are committed or shared with
        other sequences. Those keep their blocks; the slot gets a private copy of each shared block
        from the new length on. Blocks stay mapped. On CPU this does not wait; on CUDA, a call that
        must replace blocks waits for queued programs.

        Args:
            cache: the newest cache.
            slot: an occupied slot, or a list.
            num_tokens: the new length, at most the present one, or a list with an entry for each
                slot.

        Returns:
            The next cache. Programs that still read an older cache fail as stale.

        Raises:
            OutOfBlocks: no blocks for the private copies; nothing has changed.
            ValueError: a length beyond what is mapped, a slot that does not exist, a cache of
                another spec.
            KVPageError: the slot is not occupied.
            DeviceFault: an earlier program failed on the device; nothing has changed.
            PoolClosed: the pool is closed.
        """
        self._queue.check_cache("truncate", cache)
        slots, lengths = per_slot("truncate", slot, num_tokens)
        if self._native.mirrored and any(
            self._native.call(self._pool.shares_behind, *pair)
            for pair in zip(slots, lengths, strict=True)
        ):
            # The blocks after the new length are unmapped by the host, not by a program.
            wait_for((cache.epoch, cache.lengths))
            self._queue.settle()
        return self._queue.truncate(cache, slots, lengths)

    @overload
    def drop_before(self, cache: KVCache, slot: int, num_tokens: int) -> KVCache: ...

    @overload
    def drop_before(
        self, cache: KVCache, slot: Sequence[int], num_tokens: int | Sequence[int]
    ) -> KVCache: ...

    def drop_before(self, cache: KVCache, slot: Any, num_tokens: Any) -> KVCache:
        """Frees the blocks that are no longer in the sliding window of a model.

        Full blocks of tokens below `num_tokens` return to the pool while the sequence continues.
        Positions do not change: its length still counts from 0, and the slot begins with a hole.
        With window W, a step whose first new token is at position p needs the tokens from
        p - W + 1 on; so after a step that ended at length n, `drop_before(cache, slot, n - W + 1)`
        keeps what the next one needs. Call it every few blocks, not for every token: each call that
        frees something queues a small program, and on CUDA it waits for the queued programs
        (counted in `stats().waits`). On CPU it does not wait.

        Afterwards, every attention over the slot must use a `sliding_window` that begins after the
        dropped tokens, in all layers: any other read fails (a DeviceFault on CUDA). That includes
        `read_kv` and `implementation="xla"`, which copy the entire slot. Views show zeros there.
        The sequence can no longer be forked, found by `acquire_prefix`, or truncated into the
        dropped part; it can be extended, committed, reordered without being forked, and released,
        which returns its blocks to the pool. Dropped blocks that other sequences share, or that the
        prefix cache refers to, are kept for those.

        Args:
            cache: the newest cache.
            slot: an occupied slot, or a list.
            num_tokens: the first token that is still needed, at most the length, or a list with an
                entry for each slot. A negative number, or no more than in an earlier call, does
                nothing.

        Returns:
            The next cache. Programs may still read through the old one, within the same limits.

        Raises:
            ValueError: num_tokens beyond what is mapped (on CUDA: beyond the length), a slot that
                does not exist or is named twice, a cache of another spec, a pool over several GPUs.
            KVPageError: the slot is not occupied; on CUDA also a stale cache.
            DeviceFault: an earlier program failed on the device; nothing has changed.
            PoolClosed: the pool is closed.
        """
        self._native.refuse_gpus(
            "drop_before",
            "each unmaps at once what the call drops, and where one then failed the others could "
            "not take it back. Keep the beginnings of sequences, or use a pool on one GPU",
        )
        self._queue.check_cache("drop_before", cache)
        slots, begins = per_slot("drop_before", slot, num_tokens)
        pairs = list(zip(slots, begins, strict=True))
        stamp = (0, 0)  # without a mirror, the program checks the cache
        if self._native.mirrored and any(self._native.call(self._pool.drops, *p) for p in pairs):
            # The blocks are unmapped by the host, not by a program.
            wait_for((cache.epoch, cache.lengths))
            self._queue.settle()
            lengths = np.asarray(cache.lengths)
            stamp = (int(np.asarray(cache.handle)[1]), int(np.asarray(cache.epoch)[0]))
            for slot, begin in pairs:
                if begin > lengths[slot]:
                    raise ValueError(
                        f"drop_before: slot {slot}: cannot drop its tokens below {begin}, it "
                        f"has {lengths[slot]}"
                    )
        return self._queue.drop_before(cache, slots, begins, stamp)
