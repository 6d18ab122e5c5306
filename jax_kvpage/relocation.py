"""The host call that moves blocks so that logical neighbours are physical neighbours."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax_kvpage._arrays import as_bool, host_ints
from jax_kvpage._capacity import bytes_of
from jax_kvpage._native_pool import NativePool

__all__ = ["RelocationCalls", "RelocationReport"]


class RelocationReport(NamedTuple):
    """What `relocate` did.

    Attributes:
        blocks_moved: blocks copied to another place; a block that was moved out of the way and
            moved again later counts twice.
        bytes_copied: the same in bytes.
        mappings_before: memory mappings that the pool's slots took before.
        mappings_after: memory mappings that they take now.
        huge_pages: huge pages that now hold cached and shared blocks, if requested.
        huge_refused: why there are no (or no more) huge pages; None if all possible ones were made,
            or none were requested.
    """

    blocks_moved: int
    bytes_copied: int
    mappings_before: int
    mappings_after: int
    huge_pages: int
    huge_refused: str | None


class RelocationCalls:
    """The call of `KVPool` that moves blocks."""

    _native: NativePool
    _pool: Any

    def relocate(
        self,
        max_bytes: int | str = "64MiB",
        slots: int | Sequence[int] | None = None,
        *,
        huge_pages: bool = False,
    ) -> RelocationReport:
        """Moves idle blocks so that logical neighbours are adjacent in physical memory.

        Adjacent blocks need only one memory mapping: the pool takes fewer of the process's mappings
        (`stats().memory_mappings`), and mapping a prefix in another slot (`fork`, `acquire_prefix`)
        takes fewer system calls. Only blocks that no program can write are moved: those of parked
        slots, cached prefixes, and blocks that occupied slots only read. Contents, logical
        addresses, references and the prefix cache do not change. No program waits, and other
        threads may use the pool meanwhile. Each move needs a free block, and frees the old one;
        without free blocks nothing moves. On CPU only.

        Args:
            max_bytes: the most bytes to copy, as a number or as text ("64MiB").
            slots: a slot, or a list: move only blocks that these map. None: any block.
            huge_pages: also put cached and shared blocks that fill a huge page (2 MiB on x86-64)
                into one, if the system can: the first program that reads such a prefix in another
                slot then takes one page fault instead of one for every few pages. The distance
                between slots, which follows from `max_seq_len`, must be a multiple of a huge page.
                A program that reads these blocks meanwhile may wait for the copy of a huge page.
                The memory of a huge page is freed only with all its blocks, or when the system
                splits it.

        Returns:
            How much was copied, the memory mappings before and after, and the huge pages.

        Raises:
            ValueError: a slot that does not exist, bytes that are not positive.
            OutOfBlocks: the system had no memory for a block; earlier moves are kept.
            KVPageError: another system call failed, or the pool is on a GPU.
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
