"""Caches that are not the newest, pools that are closed, pools that are somebody else's: refused in
clear words, with nothing lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import RUN_TIME_ERRORS, Line, busy, make_batch
from mistakes import (
    DIM,
    KV_HEADS,
    LAYERS,
    SLOTS,
    append,
    attend,
    fails,
    kv,
    live,
    make_spec,
    q,
    two_sequences,
)

import jax_kvpage as kvp


@pytest.fixture(params=["fused", "per_layer"])
def line(request: pytest.FixtureRequest, make_pool) -> Iterator[Line]:
    yield from two_sequences(make_pool(make_spec(request.param), poison=True))


def test_stale_mutator(line: Line) -> None:
    old, slot = line.cache, live(line)[0]
    batch = make_batch([(slot, 0)])
    new = kvp.advance(old, batch)
    epochs = int(old.epoch[0]), int(new.epoch[0])
    numbers = f"{epochs[0]}.*{epochs[1]}|{epochs[1]}.*{epochs[0]}"
    for call in (
        lambda: append(old, batch),
        lambda: kvp.advance(old, batch),
        lambda: kvp.map_slots(old, jnp.asarray([slot]), jnp.asarray([64]))[0],
        lambda: kvp.set_lengths(old, jnp.asarray([slot]), jnp.asarray([1])),
        lambda: kvp.update_and_attend(q(), *kv(), old, batch, layer=0)[1],
    ):
        fails(f"stale.*({numbers})", call)
        fails(r"pool\.cache\(\)", call)


def test_readers_may_be_older_until_something_is_destroyed(line: Line) -> None:
    slots = live(line)
    line.append([(slot, 3) for slot in slots])
    old, batch = line.cache, [make_batch([(slot, 3)]) for slot in slots]
    want = [np.asarray(attend(old, b)) for b in batch]
    new = kvp.advance(kvp.advance(old, batch[0]), batch[1])
    np.testing.assert_array_equal(attend(old, batch[0]), want[0])
    before = [line.model.lengths[slot] for slot in slots]
    lowered = kvp.set_lengths(new, jnp.asarray([slots[0]]), jnp.asarray([before[0]]))
    fails("stale", lambda: attend(old, batch[0]))
    np.testing.assert_array_equal(attend(old, batch[1]), want[1])  # the other slot is as it was
    jax.block_until_ready(
        kvp.set_lengths(lowered, jnp.asarray([slots[1]]), jnp.asarray([before[1]]))
    )


def test_a_released_slot_cannot_be_read_through_an_old_cache(line: Line) -> None:
    slot = line.acquire(40)
    line.write({slot: 10})
    line.append([(slot, 1)])
    old = line.cache
    line.release(slot)
    again = line.acquire(40)
    assert again == slot  # adopted at once, with the old request's data in it
    fails("stale", lambda: attend(old, make_batch([(slot, 1)])))
    line.cache = line.pool.cache()
    line.release(again)
    jax.block_until_ready(line.cache)
    line.pool.trim()


def test_older_lines_are_stale(line: Line) -> None:
    old = line.cache
    line.cache = line.pool.cache()
    fails("stale|line", lambda: kvp.advance(old, make_batch([])))


def test_host_calls_with_a_stale_cache_change_nothing(line: Line) -> None:
    """Nobody knows the slot that a failed acquire took, so it must not stay taken."""
    old, slot = line.cache, live(line)[0]
    jax.block_until_ready(kvp.advance(old, make_batch([])))
    before = line.pool.stats(), line.pool.slot_table()
    for _ in range(2 * SLOTS):
        fails("acquire.*stale", lambda: line.pool.acquire(old, 10)[1])
        fails("release.*stale", lambda: line.pool.release(old, slot))
    line.cache = line.pool.cache()
    after = line.pool.stats(), line.pool.slot_table()
    assert after[1] == before[1]
    assert after[0].slots_occupied == before[0].slots_occupied
    line.pool.trim()


def test_waiting_for_a_release_that_failed(line: Line) -> None:
    """The release is queued behind a program that fails: waiting for it ends with that failure."""
    slot = line.acquire(100)
    cache = kvp.after(line.cache, busy(1))
    bad = append(cache, make_batch([(slot, 1), (slot, 1)]))
    line.pool.release(bad, slot)
    line.pool.resize(line.pool.stats().mapped + line.pool.stats().draining)
    with pytest.raises(RUN_TIME_ERRORS, match="twice"):
        line.pool.acquire(line.cache, 100, wait=True)
    line.pool.resize("16MiB")
    line.cache = line.pool.cache()
    line.model.release(slot)
    line.pool.trim()


def test_check_raises_what_went_wrong(line: Line) -> None:
    line.pool.check(line.cache)
    cache = kvp.after(line.cache, busy(1))
    bad = kvp.advance(cache, make_batch([(live(line)[0], 7)]))
    with pytest.raises(RUN_TIME_ERRORS, match="written"):
        line.pool.check(bad)


def test_implementations_that_are_not_there(line: Line) -> None:
    with pytest.raises(ValueError, match=r"cuda.*'cpu'.*implementation='xla'"):
        kvp.paged_attention(
            q(), line.cache, make_batch([(live(line)[0], 0)]), layer=0, implementation="cuda"
        )


def test_on_stale_allow_repeats_a_step(make_pool) -> None:
    spec = make_spec()
    pool = make_pool(spec, on_stale="allow")
    slots, cache = pool.acquire(pool.cache(), [40, 40])
    batch = make_batch([(slots[0], 4), (slots[1], 4)])
    k = jnp.ones((8, KV_HEADS, DIM))

    def step(cache: kvp.KVCache) -> tuple[jax.Array, kvp.KVCache]:
        for layer in range(LAYERS):
            out, cache = kvp.update_and_attend(q(), k, k, cache, batch, layer=layer)
        return out, kvp.advance(cache, batch)

    first, _ = step(cache)
    for _ in range(3):
        again, newest = step(cache)
        np.testing.assert_array_equal(again, first)
    lowered = kvp.set_lengths(newest, jnp.asarray([slots[0]]), jnp.asarray([0]))
    jax.block_until_ready(lowered)
    fails("stale", lambda: step(cache))
    with pytest.raises(ValueError, match="on_stale"):
        kvp.KVPool(spec, "8MiB", on_stale="sometimes")


def test_closed_pool() -> None:
    spec = make_spec("per_layer")
    with kvp.KVPool(spec, "8MiB") as pool:
        slot, cache = pool.acquire(pool.cache(), 10)
    batch = make_batch([(slot, 1)])
    for call in (
        pool.cache,
        lambda: pool.acquire(cache, 1),
        lambda: pool.extend(slot, 20),
        lambda: pool.release(cache, slot),
        lambda: pool.commit(slot, [1]),
        pool.trim,
        lambda: pool.resize("4MiB"),
        lambda: pool.view(0),
    ):
        with pytest.raises(kvp.PoolClosed, match="closed"):
            call()
    fails("pool.*closed", lambda: append(cache, batch))
    fails("pool.*closed", lambda: kvp.advance(cache, batch))


def test_wrong_pool(line: Line, make_pool) -> None:
    spec = dataclasses.replace(line.spec, max_slots=SLOTS + 1)
    other = make_pool(spec)
    theirs = other.cache()
    slot = live(line)[0]
    for call in (lambda: other.acquire(line.cache, 1), lambda: line.pool.release(theirs, slot)):
        with pytest.raises(ValueError, match="pool"):
            call()
    batch = make_batch([(slot, 1)])
    # A program compiled for one spec, handed the handle of a pool of another.
    mixed = dataclasses.replace(line.cache, handle=theirs.handle)
    fails(f"spec.*max_slots.*{SLOTS}.*{SLOTS + 1}", lambda: append(mixed, batch))
    nobody = dataclasses.replace(line.cache, handle=jnp.asarray([10**6, 0], jnp.int32))
    fails("no pool|unknown|does not exist|1000000", lambda: append(nobody, batch))


def test_another_pool_of_the_same_spec(line: Line, make_pool) -> None:
    """Its caches fit the programs, but its slots are not this pool's slots."""
    other = make_pool(line.spec)
    slot, theirs = other.acquire(other.cache(), 10)

    def refuses(own: kvp.KVPool, stranger: kvp.KVCache) -> None:
        before = own.slot_table()
        fails("cache belongs to pool", lambda: own.acquire(stranger, 1)[1])
        fails("cache belongs to pool", lambda: own.release(stranger, slot))
        assert own.slot_table() == before

    refuses(line.pool, theirs)
    refuses(other, line.cache)
    # Neither call has touched the line of the pool whose cache was passed.
    jax.block_until_ready(kvp.advance(theirs, make_batch([(slot, 0)])))
    jax.block_until_ready(kvp.advance(line.cache, make_batch([])))
    line.pool.trim()
