"""drop_before and the prefix index: what a sequence has dropped is never found."""

from __future__ import annotations

import jax
import pytest
from harness import Rig
from sharing_rig import drop, mapped, pool_of, spec_of

import jax_kvpage as kvp


def _found_prompt(rig: Rig) -> tuple[int, list[int]]:
    """Returns the slot of a written sequence that the prefix index may have, and its ids."""
    ids = list(range(70))
    slot, _, rig.cache = rig.pool.acquire_prefix(rig.cache, ids)
    rig.model.acquire(slot)
    rig.write({slot: len(ids)})
    rig.pool.commit(slot, ids)
    return slot, ids


@pytest.mark.parametrize("generation", [False, True])
def test_what_is_left_of_a_released_sequence_is_not_found(make_pool, layout, generation) -> None:
    rig = Rig(pool_of(make_pool, spec_of(layout), 64))
    slot, ids = _found_prompt(rig)
    assert rig.pool.find_prefix(ids) == 69
    drop(rig, slot, 32)
    rig.cache = rig.pool.release(rig.cache, slot)
    rig.pool.check(rig.cache)
    if generation:  # the slot is free, with the rest of its blocks still mapped
        rig.cache = rig.pool.cache()
    assert rig.pool.find_prefix(ids) == 0
    _, num_cached, rig.cache = rig.pool.acquire_prefix(rig.cache, ids)
    assert num_cached == 0
    rig.pool.check(rig.cache)


@pytest.mark.parametrize("found_before", [False, True])
@pytest.mark.parametrize("runs", ["before", "after", "never"])
def test_an_interrupt_in_the_call(
    make_pool, layout, monkeypatch: pytest.MonkeyPatch, runs: str, found_before: bool
) -> None:
    """Ctrl-C before the program is queued changes nothing; afterwards the tokens are gone."""
    rig = Rig(pool_of(make_pool, spec_of(layout), 64))
    slot, ids = _found_prompt(rig)
    queue, queued = rig.pool._queue.run, []

    def interrupted(*args, **options):
        if runs == "before":
            jax.block_until_ready(queue(*args, **options))
        elif runs == "after":  # than the call has been undone
            queued.append((args, options))
        raise KeyboardInterrupt

    monkeypatch.setattr(rig.pool._queue, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drop(rig, slot, 32)
    monkeypatch.undo()
    if found_before:
        assert rig.pool.find_prefix(ids) == (0 if runs == "before" else 69)
    for args, options in queued:
        jax.block_until_ready(queue(*args, **options))
    left = 69 if runs == "never" else 0
    assert rig.pool.find_prefix(ids) == left
    if not left:
        with pytest.raises(kvp.KVPageError, match="has dropped its tokens below 32"):
            rig.pool.fork(rig.cache, slot, 1)
    rig.cache = rig.pool.cache()
    assert mapped(rig, slot) == list(range(0 if left else 2, 5))
    assert rig.pool.find_prefix(ids) == left
    rig.cache = rig.pool.release(rig.cache, slot)
    slot, num_cached, rig.cache = rig.pool.acquire_prefix(rig.cache, ids)
    assert num_cached == left
    rig.pool.check(rig.cache)
