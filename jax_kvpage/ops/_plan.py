"""The attention plan on CUDA: how the work of a batch is distributed over the device.

The plan is a separate custom call. It depends on lengths, slots, query offsets and window, and on
which memory the pool's slots share, which does not change while a program runs. All layers of a
step call it with the same operands, so XLA keeps only one of the calls and hoists it out of a loop
over layers (FlashInfer and FlashAttention let the caller plan once per step).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.interpreters import mlir

from jax_kvpage import _native
from jax_kvpage.spec import DTYPE_CODES, CacheSpec

__all__ = ["appended"]

# Operands of attention on a pool: handle, epoch, lengths, slots, query_offsets, layer, q.
_HANDLE, _LENGTHS, _SLOTS, _OFFSETS, _QUERY = 0, 2, 3, 4, 6

Lower = Callable[[mlir.LoweringRuleContext, Sequence[Any], Mapping[str, Any]], tuple[Any, Any]]


def appended(window: int) -> Lower:
    """Returns the lowering of the plan, as `lower(ctx, operands, params) -> (value, aval)`.

    Args:
        window: index of the sliding window among the op's operands.
    """
    # No side effect, so that equal calls are merged.
    custom_call = jax.ffi.ffi_lowering("jax_kvpage_plan_attention")

    def lower(
        ctx: mlir.LoweringRuleContext, operands: Sequence[Any], params: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        spec: CacheSpec = params["spec"]
        avals: Sequence[Any] = ctx.avals_in
        query = avals[_QUERY]
        sequences = avals[_SLOTS].shape[0]
        aval = jax.core.ShapedArray((_native.attention_plan_bytes(sequences),), np.uint8)
        chosen = (_HANDLE, _LENGTHS, _SLOTS, _OFFSETS, window)
        (plan,) = custom_call(
            ctx.replace(primitive=None, avals_in=[avals[i] for i in chosen], avals_out=[aval]),
            *(operands[i] for i in chosen),
            spec=np.asarray(spec.as_ints(), np.int64),
            num_tokens=np.int64(query.shape[0]),
            num_q_heads=np.int32(query.shape[1]),
            q_dtype=np.int32(DTYPE_CODES[query.dtype]),
            exact_weights=np.int32(params["exact_weights"]),
        )
        return plan, aval

    return lower
