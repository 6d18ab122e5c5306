"""Every bad input gives a clear error, changes nothing, and leaves a pool whose next cache works
for all other sequences.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import pytest
from harness import Rig, make_batch, settle
from mistakes import (
    DIM,
    KV_HEADS,
    LAYERS,
    MAX,
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
from subprocesses import run_python

import jax_kvpage as kvp


@pytest.fixture(params=["fused", "per_layer"])
def rig(request: pytest.FixtureRequest, make_pool) -> Iterator[Rig]:
    yield from two_sequences(make_pool(make_spec(request.param), poison=True))


@pytest.mark.covering(2)
@pytest.mark.parametrize("op", ["append", "attend", "update", "advance"])
@pytest.mark.parametrize("case", ["free", "too large", "too small", "twice"])
def test_bad_slots_in_a_batch(rig: Rig, op: str, case: str) -> None:
    slots = live(rig)
    free = min(set(range(SLOTS)) - set(slots))
    bad = {"free": free, "too large": SLOTS, "too small": -2, "twice": slots[0]}[case]
    batch = make_batch([(slots[0], 1), (bad, 1), (slots[1], 1)])
    words = {"free": "free", "twice": "twice|duplicate|already"}.get(case, "range|invalid|0.*3")
    call = {
        "append": lambda: append(rig.cache, batch),
        "attend": lambda: attend(rig.cache, batch),
        "update": lambda: kvp.update_and_attend(q(), *kv(), rig.cache, batch, layer=0)[0],
        "advance": lambda: kvp.advance(rig.cache, batch),
    }[op]
    fails(f"slot {bad}.*({words})", call)


@pytest.mark.covering(2)
@pytest.mark.parametrize("op", ["map_slots", "set_lengths"])
@pytest.mark.parametrize("case", ["free", "too large", "too small", "twice"])
def test_bad_slots_in_a_list(rig: Rig, op: str, case: str) -> None:
    slots = live(rig)
    free = min(set(range(SLOTS)) - set(slots))
    bad = {"free": free, "too large": SLOTS, "too small": -2, "twice": slots[0]}[case]
    ids = jnp.asarray([slots[0], bad], jnp.int32)
    values = jnp.asarray([20, 20], jnp.int32)
    fails(f"slot {bad}", lambda: getattr(kvp, op)(rig.cache, ids, values))


def test_writing_past_what_is_mapped(rig: Rig) -> None:
    """60 tokens were requested, so two blocks of 32 and room for 64 tokens are mapped; 20 are
    used.
    """
    slot = live(rig)[0]
    fails(
        f"slot {slot}.*65.*64",
        lambda: append(rig.cache, make_batch([(slot, 45)]), tokens=45),
    )


def test_reading_what_was_not_written(rig: Rig) -> None:
    slot = live(rig)[0]
    fails(f"slot {slot}.*25.*20", lambda: attend(rig.cache, make_batch([(slot, 5)])))
    cache = append(rig.cache, make_batch([(slot, 5)]), layer=1)
    fails(f"slot {slot}.*25.*20", lambda: attend(cache, make_batch([(slot, 5)]), layer=0))


def test_a_new_generation_forgets_what_was_not_advanced(rig: Rig) -> None:
    """The program that wrote those tokens may have failed midway, so they do not count."""
    slot = live(rig)[0]
    batch = make_batch([(slot, 5)])
    rig.append([(slot, 5)])
    jax.block_until_ready(attend(rig.cache, batch))
    rig.cache = rig.pool.cache()
    fails(f"slot {slot}.*25.*20", lambda: attend(rig.cache, batch))
    fails(f"slot {slot}.*25.*20", lambda: kvp.advance(rig.cache, batch))


@pytest.mark.parametrize("tokens", [MAX + 1, 2**31 - 1])
def test_past_max_seq_len(rig: Rig, tokens: int) -> None:
    """A full sequence does not fail the step of the others."""
    full, other = slots = live(rig)
    before = rig.pool.block_map(full)
    program = jax.jit(kvp.map_slots)
    rig.cache, ok = program(rig.cache, jnp.asarray([*slots, -1]), jnp.asarray([tokens, 64, tokens]))
    assert ok.tolist() == [False, True, True]
    rig.cache, ok = program(rig.cache, jnp.asarray([full, -1, -1]), jnp.full(3, tokens))
    assert ok.tolist() == [False, True, True]
    assert rig.pool.block_map(full) == before
    batch = make_batch([(full, 1), (other, 1)]).mask(jnp.asarray([False, True]))
    settle(append(rig.cache, batch))


def test_negative_token_counts(rig: Rig) -> None:
    slot = jnp.asarray([live(rig)[0]])
    fails("-5", lambda: kvp.map_slots(rig.cache, slot, jnp.asarray([-5])))
    fails("-5", lambda: kvp.set_lengths(rig.cache, slot, jnp.asarray([-5])))


@pytest.mark.covering(2)
@pytest.mark.parametrize("layer", [-1, LAYERS, 10**9])
@pytest.mark.parametrize("op", [append, attend])
def test_layer_out_of_range(rig: Rig, layer: int, op: Callable[..., object]) -> None:
    batch = make_batch([(live(rig)[0], 1)])
    traced = jnp.asarray(layer, jnp.int32)
    with pytest.raises(ValueError, match=f"layer.*{layer}"):
        op(rig.cache, batch, layer)
    fails(f"layer.*{layer}.*{LAYERS - 1}", lambda: op(rig.cache, batch, traced))


@pytest.mark.covering(2)
@pytest.mark.parametrize(
    "offsets", [[1, 2, 3], [0, 3, 2], [0, 4, 9], [-1, 0, 1], [0, -3, 2], [0, 2**30, 2**31 - 1]]
)
@pytest.mark.parametrize("op", ["append", "attend", "advance"])
def test_malformed_offsets(rig: Rig, offsets: list[int], op: str) -> None:
    batch = kvp.Batch(
        slots=jnp.asarray(live(rig), jnp.int32), query_offsets=jnp.asarray(offsets, jnp.int32)
    )
    call = {
        "append": lambda: append(rig.cache, batch),
        "attend": lambda: attend(rig.cache, batch),
        "advance": lambda: kvp.advance(rig.cache, batch),
    }[op]
    # `advance` has no token axis to check the end against: it fails because fewer tokens were
    # written.
    fails("offsets|written" if op == "advance" else "offsets", call)


def test_raising_a_length_past_what_is_written(rig: Rig) -> None:
    slot = live(rig)[0]
    ids = jnp.asarray([slot])
    fails(f"slot {slot}.*21.*20", lambda: kvp.set_lengths(rig.cache, ids, jnp.asarray([21])))


@pytest.mark.covering(2)
@pytest.mark.parametrize("op", ["append", "update", "attend", "set_lengths", "advance"])
def test_a_length_changed_in_the_pytree_shows_nothing(rig: Rig, op: str) -> None:
    """The slot's memory holds an earlier request's tokens, and the cache's length includes them."""
    earlier = rig.acquire(60)
    rig.write({earlier: 50})
    rig.release(earlier)
    slot = rig.acquire(60)
    try:
        cache = dataclasses.replace(rig.cache, lengths=rig.cache.lengths.at[slot].set(40))
        batch = make_batch([(slot, 1)])
        call: Callable[[], object] = {
            "append": lambda: append(cache, batch),
            "update": lambda: kvp.update_and_attend(q(), *kv(), cache, batch, layer=0)[0],
            "attend": lambda: attend(cache, batch),
            "set_lengths": lambda: kvp.set_lengths(cache, jnp.asarray([slot]), jnp.asarray([30])),
            "advance": lambda: kvp.advance(cache, batch),
        }[op]
        fails(f"slot {slot}.*(30|4[01]) tokens.*\\b0\\b", call)
    finally:
        rig.cache = rig.pool.cache()
        assert rig.cache.lengths[slot] == 0
        rig.release(slot)
        jax.block_until_ready(rig.cache)
        rig.pool.trim()


def test_room_for_a_slot_that_nobody_has(rig: Rig) -> None:
    free = min(set(range(SLOTS)) - set(live(rig)))
    cache = dataclasses.replace(rig.cache, lengths=rig.cache.lengths.at[free].set(0))
    fails(f"slot {free}.*free", lambda: kvp.map_slots(cache, jnp.asarray([free]), 16))


def test_a_cache_of_another_process_is_refused(tmp_path: pathlib.Path) -> None:
    """Every process numbers its pools from a different random number on."""
    file = tmp_path / "cache"
    code = """
        import pickle, sys
        import jax
        import jax_kvpage as kvp
        spec = kvp.CacheSpec(1, 1, 16, max_slots=2, max_seq_len=64)
        pools = [kvp.KVPool(spec, "1MiB") for _ in range(3)]
        cache = pools[1].cache()
        slot, cache = pools[1].acquire(cache, 16)
        if len(sys.argv) == 2:
            open(sys.argv[1], "wb").write(pickle.dumps(cache))
        else:
            other = pickle.loads(open(sys.argv[2], "rb").read())
            try:
                pools[1].check(kvp.advance(other, kvp.Batch.decode([slot])))
            except (ValueError, jax.errors.JaxRuntimeError) as error:
                assert f"there is no pool {other.handle[0]} in this process" in str(error), error
            else:
                raise SystemExit("accepted")
        for pool in pools:
            pool.close()
    """
    run_python(code, str(file))
    run_python(code, "read", str(file))


def test_a_forked_child_numbers_its_pools_anew() -> None:
    """The child's pools must not get the numbers of pools that the parent creates after the
    fork.
    """
    run_python("""
        import os
        import jax_kvpage as kvp
        from jax_kvpage import _native
        spec = kvp.CacheSpec(1, 1, 16, max_slots=2, max_seq_len=64).resolve("cpu")
        options = (False, False, False, "cpu", 0)
        make = lambda: _native.Pool(spec.as_ints(), spec.block_bytes, 2**20, *options)
        pools = [make()]
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, str(make().id).encode())
            os._exit(0)
        os.waitpid(child, 0)
        pools.append(make())
        ids = [pool.id for pool in pools]
        assert all(0 < one < 2**31 for one in ids) and ids[1] == ids[0] + 1, ids
        assert int(os.read(read, 99)) not in ids
    """)


def test_advancing_past_what_is_written(rig: Rig) -> None:
    """Layer 1 is missing: advancing would expose old memory contents."""
    slot = live(rig)[0]
    batch = make_batch([(slot, 3)])
    k = jnp.zeros((8, KV_HEADS, DIM))
    cache = rig.cache
    for layer in (0, 2):
        cache = kvp.append_kv(cache, k, k, batch, layer=layer)
    runs = "written in layer 0: 23, layer 1: 20, layer 2: 23"
    fails(f"slot {slot}: 23 tokens wanted, {runs};", lambda: kvp.advance(cache, batch))


def test_a_sum_of_tokens_beyond_int32(rig: Rig) -> None:
    slot = live(rig)[0]
    batch = kvp.Batch(slots=jnp.asarray([slot]), query_offsets=jnp.asarray([0, 2**31 - 1]))
    fails(f"slot {slot}.*{20 + 2**31 - 1} tokens", lambda: kvp.advance(rig.cache, batch))


def test_a_failed_program_writes_nothing(rig: Rig) -> None:
    """The batch names a good and a bad slot: the good one's memory is not modified either."""
    slots = live(rig)
    bad = make_batch([(slots[0], 1), (slots[0], 1), (slots[1], 1)])
    for _ in range(3):
        fails("slot", lambda: append(rig.cache, bad))


def test_failures_do_not_add_up(rig: Rig) -> None:
    """Pins left by failed handlers would keep slots from draining, and close from returning."""
    slot = rig.acquire(30)
    for _ in range(20):
        fails("slot", lambda: attend(rig.cache, make_batch([(slot, 1), (99, 1)])))
    rig.cache = rig.pool.cache()
    rig.release(slot)
    jax.block_until_ready(rig.cache)
    assert rig.pool.stats().blocks_draining == 0
    rig.pool.trim()


def test_spec_mistakes_come_together() -> None:
    with pytest.raises(ValueError) as caught:
        kvp.CacheSpec(0, 2, 64, -1, 128, dtype=jnp.int16, layout="ring", block_tokens=17)
    for word in ("num_layers", "max_slots", "dtype", "layout", "block_tokens", "17"):
        assert word in str(caught.value)


def _reasons(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def test_trace_time_mistakes_come_together(rig: Rig) -> None:
    batch = make_batch([(0, 1)])
    k, v = kv()
    text = _reasons(
        lambda: kvp.paged_attention(
            jnp.ones((8, 3, 32)), rig.cache, batch, layer=7, sinks=jnp.ones(9), sliding_window=0
        )
    )
    for word in ("multiple", "32", "layer", "sinks", "sliding_window"):
        assert word in text, text
    text = _reasons(lambda: kvp.append_kv(rig.cache, k[:4], v[:, :1], batch, layer=0))
    assert "k" in text
    assert "v" in text
    text = _reasons(
        lambda: kvp.update_and_attend(q(6), k, v, rig.cache, batch, layer=0, implementation="tpu")
    )
    assert "tpu" in text
    assert "6" in text
    text = _reasons(
        lambda: kvp.advance(
            rig.cache,
            kvp.Batch(slots=jnp.zeros(2, jnp.int32), query_offsets=jnp.zeros(2, jnp.int32)),
        )
    )
    assert "query_offsets" in text
    text = _reasons(
        lambda: kvp.map_slots(rig.cache, jnp.zeros(2, jnp.int32), jnp.zeros(3, jnp.int32))
    )
    assert "num_tokens" in text
    text = _reasons(lambda: kvp.set_lengths(rig.cache, jnp.zeros(2), jnp.zeros(2, jnp.int32)))
    assert "slots" in text


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_soft_caps_that_cannot_be(rig: Rig, value: float) -> None:
    text = _reasons(
        lambda: kvp.paged_attention(q(), rig.cache, make_batch([]), layer=0, logits_soft_cap=value)
    )
    assert "soft_cap" in text
