"""Saving and loading prefixes: the bytes, what is found, and what is left out and why."""

from __future__ import annotations

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from prefix_rig import BLOCK, LAYERS, PrefixRig, Replay, spec_of, text
from store_rig import DTYPES, decode, meanwhile
from subprocesses import run_python

import jax_kvpage as kvp


def rig_of(make_pool, layout: str, dtype=jnp.float32, blocks: int = 64, **changes) -> PrefixRig:
    """Makes a pool with room for this many logical blocks."""
    resolved = spec_of(layout, dtype, **changes).resolve("cpu")
    ranges = 1 if layout == "fused" else 2 * LAYERS
    return PrefixRig(make_pool(resolved, resolved.block_bytes * blocks * ranges))


def save(rig: PrefixRig, path: pathlib.Path, *args, **options) -> kvp.saving.SavedPrefixes:
    rig.pool.check(rig.cache)
    return rig.pool.save_prefixes(path, *args, **options)


def files(path: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_goes_on_bit_for_bit_in_another_pool(
    make_pool, tmp_path: pathlib.Path, layout: str, dtype
) -> None:
    first, second, fresh = (rig_of(make_pool, layout, dtype) for _ in range(3))
    ids = text(100)
    slot, _ = first.acquire(ids)
    other, _ = first.acquire(ids[:40] + text(30, 1))
    saved = save(first, tmp_path / "a")
    assert saved == (96 + 64 - 32, 96 + 64 - 32)  # full blocks, two of which are shared
    loaded = second.pool.load_prefixes(tmp_path / "a")
    assert loaded == (saved.tokens, 0, 0, 0)
    assert second.pool.find_prefix(ids) == 96
    # When saved again, the blocks have the same bytes, including scales and padding.
    assert save(second, tmp_path / "b").written == saved.written
    stored = files(tmp_path / "a")
    assert stored == files(tmp_path / "b")
    assert stored

    again, cached = second.acquire(ids)
    assert cached == 96
    shorter, cached = second.acquire(first.ids[other])
    assert cached == 64
    computed, cached = fresh.acquire(ids)
    assert cached == 0
    for token in text(20, 7):
        want = decode(fresh, computed, token)
        assert np.array_equal(decode(second, again, token), want)
        assert np.array_equal(decode(first, slot, token), want)
    assert np.array_equal(decode(second, shorter, 5), decode(first, other, 5))
    for rig in (first, second, fresh):
        rig.check()
    second.release(again, shorter)
    assert second.pool.stats().blocks_cached > 0
    second.pool.evict()
    assert second.pool.stats().blocks_cached == 0
    assert second.pool.stats().blocks_free == second.pool.stats().blocks_total


def test_another_process_finds_what_was_saved(make_pool, tmp_path: pathlib.Path, layout) -> None:
    rig = rig_of(make_pool, layout)
    slot, _ = rig.acquire(text(50), namespace="chat")
    rig.release(slot)
    save(rig, tmp_path / "deep" / "store", fingerprint="m1")
    code = """
    import sys
    import jax_kvpage as kvp
    from prefix_rig import PrefixRig, spec_of
    from prefix_rig import text

    with kvp.KVPool(spec_of(sys.argv[2]), capacity="64MiB") as pool:
        assert pool.load_prefixes(sys.argv[1], fingerprint="m2") == (0, 0, 0, 0)
        assert pool.load_prefixes(sys.argv[1], fingerprint="m1").tokens == 48
        rig = PrefixRig(pool)
        slot, cached = rig.acquire(text(50), namespace="chat")
        assert cached == 48
        rig.check()
        assert rig.acquire(text(50))[1] == 0
    """
    run_python(code, str(tmp_path / "deep" / "store"), layout)


def test_what_is_asked_for_is_saved(make_pool, tmp_path: pathlib.Path) -> None:
    rig = rig_of(make_pool, "fused")
    a, b, c = text(40, 1), text(50, 2), text(33, 3)
    for ids in (a, b):
        rig.acquire(ids)
    slot, _ = rig.acquire(c, namespace="n")
    rig.write(slot, text(20, 4), commit=False)
    assert save(rig, tmp_path / "one", b[:20]) == (16, 16)
    assert save(rig, tmp_path / "one", np.asarray(b, np.int32)) == (48, 32)
    assert save(rig, tmp_path / "one", [b, b[:20] + a, text(99, 9)]) == (48, 0)
    assert save(rig, tmp_path / "one", c) == (0, 0)
    assert save(rig, tmp_path / "one", c, "n") == (32, 32)
    assert save(rig, tmp_path / "one") == (32 + 48 + 32, 32)  # uncommitted tokens are left out
    other = rig_of(make_pool, "fused")
    assert other.pool.load_prefixes(tmp_path / "one") == (112, 0, 0, 0)
    assert other.pool.load_prefixes(tmp_path / "one") == (0, 112, 0, 0)
    assert [other.pool.find_prefix(ids) for ids in (a, b, c)] == [32, 48, 0]
    assert other.pool.find_prefix(c, "n") == 32


def test_loading_fills_free_blocks_only(make_pool, tmp_path: pathlib.Path, layout: str) -> None:
    rig = rig_of(make_pool, layout)
    long, short = text(160), text(64, 1)
    rig.acquire(long)
    rig.acquire(short)
    save(rig, tmp_path)
    small = rig_of(make_pool, layout, blocks=8)
    cached, _ = small.acquire(text(30, 5))
    small.release(cached)
    loaded = small.pool.load_prefixes(tmp_path)
    assert loaded.tokens + loaded.no_room == 224
    assert loaded.tokens == 6 * BLOCK  # two of them hold what was in the pool before
    assert small.pool.find_prefix(text(30, 5), whole=True) == 30
    found = [small.pool.find_prefix(ids, whole=True) for ids in (long, short)]
    assert sum(found) == loaded.tokens
    # Requests can take the memory back.
    slot, _ = small.acquire(text(8 * BLOCK, 6))
    small.check()
    small.release(slot)


def test_memory_of_finished_requests_is_used(make_pool, tmp_path: pathlib.Path) -> None:
    rig = rig_of(make_pool, "fused")
    rig.acquire(text(64))
    save(rig, tmp_path)
    small = rig_of(make_pool, "fused", blocks=4)
    slot, cache = small.pool.acquire(small.cache, 4 * BLOCK)
    small.cache = small.pool.release(cache, slot)
    small.pool.check(small.cache)
    assert small.pool.stats().blocks_parked == 4
    assert small.pool.load_prefixes(tmp_path).tokens == 64


def test_other_caches_are_left_alone(make_pool, tmp_path: pathlib.Path) -> None:
    rig = rig_of(make_pool, "fused")
    rig.acquire(text(40))
    save(rig, tmp_path)
    for layout, dtype, changes in [
        ("per_layer", jnp.float32, {}),
        ("fused", jnp.bfloat16, {}),
        ("fused", jnp.float32, {"block_tokens": 2 * BLOCK}),
    ]:
        other = rig_of(make_pool, layout, dtype, **changes)
        assert other.pool.load_prefixes(tmp_path) == (0, 0, 0, 0)
    more = rig_of(make_pool, "fused", max_slots=3, max_seq_len=1024)
    assert more.pool.load_prefixes(tmp_path).tokens == 32


def test_a_damaged_file_is_lost_with_what_continues_it(make_pool, tmp_path: pathlib.Path) -> None:
    rig = rig_of(make_pool, "fused")
    ids, other = text(100), text(40, 1)
    slot, _ = rig.acquire(ids[:33])
    save(rig, tmp_path)
    (damaged,) = tmp_path.glob("*.safetensors")
    rig.write(slot, ids[33:])
    rig.acquire(other)
    save(rig, tmp_path)
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1  # in the second of two blocks
    damaged.write_bytes(data)
    with kvp.BlockStore(tmp_path) as store:
        second = rig_of(make_pool, "fused")
        assert second.pool.load_prefixes(store) == (16 + 32, 0, 0, 16 + 64)
        assert store.stats().missed == {"damaged": 1}
        assert store.stats().refused == {"damaged": 1}
        assert second.acquire(ids)[1] == 16
        second.check()
        # The complete sequence is in memory again, and is saved again.
        second.pool.check(second.cache)
        assert second.pool.save_prefixes(store).written == 96
    third = rig_of(make_pool, "fused")
    assert third.pool.load_prefixes(tmp_path) == (96 + 32, 64 + 16, 0, 0)


def test_events_tell_of_what_is_loaded(make_pool, tmp_path: pathlib.Path) -> None:
    rig = rig_of(make_pool, "fused")
    rig.acquire(text(70))
    save(rig, tmp_path)
    second, replay = rig_of(make_pool, "fused"), Replay()
    replay.read(second.pool.events())
    second.pool.load_prefixes(tmp_path)
    replay.read(second.pool.events())
    assert replay.sequences() == {(None, tuple(text(70)[:end])) for end in (16, 32, 48, 64)}


def test_a_pool_in_use_is_saved_and_loaded(make_pool, tmp_path: pathlib.Path) -> None:
    """Saving and loading while requests adopt, evict and write the same sequences."""
    rig = rig_of(make_pool, "fused", blocks=24)
    texts = [text(40 + 16 * (i % 3), i % 5) for i in range(10)]

    def move() -> None:
        rig.pool.save_prefixes(tmp_path)
        rig.pool.load_prefixes(tmp_path)

    with meanwhile(move):
        for i in range(60):
            slot, _ = rig.acquire(texts[i % 10])
            rig.write(slot, text(9, i))
            rig.check()
            rig.release(slot)
            if i % 7 == 0:
                rig.pool.evict()
    second = rig_of(make_pool, "fused")
    assert second.pool.load_prefixes(tmp_path).lost == 0
    for ids in texts:
        slot, cached = second.acquire(ids)
        assert cached >= BLOCK
        second.check()
        second.release(slot)


def test_a_full_store_is_said(make_pool, tmp_path: pathlib.Path) -> None:
    rig = rig_of(make_pool, "fused")
    rig.acquire(text(40))
    rig.pool.check(rig.cache)
    with kvp.BlockStore(tmp_path, limit=8192) as store:
        with pytest.raises(kvp.OutOfBlocks, match=r"does not fit in a store of 8192"):
            rig.pool.save_prefixes(store)
        assert store.stats().failed_writes == 1
        assert "8192" in store.stats().last_error
    assert not files(tmp_path)


def test_mistakes_are_named(make_pool, tmp_path: pathlib.Path) -> None:
    rig = rig_of(make_pool, "fused")
    pool = rig.pool
    with pytest.raises(ValueError, match="namespace: also pass the token_ids"):
        pool.save_prefixes(tmp_path, namespace="n")
    with pytest.raises(ValueError, match="wanted a BlockStore or a path, got 3"):
        pool.load_prefixes(3)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(kvp.KVPageError, match="Not a directory"):
        pool.load_prefixes(tmp_path / "file")
    store = kvp.BlockStore(tmp_path / "store")
    with pytest.raises(ValueError, match="the store has one, ''"):
        pool.load_prefixes(store, fingerprint="m")
    store.close()
    store.close()
    for call in (pool.save_prefixes, pool.load_prefixes):
        with pytest.raises(kvp.PoolClosed, match="the store is closed"):
            call(store)
    pool.close()
    with pytest.raises(kvp.PoolClosed):
        pool.save_prefixes(tmp_path)


def test_a_pool_with_a_store_saves_there_and_loads_from_there(
    make_pool, tmp_path: pathlib.Path
) -> None:
    spec = spec_of("fused", jnp.float32).resolve("cpu")
    size = spec.block_bytes * 64
    with kvp.BlockStore(tmp_path) as store:
        first, second = (PrefixRig(make_pool(spec, size, store=store)) for _ in range(2))
        assert first.pool.store is store
        first.acquire(text(100))
        first.pool.check(first.cache)
        saved = first.pool.save_prefixes()
        assert saved.tokens == saved.written == 100 // BLOCK * BLOCK
        assert second.pool.load_prefixes().tokens == saved.tokens
        assert store.stats().files == len(files(tmp_path)) == 1


def test_stores_that_cannot_lie_below_a_pool_are_refused(make_pool, tmp_path: pathlib.Path) -> None:
    spec = spec_of("fused", jnp.float32).resolve("cpu")
    with pytest.raises(
        ValueError, match="KVPool: store: wanted a BlockStore, a HostStore or None, got"
    ):
        make_pool(spec, spec.block_bytes * 64, store=str(tmp_path))
    store = kvp.BlockStore(tmp_path)
    store.close()
    with pytest.raises(kvp.PoolClosed, match="store is closed"):
        make_pool(spec, spec.block_bytes * 64, store=store)
    pool = make_pool(spec, spec.block_bytes * 64)
    assert pool.store is None
    with pytest.raises(
        ValueError, match=r"save_prefixes: store: give one, or .*KVPool\(store=\.\.\.\)"
    ):
        pool.save_prefixes()
    with pytest.raises(ValueError, match="load_prefixes: store: give one"):
        pool.load_prefixes()
