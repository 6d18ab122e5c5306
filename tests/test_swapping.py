"""Sequences that are swapped out and in: what they hold, what stays in memory, and who waits."""

from __future__ import annotations

import gc
import pathlib

import jax
import numpy as np
import pytest
from harness import busy
from prefix_rig import BLOCK, text
from store_rig import DTYPES, decode
from swap_rig import swap_files, swap_rig

import jax_kvpage as kvp


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_goes_on_bit_for_bit(store, make_pool, layout: str, dtype) -> None:
    rig, fresh = (swap_rig(make_pool, s, layout, dtype) for s in (store, None))
    ids = text(100)
    slot, computed = rig.begin(ids), fresh.begin(ids)
    free = rig.pool.stats().blocks_free
    swapped = rig.swap_out(slot)
    assert (swapped.tokens, swapped.closed) == (100, False)
    stats = rig.audit()
    assert stats.blocks_free == stats.blocks_total == free + 7 * rig.pool.spec.num_ranges
    assert (stats.sequences_swapped, stats.swapped_out, stats.blocks_swapped) == (1, 1, 0)
    size = 7 * rig.pool.spec.num_ranges * stats.block_bytes
    assert (stats.bytes_swapped_out, store.stats().bytes_swapped) == (size, size)
    other = rig.begin(text(300, 1))  # another sequence uses the memory and the slot meanwhile

    ticket = rig.pool.prefetch(swapped)
    assert ticket.wait()
    assert (ticket.ready, ticket.tokens, ticket.error) == (True, 100, None)
    again = rig.swap_in(swapped, wait=False)
    assert (swapped.closed, rig.pool.committed(again)) == (True, ids)
    held = store.stats()
    assert held.bytes_swapped == 0
    assert 0 < held.swap_out_seconds_median <= held.swap_out_seconds_p95
    assert 0 < held.swap_in_seconds_median <= held.swap_in_seconds_p95
    assert list(swap_files()) == []
    for token in text(14, 7):  # into the next block
        assert np.array_equal(decode(rig, again, token), decode(fresh, computed, token))
    rig.check()
    stats = rig.audit()
    assert (stats.swapped_in, stats.bytes_swapped_in, stats.sequences_swapped) == (1, size, 0)
    rig.release(again, other)


def test_nothing_is_ready_by_itself(store, make_pool, layout: str) -> None:
    rig = swap_rig(make_pool, store, layout)
    swapped = rig.swap_out(rig.begin(text(40)))
    with pytest.raises(kvp.KVPageError, match=r"is on disk: pool\.prefetch"):
        rig.swap_in(swapped, wait=False)
    rig.swap_in(swapped)
    rig.check()
    with pytest.raises(kvp.KVPageError, match="was already swapped in or dropped"):
        rig.pool.swap_in(rig.cache, swapped)
    with pytest.raises(kvp.KVPageError, match="was already swapped in or dropped"):
        rig.pool.prefetch(swapped)


def test_shared_blocks_stay(store, make_pool, layout: str) -> None:
    rig = swap_rig(make_pool, store, layout)
    parent = rig.begin(text(40))
    child = rig.fork(parent)
    rig.write(parent, text(30, 1))
    rig.write(child, text(10, 2))
    out = rig.swap_out(parent)
    stats = rig.audit()
    ranges = rig.pool.spec.num_ranges
    assert stats.bytes_swapped_out == (5 - 2) * ranges * stats.block_bytes
    assert stats.blocks_swapped == 2 * ranges
    also = rig.swap_out(child)  # blocks that only swapped sequences share stay too, unwritten
    stats = rig.audit()
    assert stats.bytes_swapped_out == (3 + 2) * ranges * stats.block_bytes
    assert stats.blocks_swapped == stats.blocks_mapped == 2 * ranges
    first, second = rig.swap_in(also), rig.swap_in(out)
    rig.check()
    maps = [rig.pool.block_map(slot, owners=True)[0] for slot in (first, second)]
    assert [b.block for b in maps[0][:2]] == [b.block for b in maps[1][:2]]
    assert rig.audit().blocks_shared == 2 * ranges
    # As before, neither may overwrite what the other reads.
    with pytest.raises(
        (jax.errors.JaxRuntimeError, ValueError), match="tokens below 32 are shared"
    ):
        jax.block_until_ready(kvp.set_lengths(rig.cache, [first], [10]))
    rig.cache = rig.pool.truncate(rig.cache, second, 10)
    rig.ids[second] = rig.ids[second][:10]
    rig.write(second, text(30, 5))
    rig.check()
    rig.audit()


def test_a_sequence_is_given_up(store, make_pool, layout: str) -> None:
    rig = swap_rig(make_pool, store, layout)
    parent = rig.begin(text(40))
    for give_up in (rig.pool.drop_swapped, kvp.Swapped.close, None):
        child = rig.fork(parent)
        rig.write(child, text(50, 2))
        swapped = rig.swap_out(child)
        assert rig.audit().blocks_shared == 2 * rig.pool.spec.num_ranges
        assert len(list(swap_files())) == 1
        rig.away.clear()
        if give_up is not None:
            give_up(swapped)
            give_up(swapped)
            assert swapped.closed
        del swapped
        gc.collect()
        assert rig.audit().blocks_shared == 0
        assert (store.stats().bytes_swapped, list(swap_files())) == (0, [])
    rig.check()


def test_a_sequence_of_the_prefix_cache(store, make_pool, layout: str) -> None:
    rig = swap_rig(make_pool, store, layout)
    ids = text(90)
    slot, _ = rig.acquire(ids)
    swapped = rig.swap_out(slot)
    assert rig.pool.find_prefix(ids) == 89  # all but one, as for any prompt
    rig.pool.evict()
    assert rig.audit().blocks_free == rig.pool.stats().blocks_total
    back = rig.swap_in(swapped)
    rig.check()
    assert rig.pool.find_prefix(ids) == 89  # it is back in the index
    other, cached = rig.acquire([*ids[:80], *text(30, 1)])
    assert cached == 80
    rig.write(back, text(20, 3))
    rig.check()
    rig.release(back, other)
    rig.audit()


def test_the_host_does_not_wait(store, make_pool) -> None:
    rig = swap_rig(make_pool, store, "fused")
    slot = rig.begin(text(40))
    rig.pool.check(rig.cache)
    done = busy(2)
    rig.cache = kvp.after(rig.cache, done)
    rig.write(slot, text(30, 1))
    swapped = rig.swap_out(slot, to_disk=False)
    assert not done.is_ready()
    with pytest.raises(kvp.KVPageError, match="have not run yet: wait=True"):
        rig.swap_in(swapped, wait=False)
    ticket = rig.pool.prefetch(swapped)
    assert not done.is_ready()
    assert (ticket.ready, ticket.tokens, ticket.error) == (False, 0, None)
    assert not ticket.wait(0.01)
    rig.swap_in(swapped)
    assert done.is_ready()
    rig.check()
    assert rig.audit().bytes_swapped_out == 0  # swapped in before it could be written


def test_blocks_drain_until_they_are_written(store, make_pool) -> None:
    rig = swap_rig(make_pool, store, "per_layer", blocks=8)
    first = rig.begin(text(100))
    rig.pool.check(rig.cache)
    rig.cache = kvp.after(rig.cache, busy(1))
    swapped = rig.swap_out(first, to_disk=False)
    with pytest.raises(kvp.OutOfBlocks) as caught:
        rig.pool.acquire(rig.cache, 100)
    assert caught.value.draining == 7 * rig.pool.spec.num_ranges
    slot, rig.cache = rig.pool.acquire(rig.cache, 100, wait=True)
    assert swapped.on_disk
    with pytest.raises(kvp.OutOfBlocks):
        rig.pool.prefetch(swapped)
    rig.cache = rig.pool.release(rig.cache, slot)
    rig.swap_in(swapped)
    rig.check()


def test_swapped_sequences_go_before_saved_prefixes(tmp_path, make_pool) -> None:
    size = 40 * swap_rig(make_pool, None, "fused").pool.spec.block_bytes
    with kvp.BlockStore(tmp_path, limit=size) as store:
        rig = swap_rig(make_pool, store, "fused")
        saved, _ = rig.acquire(text(16 * 20))
        rig.pool.check(rig.cache)
        rig.pool.save_prefixes()
        swapped = rig.swap_out(rig.begin(text(16 * 30, 1)))
        assert (store.stats().files, store.stats().files_evicted) == (0, 1)
        rig.swap_in(swapped)
        rig.check()
        rig.release(saved)
        rig.pool.close()


def test_mistakes_are_named(store, make_pool, tmp_path: pathlib.Path) -> None:
    bare, rig = swap_rig(make_pool, None, "fused"), swap_rig(make_pool, store, "fused")
    slot = bare.begin(text(20))
    with pytest.raises(ValueError, match=r"has no store: make it with KVPool\(store=...\)"):
        bare.pool.swap_out(bare.cache, slot)
    with pytest.raises(kvp.KVPageError, match="swap_out: slot 0 is free"):
        rig.pool.swap_out(rig.cache, 0)
    with pytest.raises(ValueError, match="swap_out: slot 99 does not exist"):
        rig.pool.swap_out(rig.cache, 99)
    swapped = rig.swap_out(rig.begin(text(20)))
    other = swap_rig(make_pool, store, "fused")
    for call in (other.pool.prefetch, lambda s: other.pool.swap_in(other.cache, s)):
        with pytest.raises(ValueError, match="was not swapped out of this pool"):
            call(swapped)
    with pytest.raises(ValueError, match="wanted what swap_out returns, got 3"):
        rig.pool.swap_in(rig.cache, 3)
    with pytest.raises(ValueError, match="a swapped sequence is given alone"):
        rig.pool.prefetch(swapped, namespace="tenant")
    dropping = rig.begin(text(64))
    rig.drop(dropping, 2 * BLOCK)
    with pytest.raises(kvp.KVPageError, match="has dropped its tokens below 32"):
        rig.pool.swap_out(rig.cache, dropping)
    rig.check()
