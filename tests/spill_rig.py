"""Pools with a store, for tests of what is written to it and read back."""

from __future__ import annotations

import time

import jax.numpy as jnp
from prefix_rig import LAYERS, PrefixRig, spec_of

import jax_kvpage as kvp
from jax_kvpage.tickets import Ticket


def rig_of(make_pool, store, layout: str = "fused", dtype=jnp.float32, blocks: int = 64, **options):
    """Makes a pool with a store and room for this many logical blocks."""
    spec = spec_of(layout, dtype).resolve("cpu")
    ranges = 1 if layout == "fused" else 2 * LAYERS
    return PrefixRig(make_pool(spec, spec.block_bytes * blocks * ranges, store=store, **options))


def saved(rig: PrefixRig, ids: list[int], namespace: str | None = None) -> None:
    slot, _ = rig.acquire(ids, namespace=namespace)
    rig.pool.check(rig.cache)
    rig.pool.save_prefixes(None, ids, namespace)
    rig.release(slot)


def fetched(rig: PrefixRig, ids: list[int], **options) -> Ticket:
    ticket = rig.pool.prefetch(ids, **options)
    assert ticket.wait(60)
    return ticket


def add_up(pool: kvp.KVPool) -> bool:
    stats = pool.stats()
    parts = stats.blocks_mapped + stats.blocks_parked + stats.blocks_draining + stats.blocks_free
    return parts == stats.blocks_total


def spilled(pool: kvp.KVPool, tokens: int) -> None:
    """Waits until the pool has written this many tokens ahead of eviction."""
    deadline = time.monotonic() + 60
    while pool.spill_stats().tokens_written < tokens:
        assert time.monotonic() < deadline, pool.spill_stats()
        time.sleep(0.005)
