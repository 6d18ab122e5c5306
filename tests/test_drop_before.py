"""drop_before: blocks that a sliding window has passed are freed, and nothing reads them any
more.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import RUN_TIME_ERRORS, Rig, busy, make_batch
from mistakes import fails
from reference_numpy import Variant
from sharing_rig import drop, filled, fork, mapped, pool_of, spec_of, truncate

import jax_kvpage as kvp

_BLOCK, _WINDOW = 16, 20
_WINDOWED = Variant(sliding_window=_WINDOW)


@pytest.fixture
def rig(make_pool, layout: str) -> tuple[Rig, int]:
    """A sequence of 70 tokens in blocks of 16; memory is poisoned before a request gets it."""
    return filled(pool_of(make_pool, spec_of(layout), 64, poison=True), 70)


def _attend(rig: Rig, slot: int, window: int | None, n: int = 1, **options: object) -> jax.Array:
    """Returns the attention of the last n tokens of a slot."""
    cache = kvp.KVCache(
        rig.cache.handle, rig.cache.epoch, rig.cache.lengths.at[slot].add(-n), rig.spec
    )
    q = jnp.ones((n, rig.query_heads, rig.spec.head_dim))
    batch = make_batch([(slot, n)])
    return kvp.paged_attention(q, cache, batch, layer=1, sliding_window=window, **options)


def _check(rig: Rig, slot: int, n: int = 2) -> None:
    """Asserts that the sequence continues as the reference does."""
    rig.check_lengths()
    rig.pool.extend(slot, rig.model.lengths[slot] + n)
    out, _, want, _ = rig.step([(slot, n)], _WINDOWED)
    np.testing.assert_allclose(out[:, :n], want[:, :n], atol=1e-4)


def test_whole_blocks_come_back(rig) -> None:
    rig, slot = rig
    ranges, before = len(rig.pool.block_map(slot)), rig.pool.stats()
    drop(rig, slot, 70 - _WINDOW + 1)  # 51: three blocks of 16
    rig.pool.check(rig.cache)
    after = rig.pool.stats()
    assert after.blocks_mapped == before.blocks_mapped - 3 * ranges
    assert after.blocks_free == before.blocks_free + 3 * ranges
    assert after.waits == before.waits
    assert mapped(rig, slot) == [3, 4]
    assert rig.pool.block_map(slot)[0][:3] == [(-1, 0)] * 3
    assert [x.block for x in rig.pool.block_map(slot, owners=True)[0][:3]] == [-1] * 3
    row = rig.pool.slot_table()[0]
    assert (row.dropped_tokens, row.num_blocks, row.committed_tokens) == (48, 2 * ranges, 70)
    for n in (1, 5, 2):
        _check(rig, slot, n)


def test_what_is_less_than_a_block_or_dropped_already_changes_nothing(rig) -> None:
    rig, slot = rig
    cache = rig.cache
    drop(rig, slot, 15)
    assert rig.cache is cache
    drop(rig, slot, 40)
    cache = rig.cache
    for tokens in (-20, 0, 32, 47):
        drop(rig, slot, tokens)
    assert rig.cache is cache
    assert rig.pool.slot_table()[0].dropped_tokens == 32
    _check(rig, slot)


def test_lists(rig) -> None:
    rig, slot = rig
    other = rig.acquire(70)
    rig.write({other: 70})
    rig.cache = rig.pool.drop_before(rig.cache, [slot, other], [40, 51])
    rig.pool.check(rig.cache)
    assert (mapped(rig, slot), mapped(rig, other)) == ([2, 3, 4], [3, 4])
    rig.cache = rig.pool.drop_before(rig.cache, [slot, other], 48)
    rig.pool.check(rig.cache)
    assert (mapped(rig, slot), mapped(rig, other)) == ([3, 4], [3, 4])
    out, _, want, _ = rig.step([(slot, 3), (other, 4)], _WINDOWED)
    np.testing.assert_allclose(out[:, :7], want[:, :7], atol=1e-4)


@pytest.mark.parametrize(
    ("window", "n", "seen"),
    [(None, 1, False), (0, 1, False), (22, 1, True), (23, 1, False), (18, 5, True), (19, 5, False)],
)
def test_a_window_must_begin_behind_what_is_dropped(
    rig, window: int | None, n: int, seen: bool
) -> None:
    _check_window(rig, window, n, seen, "slots")


@pytest.mark.parametrize(("window", "seen"), [(22, True), (23, False)])
def test_tables_are_not_followed_where_they_are_dropped(rig, window: int, seen: bool) -> None:
    _check_window(rig, window, 1, seen, "table")


def _check_window(rig, window: int | None, n: int, seen: bool, addressing: str) -> None:
    rig, slot = rig
    traced = None if window is None else jnp.int32(window)
    before = _attend(rig, slot, traced, n, addressing=addressing)
    drop(rig, slot, 48)
    rig.pool.check(rig.cache)

    def attend() -> jax.Array:
        return _attend(rig, slot, traced, n, addressing=addressing)

    if seen:
        assert np.asarray(attend()).tobytes() == np.asarray(before).tobytes()
    else:
        first = 70 - n - window + 1 if window else 0
        fails(f"position {first} on are needed, but those below 48 were dropped", attend)


def test_reads_of_the_whole_slot_fail(rig) -> None:
    rig, slot = rig
    drop(rig, slot, 51)
    fails("below 48 were dropped", lambda: kvp.read_kv(rig.cache, [slot], 0))
    fails("below 48 were dropped", lambda: _attend(rig, slot, 10, implementation="xla"))
    q, k = jnp.ones((1, rig.query_heads, 64)), jnp.ones((1, 2, 64))
    rig.pool.extend(slot, 80)
    batch = make_batch([(slot, 1)])
    fails(
        "below 48 were dropped",
        lambda: kvp.update_and_attend(q, k, k, rig.cache, batch, layer=0)[0],
    )
    rig.cache = rig.pool.cache()
    _check(rig, slot)


def test_it_cannot_become_shorter_than_what_is_dropped(rig) -> None:
    rig, slot = rig
    drop(rig, slot, 40)
    rig.pool.check(rig.cache)
    with pytest.raises(kvp.KVPageError, match=r"below 32 were dropped.*cannot become shorter"):
        rig.pool.truncate(rig.cache, slot, 31)
    fails(
        "below 32 were dropped.*cannot become shorter",
        lambda: kvp.set_lengths(rig.cache, [slot], [20]).lengths,
    )
    rig.cache = rig.pool.cache()
    truncate(rig, slot, 60)
    _check(rig, slot)
    forged = kvp.KVCache(
        rig.cache.handle, rig.cache.epoch, rig.cache.lengths.at[slot].set(20), rig.spec
    )
    x = jnp.full((1, 2, 64), 9.0)
    fails(
        "position 20 on are needed, but those below 32",
        lambda: kvp.append_kv(forged, x, x, make_batch([(slot, 1)]), layer=0).epoch,
    )


def test_it_cannot_drop_more_than_it_has(rig) -> None:
    rig, slot = rig
    with pytest.raises(ValueError, match="cannot drop its tokens below 90, it has 80"):
        drop(rig, slot, 90)  # more than the slot has room for
    with pytest.raises(ValueError, match="named twice"):
        rig.pool.drop_before(rig.cache, [slot, slot], 20)
    with pytest.raises(ValueError, match="does not exist"):
        drop(rig, 99, 20)
    with pytest.raises(kvp.KVPageError, match="acquire it first"):
        drop(rig, (slot + 1) % rig.spec.max_slots, 0)
    with pytest.raises(ValueError, match="2 slots, but 1 num_tokens"):
        rig.pool.drop_before(rig.cache, [slot, slot], [20])
    empty = rig.acquire(40)
    with pytest.raises(RUN_TIME_ERRORS, match="cannot drop its tokens below 32, it has 0"):
        jax.block_until_ready(rig.pool.drop_before(rig.cache, empty, 32))
    rig.cache = rig.pool.cache()  # the drop did not run
    assert len(mapped(rig, empty)) == 3
    rig.write({empty: 40})
    _check(rig, empty)
    _check(rig, slot)


def test_what_others_share_stays_with_them(rig) -> None:
    rig, slot = rig
    other = fork(rig, slot, 1)[0]
    before = rig.pool.stats().blocks_mapped
    ranges = len(rig.pool.block_map(slot))
    for target, blocks in ((slot, before), (other, before - 2 * ranges)):
        drop(rig, target, 40)
        rig.pool.check(rig.cache)
        assert rig.pool.stats().blocks_mapped == blocks
        out, _, want, _ = rig.step([(slot, 1), (other, 1)], _WINDOWED)
        np.testing.assert_allclose(out[:, :2], want[:, :2], atol=1e-4)
    with pytest.raises(kvp.KVPageError, match="has dropped its tokens below 32"):
        rig.pool.fork(rig.cache, slot, 1)
    slots, rig.cache = rig.pool.reorder(rig.cache, [slot, other], [1, 0])
    assert slots == [other, slot]
    # The tail that both still share is copied; the dropped beginning is not needed.
    truncate(rig, other, 60)
    _check(rig, other)
    _check(rig, slot)
    rig.release(slot, other)
    rig.pool.check(rig.cache)
    rig.pool.trim()
    assert rig.pool.stats().blocks_free == 64


def test_a_released_slot_keeps_nothing_and_is_whole_again(rig) -> None:
    rig, slot = rig
    drop(rig, slot, 51)
    rig.release(slot)
    rig.pool.check(rig.cache)
    for _ in range(rig.spec.max_slots):  # each slot once
        other = rig.acquire(70)
        assert len(mapped(rig, other)) == 5
        rig.write({other: 70})
        jax.block_until_ready(kvp.read_kv(rig.cache, [other], 0))
        rig.release(other)
        rig.pool.check(rig.cache)
        rig.pool.trim()


def test_order_with_queued_programs(rig) -> None:
    """The host decides at once; memory is freed when the queued program runs, after its readers."""
    rig, slot = rig
    if rig.pool._native.mirrored:
        pytest.skip("on a device the call waits")
    _attend(rig, slot, None).block_until_ready()
    want = np.asarray(_attend(rig, slot, None))
    drop(rig, slot, 16)  # compiles everything
    rig.pool.check(rig.cache)
    before = rig.pool.stats()
    rig.cache = kvp.after(rig.cache, busy(1))
    drop(rig, slot, 51)
    drop(rig, slot, 64)
    assert rig.pool.stats().blocks_mapped == before.blocks_mapped
    with pytest.raises(kvp.KVPageError, match="below 64"):
        rig.pool.truncate(rig.cache, slot, 63)
    rig.release(slot)
    rig.pool.check(rig.cache)
    after = rig.pool.stats()
    assert (after.waits, after.blocks_mapped) == (before.waits, 0)
    assert want.size


def test_a_drop_whose_program_fails_never_happened(rig) -> None:
    rig, slot = rig
    bad = kvp.set_lengths(kvp.after(rig.cache, busy(1)), [slot], [99])
    with pytest.raises(RUN_TIME_ERRORS):
        rig.pool.check(rig.pool.drop_before(bad, slot, 51))
    rig.cache = rig.pool.cache()
    if not rig.pool._native.mirrored:
        assert rig.pool.slot_table()[0].dropped_tokens == 0
        assert fork(rig, slot, 1)
        jax.block_until_ready(kvp.read_kv(rig.cache, [slot], 0))
    _check(rig, slot)


def test_a_call_that_cannot_be_queued_changes_nothing(rig, monkeypatch) -> None:
    rig, slot = rig
    drop(rig, slot, 16)

    def broken(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rig.pool._queue, "run", broken)
        with pytest.raises(KeyboardInterrupt):
            drop(rig, slot, 51)
    assert rig.pool.slot_table()[0].dropped_tokens == 16
    assert mapped(rig, slot) == [1, 2, 3, 4]
    _check(rig, slot)


def test_what_was_dropped_stays_dropped_in_a_new_generation(rig) -> None:
    rig, slot = rig
    drop(rig, slot, 51)
    rig.pool.check(rig.cache)
    rig.cache = rig.pool.cache()
    fails("below 48 were dropped", lambda: kvp.read_kv(rig.cache, [slot], 0))
    with pytest.raises(kvp.KVPageError, match="has dropped its tokens"):
        rig.pool.fork(rig.cache, slot, 1)
    _check(rig, slot)


def test_views_show_zeros(make_pool) -> None:
    rig, slot = filled(pool_of(make_pool, spec_of("per_layer"), 64, poison=True), 70)
    early, _ = rig.pool.view(0, slot)
    drop(rig, slot, 51)
    rig.pool.check(rig.cache)
    late, _ = rig.pool.view(0, slot)
    want, _ = rig.model.context(slot, 0)
    for view in (early, late):
        shown = np.asarray(view)
        np.testing.assert_array_equal(shown[48:70], want[48:70])
        assert not shown[:48].any()
        assert not shown[70:].any()
    del early, late, view
    _check(rig, slot)


def test_it_is_not_found_by_its_tokens(make_pool, layout: str) -> None:
    pool = pool_of(make_pool, spec_of(layout), 64)
    rig, ids = Rig(pool), list(range(70))
    slot, cached, rig.cache = pool.acquire_prefix(rig.cache, ids)
    assert cached == 0
    rig.model.acquire(slot)
    rig.write({slot: 70})
    pool.commit(slot, ids)
    pool.check(rig.cache)
    assert pool.find_prefix(ids) > 0
    other, cached, rig.cache = pool.acquire_prefix(rig.cache, ids[:40])
    assert cached == 39  # shares two blocks
    rig.model.fork(slot, other, 39)
    drop(rig, slot, 51)
    pool.check(rig.cache)
    assert pool.find_prefix(ids) <= 40, "what the other one has may still be found"
    _check(rig, slot)
    pool.commit(slot, [1, 2])
    rig.release(slot)
    pool.check(rig.cache)
    assert pool.find_prefix(ids) <= 40
    # A request for the same tokens gets a complete slot with the right contents.
    again, cached, rig.cache = pool.acquire_prefix(rig.cache, ids)
    assert cached <= 40
    assert len(mapped(rig, again)) == 5
    rig.cache = pool.release(rig.cache, [again, other])
    pool.check(rig.cache)
    pool.evict(64 * rig.spec.block_bytes)
    pool.trim()
    assert pool.stats().blocks_free == 64
