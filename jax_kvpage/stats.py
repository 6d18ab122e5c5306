"""PoolStats, SlotInfo, BlockInfo and MemoryRange: the state of a pool."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "BlockInfo",
    "MemoryRange",
    "PoolStats",
    "SlotInfo",
    "make_block_map",
    "make_rows",
    "make_stats",
]


@dataclasses.dataclass(frozen=True)
class PoolStats:
    """A snapshot of a pool's accounts. Sizes are in bytes.

    `capacity == mapped + parked + draining + free`: a block that several slots map counts once, for
    the slot that will keep it longest.

    Attributes:
        capacity: the capacity, rounded down to whole blocks.
        mapped: in occupied slots, set aside for one (`truncate`), kept for a swapped sequence, or
            being read into (`prefetch`, `load_prefixes`).
        parked: mapped in free slots, which the next request reuses, or kept for the prefix cache.
        draining: in released slots that a program in flight may still access, or being written to
            the store (`swap_out`).
        free: without an owner.
        shared: in blocks that more than one slot maps.
        cached: in blocks that the prefix cache can find, mapped or not.
        reserved_virtual: address space of all slots.
        peak: the maximum so far of mapped, parked and draining together.
        physical: memory that the system has allocated for blocks (free blocks stay allocated for
            reuse until `trim`).
        block_bytes: size of one block.
        blocks_total: capacity in blocks.
        blocks_mapped: mapped in blocks.
        blocks_parked: parked in blocks.
        blocks_draining: draining in blocks.
        blocks_free: free in blocks.
        blocks_spare: mapped blocks that live requests have beyond what they asked for; other
            requests can take them when blocks run out.
        blocks_shared: shared in blocks.
        blocks_cached: cached in blocks.
        slots_occupied: slots with a live request.
        slots_draining: released slots that are not free yet.
        slots_parked: free slots with blocks still mapped.
        system_calls: calls into the system's memory management so far (mmap, fallocate, ...).
        memory_mappings: memory mappings of the process that the slots' blocks take on CPU, where
            blocks that are adjacent in memory share one (`KVPool.relocate`); 0 on CUDA.
        waits: how often a host call had to wait for programs.
        prefix_queries: tokens requested by `acquire_prefix`.
        prefix_hits: requested tokens that were found.
        prefix_tokens: tokens that can be found now.
        prefix_evictions: blocks of cached tokens that were evicted so far.
        sequences_swapped: sequences that are swapped out now.
        blocks_swapped: their blocks in memory: shared blocks, blocks not written yet, and blocks
            already read back.
        swapped_out: sequences swapped out so far.
        swapped_in: sequences swapped in so far.
        bytes_swapped_out: bytes of keys and values that were written to the store.
        bytes_swapped_in: bytes of keys and values that were read from it.
        received: in blocks whose memory belongs to other processes (`import_blocks`). They count
            in `capacity` like any others, but not in `physical`: the system, and a cgroup, charge
            them to the process that made them.
        exported: sequences exported so far (`export_blocks`).
        imported: sequences imported so far (`import_blocks`).
        bytes_copied_out: bytes of blocks that `export_blocks` copied; normally none for slots that
            were acquired with `handover=True`.
        bytes_copied_in: bytes of blocks that `import_blocks` copied: partial last ones.
    """

    capacity: int
    mapped: int
    parked: int
    draining: int
    free: int
    shared: int
    cached: int
    reserved_virtual: int
    peak: int
    physical: int
    block_bytes: int
    blocks_total: int
    blocks_mapped: int
    blocks_parked: int
    blocks_draining: int
    blocks_free: int
    blocks_spare: int
    blocks_shared: int
    blocks_cached: int
    slots_occupied: int
    slots_draining: int
    slots_parked: int
    system_calls: int
    memory_mappings: int
    waits: int
    prefix_queries: int
    prefix_hits: int
    prefix_tokens: int
    prefix_evictions: int
    sequences_swapped: int
    blocks_swapped: int
    swapped_out: int
    swapped_in: int
    bytes_swapped_out: int
    bytes_swapped_in: int
    received: int
    exported: int
    imported: int
    bytes_copied_out: int
    bytes_copied_in: int


@dataclasses.dataclass(frozen=True)
class SlotInfo:
    """A row of the valid slot table.

    Attributes:
        slot: its number.
        num_blocks: physical blocks mapped, over all ranges.
        bytes: the same in bytes.
        shared_bytes: bytes in blocks that other slots map too.
        own_bytes: bytes in its other blocks, which become free with the slot.
        reserved_tokens: tokens for which room was requested.
        committed_tokens: tokens whose ids were committed (`KVPool.commit`).
        dropped_tokens: dropped tokens at its beginning (`KVPool.drop_before`).
        draining: released, but a program in flight may still access it.
        length: tokens in the slot according to a cache; None if no cache was given.
    """

    slot: int
    num_blocks: int
    bytes: int
    shared_bytes: int
    own_bytes: int
    reserved_tokens: int
    committed_tokens: int
    dropped_tokens: int
    draining: bool
    length: int | None = None


@dataclasses.dataclass(frozen=True)
class BlockInfo:
    """A physical block of a slot, and the slots that map it.

    Attributes:
        block: its number; -1 if it was dropped (`KVPool.drop_before`).
        references: its reference count. It becomes free at 0.
        slots: the slots that map it, in ascending order, including released ones that still have
            their blocks.
        owner: the one of these that maps it for writing; None if that slot no longer has it. The
            mappings of the others are read-only on CPU. While a block is shared, writes by the
            owner's programs are refused too: `KVPool.truncate` makes private copies.
    """

    block: int
    references: int
    slots: tuple[int, ...]
    owner: int | None


class MemoryRange(NamedTuple):
    """A contiguous range of a slot's memory.

    Attributes:
        address: its start address, in this process's memory or on the pool's CUDA device.
        num_bytes: its length, a whole number of blocks.
    """

    address: int
    num_bytes: int


def make_stats(n: Any, host_waits: int) -> PoolStats:
    """Makes PoolStats from the compiled pool's numbers.

    Args:
        n: `_native.PoolNumbers`.
        host_waits: waits counted in Python.
    """
    size = n.block_bytes
    return PoolStats(
        capacity=n.blocks_total * size,
        mapped=n.blocks_mapped * size,
        parked=n.blocks_parked * size,
        draining=n.blocks_draining * size,
        free=n.blocks_free * size,
        shared=n.blocks_shared * size,
        cached=n.blocks_cached * size,
        reserved_virtual=n.virtual_bytes,
        peak=n.blocks_peak * size,
        physical=n.physical_bytes,
        block_bytes=size,
        blocks_total=n.blocks_total,
        blocks_mapped=n.blocks_mapped,
        blocks_parked=n.blocks_parked,
        blocks_draining=n.blocks_draining,
        blocks_free=n.blocks_free,
        blocks_spare=n.blocks_spare,
        blocks_shared=n.blocks_shared,
        blocks_cached=n.blocks_cached,
        slots_occupied=n.slots_occupied,
        slots_draining=n.slots_draining,
        slots_parked=n.slots_parked,
        system_calls=n.system_calls,
        memory_mappings=n.memory_mappings,
        waits=n.waits + host_waits,
        prefix_queries=n.prefix_queries,
        prefix_hits=n.prefix_hits,
        prefix_tokens=n.prefix_tokens,
        prefix_evictions=n.prefix_evictions,
        sequences_swapped=n.sequences_swapped,
        blocks_swapped=n.blocks_swapped,
        swapped_out=n.swapped_out,
        swapped_in=n.swapped_in,
        bytes_swapped_out=n.bytes_swapped_out,
        bytes_swapped_in=n.bytes_swapped_in,
        received=n.blocks_received * size,
        exported=n.exported,
        imported=n.imported,
        bytes_copied_out=n.bytes_copied_out,
        bytes_copied_in=n.bytes_copied_in,
    )


def make_rows(rows: Sequence[Any], block_bytes: int, lengths: np.ndarray | None) -> list[SlotInfo]:
    """Makes the valid slot table from the compiled pool's rows.

    Args:
        rows: `_native.SlotRow` objects.
        block_bytes: bytes of a block.
        lengths: the lengths of a cache, [max_slots], or None.
    """
    return [
        SlotInfo(
            slot=row.slot,
            num_blocks=row.blocks,
            bytes=row.blocks * block_bytes,
            shared_bytes=row.shared * block_bytes,
            own_bytes=(row.blocks - row.shared) * block_bytes,
            reserved_tokens=row.reserved,
            committed_tokens=row.committed,
            dropped_tokens=row.dropped,
            draining=row.draining,
            length=None if lengths is None else int(lengths[row.slot]),
        )
        for row in rows
    ]


def make_block_map(rows: Sequence[Sequence[Any]]) -> list[list[BlockInfo]]:
    """Makes a block map with owners from the `_native.BlockRow`s of each range."""
    return [
        [
            BlockInfo(
                row.block, row.references, tuple(row.slots), row.owner if row.owner >= 0 else None
            )
            for row in blocks
        ]
        for blocks in rows
    ]
