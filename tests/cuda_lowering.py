"""Helpers for tests of CUDA lowering: each op as a small program, and its custom calls as text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_kvpage as kvp
from jax_kvpage.ops.copy_rotated import copy_rotated
from jax_kvpage.ops.edit_slots import OCCUPY, edit_slots
from jax_kvpage.ops.gather_context import gather_context_p

SLOTS, HEADS, KV_HEADS, DIM, TOKENS = 4, 4, 2, 64, 3
SPEC = kvp.CacheSpec(2, KV_HEADS, DIM, SLOTS, 256, dtype=jnp.bfloat16).resolve("cuda")
PLATFORMS = ("cpu", "cuda")


def make_cache() -> kvp.KVCache:
    lengths = jnp.zeros(SLOTS, jnp.int32)
    return kvp.KVCache(jnp.zeros(2, jnp.int32), jnp.zeros(1, jnp.uint32), lengths, SPEC)


def make_batch() -> kvp.Batch:
    return kvp.Batch.decode(jnp.arange(TOKENS, dtype=jnp.int32))


def rows(heads: int) -> jax.Array:
    return jnp.ones((TOKENS, heads, DIM), jnp.bfloat16)


def queries() -> jax.Array:
    return rows(HEADS)


def new_kv() -> jax.Array:
    return rows(KV_HEADS)


def attend(cache: kvp.KVCache, batch: kvp.Batch, **options: Any) -> Any:
    return kvp.paged_attention(queries(), cache, batch, layer=1, **options)


def update(cache: kvp.KVCache, batch: kvp.Batch, **options: Any) -> Any:
    return kvp.update_and_attend(queries(), new_kv(), new_kv(), cache, batch, layer=1, **options)


def gather(cache: kvp.KVCache, batch: kvp.Batch) -> Any:
    arrays = (cache.handle, cache.epoch, cache.lengths, batch.slots, batch.query_offsets)
    return gather_context_p.bind(*arrays, jnp.int32(0), spec=cache.spec)


def attend_with_tables(cache: kvp.KVCache, batch: kvp.Batch, **options: Any) -> Any:
    pages = jnp.ones((9, 16, KV_HEADS, DIM), jnp.bfloat16)
    tables = jnp.zeros((TOKENS, 3), jnp.int32)
    lengths = cache.lengths[batch.slots] + 1
    return kvp.paged_attention_with_tables(queries(), pages, pages, tables, lengths, **options)


def edit(cache: kvp.KVCache, batch: kvp.Batch) -> kvp.KVCache:
    edits = jnp.stack(
        [jnp.full(TOKENS, OCCUPY), batch.slots, jnp.zeros(TOKENS, jnp.int32), -batch.slots], 1
    )
    copies = jnp.full((1, 4), -1, jnp.int32)
    return edit_slots(cache, np.zeros(2, np.int32), edits, copies, "acquire")


def reuse(cache: kvp.KVCache, batch: kvp.Batch) -> kvp.KVCache:
    copies = jnp.stack([batch.slots, batch.slots + 1, *[jnp.ones(TOKENS, jnp.int32)] * 3], 1)
    frequencies = np.ones((SPEC.num_layers, DIM // 2), np.float32)
    return copy_rotated(cache, np.zeros(2, np.int32), copies, frequencies)


# Each op, and which operands share a buffer with which results: {operand: result}.
OPS: dict[str, tuple[Callable[[kvp.KVCache, kvp.Batch], Any], dict[int, int]]] = {
    "map_slots": (lambda c, b: kvp.map_slots(c, b.slots, 40), {1: 0}),
    "append_kv": (lambda c, b: kvp.append_kv(c, new_kv(), new_kv(), b, layer=1), {1: 0}),
    "paged_attention": (attend, {}),
    "update_and_attend": (update, {1: 2}),
    "advance": (kvp.advance, {1: 0, 2: 1}),
    "set_lengths": (lambda c, b: kvp.set_lengths(c, b.slots, 0), {1: 0, 2: 1}),
    "edit_slots": (edit, {1: 0, 2: 1}),
    "copy_rotated": (reuse, {1: 0, 2: 1}),
    "after": (lambda c, b: kvp.after(c, b.slots), {0: 0}),
    "gather_context": (gather, {}),
}
ALL = [*OPS, "attend_with_tables"]


def lowered(function: Callable[..., Any], *platforms: str) -> str:
    text: str = (
        jax.jit(function)
        .trace(make_cache(), make_batch())
        .lower(lowering_platforms=platforms or ("cuda",))
        .as_text()
    )
    return text


def calls_in(text: str) -> list[tuple[str, str]]:
    """Returns (op, rest of the line) of each of this package's custom calls except
    `plan_attention`.
    """
    calls = re.findall(r"custom_call @jax_kvpage_(\w+)\((.*)", text)
    return [(op, rest) for op, rest in calls if op != "plan_attention"]


def op_of(name: str) -> Callable[[kvp.KVCache, kvp.Batch], Any]:
    if name == "attend_with_tables":
        return lambda c, b: attend_with_tables(c, b, implementation="cuda")
    return OPS[name][0]


# Ops whose last operand is a plan.
WITH_PLAN = ("paged_attention", "update_and_attend")


def without_plan(call: str) -> str:
    """Rewrites a call without its last operand."""
    call = re.sub(r", %\)", ")", call, count=1)
    call = re.sub(r", tensor<\d+xui8>\) ->", ") ->", call, count=1)
    return re.sub(
        r"(operand_layouts = \[.*?), dense<0> : tensor<1xindex>\](, output|, result)",
        r"\1]\2",
        call,
    )


# Ops whose last result is device scratch memory.
WITH_SCRATCH = (
    "append_kv",
    "paged_attention",
    "update_and_attend",
    "edit_slots",
    "copy_rotated",
    "gather_context",
    "attend_with_tables",
)


def without_scratch(call: str) -> tuple[str, int]:
    """Rewrites a call without its last result; also returns the size of that result in bytes."""
    call, found = re.subn(r", tensor<\d+xui8>\)$", ")", call)
    if not found:
        return call, 0
    call = re.sub(r", dense<0> : tensor<1xindex>\]\}", "]}", call)  # its layout
    if "-> (" in call and "," not in call.rsplit("-> (", 1)[1]:  # a single result is not a tuple
        head, result = call[:-1].rsplit("-> (", 1)
        call = (
            f"{head.replace('output_tuple_indices = [0]', 'output_tuple_indices = []')}-> {result}"
        )
    return call, found
