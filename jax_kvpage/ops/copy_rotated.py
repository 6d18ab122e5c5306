"""copy_rotated: the op that `KVPool.reuse_segment` queues (internal).

Keys are cached after their rotation by a rotary position embedding (RoPE). Rotations add up, so a
key computed at position p becomes that of position p + d by another rotation by the angles of d. A
factor on queries and keys (yarn's attention scaling) stays in the key and does not matter.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jax_kvpage._arrays import as_int32
from jax_kvpage.cache import KVCache
from jax_kvpage.ops import _batching, _lowering, _scratch
from jax_kvpage.ops._checks import EPOCH, INT32, cache_operands, pool_checker, results
from jax_kvpage.spec import CacheSpec

__all__ = ["copy_rotated"]

_OP = "KVPool.reuse_segment"


def _abstract(*avals: Any, spec: CacheSpec, interleaved: bool) -> list[Any]:
    del interleaved
    handle, epoch, lengths, own, copies, inv_freq = avals
    check = pool_checker(_OP, spec)
    check.cache(handle, epoch, lengths)
    check.array("own", own, (2,), INT32)
    check.array("copies", copies, ("n", 5), INT32)
    check.array("inv_freq", inv_freq, (spec.num_layers, "pairs"), (jnp.float32,))
    if 2 * check.dims.get("pairs", 0) > spec.head_dim:
        check.add(
            f"inv_freq: has {check.dims['pairs']} pairs, but a key has {spec.head_dim} elements"
        )
    check.done()
    return results(avals, EPOCH, ((spec.max_slots,), jnp.int32))


copy_rotated_p = _lowering.make_primitive("copy_rotated", _abstract, static=("spec", "interleaved"))


def copy_rotated(
    cache: KVCache, own: Any, copies: Any, inv_freq: Any, interleaved: bool = False
) -> KVCache:
    """Copies segments of sequences, in all layers, to the end of other sequences.

    All or nothing: the whole list is checked before anything is changed. Values are copied bit by
    bit. Keys are rotated in float32 (quantized ones are dequantized and requantized), or also
    copied bit by bit if the position stays the same or all angles of the layer are 0.

    Args:
        cache: the cache.
        own: int32[2], handle of the pool that makes the call; must be the cache's.
        copies: int32[n, 5], rows of (source slot, target slot, first token, number of tokens,
            committed tokens of the target); source -1 is padding. The target grows by the number of
            tokens. A slot may be the target of only one copy, and then not a source.
        inv_freq: float32[num_layers, pairs], rotation angle per position of each pair of elements.
        interleaved: whether a pair is elements 2i and 2i + 1 (GPT-J) instead of i and i + pairs.

    Returns:
        The next cache.
    """
    operands = (
        *cache_operands(_OP, cache),
        as_int32("own", own),
        as_int32("copies", copies),
        inv_freq,
    )
    params = {"spec": cache.spec, "interleaved": interleaved}
    epoch, lengths = _lowering.bind(copy_rotated_p, _abstract, operands, params)
    return dataclasses.replace(cache, epoch=epoch, lengths=lengths)


_lowering.register_lowerings(
    copy_rotated_p, name=_OP, aliases={1: 0, 2: 1}, scratch=_scratch.segments
)


def _refuse_batch(operands: Any, dims: Any, **params: Any) -> Any:
    del operands, dims, params
    raise ValueError(f"vmap of {_OP}: copy segments outside of vmap")


_batching.register(copy_rotated_p, _refuse_batch)
_lowering.refuse_differentiation(copy_rotated_p)
