"""Lowering: custom calls and their attributes, refused platforms and transformations, and the types
of results under shard_map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from abstract_values import (
    BATCH,
    DIM,
    HEADS,
    KV_HEADS,
    SLOTS,
    SPEC,
    abstract_cache,
    make_kv,
    make_q,
)
from jax.sharding import PartitionSpec as P

import jax_kvpage as kvp


def _attend(q: jax.Array, implementation: str | None) -> Any:
    return kvp.paged_attention(q, abstract_cache(), BATCH, layer=0, implementation=implementation)


@pytest.mark.parametrize("implementation", [None, "cpu", "cuda"])
def test_platform_without_kernels(implementation: str | None) -> None:
    traced = jax.jit(lambda q: _attend(q, implementation)).trace(make_q())
    message = r"cannot be compiled for platform 'rocm'.*'cpu' and 'cuda' only.*compile for cpu"
    with pytest.raises(ValueError, match=message):
        traced.lower(lowering_platforms=("rocm",))


def test_tables_lower_to_plain_jax_elsewhere() -> None:
    pages = jnp.zeros((9, 16, KV_HEADS, DIM))
    tables, lengths = jnp.zeros((2, 3), jnp.int32), jnp.ones(2, jnp.int32)

    def attend(q: jax.Array) -> Any:
        return kvp.paged_attention_with_tables(q, pages, pages, tables, lengths)

    text = jax.jit(attend).trace(make_q()).lower(lowering_platforms=("rocm",)).as_text()
    assert "custom_call" not in text
    assert "jax_kvpage_attend_with_tables" in jax.jit(attend).lower(make_q()).as_text()


@pytest.mark.parametrize("op", ["append", "attend", "update", "tables"])
def test_differentiation_is_refused_in_words(op: str) -> None:
    pages = jnp.zeros((9, 16, KV_HEADS, DIM))
    tables, lengths = jnp.zeros((2, 3), jnp.int32), jnp.ones(2, jnp.int32)
    calls = {
        "append": lambda q: (
            kvp.append_kv(abstract_cache(), q[:, :KV_HEADS], make_kv(), BATCH, layer=0).epoch,
            q.sum(),
        )[1],
        "attend": lambda q: _attend(q, "xla").sum(),
        "update": lambda q: kvp.update_and_attend(
            q, make_kv(), make_kv(), abstract_cache(), BATCH, layer=0
        )[0].sum(),
        "tables": lambda q: kvp.paged_attention_with_tables(
            q, pages, pages, tables, lengths, implementation="xla"
        ).sum(),
    }
    with pytest.raises(ValueError, match=r"cannot be differentiated.*stop_gradient"):
        jax.grad(calls[op])(make_q())


def test_a_cache_rides_along_in_a_differentiated_program() -> None:
    """No floating-point value reaches the cache, so there is nothing to refuse."""

    def loss(x: jax.Array) -> jax.Array:
        q = jax.lax.stop_gradient(make_q() + x)
        out, cache = kvp.update_and_attend(
            q, make_kv(), make_kv(), abstract_cache(), BATCH, layer=0
        )
        cache = kvp.after(kvp.advance(cache, BATCH), x * out)
        return (x * out).sum() + cache.epoch[0]

    assert "kvpage_after" in str(jax.make_jaxpr(jax.value_and_grad(loss))(1.0))


def test_no_jax_effect() -> None:
    """An effect would take the whole program off JAX's fast dispatch path."""

    def step(cache: kvp.KVCache, q: jax.Array) -> Any:
        cache, ok = kvp.map_slots(cache, [0, 1], 5)
        out, cache = kvp.update_and_attend(q, make_kv(), make_kv(), cache, BATCH.mask(ok), layer=0)
        return out, kvp.after(kvp.advance(cache, BATCH), out)

    traced = jax.make_jaxpr(step)(abstract_cache(), make_q())
    assert not traced.effects
    assert str(traced).count("kvpage_") == 4


def test_parameters_are_attributes_and_ids_are_operands() -> None:
    text = jax.jit(lambda c, q: kvp.paged_attention(q, c, BATCH, layer=1)).lower(
        abstract_cache(), make_q()
    )
    (call,) = [line for line in text.as_text().splitlines() if "@jax_kvpage_" in line]
    assert "has_side_effect = true" in call
    assert f"spec = dense<{list(SPEC.as_ints())}> : tensor<8xi64>" in call
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
    step = jax.jit(lambda c, q: kvp.paged_attention(q, c, BATCH, layer=1))
    plain = step.lower(abstract_cache(), make_q()).as_text()
    with jax.default_matmul_precision(precision):
        asked = step.lower(abstract_cache(), make_q()).as_text()
    assert "exact_weights = 0 : i32" in plain
    assert f"exact_weights = {exact} : i32" in asked


def _sharded(step: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


@pytest.mark.parametrize("op", ["map", "append", "attend", "update", "advance", "set", "after"])
def test_results_vary_over_the_axes_that_any_operand_varies_over(op: str) -> None:
    """A result that did not vary would count as replicated, and one shard's value be used for
    all.
    """

    def step(x: jax.Array, cache: kvp.KVCache) -> Any:
        slots = x.astype(jnp.int32)
        batch = kvp.Batch(slots, jnp.arange(3, dtype=jnp.int32))
        q = jnp.zeros((2, HEADS, DIM)) + x[0]
        if op == "map":
            return kvp.map_slots(cache, slots, 5)
        if op == "append":
            return kvp.append_kv(cache, q[:, :2], q[:, :2], BATCH, layer=0)
        if op == "attend":
            return kvp.paged_attention(make_q(), cache, batch, layer=0)
        if op == "update":
            return kvp.update_and_attend(q, make_kv(), make_kv(), cache, BATCH, layer=0)
        if op == "advance":
            return kvp.advance(cache, batch)
        if op == "set":
            return kvp.set_lengths(cache, [0, 1], slots)
        return kvp.after(cache, q)

    x = jnp.zeros(2)
    _sharded(step, (P("x"), P()), P("x")).lower(
        x, abstract_cache(lengths=jnp.zeros(SLOTS, jnp.int32))
    )
    with pytest.raises(ValueError, match="out_specs"):
        _sharded(step, (P("x"), P()), P()).lower(x, abstract_cache())
    # Values that do not vary over any axis stay that way.
    _sharded(lambda x, cache: step(jnp.zeros(2), cache), (P("x"), P()), P()).lower(
        x, abstract_cache()
    )
