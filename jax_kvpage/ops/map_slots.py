"""map_slots: maps physical blocks into slots from within a program."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_kvpage.cache import KVCache
from jax_kvpage.ops import _batching, _lowering, _mesh, _slots
from jax_kvpage.ops._checks import EPOCH, pool_checker, results
from jax_kvpage.spec import CacheSpec

__all__ = ["map_slots"]


def _abstract(*avals: Any, spec: CacheSpec, problems: tuple[str, ...] = ()) -> list[Any]:
    check = pool_checker("map_slots", spec, problems)
    _slots.check(check, "num_tokens", avals)
    check.done()
    return results(avals, EPOCH, (avals[3].shape, jnp.bool_))


map_slots_p = _lowering.make_primitive("map_slots", _abstract)


@_mesh.over_mesh(_mesh.cache_and_ok, replicated=True, striped=_mesh.not_striped, maps=True)
def map_slots(cache: KVCache, slots: Any, num_tokens: Any) -> tuple[KVCache, jax.Array]:
    """Maps physical blocks until every slot has room for a total of `num_tokens` tokens.

    Existing room costs nothing, and a token that fits into the last mapped block needs no new one.
    A slot gets either all blocks that it needs or none. On a mesh this holds for all devices
    together: the first device that reaches the call decides and maps for all, the others adopt its
    decision, and ok is the same everywhere. No device waits for another.

    Args:
        cache: the cache; the slots must be occupied (`KVPool.acquire`).
        slots: int32[n], each at most once; -1 is padding. May also be a single slot.
        num_tokens: int32[n], or a scalar for all slots: total tokens, not additional ones.

    Returns:
        The next cache and ok, bool[n]: False if nothing was mapped, because the pool ran out of
        blocks or num_tokens exceeds `cache.spec.max_seq_len` (compare the two to tell which); True
        for padding.

    Raises:
        ValueError: wrong shapes or dtypes, all listed in one message; or the pool's sequences are
            sharded over a mesh (use `KVPool.extend` there); or, outside `jax.shard_map`, its slots
            are split over replicas (use `grow` there).
        jax.errors.JaxRuntimeError: at run time: a stale cache or closed pool, a free or repeated
            slot, or a negative number of tokens; on a mesh, slots or num_tokens that differ between
            devices.
    """
    operands = _slots.operands("map_slots", cache, slots, "num_tokens", num_tokens)
    epoch, ok = _lowering.bind(map_slots_p, _abstract, operands, {"spec": cache.spec})
    return _slots.replaced(cache, epoch), ok


_lowering.register_lowerings(map_slots_p, aliases={1: 0})


def _batch(operands: Any, dims: Any, *, spec: CacheSpec) -> Any:
    flat, shape = _slots.flattened("map_slots", "num_tokens", operands, dims)
    epoch, ok = map_slots_p.bind(*flat, spec=spec)
    return [epoch, _batching.split_rows(ok, shape)], [None, 0]


_batching.register(map_slots_p, _batch)
