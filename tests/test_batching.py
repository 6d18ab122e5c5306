"""vmap of every op: one call over all elements equals a call per element, and unsupported uses are
refused before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import make_batch

import jax_kvpage as kvp

_LAYERS, _KV_HEADS, _HEADS, _DIM, _SLOTS = 2, 2, 4, 32, 6
_ELEMENTS, _TOKENS = 3, 5
# New tokens of the two sequences of each element; each element also has a padding sequence.
_NEW = [(2, 1), (0, 5), (1, 0)]


class _Setup:
    """Six occupied slots that hold some tokens, and batches for three elements of two sequences."""

    def __init__(self, pool: kvp.KVPool) -> None:
        self.rng = np.random.default_rng(0)
        self.slots, cache = pool.acquire(pool.cache(), [40] * _SLOTS)
        batch = kvp.Batch.from_lengths(self.slots, [3] * _SLOTS)
        for layer in range(_LAYERS):
            cache = kvp.append_kv(cache, *self.draw(2, 3 * _SLOTS, _KV_HEADS), batch, layer=layer)
        self.cache = kvp.advance(cache, batch)
        elements = [
            make_batch([(self.slots[2 * i], new[0]), (-1, 0), (self.slots[2 * i + 1], new[1])])
            for i, new in enumerate(_NEW)
        ]
        self.elements = elements
        self.batches = jax.tree.map(lambda *x: jnp.stack(x), *elements)
        self.q = self.draw(_ELEMENTS, _TOKENS, _HEADS)
        self.k, self.v = self.draw(2, _ELEMENTS, _TOKENS, _KV_HEADS)

    def draw(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.standard_normal((*shape, _DIM), np.float32))


@pytest.fixture(params=["fused", "per_layer"])
def setup(request: pytest.FixtureRequest, make_pool) -> _Setup:
    spec = kvp.CacheSpec(_LAYERS, _KV_HEADS, _DIM, _SLOTS, 64, jnp.float32, request.param)
    return _Setup(make_pool(spec, on_stale="allow", poison=True))


@pytest.fixture
def one(make_pool) -> _Setup:
    spec = kvp.CacheSpec(_LAYERS, _KV_HEADS, _DIM, _SLOTS, 64, jnp.float32)
    return _Setup(make_pool(spec))


@pytest.mark.covering(1)
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_update_and_attend(setup: _Setup, implementation: str | None) -> None:
    s = setup

    def step(q, k, v, batch, cache=s.cache):
        return kvp.update_and_attend(
            q, k, v, cache, batch, layer=1, return_lse=True, implementation=implementation
        )

    together = jax.jit(jax.vmap(step, out_axes=(0, 0, None)))
    out, lse, cache = together(s.q, s.k, s.v, s.batches)
    assert out.shape == s.q.shape
    assert lse.shape == s.q.shape[:3]
    assert cache.lengths.shape == (_SLOTS,)
    # Append the same tokens again, one element after the other.
    cache = s.cache
    for i, batch in enumerate(s.elements):
        want, want_lse, cache = step(s.q[i], s.k[i], s.v[i], batch, cache)
        np.testing.assert_allclose(out[i], want, atol=2e-6)
        np.testing.assert_allclose(lse[i], want_lse, atol=2e-6)
        tokens = int(batch.query_offsets[-1])
        assert not np.any(out[i, tokens:])
        assert np.all(np.isneginf(lse[i, tokens:]))


@pytest.mark.covering(1)
@pytest.mark.parametrize("axis", [0, 1])
def test_append_advance_and_attend(setup: _Setup, axis: int) -> None:
    s = setup
    moved = [jnp.moveaxis(x, 0, axis) for x in (s.k, s.v)]
    cache = s.cache
    for layer in range(_LAYERS):
        cache = jax.vmap(
            lambda k, v, b, c=cache, n=layer: kvp.append_kv(c, k, v, b, layer=n),
            in_axes=(axis, axis, 0),
            out_axes=None,
        )(*moved, s.batches)
    attend = jax.vmap(lambda q, b: kvp.paged_attention(q, cache, b, layer=0))
    together = attend(s.q, s.batches)
    each = [kvp.paged_attention(q, cache, b, layer=0) for q, b in zip(s.q, s.elements, strict=True)]
    np.testing.assert_array_equal(together, jnp.stack(each))
    cache = jax.vmap(lambda b: kvp.advance(cache, b), out_axes=None)(s.batches)
    want = np.zeros(_SLOTS, int)
    want[np.asarray(s.slots)] = 3 + np.ravel(_NEW)
    np.testing.assert_array_equal(cache.lengths, want)


def test_readers_map_over_what_does_not_fold(setup: _Setup) -> None:
    """One batch with different queries and options for each element."""
    s, batch = setup, setup.elements[0]
    cache = kvp.append_kv(s.cache, s.k[0], s.v[0], batch, layer=0)
    sinks, windows = s.rng.standard_normal((3, _HEADS)), jnp.asarray([1, 0, 3], jnp.int32)

    def attend(q, sinks, window):
        return kvp.paged_attention(
            q, cache, batch, layer=0, sinks=sinks, sliding_window=window, return_lse=True
        )

    sinks = jnp.asarray(sinks, jnp.float32)
    got = jax.vmap(attend)(s.q, sinks, windows)
    each = [attend(*x) for x in zip(s.q, sinks, windows, strict=True)]
    for part, name in enumerate(["out", "lse"]):
        np.testing.assert_array_equal(got[part], jnp.stack([e[part] for e in each]), name)
    # A different batch and option for each element.
    cache = jax.vmap(lambda k, v, b: kvp.append_kv(cache, k, v, b, layer=0), out_axes=None)(
        s.k, s.v, s.batches
    )
    got = jax.vmap(lambda q, b, w: kvp.paged_attention(q, cache, b, layer=0, sliding_window=w))(
        s.q, s.batches, windows
    )
    for i, (b, w) in enumerate(zip(s.elements, windows, strict=True)):
        want = kvp.paged_attention(s.q[i], cache, b, layer=0, sliding_window=w)
        np.testing.assert_array_equal(got[i], want)


def test_map_slots_and_set_lengths(one: _Setup) -> None:
    pairs = jnp.asarray(one.slots, jnp.int32).reshape(_ELEMENTS, 2)
    cache, ok = jax.vmap(lambda s: kvp.map_slots(one.cache, s, 64), out_axes=(None, 0))(pairs)
    assert ok.shape == (_ELEMENTS, 2)
    assert np.all(ok)
    lengths = jnp.asarray([[0, 1], [2, 3], [3, 0]], jnp.int32)
    cache = jax.vmap(lambda s, n: kvp.set_lengths(cache, s, n), out_axes=None)(pairs, lengths)
    np.testing.assert_array_equal(cache.lengths[pairs], lengths)
    # One length for the slots of all elements.
    cache = jax.vmap(lambda s: kvp.set_lengths(cache, s, 0), out_axes=None)(pairs)
    np.testing.assert_array_equal(cache.lengths, np.zeros(_SLOTS))


def test_after_and_positions(one: _Setup) -> None:
    def each(q, batch):
        return kvp.after(one.cache, {"q": q}), kvp.positions(one.cache, batch, num_tokens=_TOKENS)

    cache, got = jax.vmap(each, out_axes=(None, 0))(one.q, one.batches)
    assert cache.epoch.shape == (1,)
    for row, batch in zip(got, one.elements, strict=True):
        np.testing.assert_array_equal(row, kvp.positions(one.cache, batch, num_tokens=_TOKENS))


def test_nested_vmap(one: _Setup) -> None:
    """Calls fold twice."""
    s = one
    cache = jax.vmap(
        jax.vmap(lambda k, v, b: kvp.append_kv(s.cache, k, v, b, layer=0), out_axes=None),
        out_axes=None,
    )(*(x[None] for x in (s.k, s.v)), jax.tree.map(lambda x: x[None], s.batches))
    got = jax.vmap(jax.vmap(lambda q, b: kvp.paged_attention(q, cache, b, layer=0)))(
        s.q[None], jax.tree.map(lambda x: x[None], s.batches)
    )
    want = [kvp.paged_attention(q, cache, b, layer=0) for q, b in zip(s.q, s.elements, strict=True)]
    np.testing.assert_array_equal(got[0], jnp.stack(want))


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_tables(implementation: str | None) -> None:
    rng = np.random.default_rng(2)
    k, v = jnp.asarray(rng.standard_normal((2, 3, 8, 16, _KV_HEADS, _DIM)), jnp.float32)
    q = jnp.asarray(rng.standard_normal((3, 2, _HEADS, _DIM)), jnp.float32)
    tables = jnp.asarray(rng.permuted(np.tile(np.arange(8), (3, 2, 1)), axis=-1), jnp.int32)
    lengths = jnp.asarray([[1, 128], [17, 16], [64, 3]], jnp.int32)

    def attend(*arrays):
        return kvp.paged_attention_with_tables(*arrays, implementation=implementation)

    got = jax.vmap(attend)(q, k, v, tables, lengths)
    each = [attend(*x) for x in zip(q, k, v, tables, lengths, strict=True)]
    np.testing.assert_allclose(got, jnp.stack(each), atol=1e-6)
    # Shared pages are not copied per element.
    got = jax.vmap(attend, (0, None, None, 0, 0))(q, k[0], v[0], tables, lengths)
    want = [attend(x, k[0], v[0], t, n) for x, t, n in zip(q, tables, lengths, strict=True)]
    np.testing.assert_allclose(got, jnp.stack(want), atol=1e-6)


_REFUSED: dict[str, tuple[Callable[[_Setup, kvp.KVCache], Any], str]] = {
    "batched cache": (
        lambda s, stacked: jax.vmap(lambda c: kvp.advance(c, s.elements[0]))(stacked),
        r"vmap of advance:\n  - the cache is batched.*batch\.mask\(keep\)",
    ),
    "batched layer": (
        lambda s, _: jax.vmap(
            lambda n: kvp.paged_attention(s.q[0], s.cache, s.elements[0], layer=n)
        )(jnp.arange(2)),
        r"vmap of paged_attention:\n  - the layer is batched, .*in_axes=None",
    ),
    "both, and slots that are shared": (
        lambda s, stacked: jax.vmap(
            lambda c, n: kvp.append_kv(c, s.k[0], s.v[0], s.elements[0], layer=n)
        )(stacked, jnp.zeros(2, jnp.int32)),
        r"vmap of append_kv:\n  - the cache is .*\n  - slots is not batched.*\n  - the layer is",
    ),
    "queries alone": (
        lambda s, _: jax.vmap(
            lambda q: kvp.update_and_attend(q, s.k[0], s.v[0], s.cache, s.elements[0], layer=0)[0]
        )(s.q),
        "vmap of update_and_attend:\n  - slots is not batched.*slots of its own",
    ),
    "options": (
        lambda s, _: jax.vmap(
            lambda q, k, b, w: kvp.update_and_attend(
                q, k, k, s.cache, b, layer=0, sliding_window=w
            )[0]
        )(s.q, s.k, s.batches, jnp.arange(3)),
        "sliding_window is batched, but one call serves all elements",
    ),
    "numbers alone": (
        lambda s, _: jax.vmap(lambda n: kvp.map_slots(s.cache, s.slots, n)[1])(jnp.arange(2)),
        "vmap of map_slots:\n  - slots is not batched",
    ),
    "cond with a batched predicate": (
        lambda s, _: jax.vmap(
            lambda go, k, v, b: kvp.advance(
                jax.lax.cond(
                    go,
                    lambda c: kvp.append_kv(c, k, v, b, layer=0),
                    lambda c: c,
                    s.cache,
                ),
                b,
            ),
            out_axes=None,
        )(jnp.asarray([True, False, True]), s.k, s.v, s.batches),
        r"vmap of append_kv:\n  - the cache is batched.*lax\.cond.*batch\.mask",
    ),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_refused_in_words(one: _Setup, case: str) -> None:
    call, message = _REFUSED[case]
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), one.cache)
    with pytest.raises(ValueError, match=message):
        call(one, stacked)


@pytest.mark.parametrize("element", range(_ELEMENTS))
def test_malformed_offsets_of_any_element_are_seen(one: _Setup, element: int) -> None:
    """In concatenated elements, a later one that does not begin at 0 could pass for padding."""
    s = one
    offsets = s.batches.query_offsets.at[element, 0].set(1)
    bad = kvp.Batch(s.batches.slots, offsets)
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="query_offsets"):
        jax.block_until_ready(
            jax.vmap(lambda q, b: kvp.paged_attention(q, s.cache, b, layer=0))(s.q, bad)
        )


@pytest.mark.parametrize("elements", [0, 2])
def test_empty_batches(one: _Setup, elements: int) -> None:
    """No elements, or elements without sequences: results have the shapes, and nothing changes."""
    sequences = 0 if elements else 2
    cache, length = one.cache, one.cache.lengths.tolist()
    slots = jnp.zeros((elements, sequences), jnp.int32)
    q = jnp.zeros((elements, sequences, _HEADS, _DIM))
    k = jnp.zeros((elements, sequences, _KV_HEADS, _DIM))

    def step(q: Any, k: Any, slots: Any, cache: kvp.KVCache) -> Any:
        batch = kvp.Batch.decode(slots)
        cache, ok = kvp.map_slots(cache, slots, 3)
        out, lse, cache = kvp.update_and_attend(q, k, k, cache, batch, layer=0, return_lse=True)
        cache = kvp.append_kv(cache, k, k, batch, layer=1)
        again = kvp.paged_attention(q, cache, batch, layer=1)
        cache = kvp.set_lengths(kvp.advance(cache, batch), slots, 0)
        return (ok, out, lse, again), cache

    axes: Any = (0, 0, 0, None)
    results, cache = jax.vmap(step, in_axes=axes, out_axes=(0, None))(q, k, slots, cache)
    shape = (elements, sequences)
    wanted = [shape, q.shape, (*shape, _HEADS), q.shape]
    assert [x.shape for x in results] == wanted
    assert cache.lengths.tolist() == length
