"""What programs are told before they run: every mistake in shapes, dtypes and options at once, the
platforms and transformations that are refused, and the types that results have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_kvpage as kvp

_LAYERS, _KV_HEADS, _HEADS, _DIM, _SLOTS = 3, 2, 4, 32, 4
_SPEC = kvp.CacheSpec(_LAYERS, _KV_HEADS, _DIM, _SLOTS, 256, jnp.float32).resolve("cpu")


def _cache(**fields: Any) -> kvp.KVCache:
    """Arrays of a cache without a pool: enough for what happens before a program runs."""
    return kvp.KVCache(
        **{
            "handle": jnp.zeros(2, jnp.int32),
            "epoch": jnp.zeros(1, jnp.uint32),
            "lengths": jnp.zeros(_SLOTS, jnp.int32),
            "spec": _SPEC,
            **fields,
        }
    )


def _q(tokens: int = 2, heads: int = _HEADS, dim: int = _DIM, dtype: Any = jnp.float32) -> Any:
    return jnp.zeros((tokens, heads, dim), dtype)


_kv = functools.partial(_q, heads=_KV_HEADS)
_BATCH = kvp.Batch.decode([0, 1])


def _mistakes(call: Callable[[], Any]) -> list[str]:
    """The lines of the ValueError, without its heading."""
    with pytest.raises(ValueError) as caught:
        call()
    _, *mistakes = str(caught.value).split("\n  - ")
    return mistakes


def test_every_mistake_at_once() -> None:
    batch = kvp.Batch([0, 1], [0, 1], num_tokens=9)
    mistakes = _mistakes(
        lambda: kvp.update_and_attend(
            _q(6, heads=3),
            _kv(5),
            _kv(6, dim=16, dtype=jnp.int8),
            _cache(epoch=jnp.zeros(1, jnp.int32)),
            batch,
            layer=_LAYERS,
            scale=-1.0,
            sliding_window=0,
            logits_soft_cap=float("inf"),
            sinks=jnp.zeros(3, jnp.int32),
            alibi_slopes=jnp.zeros(5),
            implementation="tpu",
        )
    )
    floats = "wanted float32 or bfloat16 or float16 [T=6, Hkv=2, D=32], got"
    for part in (
        "cache.epoch: wanted uint32 [1], got int32[1]",
        "batch.query_offsets: wanted int32 [S+1=3], got int32[2]",
        "q: has 6 tokens, but batch.num_tokens is 9",
        "q: wanted a multiple of the 2 key/value heads as heads, got 3",
        f"k: {floats} float32[5, 2, 32]",
        f"v: {floats} int8[6, 2, 16]",
        "v: wanted the dtype of k, float32, got int8",
        "layer: wanted 0 to 2, the spec has 3, got 3",
        "scale: wanted a positive finite number or None, got -1.0",
        "sliding_window: wanted None, an int from 1",
        "logits_soft_cap: wanted a positive finite number or None, got inf",
        "sinks: wanted floating point values, got int32[3]",
        "alibi_slopes: wanted float32 [Hq=3], got float32[5]",
        "implementation: wanted 'cpu', 'cuda', 'xla' or None, got 'tpu'",
    ):
        assert any(mistake.startswith(part) for mistake in mistakes), (part, mistakes)
    assert len(mistakes) == 14


@pytest.mark.parametrize(
    ("call", "message"),
    {
        "append: rank of k": (
            lambda: kvp.append_kv(_cache(), _kv()[0], _kv(), _BATCH, layer=0),
            r"append_kv:\n  - k: wanted .*\[T, Hkv=2, D=32\], got float32\[2, 32\]",
        ),
        "append: tokens of v": (
            lambda: kvp.append_kv(_cache(), _kv(), _kv(3), _BATCH, layer=0),
            r"v: wanted .*\[T=2, Hkv=2, D=32\], got float32\[3, 2, 32\]",
        ),
        "append: negative layer": (
            lambda: kvp.append_kv(_cache(), _kv(), _kv(), _BATCH, layer=-1),
            "layer: wanted 0 to 2, the spec has 3, got -1",
        ),
        "append: layer of the wrong type": (
            lambda: kvp.append_kv(_cache(), _kv(), _kv(), _BATCH, layer=1.0),
            r"layer: wanted int32 \[\], got float32\[\]",
        ),
        "attend: head size": (
            lambda: kvp.paged_attention(_q(dim=64), _cache(), _BATCH, layer=0),
            r"q: wanted .*\[T=2, Hq=4, D=32\], got float32\[2, 4, 64\]",
        ),
        "attend: float64-like queries": (
            lambda: kvp.paged_attention(_q(dtype=jnp.int32), _cache(), _BATCH, layer=0),
            r"q: wanted float32 or bfloat16 or float16 .* got int32",
        ),
        "attend: empty sinks": (
            lambda: kvp.paged_attention(_q(), _cache(), _BATCH, layer=0, sinks=jnp.zeros(0)),
            "sinks: is empty; pass None",
        ),
        "attend: scale as an array": (
            lambda: kvp.paged_attention(_q(), _cache(), _BATCH, layer=0, scale=jnp.ones(())),
            r"scale: wanted a Python number known at trace time.*multiplied into q",
        ),
        "attend: window of floats": (
            lambda: kvp.paged_attention(
                _q(), _cache(), _BATCH, layer=0, sliding_window=jnp.ones(())
            ),
            r"sliding_window: wanted int32 \[\], got float32\[\]",
        ),
        "slots of floats": (
            lambda: kvp.paged_attention(
                _q(), _cache(), kvp.Batch(jnp.zeros(2), jnp.zeros(3, jnp.int32)), layer=0
            ),
            r"batch.slots: wanted int32 \[S=2\], got float32\[2\]",
        ),
        "another number of slots": (
            lambda: kvp.advance(_cache(lengths=jnp.zeros(5, jnp.int32)), _BATCH),
            r"advance:\n  - cache.lengths: wanted int32 \[max_slots=4\], got int32\[5\]",
        ),
        "map: one number each": (
            lambda: kvp.map_slots(_cache(), [0, 1], [5, 6, 7]),
            r"map_slots:\n  - num_tokens: wanted int32 \[n=2\], got int32\[3\]",
        ),
        "map: whole numbers": (
            lambda: kvp.map_slots(_cache(), [0.5], [5]),
            r"slots: wanted int32 \[n=1\], got float32\[1\]",
        ),
        "set: beyond int32": (
            lambda: kvp.set_lengths(_cache(), [0], [2**40]),
            "set_lengths: lengths: wanted integers that fit int32, got 1099511627776",
        ),
        "after: epoch": (
            lambda: kvp.after(_cache(epoch=jnp.zeros(2, jnp.uint32)), _q()),
            r"after:\n  - cache.epoch: wanted uint32 \[1\], got uint32\[2\]",
        ),
        "mask: shape": (
            lambda: _BATCH.mask(jnp.ones(3, bool)),
            r"Batch.mask: keep: wanted bool\[2\].* got bool\[3\]",
        ),
        "mask: dtype": (lambda: _BATCH.mask(jnp.ones(2)), "Batch.mask: .*got float32"),
        "lengths that do not match": (
            lambda: kvp.Batch.from_lengths([0, 1], [3]),
            r"Batch.from_lengths:\n  - slots \(2,\) and lengths \(1,\) do not match",
        ),
        "lengths that are no integers": (
            lambda: kvp.Batch.from_lengths([0, 1], jnp.ones(2)),
            "lengths must be integers, got float32",
        ),
        "lengths below zero, and too many": (
            lambda: kvp.Batch.from_lengths([0, 1], [9, -1], num_tokens=7),
            r"lengths must not be negative, got -1\n  - lengths sum to 8, more than num_tokens=7",
        ),
        "tables: pages": (
            lambda: kvp.paged_attention_with_tables(
                _q(),
                jnp.zeros((9, 16, 2, 64)),
                jnp.zeros((9, 16, 2, 32), jnp.bfloat16),
                jnp.zeros((2, 3), jnp.int32),
                jnp.zeros(3, jnp.int32),
            ),
            r"query_offsets: None means one token for each of the 3 sequences, but q has 2\n"
            r"  - v_pages: wanted .*page_size=16, Hkv=2, D=64\], got bfloat16\[9, 16, 2, 32\]\n"
            r"  - v_pages: wanted the dtype of k_pages, float32, got bfloat16\n"
            r"  - lengths: wanted int32 \[S=2\], got int32\[3\]\n(.|\n)*"
            r"  - q: wanted .*D=64\], got float32\[2, 4, 32\]",
        ),
        "tables: layout": (
            lambda: kvp.paged_attention_with_tables(
                _q(),
                jnp.zeros((9, 16, 2, 32)),
                jnp.zeros((9, 16, 2, 32)),
                jnp.zeros((2, 3), jnp.int32),
                jnp.zeros(2, jnp.int32),
                kv_layout="DNH",
            ),
            "kv_layout: wanted 'NHD' or 'HND', got 'DNH'",
        ),
        "positions under jit": (
            lambda: jax.jit(kvp.positions)(_cache(), kvp.Batch([0], [0, 5])),
            r"positions:\n  - num_tokens: .*num_tokens=q.shape\[0\].*Batch.from_lengths",
        ),
        "positions: disagreement": (
            lambda: kvp.positions(_cache(), _BATCH, num_tokens=3),
            "num_tokens: got 3, but batch.num_tokens is 2",
        ),
    }.values(),
)
def test_each_mistake(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("op", ["append", "attend", "advance", "map", "after"])
def test_not_a_cache_or_batch(op: str) -> None:
    calls = {
        "append": lambda: kvp.append_kv(_cache(), _kv(), _kv(), (0, 1), layer=0),
        "attend": lambda: kvp.paged_attention(_q(), _kv(), _BATCH, layer=0),
        "advance": lambda: kvp.advance(_cache(), None),
        "map": lambda: kvp.map_slots(None, [0], [1]),
        "after": lambda: kvp.after(_q(), _q()),
    }
    with pytest.raises(TypeError, match=r"wanted a (KVCache|Batch)"):
        calls[op]()


def _attend(q: jax.Array, implementation: str | None) -> Any:
    return kvp.paged_attention(q, _cache(), _BATCH, layer=0, implementation=implementation)


@pytest.mark.parametrize("implementation", [None, "cpu", "cuda"])
def test_platform_without_kernels(implementation: str | None) -> None:
    traced = jax.jit(lambda q: _attend(q, implementation)).trace(_q())
    message = r"cannot be compiled for platform 'rocm'.*'cpu' and 'cuda' only.*compile for cpu"
    with pytest.raises(ValueError, match=message):
        traced.lower(lowering_platforms=("rocm",))


def test_tables_lower_to_plain_jax_elsewhere() -> None:
    pages = jnp.zeros((9, 16, _KV_HEADS, _DIM))
    tables, lengths = jnp.zeros((2, 3), jnp.int32), jnp.ones(2, jnp.int32)

    def attend(q: jax.Array) -> Any:
        return kvp.paged_attention_with_tables(q, pages, pages, tables, lengths)

    text = jax.jit(attend).trace(_q()).lower(lowering_platforms=("rocm",)).as_text()
    assert "custom_call" not in text
    assert "jax_kvpage_attend_with_tables" in jax.jit(attend).lower(_q()).as_text()


@pytest.mark.parametrize("op", ["append", "attend", "update", "tables"])
def test_differentiation_is_refused_in_words(op: str) -> None:
    pages = jnp.zeros((9, 16, _KV_HEADS, _DIM))
    tables, lengths = jnp.zeros((2, 3), jnp.int32), jnp.ones(2, jnp.int32)
    calls = {
        "append": lambda q: (
            kvp.append_kv(_cache(), q[:, :_KV_HEADS], _kv(), _BATCH, layer=0).epoch,
            q.sum(),
        )[1],
        "attend": lambda q: _attend(q, "xla").sum(),
        "update": lambda q: kvp.update_and_attend(q, _kv(), _kv(), _cache(), _BATCH, layer=0)[
            0
        ].sum(),
        "tables": lambda q: kvp.paged_attention_with_tables(
            q, pages, pages, tables, lengths, implementation="xla"
        ).sum(),
    }
    with pytest.raises(ValueError, match=r"cannot be differentiated.*stop_gradient"):
        jax.grad(calls[op])(_q())


def test_a_cache_rides_along_in_a_differentiated_program() -> None:
    """Nothing floating point reaches the cache, so there is nothing to refuse."""

    def loss(x: jax.Array) -> jax.Array:
        q = jax.lax.stop_gradient(_q() + x)
        out, cache = kvp.update_and_attend(q, _kv(), _kv(), _cache(), _BATCH, layer=0)
        cache = kvp.after(kvp.advance(cache, _BATCH), x * out)
        return (x * out).sum() + cache.epoch[0]

    assert "kvpage_after" in str(jax.make_jaxpr(jax.value_and_grad(loss))(1.0))


def test_no_jax_effect() -> None:
    """An effect would take the whole program off the fast path of dispatch."""

    def step(cache: kvp.KVCache, q: jax.Array) -> Any:
        cache, ok = kvp.map_slots(cache, [0, 1], 5)
        out, cache = kvp.update_and_attend(q, _kv(), _kv(), cache, _BATCH.mask(ok), layer=0)
        return out, kvp.after(kvp.advance(cache, _BATCH), out)

    traced = jax.make_jaxpr(step)(_cache(), _q())
    assert not traced.effects
    assert str(traced).count("kvpage_") == 4


def test_parameters_are_attributes_and_ids_are_operands() -> None:
    text = jax.jit(lambda c, q: kvp.paged_attention(q, c, _BATCH, layer=1)).lower(_cache(), _q())
    (call,) = [line for line in text.as_text().splitlines() if "@jax_kvpage_" in line]
    assert "has_side_effect = true" in call
    assert f"spec = dense<{list(_SPEC.as_ints())}> : tensor<8xi64>" in call
    assert "soft_cap = 0.000000e+00 : f32" in call
    assert "exact_weights = 0 : i32" in call
    assert "implementation" not in call


@pytest.mark.parametrize(
    ("precision", "exact"),
    [
        *((name, 1) for name in ("highest", "float32", "F32_F32_F32", "F64_F64_F64")),
        *((name, 0) for name in ("default", "high", "bfloat16", "tensorfloat32")),
        *((name, 0) for name in ("F16_F16_F32", "BF16_BF16_F32", "BF16_BF16_F32_X3")),
        *((name, 0) for name in ("TF32_TF32_F32", "TF32_TF32_F32_X3", "ANY_F8_ANY_F8_F32")),
    ],
)
def test_weights_are_as_exact_as_matmul_precision_says(precision: str, exact: int) -> None:
    step = jax.jit(lambda c, q: kvp.paged_attention(q, c, _BATCH, layer=1))
    plain = step.lower(_cache(), _q()).as_text()
    with jax.default_matmul_precision(precision):
        asked = step.lower(_cache(), _q()).as_text()
    assert "exact_weights = 0 : i32" in plain
    assert f"exact_weights = {exact} : i32" in asked


def _sharded(step: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


@pytest.mark.parametrize("op", ["map", "append", "attend", "update", "advance", "set", "after"])
def test_results_vary_over_the_axes_that_any_operand_varies_over(op: str) -> None:
    """A result that forgot would pass for unsharded: one shard's value, taken for all."""

    def step(x: jax.Array, cache: kvp.KVCache) -> Any:
        slots = x.astype(jnp.int32)
        batch = kvp.Batch(slots, jnp.arange(3, dtype=jnp.int32))
        q = jnp.zeros((2, _HEADS, _DIM)) + x[0]
        if op == "map":
            return kvp.map_slots(cache, slots, 5)
        if op == "append":
            return kvp.append_kv(cache, q[:, :2], q[:, :2], _BATCH, layer=0)
        if op == "attend":
            return kvp.paged_attention(_q(), cache, batch, layer=0)
        if op == "update":
            return kvp.update_and_attend(q, _kv(), _kv(), cache, _BATCH, layer=0)
        if op == "advance":
            return kvp.advance(cache, batch)
        if op == "set":
            return kvp.set_lengths(cache, [0, 1], slots)
        return kvp.after(cache, q)

    x = jnp.zeros(2)
    _sharded(step, (P("x"), P()), P("x")).lower(x, _cache(lengths=jnp.zeros(_SLOTS, jnp.int32)))
    with pytest.raises(ValueError, match="out_specs"):
        _sharded(step, (P("x"), P()), P()).lower(x, _cache())
    # What varies over nothing stays that way.
    _sharded(lambda x, cache: step(jnp.zeros(2), cache), (P("x"), P()), P()).lower(x, _cache())


def test_host_integers_become_int32() -> None:
    batch = kvp.Batch([0, -1], np.asarray([0, 3, 5]))
    assert batch.slots.dtype == batch.query_offsets.dtype == jnp.int32
    batch = kvp.Batch.from_lengths((2, 0), np.asarray([3, 4]), num_tokens=10)
    assert batch.query_offsets.tolist() == [0, 3, 7]
    assert batch.num_tokens == 10
    assert kvp.Batch.from_lengths([2, 0], [3, 4]).num_tokens == 7
    assert kvp.Batch.from_lengths([2], jnp.asarray([3])).num_tokens is None
    decode = kvp.Batch.decode([3, -1, 2])
    assert decode.query_offsets.tolist() == [0, 1, 2, 3]
    assert decode.num_tokens == 3
    assert decode.mask(jnp.asarray([True, True, False])).slots.tolist() == [3, -1, -1]
    with pytest.raises(ValueError, match=r"Batch.slots: wanted integers that fit int32, got -"):
        kvp.Batch([-(2**31) - 1], [0, 1])
    # A batch goes through tree functions with leaves that are no arrays.
    assert jax.tree.map(lambda _: None, decode).num_tokens == 3


def test_positions() -> None:
    cache = _cache(lengths=jnp.asarray([7, -1, 20, 0], jnp.int32))
    batch = kvp.Batch.from_lengths([2, -1, 3, 0], [2, 2, 0, 3], num_tokens=9)
    want = [20, 21, 0, 0, 7, 8, 9, 0, 0]
    assert jax.jit(kvp.positions)(cache, batch).tolist() == want
    unsaid = kvp.Batch(batch.slots, batch.query_offsets)
    assert kvp.positions(cache, unsaid, num_tokens=9).tolist() == want
    assert kvp.positions(cache, unsaid).tolist() == want[:7]
    assert kvp.positions(cache, kvp.Batch.decode([])).tolist() == []
