"""Sequences that are swapped out of a GPU to host memory and back."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import numpy as np
import pytest
from harness import busy
from prefix_rig import text
from store_rig import DTYPES, decode, soon
from swap_rig import SwapRig, swap_rig

import jax_kvpage as kvp

pytestmark = pytest.mark.gpu


@pytest.fixture
def below(platform: str, tmp_path: pathlib.Path) -> Iterator[kvp.HostStore | kvp.BlockStore]:
    """The store below the pool on this platform."""
    store = kvp.HostStore("4GiB") if platform == "cuda" else kvp.BlockStore(tmp_path)
    with store:
        yield store


def _rig(make_pool, store, layout: str, platform: str, dtype=np.float32) -> SwapRig:
    """Makes a rig with the platform's block size."""
    spec = kvp.CacheSpec(
        2, 2, 64, dtype=dtype, layout=layout, max_slots=8, max_seq_len=512, block_tokens=None
    ).resolve(platform)
    if platform == "cpu":
        return swap_rig(make_pool, store, layout, dtype)
    return SwapRig(make_pool(spec, 16 * spec.num_ranges * spec.block_bytes, store=store))


def _swap_out(rig: SwapRig, slot: int) -> kvp.Swapped:
    swapped = rig.swap_out(slot, to_disk=False)
    assert soon(lambda: swapped.in_store), rig.pool.store.stats()
    return swapped


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_goes_on_bit_for_bit(make_pool, below, platform: str, layout: str, dtype) -> None:
    rig = _rig(make_pool, below, layout, platform, dtype)
    fresh = _rig(make_pool, None, layout, platform, dtype)
    ids = text(100)
    slot, computed = rig.begin(ids), fresh.begin(ids)
    swapped = _swap_out(rig, slot)
    stats = rig.audit()
    assert stats.blocks_free == stats.blocks_total
    assert stats.bytes_swapped_out == below.stats().bytes_written > 0
    other = rig.begin(text(300, 1))  # another sequence uses the slot and the memory meanwhile
    again = rig.swap_in(swapped)
    assert rig.pool.committed(again) == ids
    for token in text(14, 7):
        assert np.array_equal(decode(rig, again, token), decode(fresh, computed, token))
    rig.check()
    rig.audit()
    rig.release(again, other)


def test_swaps_beside_running_programs(make_pool, below, platform: str) -> None:
    """Programs of other sequences run while blocks are copied, without disturbing each other."""
    rig = _rig(make_pool, below, "fused", platform)
    kept = rig.begin(text(200, 3))
    for round_ in range(3):
        slot = rig.begin(text(150, round_))
        rig.cache = kvp.after(rig.cache, busy(1))  # the release waits for it
        swapped, rig.cache = rig.pool.swap_out(rig.cache, slot)
        rig.away[swapped] = rig.ids.pop(slot)
        rig.write(kept, text(20, 10 + round_))
        assert not swapped.in_store
        slot = rig.swap_in(swapped, wait=True)
        rig.check()
        rig.release(slot)
    rig.audit()


def test_a_full_store_and_a_dropped_sequence(make_pool, below, platform: str) -> None:
    small = kvp.HostStore(1) if platform == "cuda" else kvp.BlockStore(below.path, limit=1)
    with small:
        rig = _rig(make_pool, small, "fused", platform)
        stuck = rig.swap_out(rig.begin(text(40)), to_disk=False)
        assert soon(lambda: small.stats().last_error)
        assert not stuck.in_store
        rig.swap_in(stuck)
        rig.check()
        rig.pool.close()
    rig = _rig(make_pool, below, "fused", platform)
    dropped = _swap_out(rig, rig.begin(text(40)))
    rig.away.clear()
    rig.pool.drop_swapped(dropped)
    assert dropped.closed
    stats = rig.audit()
    assert stats.blocks_free == stats.blocks_total
