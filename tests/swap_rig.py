"""Pools that swap sequences, with a model of the sequences' contents."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
from prefix_rig import LAYERS, PrefixRig, spec_of
from store_rig import soon

import jax_kvpage as kvp


def swap_files() -> Iterator[str]:
    """Yields the paths of this process's swap files, which are unlinked."""
    for number in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{number}"
        try:
            target = os.readlink(path)
        except OSError:
            continue
        if ".writing-" in target and target.endswith("(deleted)"):
            yield path


class SwapRig(PrefixRig):
    """A rig whose sequences are swapped out and in.

    Attributes:
        away: Tokens of each swapped-out sequence.
    """

    def __init__(self, pool: kvp.KVPool) -> None:
        super().__init__(pool)
        self.away: dict[kvp.Swapped, list[int]] = {}

    def begin(self, ids: Sequence[int]) -> int:
        """Starts a sequence that the prefix cache does not know."""
        slot, self.cache = self.pool.acquire(self.cache, len(ids), wait=True)
        self.ids[slot] = []
        self.write(slot, ids)
        return slot

    def fork(self, slot: int) -> int:
        (new,), self.cache = self.pool.fork(self.cache, slot, 1)
        self.ids[new] = list(self.ids[slot])
        return new

    def swap_out(self, slot: int, to_disk: bool = True) -> kvp.Swapped:
        """Swaps a sequence out, and waits until its unshared blocks are on disk."""
        swapped, self.cache = self.pool.swap_out(self.cache, slot)
        self.away[swapped] = self.ids.pop(slot)
        if to_disk:
            assert soon(lambda: swapped.on_disk), self.pool.store.stats().last_error
        return swapped

    def swap_in(self, swapped: kvp.Swapped, wait: bool = True) -> int:
        slot, self.cache = self.pool.swap_in(self.cache, swapped, wait)
        assert slot not in self.ids
        self.ids[slot] = self.away.pop(swapped)
        return slot

    def audit(self) -> kvp.PoolStats:
        """Checks that the pool's accounts add up, and returns its stats."""
        self.pool._pool.audit()
        stats = self.pool.stats()
        in_use = stats.blocks_mapped + stats.blocks_parked + stats.blocks_draining
        assert stats.blocks_total == in_use + stats.blocks_free
        return stats


def swap_rig(
    make_pool,
    store: kvp.BlockStore | None,
    layout: str,
    dtype=jnp.float32,
    blocks: int = 64,
    **changes,
) -> SwapRig:
    """Makes a rig with room for this many logical blocks."""
    resolved = spec_of(layout, dtype, **changes).resolve("cpu")
    ranges = 1 if layout == "fused" else 2 * LAYERS
    return SwapRig(make_pool(resolved, resolved.block_bytes * blocks * ranges, store=store))
