"""Lowering for CUDA, on any machine: the custom calls are the CPU's, with the same attributes and
aliases, plus CUDA's extra operands and results.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from cuda_lowering import (
    ALL,
    OPS,
    SPEC,
    WITH_PLAN,
    WITH_SCRATCH,
    attend_with_tables,
    calls_in,
    lowered,
    new_kv,
    op_of,
    queries,
    without_plan,
    without_scratch,
)

import jax_kvpage as kvp
from jax_kvpage import _native


@pytest.mark.parametrize("name", ALL)
def test_an_op_is_the_custom_call_that_it_is_on_cpu(name: str) -> None:
    """Names, attributes, aliases and operands equal the CPU's, except for SSA names and scratch."""
    on_cpu = (
        (lambda c, b: attend_with_tables(c, b)) if name == "attend_with_tables" else op_of(name)
    )
    cuda, cpu = (
        [(op, re.sub(r"%\w+(:\d+)?(#\d+)?", "%", rest)) for op, rest in calls_in(text)]
        for text in (lowered(op_of(name)), lowered(on_cpu, "cpu"))
    )
    ((op, call),) = cuda
    call, scratch = without_scratch(call)
    assert bool(scratch) == (name in WITH_SCRATCH)
    call = without_plan(call) if name in WITH_PLAN else call
    assert [(op, call)] == cpu


@pytest.mark.parametrize("name", ALL)
def test_operands_and_results_stand_behind_barriers(name: str) -> None:
    """XLA's dynamic-slice fusion does not look through a barrier over a single array.

    It may leave a call in the program beside its fused copy. What XLA makes of the calls is tested
    in tests/gpu/test_gpu_compiled.py.
    """
    text = lowered(op_of(name))
    ((result, count, operands),) = re.findall(
        rf"(%\w+)(?::(\d+))? = stablehlo.custom_call @jax_kvpage_{name}\(([^)]*)\)", text
    )
    barriers = re.findall(r"(%\w+) = stablehlo.optimization_barrier (%[\w#]+) :", text)
    assert set(operands.split(", ")) <= {value for value, _ in barriers}
    results = {f"{result}#{i}" for i in range(int(count))} if count else {result}
    behind = text.split(f"custom_call @jax_kvpage_{name}", 1)[1]
    used = set(re.findall(re.escape(result) + r"(?:#\d+)?\b", behind))
    assert used <= {operand for _, operand in barriers}
    assert len(used) == len(results) - (name in WITH_SCRATCH)


def test_layers_ask_for_the_same_plan() -> None:
    """The plan calls have the same operands and no side effects, so XLA keeps only one."""

    def step(cache: kvp.KVCache, batch: kvp.Batch) -> Any:
        q = queries()
        for layer in range(2):
            q, cache = kvp.update_and_attend(q, new_kv(), new_kv(), cache, batch, layer=layer)
        return q, kvp.paged_attention(q, cache, batch, layer=0), kvp.advance(cache, batch)

    text = lowered(step)
    plans = re.findall(r"(%\w+) = stablehlo.custom_call @jax_kvpage_plan_attention\((.*)", text)
    constants = dict(re.findall(r"(%\w+) = stablehlo.constant (.*)", text))

    def named(call: str) -> str:
        return re.sub(r"%\w+", lambda name: constants.get(name[0], name[0]), call)

    assert len(plans) == 3
    assert len({named(call) for _, call in plans}) == 1
    assert "has_side_effect" not in plans[0][1]
    barriers = dict(re.findall(r"(%\w+) = stablehlo.optimization_barrier (%\w+) :", text))
    used = [
        re.findall(r"%\w+", rest.split(")")[0])[-1]
        for op, rest in calls_in(text)
        if op in WITH_PLAN
    ]
    assert [barriers[name] for name in used] == [name for name, _ in plans]


def test_scratch_is_sized_by_shapes() -> None:
    """It grows with the context only up to the number of separate spans, and is bounded."""

    def attention(tokens: int, sequences: int, context: int, slots: int = 8) -> int:
        return _native.attention_scratch_bytes(1, 1, 32, 8, 128, context, sequences, tokens, slots)

    assert _native.checked_scratch_bytes(0, 8) > 0
    assert _native.checked_scratch_bytes(1000, 8) > _native.checked_scratch_bytes(10, 8)
    # The check's marks are in scratch if there are too many slots for shared memory.
    assert _native.checked_scratch_bytes(10, 8192) == _native.checked_scratch_bytes(10, 8)
    assert _native.checked_scratch_bytes(10, 9000) >= _native.checked_scratch_bytes(10, 8) + 36000
    assert attention(1, 1, 64, 9000) >= attention(1, 1, 64) + 36000
    assert attention(1, 1, 64) < attention(64, 64, 8192) <= attention(64, 64, 131072)
    assert attention(4096, 64, 131072) == attention(4096, 64, 1 << 20)
    assert attention(1 << 20, 64, 1 << 20) < 1 << 30


@pytest.mark.parametrize("name", OPS)
def test_attributes_and_aliases(name: str) -> None:
    ((_, rest),) = calls_in(lowered(op_of(name)))
    assert re.search(r"backend_config = \{", rest)  # a typed FFI call, not an opaque string
    assert "has_side_effect = true" in rest
    pairs = re.findall(
        r"output_operand_alias<output_tuple_indices = \[(\d*)\],\s*operand_index = (\d+)", rest
    )
    assert {int(operand): int(result or 0) for result, operand in pairs} == OPS[name][1]
    if name != "after":
        ints = ", ".join(map(str, SPEC.as_ints()))
        assert f"spec = dense<[{ints}]> : tensor<8xi64>" in rest
    if name in ("paged_attention", "update_and_attend"):
        assert re.search(r"scale = 1\.250000e-01 : f32", rest)
        assert re.search(r"soft_cap = 0\.000000e\+00 : f32", rest)


def test_with_tables_has_no_side_effect() -> None:
    ((_, rest),) = calls_in(lowered(op_of("attend_with_tables")))
    assert "has_side_effect = true" not in rest
    assert "kv_layout = 0 : i32" in rest
