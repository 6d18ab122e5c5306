"""occupy and vacate: the part of acquiring and releasing slots that programs see (internal).

`KVPool` decides on the host and queues one of these; the cache's lengths change when it runs.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Primitive

from jax_kvpage._arrays import as_int32
from jax_kvpage.cache import KVCache
from jax_kvpage.ops import _batching, _lowering
from jax_kvpage.ops._checks import EPOCH, INT32, cache_operands, pool_checker, results
from jax_kvpage.spec import CacheSpec

__all__ = ["occupy", "vacate"]


def _abstract(*avals: Any, spec: CacheSpec) -> list[Any]:
    handle, epoch, lengths, own, slots = avals
    check = pool_checker("KVPool.acquire or release", spec)
    check.cache(handle, epoch, lengths)
    check.array("own", own, (2,), INT32)
    check.array("slots", slots, ("n",), INT32)
    check.done()
    return results(avals, EPOCH, ((spec.max_slots,), jnp.int32))


occupy_p = _lowering.make_primitive("occupy", _abstract)
vacate_p = _lowering.make_primitive("vacate", _abstract)


def _apply(primitive: Primitive, cache: KVCache, own: Any, slots: Any) -> KVCache:
    arrays = cache_operands(primitive.name, cache)
    operands = (*arrays, as_int32("own", own), as_int32("slots", slots))
    epoch, lengths = _lowering.bind(primitive, _abstract, operands, {"spec": cache.spec})
    return dataclasses.replace(cache, epoch=epoch, lengths=lengths)


def occupy(cache: KVCache, own: Any, slots: Any) -> KVCache:
    """Marks slots as occupied by empty sequences: lengths[slot] = 0.

    Args:
        cache: the cache.
        own: int32[2], handle of the pool that acts; must be the cache's.
        slots: int32[n], -1 is padding.

    Returns:
        The next cache.
    """
    return _apply(occupy_p, cache, own, slots)


def vacate(cache: KVCache, own: Any, slots: Any) -> KVCache:
    """Marks slots as free, lengths[slot] = -1, and lets their draining blocks park.

    Arguments and result are those of `occupy`.
    """
    return _apply(vacate_p, cache, own, slots)


for _primitive in (occupy_p, vacate_p):
    _lowering.register_lowerings(_primitive, aliases={1: 0, 2: 1})


def _refuse_batch(operands: Any, dims: Any, **params: Any) -> Any:
    del operands, dims, params
    raise ValueError("vmap of KVPool.acquire or release: acquire and release slots outside of vmap")


for _primitive in (occupy_p, vacate_p):
    _batching.register(_primitive, _refuse_batch)
