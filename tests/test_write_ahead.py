"""What pools write to their stores before they evict: which bytes, and when."""

from __future__ import annotations

import pathlib
import time

import pytest
from prefix_rig import BLOCK, text
from spill_rig import fetched, rig_of, spilled
from store_rig import DTYPES

import jax_kvpage as kvp


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_ahead_comes_back_bit_for_bit(
    make_pool, tmp_path: pathlib.Path, layout: str, dtype
) -> None:
    texts = [text(100, seed) for seed in range(3)]
    with kvp.BlockStore(tmp_path) as store:
        rig = rig_of(make_pool, store, layout, dtype, write_ahead=1)
        for ids in texts:
            slot, _ = rig.acquire(ids)
            rig.release(slot)
        spilled(rig.pool, 3 * 96)
        rig.pool.evict()
        stats = rig.pool.spill_stats()
        assert (stats.tokens_dropped, stats.failed_writes) == (0, 0)
        assert stats.bytes_written == store.stats().bytes_written > 0
        assert stats.write_seconds > 0
        rig.pool.close()
    # After a restart.
    with kvp.BlockStore(tmp_path) as store:
        rig, plain = rig_of(make_pool, store, layout, dtype), rig_of(make_pool, None, layout, dtype)
        for ids in texts:
            assert fetched(rig, ids).tokens == 96
            slot, cached = rig.acquire(ids)
            assert cached == 96
            plain.acquire(ids)
        rig.check()
        rig.pool.check(rig.cache)
        plain.pool.check(plain.cache)
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        rig.pool.save_prefixes(ours)
        plain.pool.save_prefixes(theirs)
        of = {path.name: path.read_bytes() for path in ours.glob("*.safetensors")}
        assert of
        assert of == {path.name: path.read_bytes() for path in theirs.glob("*.safetensors")}
        rig.pool.close()


def test_a_small_memory_serves_a_large_set_from_disk(make_pool, store, layout: str) -> None:
    """Interleaved conversations find their tokens, though memory holds only a third of them."""
    rig = rig_of(make_pool, store, layout, blocks=16, write_ahead=0.8)
    turns = {seed: text(70, seed) for seed in range(6)}
    found = asked = 0
    for turn in range(4):
        for ids in turns.values():
            asked += len(ids) // BLOCK * BLOCK * (turn > 0)
            fetched(rig, ids)
            slot, cached = rig.acquire(ids)
            found += cached
            rig.check()
            rig.release(slot)
            time.sleep(0.02)  # leaves the disk time to write between requests
    stats = rig.pool.spill_stats()
    assert stats.memory_hits + stats.store_hits == found
    assert found > 0.9 * asked
    assert stats.store_hits > 0.5 * found


def test_nothing_is_written_unless_it_is_asked_for(make_pool, store) -> None:
    rig = rig_of(make_pool, store, write_ahead=0)
    slot, _ = rig.acquire(text(100))
    rig.release(slot)
    rig.pool.evict()
    assert store.stats().files == 0
    assert rig.pool.spill_stats().tokens_dropped == 96
    for share in (-0.1, 1.5, True, "all"):
        with pytest.raises(ValueError, match="write_ahead: wanted a share from 0 to 1"):
            rig_of(make_pool, store, write_ahead=share)
