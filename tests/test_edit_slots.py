"""edit_slots, the op behind the host calls: opcodes, copies of stored tokens, refusals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Rig, make_batch
from mistakes import fails, make_spec, two_sequences

import jax_kvpage as kvp
from jax_kvpage.ops.edit_slots import OCCUPY, SET_LENGTH, VACATE, edit_slots

_LAYERS, _HEADS, _DIM, _BLOCK = 2, 2, 64, 32


def edit(
    cache: kvp.KVCache,
    edits: list[tuple[int, int, int]],
    copies: Sequence[tuple[int, int, int, int]] = (),
) -> kvp.KVCache:
    return edit_slots(
        cache,
        cache.handle,
        np.asarray([(*row, -1) for row in edits], np.int32).reshape(-1, 4),
        np.asarray(copies, np.int32).reshape(-1, 4),
        "acquire",
    )


@pytest.fixture(params=["fused", "per_layer"])
def rig(request: pytest.FixtureRequest, make_pool) -> Iterator[Rig]:
    """Slots 0 and 1 with 20 and 33 tokens, which must still work after each test."""
    yield from two_sequences(make_pool(make_spec(request.param)))


def drop(rig: Rig, slot: int) -> None:
    """Releases a slot and frees its blocks, because the fixture counts them."""
    rig.release(slot)
    jax.block_until_ready(rig.cache)
    rig.pool.trim()


def lengths(cache: kvp.KVCache) -> list[int]:
    return np.asarray(cache.lengths).tolist()


def test_verbs_queue_it(make_pool) -> None:
    """acquire sets length 0 and release -1; both increment the epoch."""
    pool = make_pool(make_spec())
    start = pool.cache()
    slots, cache = pool.acquire(start, [10, 20, 5])
    assert [lengths(cache)[slot] for slot in slots] == [0, 0, 0]
    assert int(cache.epoch[0]) == int(start.epoch[0]) + 1
    cache = pool.release(cache, slots[1:])
    assert [lengths(cache)[slot] for slot in slots] == [0, -1, -1]
    pool.check(cache)


def test_set_length_is_destructive(rig: Rig) -> None:
    old, slot = rig.cache, 1
    rig.cache = edit(rig.cache, [(SET_LENGTH, slot, 10), (OCCUPY, -1, 0)])
    assert lengths(rig.cache)[:2] == [20, 10]
    rig.model.truncate(slot, 10)
    batch = make_batch([(slot, 1)])
    q = jnp.ones((1, 4, _DIM))
    fails("stale cache", lambda: kvp.paged_attention(q, old, batch, layer=0))
    out, _, want, _ = rig.step([(0, 2), (slot, 3)])
    np.testing.assert_allclose(out, want, atol=1e-4)


def test_set_length_to_the_same_length_is_not(rig: Rig) -> None:
    kept = edit(rig.cache, [(SET_LENGTH, 0, 20)])
    assert lengths(kept) == lengths(rig.cache)
    rig.cache = kept


def _filled(make_pool, dtype: object, layout: str, tokens: int) -> tuple[Rig, int]:
    spec = kvp.CacheSpec(
        _LAYERS, _HEADS, _DIM, 4, 256, dtype=dtype, layout=layout, block_tokens=_BLOCK
    )
    rig = Rig(make_pool(spec), group=2)
    slot = rig.acquire(tokens + 1)
    rig.write({slot: tokens})
    return rig, slot


def _next_tokens(rig: Rig, slots: list[int]) -> np.ndarray:
    """Returns the attention of one new token, the same in every slot, over the whole context."""
    rng = np.random.default_rng(5)

    def tile(x: np.ndarray) -> jax.Array:
        return jnp.asarray(np.repeat(x, len(slots), 1))

    shape = (_LAYERS, 1, _HEADS, _DIM)
    q = tile(rng.standard_normal((_LAYERS, 1, 2 * _HEADS, _DIM)).astype(np.float32))
    k, v = (tile(rng.standard_normal(shape).astype(np.float32)) for _ in range(2))
    batch = kvp.Batch.decode(slots)
    cache, outs = rig.cache, []
    for layer in range(_LAYERS):
        out, cache = kvp.update_and_attend(q[layer], k[layer], v[layer], cache, batch, layer=layer)
        outs.append(out)
    rig.cache = cache
    return np.stack([np.asarray(out, np.float32) for out in outs])


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8], ids=lambda d: d.__name__)
def test_copied_tokens_are_the_same(make_pool, dtype: object, layout: str) -> None:
    """Copies pieces that end within, before and after block boundaries, and into two slots at
    once.
    """
    tokens = 2 * _BLOCK + 7
    rig, source = _filled(make_pool, dtype, layout, tokens)
    first, second = rig.acquire(tokens + 1), rig.acquire(tokens + 1)
    rig.cache = edit(rig.cache, [], [(source, first, 0, 13), (source, second, 0, tokens)])
    for begin, end in [(13, _BLOCK), (_BLOCK, _BLOCK + 1), (_BLOCK - 3, tokens)]:
        copy = (source, first, begin, end - begin)
        rig.cache = edit(rig.cache, [], [copy, (-1, -1, -1, -1)])
    targets = [first, second]
    rig.cache = kvp.advance(rig.cache, kvp.Batch.from_lengths(targets, [tokens, tokens]))
    assert [lengths(rig.cache)[slot] for slot in targets] == [tokens, tokens]
    out = _next_tokens(rig, [source, first, second])
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out[:, 1], out[:, 0])
    np.testing.assert_array_equal(out[:, 2], out[:, 0])


def test_a_copy_sees_the_edits_of_its_list(rig: Rig) -> None:
    """A length that was lowered earlier in the list limits what can be copied."""
    target = rig.acquire(40)
    lowered = [(SET_LENGTH, 1, 10)]
    fails(
        "11 tokens wanted, written in layers 0..2: 10",
        lambda: edit(rig.cache, lowered, [(1, target, 0, 11)]),
    )
    rig.cache = edit(rig.cache, lowered, [(1, target, 0, 10)])
    rig.model.truncate(1, 10)
    rig.cache = kvp.advance(rig.cache, kvp.Batch.from_lengths([target], [10]))
    assert lengths(rig.cache)[target] == 10
    drop(rig, target)


def test_a_copy_is_destructive(rig: Rig) -> None:
    target = rig.acquire(40)
    old = rig.cache
    rig.cache = edit(rig.cache, [], [(0, target, 0, 5)])
    none = make_batch([(target, 0)])
    q = jnp.ones((0, 4, _DIM))
    fails("stale cache", lambda: (kvp.paged_attention(q, old, none, layer=0), old.epoch))
    drop(rig, target)


@pytest.mark.parametrize(
    ("edits", "copies", "words"),
    [
        ([(SET_LENGTH, 4, 0)], [], "slot 4 does not exist"),
        ([(SET_LENGTH, 0, 1), (SET_LENGTH, 0, 1)], [], "slot 0 is named twice"),
        ([(SET_LENGTH, 0, 21)], [], "length 21 wanted, it is 20"),
        ([(SET_LENGTH, 0, -1)], [], "length -1 wanted"),
        ([(SET_LENGTH, 3, 0)], [], "slot 3 is free in this cache"),
        ([(OCCUPY, 0, 0)], [], "slot 0 is already occupied in this cache"),
        ([(OCCUPY, 3, 0)], [], "slot 3 is free in the pool"),
        ([(VACATE, 3, 0)], [], "slot 3 is free in this cache"),
        ([(VACATE, 0, 0)], [], "slot 0 was not released by the host"),
        ([(9, 0, 0)], [], "no edit with opcode 9"),
        ([], [(0, 4, 0, 1)], "slot 4 does not exist"),
        ([], [(-2, 1, 0, 1)], "slot -2 does not exist"),
        ([], [(0, 3, 0, 1)], "slot 3 is free in this cache"),
        ([], [(0, 1, -1, 1)], "the copy into it takes 1 tokens from token -1"),
        ([], [(0, 1, 1, -1)], "takes -1 tokens from token 1"),
        ([], [(0, 1, 250, 7)], "257 tokens wanted, max_seq_len is 256"),
        ([], [(0, 1, 0, 65)], "slot 0: 65 tokens wanted, 64 mapped"),
        ([], [(0, 1, 0, 21)], "slot 0: 21 tokens wanted, written in layers 0..2: 20"),
        (
            [],
            [(1, 0, 21, 2)],
            "slot 0: 21 tokens wanted, written in layers 0..2: 20",
        ),  # would leave a gap
        ([], [(0, 1, 0, 2), (0, 1, 2, 2)], "slot 1 is the target of two copies"),
        ([], [(0, 1, 0, 2), (1, 0, 0, 2)], "is the source and the target"),
        ([], [(0, 0, 0, 2)], "slot 0 is the source and the target"),
        (
            [(SET_LENGTH, 1, 3)],
            [(0, 1, 4, 2)],
            "slot 1: 4 tokens wanted, written in layers 0..2: 3",
        ),
    ],
)
def test_refusals_change_nothing(rig: Rig, edits, copies, words: str) -> None:
    fails(f"acquire: .*{words}", lambda: edit(rig.cache, edits, copies).epoch)


def test_an_older_cache_is_refused(rig: Rig) -> None:
    old = rig.cache
    rig.cache = edit(rig.cache, [(OCCUPY, -1, 0)])
    fails("acquire: stale cache", lambda: edit(old, [(SET_LENGTH, 0, 1)]).epoch)


def test_another_pools_cache_is_refused(rig: Rig, make_pool) -> None:
    other = make_pool(make_spec(rig.spec.layout)).cache()
    none = np.zeros((0, 4), np.int32)
    row = np.asarray([[SET_LENGTH, 0, 1, -1]], np.int32)
    fails(
        "release: this cache belongs to pool",
        lambda: edit_slots(rig.cache, other.handle, row, none, "release").epoch,
    )


def test_shapes_are_checked_together() -> None:
    spec = make_spec().resolve("cpu")
    cache = kvp.KVCache(
        jnp.zeros(2, jnp.int32), jnp.zeros(1, jnp.uint32), jnp.zeros(4, jnp.int32), spec
    )
    with pytest.raises(ValueError, match=r"(?s)KVPool.release.*own.*edits.*copies"):
        edit_slots(cache, np.zeros(3, np.int32), np.zeros((1, 2)), np.zeros((1, 3)), "release")


def test_vmap_is_refused(rig: Rig) -> None:
    rows = jnp.asarray([[[SET_LENGTH, 0, 1, -1]], [[SET_LENGTH, 1, 1, -1]]], jnp.int32)
    none = jnp.zeros((0, 4), jnp.int32)

    def one(edits: jax.Array) -> jax.Array:
        return edit_slots(rig.cache, rig.cache.handle, edits, none, "release").epoch

    with pytest.raises(ValueError, match="release slots outside of vmap"):
        jax.vmap(one)(rows)
