"""Every bad input gives a clear error, changes nothing, and leaves a pool whose next cache works
for everybody else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import RUN_TIME_ERRORS, Line, busy, make_batch

import jax_kvpage as kvp

_LAYERS, _KV_HEADS, _DIM, _SLOTS, _MAX = 3, 2, 64, 4, 256


@pytest.fixture(params=["fused", "per_layer"])
def line(request: pytest.FixtureRequest, make_pool) -> Iterator[Line]:
    """Two sequences at work. Afterwards, whatever the test did to them, they go on as if nothing
    had happened.
    """
    spec = kvp.CacheSpec(
        _LAYERS,
        _KV_HEADS,
        _DIM,
        _SLOTS,
        _MAX,
        dtype=jnp.float32,
        layout=request.param,
        block_tokens=32,
    )
    line = Line(make_pool(spec, poison=True), group=2)
    slots = [line.acquire(60), line.acquire(60)]
    line.write({slots[0]: 20, slots[1]: 33})
    jax.block_until_ready(line.cache)
    before = line.pool.stats()
    yield line
    line.cache = line.pool.cache()
    line.check_lengths()
    after = line.pool.stats()
    assert (after.blocks_mapped, after.blocks_free) == (before.blocks_mapped, before.blocks_free)
    out, _, want, _ = line.step([(slots[0], 5), (slots[1], 2)])
    np.testing.assert_allclose(out, want, atol=1e-4)


def _kv(tokens: int = 8) -> tuple[jax.Array, jax.Array]:
    x = jnp.full((tokens, _KV_HEADS, _DIM), jnp.nan)
    return x, x


def _q(tokens: int = 8) -> jax.Array:
    return jnp.ones((tokens, 2 * _KV_HEADS, _DIM))


def _live(line: Line) -> list[int]:
    return sorted(line.model.lengths)


def _fails(pattern: str, call: Callable[[], object]) -> None:
    """The program fails at run time with this message, case ignored."""
    status = "(INVALID_ARGUMENT|FAILED_PRECONDITION|OUT_OF_RANGE): "
    with pytest.raises(RUN_TIME_ERRORS, match=f"(?is){status}.*{pattern}"):
        jax.block_until_ready(call())


def _append(
    cache: kvp.KVCache, batch: kvp.Batch, layer: object = 0, tokens: int = 8
) -> kvp.KVCache:
    return kvp.append_kv(cache, *_kv(tokens), batch, layer=layer)


def _attend(cache: kvp.KVCache, batch: kvp.Batch, layer: object = 0, tokens: int = 8) -> jax.Array:
    return kvp.paged_attention(_q(tokens), cache, batch, layer=layer)


def test_stale_mutator(line: Line) -> None:
    old, slot = line.cache, _live(line)[0]
    batch = make_batch([(slot, 0)])
    new = kvp.advance(old, batch)
    epochs = int(old.epoch[0]), int(new.epoch[0])
    numbers = f"{epochs[0]}.*{epochs[1]}|{epochs[1]}.*{epochs[0]}"
    for call in (
        lambda: _append(old, batch),
        lambda: kvp.advance(old, batch),
        lambda: kvp.map_slots(old, jnp.asarray([slot]), jnp.asarray([64]))[0],
        lambda: kvp.set_lengths(old, jnp.asarray([slot]), jnp.asarray([1])),
        lambda: kvp.update_and_attend(_q(), *_kv(), old, batch, layer=0)[1],
    ):
        _fails(f"stale.*({numbers})", call)
        _fails(r"pool\.cache\(\)", call)


def test_readers_may_be_older_until_something_is_destroyed(line: Line) -> None:
    slots = _live(line)
    line.append([(slot, 3) for slot in slots])
    old, batch = line.cache, [make_batch([(slot, 3)]) for slot in slots]
    want = [np.asarray(_attend(old, b)) for b in batch]
    new = kvp.advance(kvp.advance(old, batch[0]), batch[1])
    np.testing.assert_array_equal(_attend(old, batch[0]), want[0])
    before = [line.model.lengths[slot] for slot in slots]
    lowered = kvp.set_lengths(new, jnp.asarray([slots[0]]), jnp.asarray([before[0]]))
    _fails("stale", lambda: _attend(old, batch[0]))
    np.testing.assert_array_equal(_attend(old, batch[1]), want[1])  # the other slot is as it was
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
    _fails("stale", lambda: _attend(old, make_batch([(slot, 1)])))
    line.cache = line.pool.cache()
    line.release(again)
    jax.block_until_ready(line.cache)
    line.pool.trim()


def test_older_lines_are_stale(line: Line) -> None:
    old = line.cache
    line.cache = line.pool.cache()
    _fails("stale|line", lambda: kvp.advance(old, make_batch([])))


def test_host_calls_with_a_stale_cache_change_nothing(line: Line) -> None:
    """Nobody knows the slot that a failed acquire took, so it must not stay taken."""
    old, slot = line.cache, _live(line)[0]
    jax.block_until_ready(kvp.advance(old, make_batch([])))
    before = line.pool.stats(), line.pool.slot_table()
    for _ in range(2 * _SLOTS):
        _fails("acquire.*stale", lambda: line.pool.acquire(old, 10)[1])
        _fails("release.*stale", lambda: line.pool.release(old, slot))
    line.cache = line.pool.cache()
    after = line.pool.stats(), line.pool.slot_table()
    assert after[1] == before[1]
    assert after[0].slots_occupied == before[0].slots_occupied
    line.pool.trim()


def test_waiting_for_a_release_that_failed(line: Line) -> None:
    """The release is queued behind a program that fails: waiting for it ends with that failure."""
    slot = line.acquire(100)
    cache = kvp.after(line.cache, busy(1))
    bad = _append(cache, make_batch([(slot, 1), (slot, 1)]))
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
    bad = kvp.advance(cache, make_batch([(_live(line)[0], 7)]))
    with pytest.raises(RUN_TIME_ERRORS, match="written"):
        line.pool.check(bad)


def test_implementations_that_are_not_there(line: Line) -> None:
    with pytest.raises(ValueError, match=r"cuda.*'cpu'.*implementation='xla'"):
        kvp.paged_attention(
            _q(), line.cache, make_batch([(_live(line)[0], 0)]), layer=0, implementation="cuda"
        )


def test_on_stale_allow_repeats_a_step(make_pool) -> None:
    spec = kvp.CacheSpec(_LAYERS, _KV_HEADS, _DIM, _SLOTS, _MAX, dtype=jnp.float32)
    pool = make_pool(spec, on_stale="allow")
    slots, cache = pool.acquire(pool.cache(), [40, 40])
    batch = make_batch([(slots[0], 4), (slots[1], 4)])
    k = jnp.ones((8, _KV_HEADS, _DIM))

    def step(cache: kvp.KVCache) -> tuple[jax.Array, kvp.KVCache]:
        for layer in range(_LAYERS):
            out, cache = kvp.update_and_attend(_q(), k, k, cache, batch, layer=layer)
        return out, kvp.advance(cache, batch)

    first, _ = step(cache)
    for _ in range(3):
        again, newest = step(cache)
        np.testing.assert_array_equal(again, first)
    lowered = kvp.set_lengths(newest, jnp.asarray([slots[0]]), jnp.asarray([0]))
    jax.block_until_ready(lowered)
    _fails("stale", lambda: step(cache))
    with pytest.raises(ValueError, match="on_stale"):
        kvp.KVPool(spec, "8MiB", on_stale="sometimes")


def test_closed_pool() -> None:
    spec = kvp.CacheSpec(
        _LAYERS, _KV_HEADS, _DIM, _SLOTS, _MAX, dtype=jnp.float32, layout="per_layer"
    )
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
    _fails("pool.*closed", lambda: _append(cache, batch))
    _fails("pool.*closed", lambda: kvp.advance(cache, batch))


def test_wrong_pool(line: Line, make_pool) -> None:
    spec = dataclasses.replace(line.spec, max_slots=_SLOTS + 1)
    other = make_pool(spec)
    theirs = other.cache()
    slot = _live(line)[0]
    for call in (lambda: other.acquire(line.cache, 1), lambda: line.pool.release(theirs, slot)):
        with pytest.raises(ValueError, match="pool"):
            call()
    batch = make_batch([(slot, 1)])
    # A program compiled for one spec, handed the handle of a pool of another.
    mixed = dataclasses.replace(line.cache, handle=theirs.handle)
    _fails(f"spec.*max_slots.*{_SLOTS}.*{_SLOTS + 1}", lambda: _append(mixed, batch))
    nobody = dataclasses.replace(line.cache, handle=jnp.asarray([10**6, 0], jnp.int32))
    _fails("no pool|unknown|does not exist|1000000", lambda: _append(nobody, batch))


def test_another_pool_of_the_same_spec(line: Line, make_pool) -> None:
    """Its caches fit the programs, but its slots are not this pool's slots."""
    other = make_pool(line.spec)
    slot, theirs = other.acquire(other.cache(), 10)

    def refuses(own: kvp.KVPool, stranger: kvp.KVCache) -> None:
        before = own.slot_table()
        _fails("cache belongs to pool", lambda: own.acquire(stranger, 1)[1])
        _fails("cache belongs to pool", lambda: own.release(stranger, slot))
        assert own.slot_table() == before

    refuses(line.pool, theirs)
    refuses(other, line.cache)
    # Neither call has touched the line of the pool whose cache was passed.
    jax.block_until_ready(kvp.advance(theirs, make_batch([(slot, 0)])))
    jax.block_until_ready(kvp.advance(line.cache, make_batch([])))
    line.pool.trim()


@pytest.mark.parametrize("op", ["append", "attend", "update", "advance"])
@pytest.mark.parametrize("case", ["free", "too large", "too small", "twice"])
def test_bad_slots_in_a_batch(line: Line, op: str, case: str) -> None:
    slots = _live(line)
    free = min(set(range(_SLOTS)) - set(slots))
    bad = {"free": free, "too large": _SLOTS, "too small": -2, "twice": slots[0]}[case]
    batch = make_batch([(slots[0], 1), (bad, 1), (slots[1], 1)])
    words = {"free": "free", "twice": "twice|duplicate|already"}.get(case, "range|invalid|0.*3")
    call = {
        "append": lambda: _append(line.cache, batch),
        "attend": lambda: _attend(line.cache, batch),
        "update": lambda: kvp.update_and_attend(_q(), *_kv(), line.cache, batch, layer=0)[0],
        "advance": lambda: kvp.advance(line.cache, batch),
    }[op]
    _fails(f"slot {bad}.*({words})", call)


@pytest.mark.parametrize("op", ["map_slots", "set_lengths"])
@pytest.mark.parametrize("case", ["free", "too large", "too small", "twice"])
def test_bad_slots_in_a_list(line: Line, op: str, case: str) -> None:
    slots = _live(line)
    free = min(set(range(_SLOTS)) - set(slots))
    bad = {"free": free, "too large": _SLOTS, "too small": -2, "twice": slots[0]}[case]
    ids = jnp.asarray([slots[0], bad], jnp.int32)
    values = jnp.asarray([20, 20], jnp.int32)
    _fails(f"slot {bad}", lambda: getattr(kvp, op)(line.cache, ids, values))


def test_writing_past_what_is_mapped(line: Line) -> None:
    """60 tokens were asked for and two blocks of 32 came, so 64 are there; 20 are used."""
    slot = _live(line)[0]
    _fails(
        f"slot {slot}.*65.*64",
        lambda: _append(line.cache, make_batch([(slot, 45)]), tokens=45),
    )


def test_reading_what_was_not_written(line: Line) -> None:
    slot = _live(line)[0]
    _fails(f"slot {slot}.*25.*20", lambda: _attend(line.cache, make_batch([(slot, 5)])))
    cache = _append(line.cache, make_batch([(slot, 5)]), layer=1)
    _fails(f"slot {slot}.*25.*20", lambda: _attend(cache, make_batch([(slot, 5)]), layer=0))


def test_a_new_line_forgets_what_was_not_advanced(line: Line) -> None:
    """The program that wrote those tokens may have failed halfway: nobody may count on them."""
    slot = _live(line)[0]
    batch = make_batch([(slot, 5)])
    line.append([(slot, 5)])
    jax.block_until_ready(_attend(line.cache, batch))
    line.cache = line.pool.cache()
    _fails(f"slot {slot}.*25.*20", lambda: _attend(line.cache, batch))
    _fails(f"slot {slot}.*25.*20", lambda: kvp.advance(line.cache, batch))


def test_past_max_seq_len(line: Line) -> None:
    slot = _live(line)[0]
    _fails(
        f"{_MAX + 1}.*{_MAX}",
        lambda: kvp.map_slots(line.cache, jnp.asarray([slot]), jnp.asarray([_MAX + 1])),
    )


def test_negative_token_counts(line: Line) -> None:
    slot = jnp.asarray([_live(line)[0]])
    _fails("-5", lambda: kvp.map_slots(line.cache, slot, jnp.asarray([-5])))
    _fails("-5", lambda: kvp.set_lengths(line.cache, slot, jnp.asarray([-5])))


@pytest.mark.parametrize("layer", [-1, _LAYERS, 10**9])
@pytest.mark.parametrize("op", [_append, _attend])
def test_layer_out_of_range(line: Line, layer: int, op: Callable[..., object]) -> None:
    batch = make_batch([(_live(line)[0], 1)])
    traced = jnp.asarray(layer, jnp.int32)
    with pytest.raises(ValueError, match=f"layer.*{layer}"):
        op(line.cache, batch, layer)
    _fails(f"layer.*{layer}.*{_LAYERS - 1}", lambda: op(line.cache, batch, traced))


@pytest.mark.parametrize(
    "offsets", [[1, 2, 3], [0, 3, 2], [0, 4, 9], [-1, 0, 1], [0, -3, 2], [0, 2**30, 2**31 - 1]]
)
@pytest.mark.parametrize("op", ["append", "attend", "advance"])
def test_malformed_offsets(line: Line, offsets: list[int], op: str) -> None:
    batch = kvp.Batch(
        slots=jnp.asarray(_live(line), jnp.int32), query_offsets=jnp.asarray(offsets, jnp.int32)
    )
    call = {
        "append": lambda: _append(line.cache, batch),
        "attend": lambda: _attend(line.cache, batch),
        "advance": lambda: kvp.advance(line.cache, batch),
    }[op]
    # `advance` has no token axis to compare the end with: what stops it is that nobody wrote so
    # much.
    _fails("offsets|written" if op == "advance" else "offsets", call)


def test_raising_a_length_past_what_is_written(line: Line) -> None:
    slot = _live(line)[0]
    ids = jnp.asarray([slot])
    _fails(f"slot {slot}.*21.*20", lambda: kvp.set_lengths(line.cache, ids, jnp.asarray([21])))


def test_advancing_past_what_is_written(line: Line) -> None:
    """Layer 1 is missing: advancing would let everybody read whatever was there before."""
    slot = _live(line)[0]
    batch = make_batch([(slot, 3)])
    k = jnp.zeros((8, _KV_HEADS, _DIM))
    cache = line.cache
    for layer in (0, 2):
        cache = kvp.append_kv(cache, k, k, batch, layer=layer)
    _fails(f"slot {slot}.*(layer|written)", lambda: kvp.advance(cache, batch))


def test_a_failed_program_writes_nothing(line: Line) -> None:
    """The batch names one good and one bad slot: the good one's memory is not touched either."""
    slots = _live(line)
    bad = make_batch([(slots[0], 1), (slots[0], 1), (slots[1], 1)])
    for _ in range(3):
        _fails("slot", lambda: _append(line.cache, bad))


def test_failures_do_not_add_up(line: Line) -> None:
    """Pins taken by failed handlers would keep slots from draining, and close from returning."""
    slot = line.acquire(30)
    for _ in range(20):
        _fails("slot", lambda: _attend(line.cache, make_batch([(slot, 1), (99, 1)])))
    line.cache = line.pool.cache()
    line.release(slot)
    jax.block_until_ready(line.cache)
    assert line.pool.stats().blocks_draining == 0
    line.pool.trim()


def test_spec_mistakes_come_together() -> None:
    with pytest.raises(ValueError) as caught:
        kvp.CacheSpec(0, 2, 64, -1, 128, dtype=jnp.int8, layout="ring", block_tokens=17)
    for word in ("num_layers", "max_slots", "dtype", "layout", "block_tokens", "17"):
        assert word in str(caught.value)


def _reasons(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def test_trace_time_mistakes_come_together(line: Line) -> None:
    batch = make_batch([(0, 1)])
    k, v = _kv()
    text = _reasons(
        lambda: kvp.paged_attention(
            jnp.ones((8, 3, 32)), line.cache, batch, layer=7, sinks=jnp.ones(9), sliding_window=0
        )
    )
    for word in ("multiple", "32", "layer", "sinks", "sliding_window"):
        assert word in text, text
    text = _reasons(lambda: kvp.append_kv(line.cache, k[:4], v[:, :1], batch, layer=0))
    assert "k" in text
    assert "v" in text
    text = _reasons(
        lambda: kvp.update_and_attend(_q(6), k, v, line.cache, batch, layer=0, implementation="tpu")
    )
    assert "tpu" in text
    assert "6" in text
    text = _reasons(
        lambda: kvp.advance(
            line.cache,
            kvp.Batch(slots=jnp.zeros(2, jnp.int32), query_offsets=jnp.zeros(2, jnp.int32)),
        )
    )
    assert "query_offsets" in text
    text = _reasons(
        lambda: kvp.map_slots(line.cache, jnp.zeros(2, jnp.int32), jnp.zeros(3, jnp.int32))
    )
    assert "num_tokens" in text
    text = _reasons(lambda: kvp.set_lengths(line.cache, jnp.zeros(2), jnp.zeros(2, jnp.int32)))
    assert "slots" in text


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_soft_caps_that_cannot_be(line: Line, value: float) -> None:
    text = _reasons(
        lambda: kvp.paged_attention(
            _q(), line.cache, make_batch([]), layer=0, logits_soft_cap=value
        )
    )
    assert "soft_cap" in text
