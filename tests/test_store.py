"""BlockStore and its files: the format as read by other programs, limits, the command line."""

from __future__ import annotations

import os
import pathlib
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from prefix_rig import HEADS, LAYERS, PrefixRig, contents, spec_of, text
from safetensors import safe_open

import jax_kvpage as kvp
from jax_kvpage import _store_command
from jax_kvpage import store as kv_store


@pytest.fixture
def rig(make_pool) -> PrefixRig:
    return PrefixRig(make_pool(spec_of("fused"), "8MiB"))


def fill(rig: PrefixRig, store: kvp.BlockStore, count: int) -> list[list[int]]:
    """Saves sequences of 40 tokens, one file each."""
    texts = [text(40, seed) for seed in range(count)]
    for ids in texts:
        slot, _ = rig.acquire(ids, namespace="n")
        rig.pool.check(rig.cache)
        rig.pool.save_prefixes(store, ids, "n")
        rig.release(slot)
        time.sleep(0.01)
    return texts


def test_safetensors_reads_a_file(rig: PrefixRig, tmp_path: pathlib.Path) -> None:
    ids = text(40)
    rig.acquire(ids, namespace='a "name" é')
    rig.pool.check(rig.cache)
    rig.pool.save_prefixes(tmp_path, fingerprint="model 1")
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, framework="numpy") as file:
        metadata, blocks = file.metadata(), file.get_tensor("blocks")
    spec = rig.pool.spec
    assert blocks.shape == (2, 1, spec.block_bytes)
    assert metadata["namespace"] == '=a "name" é'
    assert metadata["fingerprint"] == "model 1"
    assert [int(token) for token in metadata["tokens"].split()] == ids[:32]
    assert len(metadata["crc32c"].split()) == 2
    assert metadata["first_block"] == "0"
    # [layer][K|V][head][token][D], as the design says.
    shape = (LAYERS, 2, HEADS, 16, spec.head_dim)
    size = 4 * int(np.prod(shape))
    for i in range(2):
        got = blocks[i, 0, :size].view(np.float32).reshape(shape)
        want = contents(ids[: 16 * (i + 1)], 16 * i).transpose(1, 0, 3, 2, 4)
        assert np.array_equal(got, want)
    # Blocks are page-aligned.
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert (header + 8) % 4096 == 0
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_directory_is_the_users_alone(tmp_path: pathlib.Path) -> None:
    with kvp.BlockStore(tmp_path / "a" / "b", limit=None, fingerprint="m") as store:
        assert (store.path, store.limit, store.fingerprint) == (tmp_path / "a" / "b", None, "m")
        assert store.path.stat().st_mode & 0o777 == 0o700
        assert store.stats() == (0, 0, 0, None, 0, 0, 0, 0, 0, {}, {}, "", *(0.0,) * 5)
        assert repr(store) == f"BlockStore({str(store.path)!r}, None, 'm')"
    with pytest.raises(kvp.PoolClosed, match="the store is closed"):
        store.stats()
    with pytest.raises(kvp.PoolClosed, match="the store is closed"):
        store.refresh()


def test_the_limit_keeps_what_was_used_last(rig: PrefixRig, tmp_path: pathlib.Path) -> None:
    size = 4096 + 2 * rig.pool.spec.block_bytes
    with kvp.BlockStore(tmp_path, limit=3 * size) as store:
        fill(rig, store, 5)
        stats = store.stats()
        assert (stats.files, stats.files_evicted, stats.bytes) == (3, 2, 3 * size)
        assert stats.bytes_evicted == 2 * size
        assert stats.bytes_written == 5 * 2 * rig.pool.spec.block_bytes
    kept = {tuple(file.token_ids) for file in kv_store.list_files(tmp_path)}
    assert kept == {tuple(text(40, seed)[:32]) for seed in (2, 3, 4)}


def test_two_stores_share_a_directory(rig: PrefixRig, tmp_path: pathlib.Path) -> None:
    with kvp.BlockStore(tmp_path, fingerprint="a") as a, kvp.BlockStore(tmp_path) as b:
        fill(rig, a, 2)
        b.refresh()
        assert b.stats().files == 2
        assert b.stats().refused == {"fingerprint": 2}
        for path in tmp_path.glob("*.safetensors"):
            path.unlink()
        deadline = time.monotonic() + 30
        while a.stats().files and time.monotonic() < deadline:
            time.sleep(0.05)  # the store's thread notices
        assert a.stats().bytes == 0


def test_files_are_listed_verified_and_pruned(rig: PrefixRig, tmp_path: pathlib.Path) -> None:
    with kvp.BlockStore(tmp_path, fingerprint="m") as store:
        texts = fill(rig, store, 3)
    listed = kv_store.list_files(tmp_path, verify=True)
    assert sorted(file.token_ids for file in listed) == sorted(ids[:32] for ids in texts)
    for file in listed:
        assert (file.problem, file.namespace, file.fingerprint) == (None, "n", "m")
        assert file.first_token == 0
        assert "fused float32 num_layers=2" in file.layout
        assert abs(file.used - time.time()) < 60
    path = tmp_path / listed[0].name
    path.write_bytes(path.read_bytes()[:-1])
    assert kv_store.list_files(tmp_path)[0].problem == "truncated"
    old = tmp_path / listed[1].name
    os.utime(old, (0, 0))
    assert kv_store.prune(tmp_path, older_than=3600) == [old.name]
    assert kv_store.prune(tmp_path, limit=listed[2].bytes) == [path.name]
    assert kv_store.prune(tmp_path, limit="1MiB") == []
    assert kv_store.prune(tmp_path, limit=0) == [listed[2].name]
    assert kv_store.list_files(tmp_path) == []


def test_the_command_line(rig: PrefixRig, tmp_path: pathlib.Path, capsys) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        status = _store_command.run([str(tmp_path), *arguments])
        return status, capsys.readouterr().out

    with kvp.BlockStore(tmp_path, fingerprint="m") as store:
        fill(rig, store, 2)
    status, out = run()
    assert status == 0
    assert out.count("sound  0-32    n") == 2
    assert "2 files" in out
    path = min(tmp_path.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 64
    path.write_bytes(data)
    assert run()[0] == 0
    status, out = run("--verify")
    assert (status, "damaged" in out, "1 of no use" in out) == (1, True, True)
    assert "0 files removed" in run("--older-than", "1d")[1]
    status, out = run("--limit", "0")
    assert (status, "2 files removed" in out) == (0, True)
    assert run("--limit", "lots")[0] == 1
    with pytest.raises(SystemExit):
        run("--older-than", "soon")
    assert "wanted an age such as" in capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, "-m", "jax_kvpage", "store", str(tmp_path / "missing")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, "No such file" in done.stderr) == (1, True)


@pytest.mark.parametrize("limit", [0, -1, "many", True, 1.5])
def test_a_limit_is_a_number_of_bytes(tmp_path: pathlib.Path, limit: object) -> None:
    with pytest.raises(ValueError, match="BlockStore: limit: wanted a positive number of bytes"):
        kvp.BlockStore(tmp_path, limit)  # type: ignore[arg-type]


def test_mistakes_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="fingerprint: wanted a str, got int 3"):
        kvp.BlockStore(tmp_path, fingerprint=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="older_than: wanted at least 0 seconds"):
        kv_store.prune(tmp_path, older_than=-1)
    with pytest.raises(kvp.KVPageError, match="No such file"):
        kv_store.list_files(tmp_path / "missing")
