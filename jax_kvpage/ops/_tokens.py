"""Shared by ops over the tokens of a ragged batch: the first six operands and their batching."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpage._arrays import as_int32
from jax_kvpage._compat import gathered
from jax_kvpage._padding import with_padding
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

__all__ = [
    "HEADER",
    "check_header",
    "check_kv",
    "expanded",
    "folded",
    "like",
    "operands",
    "replaced",
]

# handle, epoch, lengths, slots, query_offsets, layer
HEADER = 6


def operands(
    op: str, cache: KVCache, batch: Batch, layer: Any, **tokens: Any
) -> tuple[tuple[Any, ...], list[str]]:
    """Returns the operands of an op over tokens: the header (cache, batch, layer), then the tokens.

    Those of a padded batch become a ragged batch of S * T tokens (_padding.py).

    Args:
        op: op name for messages.
        cache: the cache.
        batch: the batch.
        layer: int or int32 scalar.
        **tokens: arrays [T, heads, dim], or [S, T, heads, dim] for a padded batch.

    Returns:
        The operands, with the tokens as [rows, heads, dim]; and the mistakes found in them.
    """
    problems: list[str] = []
    slots, offsets = batch_operands(op, batch)
    if batch.starts is not None:
        slots, offsets = expanded(batch, slots, offsets, problems)
        for name, array in tokens.items():
            tokens[name] = _rows(batch, name, array, problems)
    else:
        name, array = next(iter(tokens.items()))
        if np.ndim(array) != 4:
            check_num_tokens(batch, array, name, problems)
        _check_packed(tokens, problems)
    header = (*cache_operands(op, cache), slots, offsets)
    return (*header, layer_operand(layer, cache.spec, problems), *tokens.values()), problems


def _check_packed(tokens: dict[str, Any], problems: list[str]) -> None:
    """Reports arrays in a padded batch's shape as one problem, and removes the extra axis.

    This way, later checks only find other problems.
    """
    shapes = {name: list(np.shape(x)) for name, x in tokens.items() if np.ndim(x) == 4}
    if not shapes:
        return
    (name, shape), *rest = shapes.items()
    others = "".join(f", {other}: {like} too" for other, like in rest)
    problems.append(
        f"{name}: {shape} has an axis too many for a packed batch{others}: for "
        "[S, T, heads, dim] make the batch with Batch.padded or Batch.from_mask"
    )
    for name in shapes:
        array = gathered(jnp.asarray(tokens[name]))
        tokens[name] = array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])


def expanded(
    batch: Batch, slots: jax.Array, offsets: jax.Array, problems: list[str]
) -> tuple[jax.Array, jax.Array]:
    """Converts a padded batch to a ragged one over S * T tokens, unless its shapes are wrong."""
    assert batch.num_tokens is not None
    starts = as_int32("batch.starts", batch.starts)
    size = slots.shape[-1] if slots.ndim else 0
    if starts.shape != (size,) or starts.dtype != np.int32:
        got = f"{starts.dtype}{list(starts.shape)}"
        problems.append(f"batch.starts: wanted int32 [S={size}], got {got}")
    elif slots.shape == (size,) and offsets.shape == (size + 1,):
        return with_padding(*map(gathered, (slots, offsets, starts)), batch.num_tokens)
    return slots, offsets


def _rows(batch: Batch, name: str, array: Any, problems: list[str]) -> Any:
    """[S, T, heads, dim] -> [S * T, heads, dim]."""
    wanted = (*np.shape(batch.slots), batch.num_tokens)
    if np.ndim(array) != 4 or np.shape(array)[:2] != wanted:
        problems.append(
            f"{name}: wanted [S={wanted[0] if wanted[:-1] else '?'}, T={wanted[-1]}, heads, dim] "
            f"for a padded batch, got {list(np.shape(array))}"
        )
        return array
    if not isinstance(array, (jax.Array, np.ndarray)):
        array = jnp.asarray(array)
    rows, tokens, *rest = array.shape
    return gathered(array).reshape(rows * tokens, *rest)


def like(batch: Batch, rows: jax.Array) -> jax.Array:
    """[S * T, ...] -> [S, T, ...] for a padded batch."""
    if batch.starts is None:
        return rows
    assert batch.num_tokens is not None
    return rows.reshape(batch.slots.shape[0], batch.num_tokens, *rows.shape[1:])


def check_header(check: Checker, avals: Sequence[Any]) -> None:
    """Checks the six operands of the header."""
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


def folded(operands: Sequence[Any], dims: Any, per_token: int) -> tuple[list[Any], tuple[int, int]]:
    """Merges the calls of all elements into one call over their concatenated batches.

    Args:
        operands: a header, then `per_token` arrays [T, ...], then operands that are not mapped.
        dims: mapped axes.
        per_token: number of arrays with a token axis.

    Returns:
        The operands, and the size of the mapped axis with T.
    """
    size = _batching.axis_size(operands, dims)
    slots, offsets = (_batching.front(operands[i], dims[i], size) for i in (3, 4))
    end = HEADER + per_token
    arrays = [_batching.front(operands[i], dims[i], size) for i in range(HEADER, end)]
    tokens = arrays[0].shape[1]
    slots, offsets = _batching.fold(slots, offsets, tokens)
    flat = [_batching.merge_rows(x) for x in arrays]
    return [*operands[:3], slots, offsets, operands[5], *flat, *operands[end:]], (size, tokens)
