"""Scratch memory of ops on CUDA, in bytes, computed from operand shapes.

The scratch memory is the custom call's last result and is never read. XLA could lend a handler
memory while it runs, but a call captured into a CUDA graph writes to that memory whenever the graph
is replayed, so XLA must account for it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jax_kvpage import _native
from jax_kvpage.spec import DTYPE_CODES, CacheSpec

__all__ = ["attention", "attention_with_tables", "checked", "copies", "segments", "with_result"]


def checked(operands: Sequence[Any], params: Mapping[str, Any]) -> int:
    """Bytes for the checked batch with which append_kv and gather_context begin.

    Operand 2 is the cache's lengths, [max_slots]; operand 3 the batch's slots.
    """
    del params
    return _native.checked_scratch_bytes(operands[3].shape[0], operands[2].shape[0])


def copies(operands: Sequence[Any], params: Mapping[str, Any]) -> int:
    """Bytes that edit_slots needs for its copies; 0 if there are none."""
    del params
    return _native.checked_scratch_bytes(0, 0) if operands[5].shape[0] else 0


def segments(operands: Sequence[Any], params: Mapping[str, Any]) -> int:
    """Bytes that copy_rotated needs for its copies."""
    del operands, params
    return _native.checked_scratch_bytes(0, 0)


def _attention(
    q: Any,
    storage: Any,
    heads: int,
    max_context: int,
    sequences: int,
    max_slots: int,
    exact_weights: bool,
) -> int:
    tokens, query_heads, dim = q.shape
    return _native.attention_scratch_bytes(
        DTYPE_CODES[q.dtype],
        DTYPE_CODES[storage],
        query_heads,
        heads,
        dim,
        max_context,
        sequences,
        tokens,
        max_slots,
        exact_weights,
    )


def attention(operands: Sequence[Any], params: Mapping[str, Any]) -> int:
    """Bytes for paged_attention and update_and_attend; q follows cache, batch and layer."""
    spec: CacheSpec = params["spec"]
    sequences = operands[3].shape[0]
    return _attention(
        operands[6],
        spec.dtype,
        spec.num_kv_heads,
        spec.max_seq_len,
        sequences,
        spec.max_slots,
        params["exact_weights"],
    )


def attention_with_tables(operands: Sequence[Any], params: Mapping[str, Any]) -> int:
    """Bytes for attention over page arrays, including its plan.

    The longest possible sequence is what a row of the tables can hold.
    """
    q, k_pages, _, tables, lengths = operands[:5]
    size, heads = (k_pages.shape[1], k_pages.shape[2])
    if params["kv_layout"] == 1:
        size, heads = heads, size
    call = _attention(
        q,
        k_pages.dtype,
        heads,
        tables.shape[1] * size,
        lengths.shape[0],
        0,
        params["exact_weights"],
    )
    return call + _native.attention_plan_bytes(lengths.shape[0])


def with_result(ctx: Any, num_bytes: int) -> Any:
    """Returns a lowering context with scratch memory as an additional result.

    Args:
        ctx: `jax.interpreters.mlir.LoweringRuleContext`.
        num_bytes: size of the scratch memory.
    """
    scratch = jax.core.ShapedArray((num_bytes,), jax.numpy.uint8)
    return ctx.replace(avals_out=[*ctx.avals_out, scratch])
