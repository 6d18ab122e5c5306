"""Scratch memory of ops on CUDA, in bytes, by the shapes of their operands.

It is the custom call's last result and is never read. XLA could lend such memory to a handler as
it runs, but a call that was captured into a CUDA graph writes to it whenever the graph is replayed,
so XLA must count on it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jax_kvpage import _native
from jax_kvpage.spec import DTYPE_CODES, CacheSpec

__all__ = ["attention", "attention_with_tables", "checked", "copies", "segments", "with_result"]


def checked(operands: Sequence[Any], params: Mapping[str, Any]) -> int:
    """Bytes for the checked batch that append_kv and gather_context begin with.

    The cache's lengths, [max_slots], are operand 2, the batch's slots operand 3.
    """
    del params
    return _native.checked_scratch_bytes(operands[3].shape[0], operands[2].shape[0])


def copies(operands: Sequence[Any], params: Mapping[str, Any]) -> int:
    """Bytes for what edit_slots hands to its copies; none without any."""
    del params
    return _native.checked_scratch_bytes(0, 0) if operands[5].shape[0] else 0


def segments(operands: Sequence[Any], params: Mapping[str, Any]) -> int:
    """Bytes for what copy_rotated hands to its copies."""
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
    """Bytes for paged_attention and update_and_attend: q stands behind cache, batch and layer."""
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
    """Bytes for attention over page arrays, with its plan.

    The longest sequence is what a row of tables holds.
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
    """A lowering context with scratch memory as one more result.

    Args:
        ctx: `jax.interpreters.mlir.LoweringRuleContext`.
        num_bytes: how much.
    """
    scratch = jax.core.ShapedArray((num_bytes,), jax.numpy.uint8)
    return ctx.replace(avals_out=[*ctx.avals_out, scratch])
