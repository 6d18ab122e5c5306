"""Padded batches: models with [batch, seq, heads, dim] activations get, bit for bit, what each
sequence gets when run alone, and padding is neither written nor attended to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_kvpage as kvp

_LAYERS, _HEADS, _KV_HEADS, _DIM, _SLOTS = 2, 4, 2, 32, 5
_implementations = pytest.mark.parametrize("implementation", ["cpu", "xla"])


def _spec(layout: str = "fused", dtype: Any = jnp.float32) -> kvp.CacheSpec:
    return kvp.CacheSpec(_LAYERS, _KV_HEADS, _DIM, _SLOTS, 64, dtype, layout)


def _draw(rng: np.random.Generator, *shape: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k, v of all layers, [layers, *shape, heads, dim]."""
    heads = (_HEADS, _KV_HEADS, _KV_HEADS)
    q, k, v = (rng.standard_normal((_LAYERS, *shape, h, _DIM)).astype(np.float32) for h in heads)
    return q, k, v


def _real(counts: list[int], tokens: int, side: str) -> np.ndarray:
    """Computes bool[S, T] by hand."""
    mask = np.zeros((len(counts), tokens), bool)
    for row, n in zip(mask, counts, strict=True):
        row[tokens - n if side == "left" else 0 :][:n] = True
    return mask


def _make(kind: str, slots: list[int], counts: list[int], tokens: int) -> kvp.Batch:
    side, _, how = kind.partition(" ")
    if how == "mask":
        return kvp.Batch.from_mask(slots, _real(counts, tokens, side))
    return kvp.Batch.padded(slots, counts, tokens, side=side)


def _step(
    cache: kvp.KVCache, batch: kvp.Batch, qkv: Any, implementation: str, one_call: bool
) -> Any:
    """Runs all layers of one step; returns positions, out, lse and cache."""
    positions = kvp.positions(cache, batch)
    cache, ok = kvp.grow(cache, batch)
    batch = batch.mask(ok)
    outs, lses = [], []
    options = {"return_lse": True, "implementation": implementation}
    for layer, (q, k, v) in enumerate(zip(*qkv, strict=True)):
        if one_call:
            out, lse, cache = kvp.update_and_attend(q, k, v, cache, batch, layer=layer, **options)
        else:
            cache = kvp.append_kv(cache, k, v, batch, layer=layer)
            out, lse = kvp.paged_attention(q, cache, batch, layer=layer, **options)
        outs.append(out)
        lses.append(lse)
    return positions, jnp.stack(outs), jnp.stack(lses), kvp.advance(cache, batch)


_jitted = jax.jit(_step, static_argnums=(3, 4), donate_argnums=0)

# (new tokens of each sequence, T) of some steps: prefill, chunks, decode, a sequence that pauses.
_STEPS = [([7, 3, 5], 7), ([0, 4, 2], 6), ([1, 1, 1], 1), ([1, 0, 1], 1)]


@pytest.mark.covering(1)
@_implementations
@pytest.mark.parametrize("kind", ["left", "right", "left mask", "right mask"])
@pytest.mark.parametrize("one_call", [True, False])
@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_equals_each_sequence_by_itself(
    implementation: str, kind: str, one_call: bool, layout: str, dtype: Any, make_pool
) -> None:
    rng = np.random.default_rng(0)
    spec = _spec(layout, dtype)
    together, alone = make_pool(spec, poison=True), make_pool(spec, poison=True)
    slots, cache = together.acquire(together.cache(), [1] * 3)
    single_slots, single = alone.acquire(alone.cache(), [1] * 3)
    begin = [0, 0, 0]
    for counts, tokens in _STEPS:
        mask = _real(counts, tokens, kind.split()[0])
        qkv = _draw(rng, 3, tokens)
        for x in qkv:
            x[:, ~mask] = np.nan  # would be visible if it were written or attended to
        batch = _make(kind, slots, counts, tokens)
        got = _jitted(cache, batch, qkv, implementation, one_call)
        positions, out, lse, cache = got
        assert out.shape == (_LAYERS, 3, tokens, _HEADS, _DIM)
        assert lse.shape == out.shape[:-1]
        assert not np.any(out[:, ~mask])
        assert np.all(np.isneginf(lse[:, ~mask]))
        assert positions.shape == (3, tokens)
        assert not np.any(positions[~mask])
        for s, n in enumerate(counts):
            own = kvp.Batch.from_lengths([single_slots[s]], [n])
            rows = [x[:, s, mask[s]] for x in qkv]
            _, want, want_lse, single = _jitted(single, own, rows, implementation, one_call)
            np.testing.assert_array_equal(out[:, s, mask[s]], want)
            np.testing.assert_array_equal(lse[:, s, mask[s]], want_lse)
            np.testing.assert_array_equal(positions[s, mask[s]], begin[s] + np.arange(n))
            begin[s] += n
            row = np.flatnonzero(mask.reshape(-1) & (np.arange(mask.size) // tokens == s))
            assert batch.last_rows[s] == (row[-1] if n else 0)
        assert cache.lengths[jnp.asarray(slots)].tolist() == begin


def test_left_padded_generation_like_hugging_face(make_pool) -> None:
    """Left-padded prompts, then one token at a time in one scanned program; masked sequences and
    traced lengths."""
    spec, rng = _spec(), np.random.default_rng(1)
    pool = make_pool(spec)
    slots, cache = pool.acquire(pool.cache(), [1] * 3)
    prompt, rest = _draw(rng, 3, 8), _draw(rng, 6, 3, 1)
    mask = _real([8, 2, 5], 8, "left")

    @jax.jit
    def run(cache: kvp.KVCache, mask: jax.Array, prompt: Any, rest: Any) -> Any:
        batch = kvp.Batch.from_mask(slots, mask)
        _, first, _, cache = _step(cache, batch, prompt, "cpu", True)

        def one(cache: kvp.KVCache, qkv: Any) -> Any:
            batch = kvp.Batch.padded(slots, jnp.ones(3, jnp.int32), 1)
            batch = batch.mask(jnp.asarray([True, False, True]))
            _, out, _, cache = _step(cache, batch, qkv, "cpu", True)
            return cache, out

        cache, outs = jax.lax.scan(one, cache, tuple(jnp.moveaxis(x, 1, 0) for x in rest))
        return first, outs, cache

    first, outs, cache = run(cache, mask, prompt, rest)
    assert not np.any(outs[:, :, 1])
    assert cache.lengths[jnp.asarray(slots)].tolist() == [14, 2, 11]
    other = make_pool(spec)
    for s in (0, 2):
        (slot,), single = other.acquire(other.cache(), [1])
        qkv = [x[:, s, mask[s]] for x in prompt]
        n = int(mask[s].sum())
        _, want, _, single = _jitted(single, kvp.Batch.from_lengths([slot], [n]), qkv, "cpu", True)
        np.testing.assert_array_equal(first[:, s, mask[s]], want)
        for i in range(6):
            qkv = [x[:, i, s] for x in rest]
            _, want, _, single = _jitted(single, kvp.Batch.decode([slot]), qkv, "cpu", True)
            np.testing.assert_array_equal(outs[i, :, s], want)


@_implementations
def test_vmap(implementation: str, make_pool) -> None:
    """Each element has its own padded batch."""
    pool = make_pool(_spec(), on_stale="allow")
    slots, cache = pool.acquire(pool.cache(), [16] * 4)
    rng = np.random.default_rng(2)
    qkv = tuple(x[0] for x in _draw(rng, 2, 2, 5))
    batches = [
        kvp.Batch.padded(slots[:2], [5, 2], 5),
        kvp.Batch.padded(slots[2:], [0, 4], 5, side="right"),
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)

    def attend(q: Any, k: Any, v: Any, batch: kvp.Batch, cache: kvp.KVCache = cache) -> Any:
        return kvp.update_and_attend(q, k, v, cache, batch, layer=0, implementation=implementation)

    out, _ = jax.jit(jax.vmap(attend, out_axes=(0, None)))(*qkv, stacked)
    for i, batch in enumerate(batches):
        want, cache = attend(*(x[i] for x in qkv), batch, cache)
        np.testing.assert_allclose(out[i], want, atol=2e-6)
    last = jax.vmap(lambda b: b.last_rows)(stacked)
    assert last.tolist() == [[4, 9], [0, 8]]


def test_nothing_to_do(make_pool) -> None:
    pool = make_pool(_spec())
    cache = pool.cache()
    for batch in (
        kvp.Batch.padded([], [], 3),
        kvp.Batch.padded([-1, -1], [0, 0], 0),
        kvp.Batch.from_mask([-1, -1], np.zeros((2, 0), bool)),
        kvp.Batch.from_mask([-1], [[0, 1, 1]]),
    ):
        shape = (batch.slots.shape[0], batch.num_tokens)
        q, k = jnp.ones((*shape, _HEADS, _DIM)), jnp.ones((*shape, _KV_HEADS, _DIM))
        out, cache = kvp.update_and_attend(q, k, k, cache, batch, layer=0)
        np.testing.assert_array_equal(out, np.zeros(q.shape))
        assert kvp.positions(cache, batch).shape == shape


_WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "side": (lambda: kvp.Batch.padded([0], [1], 2, side="both"), "side: wanted 'left' or 'right'"),
    "too long": (
        lambda: kvp.Batch.padded([0, 1], [1, 4], 3),
        "lengths must be from 0 to num_tokens=3, got 4",
    ),
    "negative": (lambda: kvp.Batch.padded([0], [-1], 3), "from 0 to num_tokens=3, got -1"),
    "no match": (lambda: kvp.Batch.padded([0], [1, 1], 3), r"slots \(1,\) and lengths \(2,\)"),
    "floats": (lambda: kvp.Batch.padded([0], np.ones(1), 3), "lengths must be integers"),
    "traced T": (
        lambda: jax.jit(lambda n: kvp.Batch.padded([0], [1], n))(3),
        "num_tokens: wanted an int known to the host",
    ),
    "too many rows": (lambda: kvp.Batch.padded([0] * 8, [1] * 8, 2**30), "rows of tokens in all"),
    "a gap": (
        lambda: kvp.Batch.from_mask([0, 1], [[1, 1, 1], [1, 0, 1]]),
        "row 1 have a gap, .*101.*: padding must be to the left",
    ),
    "no mask": (lambda: kvp.Batch.from_mask([0], [[0, 2]]), "got other integers"),
    "float mask": (lambda: kvp.Batch.from_mask([0], [[0.0, 1.0]]), r"wanted bool\[1, T\].*float"),
    "rank": (lambda: kvp.Batch.from_mask([0], [True]), r"wanted bool\[1, T\].*got bool\[1\]"),
    "no T": (lambda: kvp.Batch([0], [0, 1], starts=[0]), "needs num_tokens"),
}


@pytest.mark.parametrize("case", _WRONG)
def test_wrong_batches(case: str) -> None:
    call, message = _WRONG[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_shapes_that_do_not_match_are_one_error(make_pool) -> None:
    pool = make_pool(_spec())
    cache = pool.cache()
    batch = kvp.Batch.padded([-1, -1], [1, 2], 3)
    q, k = jnp.ones((2, 3, _HEADS, _DIM)), jnp.ones((2, 3, _KV_HEADS, _DIM))
    with pytest.raises(ValueError, match=r"q: wanted \[S=2, T=3, heads, dim\].*got \[3, 4, 32\]"):
        kvp.paged_attention(q[0], cache, batch, layer=0)
    with pytest.raises(ValueError, match=r"(?s)k: wanted \[S=2, T=3, .*v: wanted .*layer: wanted"):
        kvp.append_kv(cache, k[:, :2], k[:1], batch, layer=9)
    with pytest.raises(ValueError, match=r"k: \[2, 3, 2, 32\] has an axis too many.*Batch\.padded"):
        kvp.append_kv(cache, k, k, kvp.Batch.decode([-1, -1]), layer=0)
    with pytest.raises(ValueError, match="axis too many") as error:
        kvp.update_and_attend(q, k, k[0], cache, kvp.Batch.decode([-1] * 6), layer=0)
    problems = str(error.value).split("\n  - ")[1:]
    assert len(problems) == 2, problems
    assert problems[0].startswith("q: [2, 3, 4, 32] has an axis too many for a packed batch, k: [2")
    assert problems[1].startswith("v: wanted float32")
    wrong = kvp.Batch([-1, -1], [0, 1, 2], num_tokens=3, starts=[0])
    with pytest.raises(ValueError, match=r"batch\.starts: wanted int32 \[S=2\]"):
        kvp.update_and_attend(q, k, k, cache, wrong, layer=0)
    with pytest.raises(ValueError, match=r"num_tokens: got 4, but batch\.num_tokens is 3"):
        kvp.positions(cache, batch, num_tokens=4)


@pytest.mark.parametrize("what", ["gap", "too long", "negative"])
def test_traced_mistakes_fail_when_run(what: str, make_pool) -> None:
    pool = make_pool(_spec())
    slots, cache = pool.acquire(pool.cache(), [16, 16])
    k = jnp.ones((2, 3, _KV_HEADS, _DIM))

    def make(operand: jax.Array) -> kvp.Batch:
        if what == "gap":
            return kvp.Batch.from_mask(slots, operand)
        return kvp.Batch.padded(slots, operand, 3, side="right")

    operand = {
        "gap": np.asarray([[True, True, True], [True, False, True]]),
        "too long": np.int32([1, 4]),
        "negative": np.int32([-1, 2]),
    }[what]
    program = jax.jit(lambda c, x: kvp.append_kv(c, k, k, make(x), layer=0))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="query_offsets"):
        jax.block_until_ready(program(cache, operand))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint32", "int32"])
def test_lengths_of_any_integer_dtype(dtype: str) -> None:
    for lengths in (jnp.asarray([20, 5], dtype), np.asarray([20, 5], dtype)):
        for program in (kvp.Batch.padded, jax.jit(kvp.Batch.padded, static_argnums=2)):
            batch = program(jnp.arange(2), lengths, 300)
            assert batch.starts.tolist() == [280, 295]
            assert batch.query_offsets.tolist() == [0, 20, 25]
            assert batch.starts.dtype == batch.query_offsets.dtype == jnp.int32


def test_a_mask_without_columns() -> None:
    for mask in ([[], []], np.zeros((2, 0)), np.zeros((2, 0), bool), jnp.zeros((2, 0), bool)):
        batch = kvp.Batch.from_mask([0, 1], mask)
        assert batch.num_tokens == 0
        assert batch.query_offsets.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"wanted bool\[2, T\]"):
        kvp.Batch.from_mask([0, 1], [])


def test_queries_without_heads(make_pool) -> None:
    pool = make_pool(_spec())
    slots, cache = pool.acquire(pool.cache(), [4])
    with pytest.raises(ValueError, match="q: wanted a multiple of the 2 key/value heads"):
        kvp.paged_attention(
            jnp.zeros((1, 1, 0, _DIM)), cache, kvp.Batch.padded(slots, [1], 1), layer=0
        )
