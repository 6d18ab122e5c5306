"""set_lengths: rolls sequences back to fewer tokens."""

from typing import Any

import jax.numpy as jnp

from jax_kvpage.cache import KVCache
from jax_kvpage.ops import _batching, _lowering, _mesh, _slots, _stripes
from jax_kvpage.ops._checks import EPOCH, pool_checker, results
from jax_kvpage.spec import CacheSpec

__all__ = ["set_lengths"]


def _abstract(*avals: Any, spec: CacheSpec, problems: tuple[str, ...] = ()) -> list[Any]:
    check = pool_checker("set_lengths", spec, problems)
    _slots.check(check, "lengths", avals)
    check.done()
    return results(avals, EPOCH, ((spec.max_slots,), jnp.int32))


set_lengths_p = _lowering.make_primitive("set_lengths", _abstract)


@_mesh.over_mesh(_mesh.cache_only, striped=_stripes.set_lengths)
def set_lengths(cache: KVCache, slots: Any, lengths: Any) -> KVCache:
    """Lowers the lengths of sequences, for instance to drop rejected draft tokens.

    Blocks stay mapped. The dropped positions count as unwritten afterwards.

    Args:
        cache: the cache.
        slots: int32[n], each at most once; -1 is padding. May also be a single slot.
        lengths: int32[n], or a scalar for all slots; from 0 to what the sequence has written.

    Returns:
        The next cache. Programs that still read the old one fail as stale.

    Raises:
        ValueError: wrong shapes or dtypes, all listed in one message.
        jax.errors.JaxRuntimeError: at run time: a stale cache or closed pool, a free or repeated
            slot, or a length beyond what was written.
    """
    operands = _slots.operands("set_lengths", cache, slots, "lengths", lengths)
    epoch, new = _lowering.bind(set_lengths_p, _abstract, operands, {"spec": cache.spec})
    return _slots.replaced(cache, epoch, new)


_lowering.register_lowerings(set_lengths_p, aliases={1: 0, 2: 1})


def _batch(operands: Any, dims: Any, *, spec: CacheSpec) -> Any:
    flat, _ = _slots.flattened("set_lengths", "lengths", operands, dims)
    return set_lengths_p.bind(*flat, spec=spec), [None, None]


_batching.register(set_lengths_p, _batch)
