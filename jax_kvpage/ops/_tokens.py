"""Shared by ops over the tokens of a ragged batch: the first six operands and their batching."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax_kvpage.cache import Batch, KVCache
from jax_kvpage.ops import _batching
from jax_kvpage.ops._checks import (
    FLOATS,
    INT32,
    Checker,
    batch_operands,
    cache_operands,
    check_num_tokens,
    layer_operand,
)

__all__ = ["check_header", "check_kv", "folded", "header", "replaced"]

# handle, epoch, lengths, slots, query_offsets, layer
HEADER = 6


def header(
    op: str, cache: KVCache, batch: Batch, layer: Any, **tokens: Any
) -> tuple[tuple[Any, ...], list[str]]:
    """The operands for the place of the tokens: cache, batch and layer.

    Args:
        op: name for messages.
        cache: the cache.
        batch: the batch.
        layer: int or int32 scalar.
        **tokens: arrays whose first axis must match the batch.

    Returns:
        The six operands, and the mistakes found in them.
    """
    problems: list[str] = []
    arrays = (*cache_operands(op, cache), *batch_operands(op, batch))
    for name, array in tokens.items():
        check_num_tokens(batch, array, name, problems)
    return (*arrays, layer_operand(layer, cache.spec, problems)), problems


def check_header(check: Checker, avals: Sequence[Any]) -> None:
    """Checks the six operands of `header`."""
    handle, epoch, lengths, slots, query_offsets, layer = avals[:HEADER]
    check.cache(handle, epoch, lengths)
    check.batch(slots, query_offsets)
    check.array("layer", layer, (), INT32)


def check_kv(check: Checker, k: Any, v: Any) -> None:
    """Checks new keys and values."""
    check.array("k", k, ("T", "Hkv", "D"), FLOATS)
    check.array("v", v, ("T", "Hkv", "D"), FLOATS)
    if k.dtype != v.dtype:
        check.add(f"v: wanted the dtype of k, {k.dtype}, got {v.dtype}")


def replaced(cache: KVCache, epoch: Any) -> KVCache:
    """The next cache after an op that does not change lengths."""
    return dataclasses.replace(cache, epoch=epoch)


def folded(operands: Sequence[Any], dims: Any, per_token: int) -> tuple[list[Any], int]:
    """Operands of one call over the batches of all elements, laid end to end.

    Args:
        operands: a header, then `per_token` arrays [T, ...], then operands that are not mapped.
        dims: mapped axes.
        per_token: number of arrays with a token axis.

    Returns:
        The operands and the size of the mapped axis.
    """
    size = _batching.axis_size(operands, dims)
    slots, offsets = (_batching.front(operands[i], dims[i], size) for i in (3, 4))
    end = HEADER + per_token
    arrays = [_batching.front(operands[i], dims[i], size) for i in range(HEADER, end)]
    slots, offsets = _batching.fold(slots, offsets, arrays[0].shape[1])
    flat = [x.reshape(-1, *x.shape[2:]) for x in arrays]
    return [*operands[:3], slots, offsets, operands[5], *flat, *operands[end:]], size
