"""reuse_segment and the prefix cache: nothing that depends on a reused segment can be found."""

from __future__ import annotations

import numpy as np
import pytest
from prefix_rig import BLOCK, DIM, PrefixRig, spec_of

import jax_kvpage as kvp

_FREQUENCIES = np.ones(DIM // 2, np.float32)
_DOCUMENT = list(range(1000, 1070))
_QUESTION = list(range(500, 530))


@pytest.fixture
def rig(make_pool) -> PrefixRig:
    spec = spec_of("fused").resolve("cpu")
    rig = PrefixRig(make_pool(spec, 128 * spec.block_bytes))
    assert rig.acquire(_DOCUMENT) == (0, 0)
    return rig


def _quote(rig: PrefixRig, slot: int) -> list[int]:
    """Reuses and commits a part of the document, then appends some tokens; returns all ids."""
    ids = rig.ids[slot]
    rig.pool.extend(slot, len(ids) + 60)
    rig.cache = rig.pool.reuse_segment(rig.cache, slot, 0, 20, 50, inv_freq=_FREQUENCIES)
    rig.pool.commit(slot, _DOCUMENT[20:])
    rig.ids[slot] = [*ids, *_DOCUMENT[20:]]
    rig.write(slot, [7, 8, 9])
    return rig.ids[slot]


def _found(rig: PrefixRig, ids: list[int]) -> int:
    slot, cached, rig.cache = rig.pool.acquire_prefix(rig.cache, ids)
    rig.cache = rig.pool.release(rig.cache, slot)
    rig.pool.check(rig.cache)
    return cached


def test_only_what_was_computed_is_found(rig: PrefixRig) -> None:
    slot, _ = rig.acquire(_QUESTION)
    ids = _quote(rig, slot)
    assert len(rig.pool.committed(slot)) == len(ids)
    more = [*ids, 1, 2, 3]
    assert _found(rig, more) == len(_QUESTION)
    (fork,), rig.cache = rig.pool.fork(rig.cache, slot, 1)
    rig.ids[fork] = list(ids)
    rig.write(fork, list(range(2 * BLOCK)))
    assert _found(rig, [*rig.ids[fork], 1]) == len(_QUESTION)
    rig.release(slot)
    assert _found(rig, more) == len(_QUESTION)
    rig.release(fork)
    assert _found(rig, more) == len(_QUESTION)
    assert _found(rig, [*_DOCUMENT, 5]) == len(_DOCUMENT), "the source is still found"


def test_forks_of_what_was_computed_have_no_bound(rig: PrefixRig) -> None:
    """A fork like those of acquire_prefix, made while the sequence is running."""
    slot, _ = rig.acquire(_QUESTION)
    _quote(rig, slot)
    ids = [*_QUESTION, *range(2000, 2040)]
    other, cached = rig.acquire(ids)
    assert (cached, other == slot) == (len(_QUESTION), False)
    assert _found(rig, [*ids, 1]) == len(ids)
    rig.release(other)
    assert _found(rig, [*ids, 1]) == len(ids)


def test_a_slot_is_indexed_again_by_its_next_owner(rig: PrefixRig) -> None:
    slot, _ = rig.acquire(_QUESTION)
    _quote(rig, slot)
    rig.release(slot)
    rig.pool.trim()
    again, cached = rig.acquire([*_QUESTION, *range(90, 190)])
    assert (again, cached) == (slot, len(_QUESTION)) or cached == 0
    assert _found(rig, [*rig.ids[again], 1]) == len(rig.ids[again])


def test_a_second_segment_does_not_raise_the_bound(rig: PrefixRig) -> None:
    slot, _ = rig.acquire(_QUESTION)
    _quote(rig, slot)
    ids = _quote(rig, slot)
    assert _found(rig, [*ids, 1]) == len(_QUESTION)


def test_a_call_that_is_not_queued_changes_nothing(
    rig: PrefixRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot, _ = rig.acquire(_QUESTION)

    def broken(*args: object) -> None:
        raise RuntimeError("not queued")

    with monkeypatch.context() as patch:
        patch.setattr(rig.pool._queue, "call", broken)
        with pytest.raises(RuntimeError, match="not queued"):
            rig.pool.reuse_segment(rig.cache, slot, 0, 20, 5, inv_freq=_FREQUENCIES)
    rig.write(slot, [1, 2, 3])
    assert _found(rig, [*rig.ids[slot], 9]) == len(_QUESTION) + 3
    with pytest.raises(kvp.KVPageError, match="slot 5 is free"):
        rig.pool.reuse_segment(rig.cache, [slot, 5], [0, 0], [0, 0], [1, 1], inv_freq=_FREQUENCIES)
    rig.write(slot, [4, 5])
    assert _found(rig, [*rig.ids[slot], 9]) == len(_QUESTION) + 5
