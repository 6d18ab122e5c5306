"""Caches that are not the newest, closed pools, and caches of other pools are refused with clear
messages, and nothing is lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import RUN_TIME_ERRORS, Rig, busy, make_batch
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
def rig(request: pytest.FixtureRequest, make_pool) -> Iterator[Rig]:
    yield from two_sequences(make_pool(make_spec(request.param), poison=True))


def test_stale_mutator(rig: Rig) -> None:
    old, slot = rig.cache, live(rig)[0]
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


def test_readers_may_be_older_until_something_is_destroyed(rig: Rig) -> None:
    slots = live(rig)
    rig.append([(slot, 3) for slot in slots])
    old, batch = rig.cache, [make_batch([(slot, 3)]) for slot in slots]
    want = [np.asarray(attend(old, b)) for b in batch]
    new = kvp.advance(kvp.advance(old, batch[0]), batch[1])
    np.testing.assert_array_equal(attend(old, batch[0]), want[0])
    before = [rig.model.lengths[slot] for slot in slots]
    lowered = kvp.set_lengths(new, jnp.asarray([slots[0]]), jnp.asarray([before[0]]))
    fails("stale", lambda: attend(old, batch[0]))
    np.testing.assert_array_equal(attend(old, batch[1]), want[1])  # the other slot is unchanged
    jax.block_until_ready(
        kvp.set_lengths(lowered, jnp.asarray([slots[1]]), jnp.asarray([before[1]]))
    )


def test_a_released_slot_cannot_be_read_through_an_old_cache(rig: Rig) -> None:
    slot = rig.acquire(40)
    rig.write({slot: 10})
    rig.append([(slot, 1)])
    old = rig.cache
    rig.release(slot)
    jax.block_until_ready(rig.cache)
    again = rig.acquire(40)
    assert again == slot  # adopted at once, still holding the old request's data
    fails("stale", lambda: attend(old, make_batch([(slot, 1)])))
    rig.cache = rig.pool.cache()
    rig.release(again)
    jax.block_until_ready(rig.cache)
    rig.pool.trim()


def test_older_generations_are_stale(rig: Rig) -> None:
    old = rig.cache
    rig.cache = rig.pool.cache()
    fails("stale|generation", lambda: kvp.advance(old, make_batch([])))


def test_host_calls_with_a_stale_cache_change_nothing(rig: Rig) -> None:
    """Nobody knows the slot of a failed acquire, so it must not stay occupied."""
    old, slot = rig.cache, live(rig)[0]
    jax.block_until_ready(kvp.advance(old, make_batch([])))
    before = rig.pool.stats(), rig.pool.slot_table()
    for _ in range(2 * SLOTS):
        fails("acquire.*stale", lambda: rig.pool.acquire(old, 10)[1])
        fails("release.*stale", lambda: rig.pool.release(old, slot))
    rig.cache = rig.pool.cache()
    after = rig.pool.stats(), rig.pool.slot_table()
    assert after[1] == before[1]
    assert after[0].slots_occupied == before[0].slots_occupied
    rig.pool.trim()


def test_waiting_for_a_release_that_failed(rig: Rig) -> None:
    """The release is queued behind a failing program: waiting for it raises that program's
    error.
    """
    slot = rig.acquire(100)
    cache = kvp.after(rig.cache, busy(1))
    bad = append(cache, make_batch([(slot, 1), (slot, 1)]))
    rig.pool.release(bad, slot)
    rig.pool.resize(rig.pool.stats().mapped + rig.pool.stats().draining)
    with pytest.raises(RUN_TIME_ERRORS, match="twice"):
        rig.pool.acquire(rig.cache, 100, wait=True)
    rig.pool.resize("16MiB")
    rig.cache = rig.pool.cache()
    rig.model.release(slot)
    rig.pool.trim()


def test_check_raises_what_went_wrong(rig: Rig) -> None:
    rig.pool.check(rig.cache)
    cache = kvp.after(rig.cache, busy(1))
    bad = kvp.advance(cache, make_batch([(live(rig)[0], 7)]))
    with pytest.raises(RUN_TIME_ERRORS, match="written"):
        rig.pool.check(bad)


def test_implementations_that_are_not_there(rig: Rig) -> None:
    with pytest.raises(ValueError, match=r"cuda.*'cpu'.*implementation='xla'"):
        kvp.paged_attention(
            q(), rig.cache, make_batch([(live(rig)[0], 0)]), layer=0, implementation="cuda"
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
    fails("pool.*closed.*when the results of its programs are ready", lambda: append(cache, batch))
    fails("pool.*closed", lambda: kvp.advance(cache, batch))


def test_wrong_pool(rig: Rig, make_pool) -> None:
    spec = dataclasses.replace(rig.spec, max_slots=SLOTS + 1)
    other = make_pool(spec)
    theirs = other.cache()
    slot = live(rig)[0]
    for call in (lambda: other.acquire(rig.cache, 1), lambda: rig.pool.release(theirs, slot)):
        with pytest.raises(ValueError, match="pool"):
            call()
    batch = make_batch([(slot, 1)])
    # A program compiled for one spec is called with the handle of a pool with another.
    mixed = dataclasses.replace(rig.cache, handle=theirs.handle)
    fails(f"spec.*max_slots.*{SLOTS}.*{SLOTS + 1}", lambda: append(mixed, batch))
    nobody = dataclasses.replace(rig.cache, handle=jnp.asarray([10**6, 0], jnp.int32))
    fails("no pool|unknown|does not exist|1000000", lambda: append(nobody, batch))


def test_another_pool_of_the_same_spec(rig: Rig, make_pool) -> None:
    """Its caches fit the programs, but its slots are not this pool's slots."""
    other = make_pool(rig.spec)
    slot, theirs = other.acquire(other.cache(), 10)

    def refuses(own: kvp.KVPool, stranger: kvp.KVCache) -> None:
        before = own.slot_table()
        fails("cache belongs to pool", lambda: own.acquire(stranger, 1)[1])
        fails("cache belongs to pool", lambda: own.release(stranger, slot))
        assert own.slot_table() == before

    refuses(rig.pool, theirs)
    refuses(other, rig.cache)
    # Neither call has affected the generation of the pool whose cache was passed.
    jax.block_until_ready(kvp.advance(theirs, make_batch([(slot, 0)])))
    jax.block_until_ready(kvp.advance(rig.cache, make_batch([])))
    rig.pool.trim()
