"""read_kv: reads the keys and values of whole sequences into dense arrays."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpage._arrays import as_int32, to_device
from jax_kvpage._compat import gathered
from jax_kvpage.cache import Batch, KVCache
from jax_kvpage.ops import _lowering, _mesh, _stripes
from jax_kvpage.ops._checks import batch_operands, cache_operands, layer_operand, misplaced
from jax_kvpage.ops.gather_context import gather_context_abstract, gather_context_p

__all__ = ["read_kv"]


@functools.partial(jax.jit, inline=True)
def _with_last(
    lengths: jax.Array, slots: jax.Array, offsets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Counts the last token of sequences without new tokens as new; returns (lengths, offsets).

    The op reads the contexts of new tokens, so a sequence without any would be left out.
    """
    counts = jnp.diff(offsets)
    safe = jnp.maximum(slots, 0)
    idle = (slots >= 0) & (counts == 0) & (lengths[safe] > 0)
    one = idle.astype(jnp.int32)
    ends = offsets[0] + jnp.cumsum(counts + one, dtype=jnp.int32)
    return lengths.at[safe].add(-one), jnp.concatenate([offsets[:1], ends])


@_mesh.over_mesh(_mesh.keys_and_values, finish=_mesh.in_order, striped=_stripes.read_kv)
def read_kv(
    cache: KVCache, batch_or_slots: Batch | Any, layer: int | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Copies the keys and values of one layer out of the cache into dense arrays.

    Use it for debugging, for exporting a sequence, or for attention that this package does not
    have. Unlike `KVPool.view`, it works on every platform, layout and storage, but it copies
    `max_seq_len` tokens of each sequence.

    Args:
        cache: the cache.
        batch_or_slots: the sequences. With slots, int32[S] (each at most once, -1 is padding, a
            single slot is S = 1), reads all tokens up to the slot's length. With a Batch, also
            reads its new tokens, which must have been written in this layer (`append_kv`).
        layer: int, or traced int32 scalar.

    Returns:
        k and v, [S, max_seq_len, Hkv, D], in the cache's dtype, or dequantized to float32 if that
        is quantized. Zeros after the tokens of each sequence, and for padding.

    Raises:
        ValueError: wrong shapes, dtypes or layer, all listed in one message.
        jax.errors.JaxRuntimeError: at run time: a stale cache or closed pool, a free or repeated
            slot, malformed offsets, a layer out of range, or new tokens that were not written.
    """
    problems: list[str] = []
    arrays = cache_operands("read_kv", cache)
    if isinstance(batch_or_slots, Batch):
        slots, offsets = batch_operands("read_kv", batch_or_slots)
    else:
        if isinstance(batch_or_slots, KVCache):
            raise misplaced("read_kv", "batch_or_slots", "a Batch, or slots", batch_or_slots)
        slots = as_int32("read_kv: slots", batch_or_slots)
        slots = slots.reshape(1) if slots.ndim == 0 else slots
        offsets = to_device(np.zeros(slots.shape[0] + 1, np.int32))
    handle, epoch, lengths = arrays
    integers = jnp.issubdtype(slots.dtype, jnp.integer)
    if integers and slots.ndim == 1 and slots.size and offsets.shape == (slots.size + 1,):
        lengths, offsets = _with_last(*map(gathered, (lengths, slots, offsets)))
    layer = layer_operand(layer, cache.spec, problems)
    operands = (handle, epoch, lengths, slots, offsets, layer)
    params = {"spec": cache.spec}
    k, v = _lowering.bind(gather_context_p, gather_context_abstract, operands, params, problems)
    return k, v
