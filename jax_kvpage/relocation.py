"""The host call that makes logical neighbours neighbours in physical memory."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax_kvpage._arrays import as_bool, host_ints
from jax_kvpage._capacity import bytes_of
from jax_kvpage._native_pool import NativePool

__all__ = ["RelocationCalls", "RelocationReport"]


class RelocationReport(NamedTuple):
    """What `relocate` did.

    Attributes:
        blocks_moved: blocks copied to another place; one that made room for others and moved again
            later counts twice.
        bytes_copied: the same in bytes.
        mappings_before: memory mappings of the process that the pool's slots took before.
        mappings_after: those that they take now.
        huge_pages: huge pages that hold cached and shared blocks now, where these were asked for.
        huge_refused: why there are none, or no more; None: all were made that could be, or none
            was asked for.
    """

    blocks_moved: int
    bytes_copied: int
    mappings_before: int
    mappings_after: int
    huge_pages: int
    huge_refused: str | None


class RelocationCalls:
    """The part of `KVPool` that moves blocks."""

    _native: NativePool
    _pool: Any

    def relocate(
        self,
        max_bytes: int | str = "64MiB",
        slots: int | Sequence[int] | None = None,
        *,
        huge_pages: bool = False,
    ) -> RelocationReport:
        """Moves idle blocks so that logical neighbours lie next to each other in memory.

        Where they do, one memory mapping holds them: the pool needs fewer of the process's
        mappings (`stats().memory_mappings`), and mapping a prefix in another slot (`fork`,
        `acquire_prefix`) takes fewer system calls. Only blocks move that no program can write:
        those of parked slots, cached prefixes, and what occupied slots only read. Contents,
        logical addresses, references and the prefix cache stay the same. No program waits, and
        other threads may use the pool meanwhile: for each block that moves a free one is taken,
        and its own comes free. Without free blocks nothing moves. On CPU only.

        Args:
            max_bytes: the most that is copied, in bytes or as text ("64MiB").
            slots: a slot, or a list: only what these map moves. None: everything may.
            huge_pages: also puts cached and shared blocks that fill a huge page (2 MiB on x86-64)
                into one, where the system can: the program that first reads such a prefix in
                another slot takes one page fault for it, not one for each few pages. Slots must
                lie a multiple of a huge page apart, which `max_seq_len` decides. A program that
                reads these blocks at that moment may wait for the copy of a huge page. The
                memory of a huge page comes free only with all its blocks, or when the system
                splits it.

        Returns:
            How much was copied, the memory mappings before and after, and the huge pages.

        Raises:
            ValueError: a slot that does not exist, bytes that are not positive.
            OutOfBlocks: the system had no memory for a block; what had moved before stays moved.
            KVPageError: a system call failed otherwise, or the pool lives on a GPU.
            PoolClosed: the pool is closed.
        """
        self._native.refuse_mesh("relocate")
        most = bytes_of("relocate: max_bytes", max_bytes)
        numbers = [] if slots is None else host_ints("relocate: slots", slots)[0]
        huge = as_bool("relocate: huge_pages", huge_pages)
        done = self._native.call(self._pool.relocate, most, slots is None, numbers, huge)
        return RelocationReport(
            done.blocks_moved,
            done.bytes_copied,
            done.mappings_before,
            done.mappings_after,
            done.huge_pages,
            done.huge_refused or None,
        )
