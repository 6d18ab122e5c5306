"""CUDA programs, lowered on any machine: under every transformation, with every choice of kernels,
and exported on machines without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cuda_lowering import (
    ALL,
    DIM,
    HEADS,
    KV_HEADS,
    PLATFORMS,
    SLOTS,
    SPEC,
    TOKENS,
    attend,
    attend_with_tables,
    calls_in,
    lowered,
    make_batch,
    make_cache,
    op_of,
    update,
)
from jax import export

import jax_kvpage as kvp
from jax_kvpage import _cuda


@pytest.mark.parametrize("name", ALL)
def test_under_scan(name: str) -> None:
    def loop(cache: kvp.KVCache, batch: kvp.Batch) -> Any:
        def body(carry: kvp.KVCache, _: None) -> tuple[kvp.KVCache, Any]:
            result = op_of(name)(carry, batch)
            nodes = jax.tree.leaves(result, is_leaf=lambda x: isinstance(x, kvp.KVCache))
            caches = [x for x in nodes if isinstance(x, kvp.KVCache)]
            return (caches or [carry])[0], [x for x in nodes if not isinstance(x, kvp.KVCache)]

        return jax.lax.scan(body, cache, None, length=3)

    assert [op for op, _ in calls_in(lowered(loop))] == [name]


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("edit_slots", "copy_rotated")])
def test_under_vmap(name: str) -> None:
    """Two elements with different slots and one cache, which is returned unbatched."""

    def mapped(cache: kvp.KVCache, batch: kvp.Batch) -> Any:
        def element(slots: jax.Array, offsets: jax.Array) -> Any:
            result = op_of(name)(cache, kvp.Batch(slots, offsets))
            nodes = jax.tree.leaves(result, is_leaf=lambda x: isinstance(x, kvp.KVCache))
            return [x for x in nodes if not isinstance(x, kvp.KVCache)]

        both = jnp.stack([batch.slots, batch.slots])
        changes = name in ("append_kv", "advance", "set_lengths", "after")
        if changes:  # only the cache is returned: use a field of it
            return jax.vmap(
                lambda s, o: op_of(name)(cache, kvp.Batch(s, o)).epoch, (0, 0), out_axes=None
            )(both, jnp.stack([batch.query_offsets] * 2))
        return jax.vmap(element)(both, jnp.stack([batch.query_offsets] * 2))

    assert {op for op, _ in calls_in(lowered(mapped))} == {name}


@pytest.mark.parametrize("op", [attend, update])
def test_options_of_attention(op: Callable[..., Any]) -> None:
    def run(cache: kvp.KVCache, batch: kvp.Batch) -> Any:
        return op(
            cache,
            batch,
            scale=0.5,
            sliding_window=7,
            logits_soft_cap=30.0,
            sinks=jnp.ones(HEADS),
            alibi_slopes=jnp.ones(HEADS),
            return_lse=True,
            implementation="cuda",
        )

    ((_, rest),) = calls_in(lowered(run))
    assert "scale = 5.000000e-01 : f32" in rest
    assert "soft_cap = 3.000000e+01 : f32" in rest
    assert f"tensor<{TOKENS}x{HEADS}xf32>" in rest  # lse


@pytest.mark.parametrize("op", [attend, update])
def test_table_addressing_is_an_attribute(op: Callable[..., Any]) -> None:
    """Nothing else changes: operands, results and plan are the same."""
    slots, table = (lowered(functools.partial(op, addressing=a)) for a in ("slots", "table"))
    assert "addressing = 0 : i32" in slots
    assert table.replace("addressing = 1 : i32", "addressing = 0 : i32") == slots != table


@pytest.mark.parametrize("op", [attend, update])
def test_xla_gathers_and_is_plain_otherwise(op: Callable[..., Any]) -> None:
    text = lowered(lambda c, b: op(c, b, implementation="xla"))
    before = ["append_kv"] if op is update else []
    assert [name for name, _ in calls_in(text)] == [*before, "gather_context"]


@pytest.mark.parametrize("op", [attend, update, attend_with_tables])
@pytest.mark.parametrize(("asked", "platform"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_the_other_platforms_kernels_are_refused(
    op: Callable[..., Any], asked: str, platform: str
) -> None:
    message = (
        rf"implementation='{asked}' cannot be compiled for platform '{platform}': there are no "
        rf"'{asked}' kernels on '{platform}'.*implementation=None.*implementation='xla'"
    )
    with pytest.raises(ValueError, match=message):
        lowered(lambda c, b: op(c, b, implementation=asked), platform)


def test_a_build_without_kernels_says_so_where_they_would_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_cuda, "BUILT", False)
    lowered(lambda c, b: attend(c, b))  # lowered for another machine: no error
    monkeypatch.setattr(_cuda, "missing_here", lambda: True)
    with pytest.raises(ValueError, match=r"no CUDA kernels.*JAX_KVPAGE_CUDA=ON"):
        lowered(lambda c, b: attend(c, b))
    with pytest.raises(
        ValueError, match=r"no 'cpu' kernels on 'cuda'; this build.*no CUDA kernels"
    ):
        lowered(lambda c, b: attend(c, b, implementation="cpu"))
    with pytest.raises(ValueError, match=r"no CUDA kernels.*implementation='xla'"):
        lowered(lambda c, b: attend_with_tables(c, b, implementation="cuda"))


@pytest.mark.parametrize("built", [True, False])
def test_tables_take_the_best_that_the_build_has(
    monkeypatch: pytest.MonkeyPatch, built: bool
) -> None:
    monkeypatch.setattr(_cuda, "BUILT", built)
    assert [op for op, _ in calls_in(lowered(lambda c, b: attend_with_tables(c, b)))] == [
        "attend_with_tables"
    ] * built


def _step(handle: Any, epoch: Any, lengths: Any, slots: Any, offsets: Any, x: Any) -> Any:
    cache = kvp.KVCache(handle, epoch, lengths, SPEC)
    cache, ok = kvp.map_slots(cache, slots, cache.lengths[slots] + 4)
    batch = kvp.Batch(slots, offsets).mask(ok)

    def layer(carry: Any, number: jax.Array) -> Any:
        x, cache = carry
        q = jnp.concatenate([x, x], axis=1)
        out, cache = kvp.update_and_attend(q, x, x, cache, batch, layer=number)
        return (x + out[:, :KV_HEADS], cache), None

    (x, cache), _ = jax.lax.scan(layer, (x, cache), jnp.arange(2, dtype=jnp.int32))
    cache = kvp.advance(cache, batch)
    return x, cache.epoch, cache.lengths


_SHAPES = [
    jax.ShapeDtypeStruct(*shape)
    for shape in (
        ((2,), jnp.int32),
        ((1,), jnp.uint32),
        ((SLOTS,), jnp.int32),
        ((2,), jnp.int32),
        ((3,), jnp.int32),
        ((TOKENS, KV_HEADS, DIM), jnp.bfloat16),
    )
]


@pytest.mark.parametrize("platforms", [["cuda"], ["cpu", "cuda"]])
def test_export(platforms: list[str]) -> None:
    ops = ("map_slots", "update_and_attend", "advance")
    named = (*ops, "plan_attention")
    checks = [export.DisabledSafetyCheck.custom_call(f"jax_kvpage_{op}") for op in named]
    exported = export.export(jax.jit(_step), platforms=platforms, disabled_checks=checks)(*_SHAPES)
    again = export.deserialize(bytearray(exported.serialize()))
    assert again.platforms == tuple(platforms)
    # One program for both, which branches on the platform.
    found = {op for op, _ in calls_in(exported.mlir_module())}
    assert found == set(ops)


def test_a_choice_for_each_platform() -> None:
    """In one program for both platforms, JAX lowers both branches for both, so the branches must
    not name kernels; None always works. When compiled for one platform, the other branch is
    dropped.
    """

    def run(cache: kvp.KVCache, batch: kvp.Batch, named: bool = True) -> Any:
        def branch(platform: str) -> Callable[..., Any]:
            options = {"implementation": platform} if named else {}
            return lambda c, b: attend(c, b, **options)

        return jax.lax.platform_dependent(cache, batch, **{p: branch(p) for p in PLATFORMS})

    assert len(calls_in(lowered(run))) == 1
    assert len(calls_in(lowered(run, "cpu"))) == 1
    checks = [
        export.DisabledSafetyCheck.custom_call(f"jax_kvpage_{op}")
        for op in ("paged_attention", "plan_attention")
    ]
    both = export.export(
        jax.jit(lambda c, b: run(c, b, named=False)), platforms=PLATFORMS, disabled_checks=checks
    )(*jax.tree.map(jax.typeof, (make_cache(), make_batch())))
    assert calls_in(both.mlir_module())
