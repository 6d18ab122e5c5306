"""advance: makes the tokens written in a step part of their sequences."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jax_kvpage.cache import Batch, KVCache
from jax_kvpage.ops import _batching, _lowering, _mesh, _stripes
from jax_kvpage.ops._checks import EPOCH, batch_operands, cache_operands, pool_checker, results
from jax_kvpage.spec import CacheSpec

__all__ = ["advance"]

_NAMES = (*_batching.CACHE, "slots", "query_offsets")


def _abstract(*avals: Any, spec: CacheSpec) -> list[Any]:
    check = pool_checker("advance", spec)
    check.cache(*avals[:3])
    check.batch(*avals[3:])
    check.done()
    return results(avals, EPOCH, ((spec.max_slots,), jnp.int32))


advance_p = _lowering.make_primitive("advance", _abstract)


@_mesh.over_mesh(_mesh.cache_only, striped=_stripes.advance)
def advance(cache: KVCache, batch: Batch) -> KVCache:
    """Raises the lengths by the new tokens of a batch; once per step, after all layers are written.

    Args:
        cache: the cache.
        batch: the batch that was written; sequences that it masks do not advance.

    Returns:
        The next cache.

    Raises:
        ValueError: wrong shapes or dtypes, all listed in one message.
        jax.errors.JaxRuntimeError: at run time: a stale cache or closed pool, a free or repeated
            slot, malformed offsets, or tokens that some layer has not written.
    """
    operands = (*cache_operands("advance", cache), *batch_operands("advance", batch))
    epoch, lengths = _lowering.bind(advance_p, _abstract, operands, {"spec": cache.spec})
    return dataclasses.replace(cache, epoch=epoch, lengths=lengths)


_lowering.register_lowerings(advance_p, aliases={1: 0, 2: 1})


def _batch(operands: Any, dims: Any, *, spec: CacheSpec) -> Any:
    _batching.refuse("advance", _NAMES, dims, _batching.must_be_mapped("slots"))
    size = _batching.axis_size(operands, dims)
    slots, offsets = (_batching.front(operands[i], dims[i], size) for i in (3, 4))
    folded = _batching.fold(slots, offsets, None)
    return advance_p.bind(*operands[:3], *folded, spec=spec), [None, None]


_batching.register(advance_p, _batch)
