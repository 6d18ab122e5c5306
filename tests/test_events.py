"""`KVPool.events`: replaying events, and the form in which vLLM's readers consume them."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import msgspec
import numpy as np
import pytest
from prefix_rig import BLOCK, PrefixRig, Replay, spec_of

import jax_kvpage as kvp
from jax_kvpage import events


@pytest.fixture
def rig() -> Any:
    with kvp.KVPool(spec_of("fused"), "16MiB") as pool:
        yield PrefixRig(pool)


def _ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(-(2**31), 2**31, n).tolist()


def test_what_is_stored_and_removed(rig: PrefixRig) -> None:
    assert rig.pool.events() == [events.AllBlocksCleared()]
    ids = _ids(3 * BLOCK + 5)
    slot, _ = rig.acquire(ids)
    (stored,) = rig.pool.events()
    assert stored == events.BlockStored(
        stored.block_hashes, None, tuple(ids[: 3 * BLOCK]), BLOCK, "CPU", None
    )
    assert len(set(stored.block_hashes)) == 3
    rig.write(slot, _ids(BLOCK, 1))
    (more,) = rig.pool.events()
    assert more.parent_block_hash == stored.block_hashes[-1]
    assert more.token_ids == tuple(rig.ids[slot][3 * BLOCK : 4 * BLOCK])
    rig.release(slot)
    assert rig.pool.events() == []  # a finished sequence can still be found
    rig.pool.evict()
    (removed,) = rig.pool.events()
    names = [*stored.block_hashes, *more.block_hashes]
    assert removed == events.BlockRemoved(tuple(reversed(names)), "CPU")


def test_a_reader_that_comes_later_gets_all_blocks(rig: PrefixRig) -> None:
    first, replay = _ids(3 * BLOCK), Replay()
    rig.acquire([*first, *_ids(BLOCK, 1)])
    rig.acquire([*first, *_ids(2 * BLOCK, 2)])
    batch = rig.pool.events()
    assert batch[0] == events.AllBlocksCleared()
    replay.read(batch)
    assert len(replay.blocks) == 3 + 1 + 2


def test_namespaces_are_those_of_the_caller(rig: PrefixRig) -> None:
    ids, replay = _ids(BLOCK), Replay()
    for space in (None, "", "a", "=a"):
        rig.acquire(ids, namespace=space)
    replay.read(rig.pool.events())
    assert replay.sequences() == {(space, tuple(ids)) for space in (None, "", "a", "=a")}


def test_events_of_a_closed_pool() -> None:
    pool = kvp.KVPool(spec_of("fused"), "16MiB")
    pool.close()
    with pytest.raises(kvp.PoolClosed):
        pool.events()


# What vLLM's readers decode with (vllm/distributed/kv_events.py): events as arrays, or as maps in
# 0.32. A batch is an array in both.


class _StoredFields(msgspec.Struct):
    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class _RemovedFields(msgspec.Struct):
    block_hashes: list[int | bytes]
    medium: str | None


class BlockStored(_StoredFields, array_like=True, omit_defaults=True, tag=True):
    pass


class BlockRemoved(_RemovedFields, array_like=True, omit_defaults=True, tag=True):
    pass


class AllBlocksCleared(msgspec.Struct, array_like=True, omit_defaults=True, tag=True):
    pass


class _Batch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class _MapStored(_StoredFields, tag="BlockStored", forbid_unknown_fields=True):
    pass


class _MapRemoved(_RemovedFields, tag="BlockRemoved", forbid_unknown_fields=True):
    pass


class _MapCleared(msgspec.Struct, tag="AllBlocksCleared", forbid_unknown_fields=True):
    pass


class _MapBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[_MapStored | _MapRemoved | _MapCleared]
    data_parallel_rank: int | None = None


def _one_of_each(rig: PrefixRig) -> list[events.Event]:
    """Returns events for a clear, two stored blocks, and the removal of both."""
    slot, _ = rig.acquire(_ids(2 * BLOCK), namespace="adapter")
    batch = rig.pool.events()
    rig.release(slot)
    rig.pool.evict()
    return [*batch, *rig.pool.events()]


def test_encoded_events_are_those_of_vllm(rig: PrefixRig) -> None:
    batch = _one_of_each(rig)
    read = msgspec.msgpack.decode(events.encode(batch, ts=12.5), type=_Batch)
    names, ids = list(batch[1].block_hashes), list(batch[1].token_ids)
    assert read == _Batch(
        12.5,
        [
            AllBlocksCleared(),
            BlockStored(names, None, ids, BLOCK, None, "CPU", "adapter"),
            BlockRemoved(names[::-1], "CPU"),
        ],
    )
    assert msgspec.msgpack.decode(events.encode([]), type=_Batch).ts > 1e9


def test_events_as_maps_are_those_of_newer_vllm(rig: PrefixRig) -> None:
    batch = _one_of_each(rig)
    cleared, stored, removed = msgspec.msgpack.decode(
        events.encode(batch, form="map", data_parallel_rank=3), type=_MapBatch
    ).events
    names, ids = list(batch[1].block_hashes), list(batch[1].token_ids)
    assert isinstance(cleared, _MapCleared)
    assert stored == _MapStored(names, None, ids, BLOCK, None, "CPU", "adapter")
    assert removed == _MapRemoved(names[::-1], "CPU")
    with pytest.raises(ValueError, match="wanted 'array' or 'map', got 'list'"):
        events.encode(batch, form="list")  # type: ignore[arg-type]


def test_encode_refuses_what_is_no_event() -> None:
    with pytest.raises(ValueError, match=r"wanted events of KVPool\.events, got 3"):
        events.encode([3])  # type: ignore[list-item]


def test_encode_without_msgspec(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name == "msgspec":
            raise ModuleNotFoundError(name)
        return original(name, *args)

    monkeypatch.delitem(sys.modules, "msgspec")
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install .*jax_kvpage\[events\]"):
        events.encode([])
