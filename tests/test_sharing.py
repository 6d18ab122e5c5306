"""fork and reorder: contents, accounting, refusals. Truncations are in test_truncate.py."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Rig, busy, make_batch
from mistakes import fails
from sharing_rig import check, filled, fork, pool_of, spec_of, truncate

import jax_kvpage as kvp


@pytest.fixture
def rig(make_pool, layout: str) -> tuple[Rig, int]:
    """A sequence of 70 tokens in blocks of 16; memory is poisoned before a request gets it."""
    return filled(pool_of(make_pool, spec_of(layout), 64, poison=True), 70)


def test_block_map_names_owners(rig: tuple[Rig, int]) -> None:
    rig, slot = rig

    def owners(of: int) -> list[tuple[set[int], int | None]]:
        ranges = rig.pool.block_map(of, owners=True)
        plain = rig.pool.block_map(of)
        assert [[(row.block, row.references) for row in rows] for rows in ranges] == plain
        assert all(len(row.slots) == row.references for rows in ranges for row in rows)
        every = [[(set(row.slots), row.owner) for row in rows] for rows in ranges]
        assert every.count(every[0]) == len(every)
        return every[0]

    assert owners(slot) == [({slot}, slot)] * 5
    first, second = fork(rig, slot, 2)
    shared = [({slot, first, second}, slot)] * 4
    assert owners(slot) == [*shared, ({slot}, slot)]
    assert owners(first) == [*shared, ({first}, first)]
    truncate(rig, slot, 20)
    assert owners(slot)[0] == shared[0]
    assert owners(slot)[1:] == [({slot}, slot)] * 4
    assert owners(first)[1:] == [({first, second}, None)] * 3 + [({first}, first)]
    truncate(rig, first, 0)
    assert owners(first) == [({first}, first)] * 5
    assert owners(second)[:4] == [({slot, second}, slot), *[({second}, None)] * 3]
    check(rig, [slot, first, second])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("tokens", [0, 5, 16, 48, 70])
def test_a_fork_has_the_donors_tokens(make_pool, layout: str, dtype, tokens: int) -> None:
    rig, slot = filled(pool_of(make_pool, spec_of(layout, dtype), 400), 70)
    slots = fork(rig, slot, 3, tokens)
    assert rig.pool.committed(slots[0]) == list(range(tokens))
    check(rig, [slot, *slots])
    check(rig, [*slots, slot])  # no sequence has overwritten what another reads


def test_blocks_are_those_of_one_prefix_and_tails(make_pool, layout: str) -> None:
    """32 forks of 2048 + 7 tokens: one prefix and 32 partial blocks, and not one block more."""
    spec = spec_of(layout, max_slots=40, max_seq_len=4096)
    pool = pool_of(make_pool, spec, 2 * 2 * 2400)
    rig, slot = filled(pool, 2055, max_tokens=512)
    block, ranges = pool.spec.block_tokens, len(pool.block_map(slot))
    before = pool.stats().blocks_mapped
    assert before == -(-2055 // block) * ranges
    slots = fork(rig, slot, 32)
    assert pool.stats().blocks_mapped == before + 32 * ranges
    assert pool.stats().blocks_shared == 2055 // block * ranges
    row = next(row for row in pool.slot_table() if row.slot == slots[0])
    assert row.own_bytes == ranges * pool.spec.block_bytes
    assert row.shared_bytes == 2055 // block * ranges * pool.spec.block_bytes
    assert {refs for _, refs in pool.block_map(slots[3])[0]} == {33, 1}
    check(rig, [slot, slots[0], slots[31]])
    rig.release(slot, *slots)
    pool.check(rig.cache)
    pool.trim()
    assert pool.stats().blocks_free == pool.stats().blocks_total


def test_donors_and_forks_may_end_in_any_order(rig) -> None:
    rig, slot = rig
    first, second = fork(rig, slot, 2)
    third = fork(rig, first, 1, 40)[0]
    rig.release(slot)
    check(rig, [first, second, third])
    other = rig.acquire(100)  # may take the donor's own blocks, but not shared ones
    rig.write({other: 100})
    check(rig, [first, second, third, other])
    rig.release(first, third)
    check(rig, [second, other])
    rig.release(second)
    again = rig.acquire(90)
    rig.write({again: 90})
    check(rig, [again, other])


def test_memory_under_pressure(make_pool, layout: str) -> None:
    """Parked donors and forks give their blocks to new requests; shared blocks stay."""
    pool = pool_of(make_pool, spec_of(layout), 4 * 12, poison=True)
    rig, slot = filled(pool, 80)
    fork(rig, slot, 2)
    rig.release(slot)
    kept = list(rig.model.lengths)
    for _ in range(3):
        new = rig.acquire(64)
        rig.write({new: 64})
        check(rig, kept[:1])
        rig.release(new)
    if layout == "per_layer":  # a block is a quarter of one in the other layout
        with pytest.raises(kvp.OutOfBlocks):
            pool.acquire(rig.cache, 200)
    rig.release(*kept)
    rig.write({rig.acquire(150): 150})
    rig.check_lengths()


def test_reorder_continues_beams(rig) -> None:
    rig, slot = rig
    beams = [slot, *fork(rig, slot, 3)]
    for parents in ([0, 0, 2, 1], [3, 3, 3, 3], [1, 0, 3, 2], [2, 2, 0, 0]):
        old = beams
        beams, rig.cache = rig.pool.reorder(rig.cache, old, parents)
        lengths = rig.model.lengths
        for parent, new in zip(parents, beams, strict=True):
            if new != old[parent]:
                rig.model.fork(old[parent], new, lengths[old[parent]])
        for dead in set(old) - set(beams):
            rig.model.release(dead)
        assert len(set(beams)) == 4
        assert [
            beams[i] for i in {p: i for i, p in reversed(list(enumerate(parents)))}.values()
        ] == [old[p] for p in {p: i for i, p in reversed(list(enumerate(parents)))}]
        check(rig, beams)
        for beam in beams:
            rig.pool.commit(beam, [1, 2])


def test_programs_cannot_write_what_others_read(rig) -> None:
    rig, slot = rig
    other = fork(rig, slot, 1)[0]
    k, v = (jnp.asarray(x[0]) for x in rig.random_kv(1))

    def lower(one: int) -> jax.Array:
        return kvp.set_lengths(rig.cache, [one], 63).lengths

    def append_below(one: int) -> jax.Array:
        """The pytree is not trusted: the program passes a made-up length."""
        forged = dataclasses.replace(rig.cache, lengths=rig.cache.lengths.at[one].set(20))
        return kvp.append_kv(forged, k, v, make_batch([(one, 1)]), layer=0).epoch

    ends = "its tokens below 64 are shared with other slots or processes"
    for one in (slot, other):
        fails(f"set_lengths: .*length 63 wanted, but {ends}.*truncate", lambda one=one: lower(one))
        fails(f"append_kv: .*has 20 tokens, and {ends}", lambda one=one: append_below(one))
    check(rig, [slot, other])


def test_unwritten_tokens_are_not_shared(make_pool, layout: str) -> None:
    """commit ran ahead of the programs: the fork fails, and the donor continues."""
    pool = pool_of(make_pool, spec_of(layout), 64)
    rig, slot = filled(pool, 35)
    pool.extend(slot, 60)
    pool.commit(slot, range(20))
    fails(
        "fork: slot 0: 55 tokens wanted, written in .*35", lambda: pool.fork(rig.cache, slot, 1)[1]
    )
    assert pool.stats().slots_occupied == 1
    queued = kvp.after(rig.cache, busy(1))
    slots, cache = pool.fork(queued, slot, 1)
    fails("fork: slot 0: 55 tokens wanted, written in .*35", lambda: cache)
    assert slots == [1]
    rig.cache = pool.cache()  # the failed fork's slot is free in it
    rig.check_lengths()
    assert len(pool.committed(slot)) == 35
    check(rig, [slot])


def test_blocks_of_a_released_fork_come_free(make_pool, layout: str) -> None:
    """Its partial block is the last free block there is; extend finds it."""
    ranges = 1 if layout == "fused" else 4
    rig, slot = filled(pool_of(make_pool, spec_of(layout), 6 * ranges), 70)
    rig.release(*fork(rig, slot, 1))
    rig.pool.check(rig.cache)
    rig.pool.extend(slot, 96)
    rig.write({slot: 20})
    check(rig, [slot])


def test_a_fork_of_tokens_whose_program_is_queued(rig) -> None:
    """The host is ahead: the tokens of the fork are written by a program queued before it."""
    rig, slot = rig
    rig.pool.extend(slot, 150)
    rig.cache = kvp.after(rig.cache, busy(1))
    rig.write({slot: 60})
    rig.pool.commit(slot, range(60))
    (other,) = fork(rig, slot, 1)
    check(rig, [slot, other])
    rig.cache = rig.pool.cache()
    check(rig, [other, slot])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda p, c, s: p.fork(c, s, 1, 71),
            "fork: slot 0: 71 tokens wanted, 70 committed: commit",
        ),
        (lambda p, c, s: p.fork(c, s, -1), "fork: n is -1"),
        (lambda p, c, s: p.fork(c, 99, 1), "fork: slot 99 does not exist"),
        (lambda p, c, s: p.fork(c, s, 1, -5), "num_tokens is -5"),
        (lambda p, c, s: p.fork(c, s, 12), "fork: 12 slots wanted, 11 free"),
        (lambda p, c, s: p.reorder(c, [s, s], [0, 1]), "wanted each slot once"),
        (lambda p, c, s: p.reorder(c, [s], [1]), "1 is not an index into the 1 slots"),
        (lambda p, c, s: p.truncate(c, s, -1), "num_tokens is -1, wanted 0..80"),
        (lambda p, c, s: p.truncate(c, s, 81), "num_tokens is 81, wanted 0..80"),
        (lambda p, c, s: p.truncate(c, [s, s], 3), "named twice"),
        (lambda p, c, s: p.truncate(c, [s], [3, 4]), "1 slots, but 2 num_tokens"),
        (lambda p, c, s: p.fork(c, 3, 1), "fork: slot 3 is free"),
    ],
)
def test_refusals_change_nothing(rig, call, words: str) -> None:
    rig, slot = rig
    before = rig.pool.stats(), rig.pool.slot_table()
    with pytest.raises(Exception, match=words):
        call(rig.pool, rig.cache, slot)
    assert (rig.pool.stats(), rig.pool.slot_table()) == before
    check(rig, [slot])


def test_out_of_blocks_changes_nothing(make_pool, layout: str) -> None:
    pool = pool_of(make_pool, spec_of(layout), 20)
    rig, slot = filled(pool, 70)
    if layout == "fused":
        pool.resize(6 * pool.spec.block_bytes)
    before = pool.stats().blocks_free, pool.slot_table()
    with pytest.raises(kvp.OutOfBlocks, match=r"fork: .* blocks wanted"):
        pool.fork(rig.cache, slot, 3)
    assert (pool.stats().blocks_free, pool.slot_table()) == before
    check(rig, [slot])


def test_nothing_waits(make_pool, layout: str) -> None:
    """With half a second of work in flight, fork, reorder and truncate return at once."""
    rig, slot = filled(pool_of(make_pool, spec_of(layout), 200), 70)
    beams = [slot, *fork(rig, slot, 1)]
    beams2, rig.cache = rig.pool.reorder(rig.cache, beams, [0, 1])
    truncate(rig, beams[1], 66)  # compiles everything
    rig.pool.check(rig.cache)
    assert beams2 == beams
    waits = rig.pool.stats().waits
    value = busy(2)
    rig.cache = kvp.after(rig.cache, value)
    new, rig.cache = rig.pool.fork(rig.cache, slot, 1)
    rig.cache = rig.pool.truncate(rig.cache, beams[1], 20)
    beams, rig.cache = rig.pool.reorder(rig.cache, [slot, beams[1], *new], [1, 1, 0])
    assert not value.is_ready()
    assert rig.pool.stats().waits == waits
    rig.pool.check(rig.cache)
    assert np.asarray(rig.cache.lengths)[beams].tolist() == [20, 20, 70]


def test_views_of_shared_slots(make_pool) -> None:
    """A view zeroes unwritten memory, but never what another slot reads."""
    rig, slot = filled(pool_of(make_pool, spec_of("per_layer"), 200), 70)
    other = fork(rig, slot, 1)[0]
    freed = fork(rig, slot, 1, 32)[0]
    rig.release(freed)
    rig.pool.check(rig.cache)
    k, _ = rig.pool.view(0, other)
    every, _ = rig.pool.view(0)
    want = np.zeros((256, 2, 64), np.float32)
    want[:70] = rig.model.context(slot, 0)[0]
    for array in (k, every[slot], every[other]):
        np.testing.assert_array_equal(np.asarray(array), want)
    assert not np.asarray(every[freed]).any()
    check(rig, [slot, other])
    del k, every


def test_a_failed_queue_undoes_a_fork(rig, monkeypatch) -> None:
    rig, slot = rig
    before = rig.pool.stats().slots_occupied
    with monkeypatch.context() as patch:
        patch.setattr("jax_kvpage._queue._program", lambda *_: lambda *a: 1 / 0)
        for call in (
            lambda: rig.pool.fork(rig.cache, slot, 2),
            lambda: rig.pool.truncate(rig.cache, slot, 10),
        ):
            with pytest.raises(ZeroDivisionError):
                call()
    assert rig.pool.stats().slots_occupied == before
    assert len(rig.pool.committed(slot)) == 70
    check(rig, fork(rig, slot, 2))
    jax.block_until_ready(rig.cache)
