"""Stored prefixes that are read back into a pool: the bytes, what is found, and why not
everything.
"""

from __future__ import annotations

import pathlib

import pytest
from prefix_rig import BLOCK, PrefixRig, spec_of, text
from spill_rig import add_up, fetched, rig_of, saved
from store_rig import DTYPES, meanwhile, soon
from subprocesses import run_python

import jax_kvpage as kvp


@pytest.mark.parametrize("dtype", DTYPES)
def test_evicted_prefixes_come_back_bit_for_bit(
    make_pool, store, tmp_path, layout: str, dtype
) -> None:
    rig = rig_of(make_pool, store, layout, dtype)
    ids = text(100)
    saved(rig, ids)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    rig.pool.evict()
    assert (rig.pool.find_prefix(ids), rig.pool.stored_prefix(ids)) == (0, 96)
    ticket = fetched(rig, ids)
    assert (ticket.tokens, ticket.error, ticket.ready) == (96, None, True)
    assert rig.pool.find_prefix(ids) == 96
    slot, cached, rig.cache = taken = rig.pool.acquire_prefix(rig.cache, ids)
    assert (cached, taken.num_stored) == (96, 0)
    rig.ids[slot] = ids[:96]
    rig.check()
    # Scales and padding are the same bytes as well.
    again = tmp_path / "again"
    rig.pool.save_prefixes(again)
    assert {path.name: path.read_bytes() for path in again.glob("*.safetensors")} == before
    stats = rig.pool.spill_stats()
    assert (stats.memory_hits, stats.store_hits, stats.queries) == (0, 96, 200)
    assert (stats.prefetches, stats.tokens_fetched) == (1, 96)
    assert stats.bytes_fetched == store.stats().bytes_read
    assert 0 < stats.longest_fetch_seconds == stats.fetch_seconds
    assert stats.read_bytes_per_second > 0
    assert not stats.missed


def test_what_is_stored_is_said(make_pool, store) -> None:
    rig = rig_of(make_pool, store)
    ids, other = text(64), text(50, 1)
    saved(rig, ids)
    rig.pool.evict()
    result = rig.pool.acquire_prefix(rig.cache, [ids, other, ids[:40] + other])
    assert result.num_cached == [0, 0, 0]
    # The last token of a prompt is not found unless `whole` asks for it.
    assert result.num_stored == [63, 0, 0]
    assert result.wait_for[2] == 0
    rig.cache = rig.pool.release(result.cache, result.slots[:2])
    result = rig.pool.acquire_prefix(rig.cache, ids, whole=True)
    assert (result.num_cached, result.num_stored) == (0, 64)
    rig.cache = result.cache
    assert rig.pool.stored_prefix(ids[:40]) == 32
    assert rig.pool.stored_prefix(ids, "another") == 0
    plain = PrefixRig(make_pool(spec_of("fused")))
    assert plain.pool.stored_prefix(ids) == 0
    assert plain.pool.acquire_prefix(plain.cache, ids).num_stored == 0
    assert (fetched(plain, ids).tokens, fetched(plain, ids).error) == (0, None)


def test_only_what_is_missing_is_read(make_pool, store) -> None:
    rig = rig_of(make_pool, store)
    ids = text(160)
    saved(rig, ids)
    rig.pool.evict()
    slot, cached = rig.acquire(ids[:70])
    assert cached == 0
    ticket = fetched(rig, ids)
    assert (ticket.tokens, ticket.error) == (160 - 64, None)
    assert store.stats().bytes_read == 6 * rig.pool.spec.block_bytes
    rig.release(slot)
    assert rig.acquire(ids)[1] == 159
    rig.check()
    assert rig.pool.spill_stats()[1:3] == (64, 95)
    assert (fetched(rig, ids).tokens, fetched(rig, text(40, 5)).tokens) == (0, 0)


def test_another_process_finds_what_is_stored(make_pool, tmp_path, layout: str) -> None:
    with kvp.BlockStore(tmp_path, fingerprint="m1") as store:
        saved(rig_of(make_pool, store, layout), text(50), "chat")
        code = """
        import sys
        import jax_kvpage as kvp
        from prefix_rig import PrefixRig, spec_of
        from prefix_rig import text

        with kvp.BlockStore(sys.argv[1], fingerprint="m1") as store:
            with kvp.KVPool(spec_of(sys.argv[2]), capacity="64MiB", store=store) as pool:
                rig = PrefixRig(pool)
                assert pool.stored_prefix(text(50)) == 0
                assert pool.stored_prefix(text(50), "chat") == 48
                ticket = pool.prefetch(text(50), "chat")
                assert ticket.wait() and ticket.tokens == 48
                assert rig.acquire(text(50), namespace="chat")[1] == 48
                rig.check()
                # The parent finds what this process writes.
                slot, _ = rig.acquire(text(40, 1))
                pool.check(rig.cache)
                pool.save_prefixes()
        """
        run_python(code, str(tmp_path), layout)
        store.refresh()
        other = rig_of(make_pool, store, layout)
        assert fetched(other, text(40, 1)).tokens == 32
        assert other.acquire(text(40, 1))[1] == 32
        other.check()


def test_a_damaged_file_is_a_miss(make_pool, store, tmp_path: pathlib.Path) -> None:
    rig = rig_of(make_pool, store)
    ids = text(100)
    saved(rig, ids)
    rig.pool.evict()
    (path,) = tmp_path.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1 - 3 * rig.pool.spec.block_bytes] ^= 1  # in the third of six blocks
    path.write_bytes(data)
    ticket = fetched(rig, ids)
    assert ticket.tokens == 32
    assert ticket.error == "32 tokens of 96 were read: a file is damaged"
    assert rig.pool.spill_stats().missed == {"damaged": 64}
    assert rig.pool.stored_prefix(ids) == 0
    assert fetched(rig, ids).tokens == 0
    assert rig.acquire(ids)[1] == 32
    rig.check()
    assert add_up(rig.pool)
    # It is written again, completely.
    rig.pool.check(rig.cache)
    assert rig.pool.save_prefixes().tokens == 96
    assert rig.pool.stored_prefix(ids) == 96


def test_a_file_that_is_gone_is_a_miss(make_pool, store, tmp_path: pathlib.Path) -> None:
    rig = rig_of(make_pool, store)
    saved(rig, text(100))
    rig.pool.evict()
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    ticket = fetched(rig, text(100))
    assert ticket.tokens == 0
    assert rig.pool.stats().blocks_free == rig.pool.stats().blocks_total


def test_reads_take_the_place_of_what_is_worth_least(make_pool, store, layout: str) -> None:
    rig = rig_of(make_pool, store, layout, blocks=12)
    wanted, other = text(96), text(100, 1)
    saved(rig, wanted)
    rig.pool.evict()
    slot, _ = rig.acquire(wanted[:33])
    rig.release(slot)
    slot, _ = rig.acquire(other)
    rig.release(slot)
    assert rig.pool.stats().blocks_free <= 2 * rig.pool.stats().blocks_total // 12
    ticket = fetched(rig, wanted)
    assert (ticket.tokens, ticket.error) == (64, None)
    assert rig.pool.find_prefix(wanted, whole=True) == 96
    assert add_up(rig.pool)


def test_live_sequences_keep_their_blocks(make_pool, store) -> None:
    rig = rig_of(make_pool, store, blocks=8)
    wanted = text(96)
    saved(rig, wanted)
    rig.pool.evict()
    slot, _ = rig.acquire(text(5 * BLOCK, 1))
    ticket = fetched(rig, wanted)
    assert ticket.tokens == 48
    assert ticket.error == "free blocks for 48 tokens of 96 only"
    more, _ = rig.acquire(text(3 * BLOCK, 2))
    ticket = fetched(rig, wanted)
    assert (ticket.tokens, ticket.error) == (0, "no free blocks")
    assert rig.pool.spill_stats().missed == {"no room": 48 + 96}
    rig.check()
    rig.release(slot, more)


def test_what_is_computed_faster_is_not_read(make_pool, store) -> None:
    rig = rig_of(make_pool, store)
    ids = text(100)
    saved(rig, ids)
    rig.pool.evict()
    # Nothing has been read yet, so it is read whatever the disk's speed.
    assert fetched(rig, ids, prefill_tokens_per_second=1e12).tokens == 96
    for _ in range(16):
        rig.pool.evict()
        assert rig.pool.find_prefix(ids) == 0
        ticket = fetched(rig, ids, prefill_tokens_per_second=1e12)
        assert ticket.tokens == 0
        assert "reading 96 tokens may take" in ticket.error
    assert rig.pool.spill_stats().missed == {"slower": 16 * 96}
    # One is read in the background, to measure the current speed of the disk.
    assert soon(lambda: rig.pool.find_prefix(ids) == 96)
    assert rig.pool.spill_stats().prefetches == 2
    rig.pool.evict()
    assert fetched(rig, ids, prefill_tokens_per_second=1).tokens == 96
    stats = rig.pool.spill_stats()
    assert 0 < stats.fetch_seconds_median <= stats.fetch_seconds_p95 <= stats.longest_fetch_seconds


def test_tickets_may_be_dropped_and_pools_closed(make_pool, tmp_path: pathlib.Path) -> None:
    with kvp.BlockStore(tmp_path) as store:
        rig = rig_of(make_pool, store)
        texts = [text(100, seed) for seed in range(6)]
        for ids in texts:
            saved(rig, ids)
        rig.pool.evict()
        for ids in texts:
            rig.pool.prefetch(ids)
        ticket = fetched(rig, texts[0])
        del ticket
        for ids in texts:
            fetched(rig, ids)
            assert rig.pool.find_prefix(ids) == 96
        rig.pool.evict()
        tickets = [rig.pool.prefetch(ids) for ids in texts]
        rig.pool.close()
        for ticket in tickets:
            assert ticket.ready
            assert ticket.tokens == 96 or ticket.error == "the pool was closed"
        with pytest.raises(kvp.PoolClosed):
            rig.pool.prefetch(texts[0])
        # Nothing is lost.
        other = rig_of(make_pool, store)
        for ids in texts:
            assert fetched(other, ids).tokens == 96
        store.close()
        for call in (other.pool.prefetch, other.pool.save_prefixes):
            with pytest.raises(kvp.PoolClosed, match="the store is closed"):
                call(text(3)) if call == other.pool.prefetch else call()
        assert other.pool.stored_prefix(texts[0]) == 0
        assert other.acquire(texts[0])[1] == 96
        other.check()


def test_reads_meet_requests(make_pool, store) -> None:
    """One thread prefetches while others make requests, save and evict."""
    rig = rig_of(make_pool, store, blocks=24)
    texts = [text(40 + 16 * (i % 3), i) for i in range(6)]
    for ids in texts:
        saved(rig, ids)

    def fetch() -> None:
        for ids in texts:
            rig.pool.prefetch(ids).wait(0.001)

    with meanwhile(fetch):
        for i in range(80):
            slot, _ = rig.acquire(texts[i % 6])
            rig.write(slot, text(9, i))
            rig.check()
            rig.release(slot)
            assert add_up(rig.pool)
            if i % 7 == 0:
                rig.pool.evict()
    assert rig.pool.spill_stats().store_hits > 0


def test_mistakes_are_named(make_pool, store) -> None:
    pool = rig_of(make_pool, store).pool
    for rate in (0, -1, True, "fast", float("nan")):
        with pytest.raises(ValueError, match="prefill_tokens_per_second: wanted a number above 0"):
            pool.prefetch([1], prefill_tokens_per_second=rate)
    with pytest.raises(ValueError, match="prefetch: token_ids: wanted the ids of one sequence"):
        pool.prefetch([[1], [2]])
    with pytest.raises(ValueError, match="stored_prefix: namespace: wanted a str or None"):
        pool.stored_prefix([1], 3)  # type: ignore[arg-type]
