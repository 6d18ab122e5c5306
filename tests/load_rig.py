"""A process that loads a store while others do the same, for test_store_processes.py."""

from __future__ import annotations

import sys
import time

import numpy as np
from prefix_rig import text
from spill_rig import fetched, rig_of
from store_rig import soon
from swap_rig import SwapRig

import jax_kvpage as kvp

LENGTH = 320  # most tokens of a sequence
LIMIT = 4 << 20  # bytes of the store
WRITERS = 2  # threads of a store that write


def load(path: str, layout: str, seed: int, seconds: float) -> None:
    """Saves, spills, evicts, prefetches, reads and swaps, and checks whatever it finds.

    All processes serve the same conversations. Prints the tokens found in memory, read from the
    store, and written.
    """
    random = np.random.default_rng(seed)
    with kvp.BlockStore(path, LIMIT) as store:
        rig = SwapRig(rig_of(kvp.KVPool, store, layout, blocks=72, write_ahead=0.8).pool)
        end, rounds = time.monotonic() + seconds, 0
        print("ready", flush=True)
        while time.monotonic() < end or rounds < 40:  # enough rounds even on a busy machine
            rounds += 1
            ids = text(LENGTH, int(random.integers(12)))[: int(random.integers(17, LENGTH + 1))]
            if random.random() < 0.2:
                rig.pool.prefetch(ids)
            else:
                fetched(rig, ids)
            slot, _ = rig.acquire(ids)
            rig.check()
            if random.random() < 0.2:
                rig.pool.save_prefixes(None, ids)
            if random.random() < 0.3:
                swapped = rig.swap_out(slot, to_disk=False)
                # The limit may leave no room for it; it then stays in memory.
                soon(lambda swapped=swapped: swapped.on_disk, 0.01)
                slot = rig.swap_in(swapped)
                rig.check()
            rig.release(slot)
            if random.random() < 0.1:
                rig.pool.evict()
            rig.audit()
        stats = rig.pool.spill_stats()
        rig.pool.close()
    print(stats.memory_hits, stats.store_hits, stats.tokens_written, flush=True)


if __name__ == "__main__":
    load(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
