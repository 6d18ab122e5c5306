"""Lowering for CUDA, on any machine: the same custom calls as on CPU, with the same attributes and
aliases, under every transformation, exported on machines that have no GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_kvpage as kvp
from jax_kvpage import _cuda, _native
from jax_kvpage.ops.edit_slots import OCCUPY, edit_slots
from jax_kvpage.ops.gather_context import gather_context_p

_SLOTS, _HEADS, _KV_HEADS, _DIM, _TOKENS = 4, 4, 2, 64, 3
_SPEC = kvp.CacheSpec(2, _KV_HEADS, _DIM, _SLOTS, 256, dtype=jnp.bfloat16).resolve("cuda")
_PLATFORMS = ("cpu", "cuda")


def _cache() -> kvp.KVCache:
    lengths = jnp.zeros(_SLOTS, jnp.int32)
    return kvp.KVCache(jnp.zeros(2, jnp.int32), jnp.zeros(1, jnp.uint32), lengths, _SPEC)


def _batch() -> kvp.Batch:
    return kvp.Batch.decode(jnp.arange(_TOKENS, dtype=jnp.int32))


def _rows(heads: int) -> jax.Array:
    return jnp.ones((_TOKENS, heads, _DIM), jnp.bfloat16)


def _q() -> jax.Array:
    return _rows(_HEADS)


def _kv() -> jax.Array:
    return _rows(_KV_HEADS)


def _attend(cache: kvp.KVCache, batch: kvp.Batch, **options: Any) -> Any:
    return kvp.paged_attention(_q(), cache, batch, layer=1, **options)


def _update(cache: kvp.KVCache, batch: kvp.Batch, **options: Any) -> Any:
    return kvp.update_and_attend(_q(), _kv(), _kv(), cache, batch, layer=1, **options)


def _gather(cache: kvp.KVCache, batch: kvp.Batch) -> Any:
    arrays = (cache.handle, cache.epoch, cache.lengths, batch.slots, batch.query_offsets)
    return gather_context_p.bind(*arrays, jnp.int32(0), spec=cache.spec)


def _tables(cache: kvp.KVCache, batch: kvp.Batch, **options: Any) -> Any:
    pages = jnp.ones((9, 16, _KV_HEADS, _DIM), jnp.bfloat16)
    tables = jnp.zeros((_TOKENS, 3), jnp.int32)
    lengths = cache.lengths[batch.slots] + 1
    return kvp.paged_attention_with_tables(_q(), pages, pages, tables, lengths, **options)


def _edit(cache: kvp.KVCache, batch: kvp.Batch) -> kvp.KVCache:
    edits = jnp.stack([jnp.full(_TOKENS, OCCUPY), batch.slots, jnp.zeros(_TOKENS, jnp.int32)], 1)
    copies = jnp.full((1, 4), -1, jnp.int32)
    return edit_slots(cache, np.zeros(2, np.int32), edits, copies, "acquire")


# The op, and how its operands share buffers with its results: {operand: result}.
_OPS: dict[str, tuple[Callable[[kvp.KVCache, kvp.Batch], Any], dict[int, int]]] = {
    "map_slots": (lambda c, b: kvp.map_slots(c, b.slots, 40), {1: 0}),
    "append_kv": (lambda c, b: kvp.append_kv(c, _kv(), _kv(), b, layer=1), {1: 0}),
    "paged_attention": (_attend, {}),
    "update_and_attend": (_update, {1: 2}),
    "advance": (kvp.advance, {1: 0, 2: 1}),
    "set_lengths": (lambda c, b: kvp.set_lengths(c, b.slots, 0), {1: 0, 2: 1}),
    "edit_slots": (_edit, {1: 0, 2: 1}),
    "after": (lambda c, b: kvp.after(c, b.slots), {0: 0}),
    "gather_context": (_gather, {}),
}
_ALL = [*_OPS, "attend_with_tables"]


def _lowered(function: Callable[..., Any], *platforms: str) -> str:
    text: str = (
        jax.jit(function)
        .trace(_cache(), _batch())
        .lower(lowering_platforms=platforms or ("cuda",))
        .as_text()
    )
    return text


def _calls(text: str) -> list[tuple[str, str]]:
    """(op, the rest of the line) of each custom call of this package but attention's plan."""
    calls = re.findall(r"custom_call @jax_kvpage_(\w+)\((.*)", text)
    return [(op, rest) for op, rest in calls if op != "plan_attention"]


def _op(name: str) -> Callable[[kvp.KVCache, kvp.Batch], Any]:
    if name == "attend_with_tables":
        return lambda c, b: _tables(c, b, implementation="cuda")
    return _OPS[name][0]


# Ops with a plan, as their last operand.
_WITH_PLAN = ("paged_attention", "update_and_attend")


def _without_plan(call: str) -> str:
    """A call without its last operand, written as if it had never had it."""
    call = re.sub(r", %\)", ")", call, count=1)
    call = re.sub(r", tensor<\d+xui8>\) ->", ") ->", call, count=1)
    return re.sub(
        r"(operand_layouts = \[.*?), dense<0> : tensor<1xindex>\](, output|, result)",
        r"\1]\2",
        call,
    )


# Ops with device scratch memory, as their last result.
_WITH_SCRATCH = (
    "append_kv",
    "paged_attention",
    "update_and_attend",
    "edit_slots",
    "gather_context",
    "attend_with_tables",
)


def _without_scratch(call: str) -> tuple[str, int]:
    """A call without its last result, written as if it had never had it; and that one's bytes."""
    call, found = re.subn(r", tensor<\d+xui8>\)$", ")", call)
    if not found:
        return call, 0
    call = re.sub(r", dense<0> : tensor<1xindex>\]\}", "]}", call)  # its layout
    if "-> (" in call and "," not in call.rsplit("-> (", 1)[1]:  # one is left: no tuple
        head, result = call[:-1].rsplit("-> (", 1)
        call = (
            f"{head.replace('output_tuple_indices = [0]', 'output_tuple_indices = []')}-> {result}"
        )
    return call, found


@pytest.mark.parametrize("name", _ALL)
def test_an_op_is_the_custom_call_that_it_is_on_cpu(name: str) -> None:
    """Names, attributes, aliases, operands: equal on both platforms, but for SSA names, scratch."""
    on_cpu = (lambda c, b: _tables(c, b)) if name == "attend_with_tables" else _op(name)
    cuda, cpu = (
        [(op, re.sub(r"%\w+(:\d+)?(#\d+)?", "%", rest)) for op, rest in _calls(text)]
        for text in (_lowered(_op(name)), _lowered(on_cpu, "cpu"))
    )
    ((op, call),) = cuda
    call, scratch = _without_scratch(call)
    assert bool(scratch) == (name in _WITH_SCRATCH)
    call = _without_plan(call) if name in _WITH_PLAN else call
    assert [(op, call)] == cpu


@pytest.mark.parametrize("name", _ALL)
def test_operands_and_results_stand_behind_barriers(name: str) -> None:
    """XLA's dynamic-slice fusion looks through no barrier over a single array.

    It may leave a call in the program beside the copy that it made of it. What XLA makes of the
    calls is tested in tests/gpu/test_gpu_compiled.py.
    """
    text = _lowered(_op(name))
    ((result, count, operands),) = re.findall(
        rf"(%\w+)(?::(\d+))? = stablehlo.custom_call @jax_kvpage_{name}\(([^)]*)\)", text
    )
    barriers = re.findall(r"(%\w+) = stablehlo.optimization_barrier (%[\w#]+) :", text)
    assert set(operands.split(", ")) <= {value for value, _ in barriers}
    results = {f"{result}#{i}" for i in range(int(count))} if count else {result}
    behind = text.split(f"custom_call @jax_kvpage_{name}", 1)[1]
    used = set(re.findall(re.escape(result) + r"(?:#\d+)?\b", behind))
    assert used <= {operand for _, operand in barriers}
    assert len(used) == len(results) - (name in _WITH_SCRATCH)


def test_layers_ask_for_the_same_plan() -> None:
    """Calls without side effects on the same values, so that XLA keeps one."""

    def step(cache: kvp.KVCache, batch: kvp.Batch) -> Any:
        q = _q()
        for layer in range(2):
            q, cache = kvp.update_and_attend(q, _kv(), _kv(), cache, batch, layer=layer)
        return q, kvp.paged_attention(q, cache, batch, layer=0), kvp.advance(cache, batch)

    text = _lowered(step)
    plans = re.findall(r"(%\w+) = stablehlo.custom_call @jax_kvpage_plan_attention\((.*)", text)
    constants = dict(re.findall(r"(%\w+) = stablehlo.constant (.*)", text))

    def named(call: str) -> str:
        return re.sub(r"%\w+", lambda name: constants.get(name[0], name[0]), call)

    assert len(plans) == 3
    assert len({named(call) for _, call in plans}) == 1
    assert "has_side_effect" not in plans[0][1]
    barriers = dict(re.findall(r"(%\w+) = stablehlo.optimization_barrier (%\w+) :", text))
    used = [
        re.findall(r"%\w+", rest.split(")")[0])[-1] for op, rest in _calls(text) if op in _WITH_PLAN
    ]
    assert [barriers[name] for name in used] == [name for name, _ in plans]


def test_scratch_is_sized_by_shapes() -> None:
    """It is no more for a longer context than the spans that are kept apart, and it is bounded."""

    def attention(tokens: int, sequences: int, context: int, slots: int = 8) -> int:
        return _native.attention_scratch_bytes(1, 1, 32, 8, 128, context, sequences, tokens, slots)

    assert _native.checked_scratch_bytes(0, 8) > 0
    assert _native.checked_scratch_bytes(1000, 8) > _native.checked_scratch_bytes(10, 8)
    # Marks of the check, where there are too many slots for shared memory.
    assert _native.checked_scratch_bytes(10, 8192) == _native.checked_scratch_bytes(10, 8)
    assert _native.checked_scratch_bytes(10, 9000) >= _native.checked_scratch_bytes(10, 8) + 36000
    assert attention(1, 1, 64, 9000) >= attention(1, 1, 64) + 36000
    assert attention(1, 1, 64) < attention(64, 64, 8192) <= attention(64, 64, 131072)
    assert attention(4096, 64, 131072) == attention(4096, 64, 1 << 20)
    assert attention(1 << 20, 64, 1 << 20) < 1 << 30


@pytest.mark.parametrize("name", _OPS)
def test_attributes_and_aliases(name: str) -> None:
    ((_, rest),) = _calls(_lowered(_op(name)))
    assert re.search(r"backend_config = \{", rest)  # a typed FFI call, not one with text
    assert "has_side_effect = true" in rest
    pairs = re.findall(
        r"output_operand_alias<output_tuple_indices = \[(\d*)\],\s*operand_index = (\d+)", rest
    )
    assert {int(operand): int(result or 0) for result, operand in pairs} == _OPS[name][1]
    if name != "after":
        ints = ", ".join(map(str, _SPEC.as_ints()))
        assert f"spec = dense<[{ints}]> : tensor<8xi64>" in rest
    if name in ("paged_attention", "update_and_attend"):
        assert re.search(r"scale = 1\.250000e-01 : f32", rest)
        assert re.search(r"soft_cap = 0\.000000e\+00 : f32", rest)


def test_with_tables_has_no_side_effect() -> None:
    ((_, rest),) = _calls(_lowered(_op("attend_with_tables")))
    assert "has_side_effect = true" not in rest
    assert "kv_layout = 0 : i32" in rest


@pytest.mark.parametrize("name", _ALL)
def test_under_scan(name: str) -> None:
    def loop(cache: kvp.KVCache, batch: kvp.Batch) -> Any:
        def body(carry: kvp.KVCache, _: None) -> tuple[kvp.KVCache, Any]:
            result = _op(name)(carry, batch)
            nodes = jax.tree.leaves(result, is_leaf=lambda x: isinstance(x, kvp.KVCache))
            caches = [x for x in nodes if isinstance(x, kvp.KVCache)]
            return (caches or [carry])[0], [x for x in nodes if not isinstance(x, kvp.KVCache)]

        return jax.lax.scan(body, cache, None, length=3)

    assert [op for op, _ in _calls(_lowered(loop))] == [name]


@pytest.mark.parametrize("name", [n for n in _ALL if n != "edit_slots"])
def test_under_vmap(name: str) -> None:
    """Two elements with different slots over one cache, which comes back unbatched."""

    def mapped(cache: kvp.KVCache, batch: kvp.Batch) -> Any:
        def element(slots: jax.Array, offsets: jax.Array) -> Any:
            result = _op(name)(cache, kvp.Batch(slots, offsets))
            nodes = jax.tree.leaves(result, is_leaf=lambda x: isinstance(x, kvp.KVCache))
            return [x for x in nodes if not isinstance(x, kvp.KVCache)]

        both = jnp.stack([batch.slots, batch.slots])
        changes = name in ("append_kv", "advance", "set_lengths", "after")
        if changes:  # only the cache comes out: take it from inside
            return jax.vmap(
                lambda s, o: _op(name)(cache, kvp.Batch(s, o)).epoch, (0, 0), out_axes=None
            )(both, jnp.stack([batch.query_offsets] * 2))
        return jax.vmap(element)(both, jnp.stack([batch.query_offsets] * 2))

    assert {op for op, _ in _calls(_lowered(mapped))} == {name}


@pytest.mark.parametrize("op", [_attend, _update])
def test_options_of_attention(op: Callable[..., Any]) -> None:
    def run(cache: kvp.KVCache, batch: kvp.Batch) -> Any:
        return op(
            cache,
            batch,
            scale=0.5,
            sliding_window=7,
            logits_soft_cap=30.0,
            sinks=jnp.ones(_HEADS),
            alibi_slopes=jnp.ones(_HEADS),
            return_lse=True,
            implementation="cuda",
        )

    ((_, rest),) = _calls(_lowered(run))
    assert "scale = 5.000000e-01 : f32" in rest
    assert "soft_cap = 3.000000e+01 : f32" in rest
    assert f"tensor<{_TOKENS}x{_HEADS}xf32>" in rest  # lse


@pytest.mark.parametrize("op", [_attend, _update])
def test_xla_gathers_and_is_plain_otherwise(op: Callable[..., Any]) -> None:
    text = _lowered(lambda c, b: op(c, b, implementation="xla"))
    before = ["append_kv"] if op is _update else []
    assert [name for name, _ in _calls(text)] == [*before, "gather_context"]


@pytest.mark.parametrize("op", [_attend, _update, _tables])
@pytest.mark.parametrize(("asked", "platform"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_the_other_platforms_kernels_are_refused(
    op: Callable[..., Any], asked: str, platform: str
) -> None:
    message = (
        rf"implementation='{asked}' cannot be compiled for platform '{platform}': there are no "
        rf"'{asked}' kernels on '{platform}'.*implementation=None.*implementation='xla'"
    )
    with pytest.raises(ValueError, match=message):
        _lowered(lambda c, b: op(c, b, implementation=asked), platform)


def test_a_build_without_kernels_says_so_where_they_would_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_cuda, "BUILT", False)
    _lowered(lambda c, b: _attend(c, b))  # for another machine: nothing to say
    monkeypatch.setattr(_cuda, "missing_here", lambda: True)
    with pytest.raises(ValueError, match=r"no CUDA kernels.*JAX_KVPAGE_CUDA=ON"):
        _lowered(lambda c, b: _attend(c, b))
    with pytest.raises(
        ValueError, match=r"no 'cpu' kernels on 'cuda'; this build.*no CUDA kernels"
    ):
        _lowered(lambda c, b: _attend(c, b, implementation="cpu"))
    with pytest.raises(ValueError, match=r"no CUDA kernels.*implementation='xla'"):
        _lowered(lambda c, b: _tables(c, b, implementation="cuda"))


@pytest.mark.parametrize("built", [True, False])
def test_tables_take_the_best_that_the_build_has(
    monkeypatch: pytest.MonkeyPatch, built: bool
) -> None:
    monkeypatch.setattr(_cuda, "BUILT", built)
    assert [op for op, _ in _calls(_lowered(lambda c, b: _tables(c, b)))] == [
        "attend_with_tables"
    ] * built


def _step(handle: Any, epoch: Any, lengths: Any, slots: Any, offsets: Any, x: Any) -> Any:
    cache = kvp.KVCache(handle, epoch, lengths, _SPEC)
    cache, ok = kvp.map_slots(cache, slots, cache.lengths[slots] + 4)
    batch = kvp.Batch(slots, offsets).mask(ok)

    def layer(carry: Any, number: jax.Array) -> Any:
        x, cache = carry
        q = jnp.concatenate([x, x], axis=1)
        out, cache = kvp.update_and_attend(q, x, x, cache, batch, layer=number)
        return (x + out[:, :_KV_HEADS], cache), None

    (x, cache), _ = jax.lax.scan(layer, (x, cache), jnp.arange(2, dtype=jnp.int32))
    cache = kvp.advance(cache, batch)
    return x, cache.epoch, cache.lengths


_SHAPES = [
    jax.ShapeDtypeStruct(*shape)
    for shape in (
        ((2,), jnp.int32),
        ((1,), jnp.uint32),
        ((_SLOTS,), jnp.int32),
        ((2,), jnp.int32),
        ((3,), jnp.int32),
        ((_TOKENS, _KV_HEADS, _DIM), jnp.bfloat16),
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
    # One program for both: a branch per platform inside it.
    found = {op for op, _ in _calls(exported.mlir_module())}
    assert found == set(ops)


def test_a_choice_for_each_platform() -> None:
    """In one program for both JAX lowers either branch for both, so that kernels must not be named
    there: None is right everywhere. Compiled for one platform, the other branch is left out.
    """

    def run(cache: kvp.KVCache, batch: kvp.Batch, named: bool = True) -> Any:
        def branch(platform: str) -> Callable[..., Any]:
            options = {"implementation": platform} if named else {}
            return lambda c, b: _attend(c, b, **options)

        return jax.lax.platform_dependent(cache, batch, **{p: branch(p) for p in _PLATFORMS})

    assert len(_calls(_lowered(run))) == 1
    assert len(_calls(_lowered(run, "cpu"))) == 1
    checks = [
        export.DisabledSafetyCheck.custom_call(f"jax_kvpage_{op}")
        for op in ("paged_attention", "plan_attention")
    ]
    both = export.export(
        jax.jit(lambda c, b: run(c, b, named=False)), platforms=_PLATFORMS, disabled_checks=checks
    )(*jax.tree.map(jax.typeof, (_cache(), _batch())))
    assert _calls(both.mlir_module())
