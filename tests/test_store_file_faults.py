"""Files other than those that a pool has saved or spilled, and full disks: a miss with its reason,
nothing is lost, and the pool continues.
"""

from __future__ import annotations

import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prefix_rig import PrefixRig, text
from spill_rig import add_up, fetched, rig_of, saved, spilled
from store_rig import soon
from swap_rig import SwapRig, swap_files

import jax_kvpage as kvp

IDS = text(100)  # six blocks and four tokens


def _stored(make_pool, store: kvp.BlockStore, how: str, **options: object) -> PrefixRig:
    """A pool that has saved or spilled `IDS`, and no longer has them in memory."""
    if how == "saved":
        rig = rig_of(make_pool, store, **options)
        saved(rig, IDS)
    else:
        rig = rig_of(make_pool, store, write_ahead=1, **options)
        rig.release(rig.acquire(IDS)[0])
        spilled(rig.pool, 96)
    rig.pool.evict()
    return rig


def _truncate(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def _cut_header(path: pathlib.Path) -> None:
    os.truncate(path, 100)


def _flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1 - len(data) // 4] ^= 1
    path.write_bytes(data)


def _flip_header(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b'"tokens":"') + 12] ^= 1
    path.write_bytes(data)


def _version(path: pathlib.Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"version":"1"', b'"version":"2"', 1))


def _link(path: pathlib.Path) -> None:
    outside = path.parent.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


@pytest.mark.parametrize("how", ["saved", "spilled"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_truncate, "truncated"),
        (_cut_header, "truncated"),
        (_flip, "damaged"),
        (_flip_header, "damaged"),
        (_version, "version"),
        (_link, None),
    ],
)
def test_what_is_wrong_with_a_file_is_said(
    make_pool, tmp_path: pathlib.Path, how: str, spoil, reason: str | None
) -> None:
    folder = tmp_path / "store"
    with kvp.BlockStore(folder) as store:
        _stored(make_pool, store, how).pool.close()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    (path,) = folder.glob("*.safetensors")
    spoil(path)
    before = path.read_bytes()
    with kvp.BlockStore(folder) as store:
        rig = rig_of(make_pool, store)
        ticket = fetched(rig, IDS)
        assert ticket.tokens < 96
        assert rig.acquire(IDS)[1] == ticket.tokens
        rig.check()
        assert store.stats().refused == ({} if reason is None else {reason: 1})
        assert (ticket.error is None) == (ticket.tokens == 0)  # else reading has found the problem
        assert ticket.error is None or f"a file is {reason}" in ticket.error
        # It is written again, next to the file or in its place, and found.
        rig.pool.check(rig.cache)
        assert rig.pool.save_prefixes().tokens == 96
        rig.release(*rig.ids)
        rig.pool.evict()
        assert fetched(rig, IDS).tokens == 96
        rig.acquire(IDS)
        rig.check()
        assert add_up(rig.pool)
        rig.pool.close()
    if spoil is _link:  # nothing was written through the link
        assert (tmp_path / "outside").read_bytes() == before


@pytest.mark.parametrize("how", ["saved", "spilled"])
def test_files_of_other_models_and_caches_are_left_alone(
    make_pool, tmp_path: pathlib.Path, how: str
) -> None:
    with kvp.BlockStore(tmp_path, fingerprint="one") as store:
        _stored(make_pool, store, how).pool.close()
    (path,) = tmp_path.glob("*.safetensors")
    before = path.read_bytes()
    for fingerprint, options, count in (
        ("other", {}, "refused"),
        ("one", {"dtype": jnp.bfloat16}, "missed"),
        ("one", {"layout": "per_layer"}, "missed"),
    ):
        with kvp.BlockStore(tmp_path, fingerprint=fingerprint) as store:
            rig = rig_of(make_pool, store, **options)
            assert fetched(rig, IDS).tokens == 0
            assert rig.acquire(IDS)[1] == 0
            rig.check()
            reasons = getattr(store.stats(), count)
            assert reasons == {"fingerprint": 1} if count == "refused" else "geometry" in reasons
            rig.pool.close()
    assert path.read_bytes() == before


@pytest.mark.parametrize("disk", ["full", "gone"])
def test_a_disk_that_fails_takes_no_memory_from_anybody(
    make_pool, tmp_path: pathlib.Path, layout: str, disk: str
) -> None:
    """Programs can map and calls can get slots as long as there is memory that nobody needs."""
    map_slots = jax.jit(kvp.map_slots)
    folder, limit = tmp_path / "store", "8GiB" if disk == "gone" else 20_000
    with kvp.BlockStore(folder, limit) as store:
        if disk == "gone":
            shutil.rmtree(folder)
        rig = SwapRig(rig_of(make_pool, store, layout, blocks=24, write_ahead=1).pool)
        why = "cannot make a file" if disk == "gone" else "not fit in a store"
        for seed in range(6):
            slot, cached = rig.acquire(text(100, seed))
            assert cached == 0
            rig.check()
            # Another sequence grows in a program, and takes blocks of parked slots.
            other, rig.cache = rig.pool.acquire(rig.cache, 16)
            for tokens in range(32, 200, 16):
                slots = np.asarray([other], np.int32)
                rig.cache, ok = map_slots(rig.cache, slots, np.asarray([tokens]))
                assert np.asarray(ok).tolist() == [True]
            rig.cache = rig.pool.release(rig.cache, other)
            if seed == 1:
                with pytest.raises(kvp.KVPageError, match=why):
                    rig.pool.save_prefixes(None, text(100, seed))
            if seed == 2:
                failed = store.stats().failed_writes
                swapped = rig.swap_out(slot, to_disk=False)
                assert soon(lambda failed=failed: store.stats().failed_writes > failed)
                slot = rig.swap_in(swapped)
                rig.check()
            rig.release(slot)
        assert soon(lambda: rig.pool.spill_stats().failed_writes > 0)
        stats = rig.pool.spill_stats()
        assert (stats.tokens_written, stats.tokens_dropped > 0) == (0, True)
        assert why in store.stats().last_error
        assert list(swap_files()) == []
        assert rig.acquire(text(100, 5))[1] == 99  # cached prefixes are still found
        rig.check()
        rig.audit()
        rig.pool.close()


def test_swap_files_are_the_users_alone(make_pool, store) -> None:
    rig = SwapRig(rig_of(make_pool, store).pool)
    swapped = rig.swap_out(rig.begin(IDS))
    (path,) = swap_files()
    status = os.stat(path)
    assert (status.st_mode & 0o777, status.st_nlink) == (0o600, 0)
    rig.swap_in(swapped)
    rig.check()
