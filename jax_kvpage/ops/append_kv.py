"""append_kv: writes the keys and values of new tokens."""

from typing import Any

import jax

from jax_kvpage.cache import Batch, KVCache
from jax_kvpage.ops import _batching, _lowering, _mesh, _scratch, _stripes, _tokens
from jax_kvpage.ops._checks import EPOCH, check_arrays, pool_checker, results
from jax_kvpage.spec import CacheSpec

__all__ = ["append_kv"]

_NAMES = (*_batching.CACHE, "slots", "query_offsets", "layer", "k", "v")


def _abstract(*avals: Any, spec: CacheSpec, problems: tuple[str, ...] = ()) -> list[Any]:
    check = pool_checker("append_kv", spec, problems)
    _tokens.check_header(check, avals)
    _tokens.check_kv(check, *avals[6:])
    check.done()
    return results(avals, EPOCH)


append_kv_p = _lowering.make_primitive("append_kv", _abstract)


@_mesh.over_mesh(_mesh.cache_only, striped=_stripes.append_kv)
def append_kv(
    cache: KVCache, k: jax.Array, v: jax.Array, batch: Batch, *, layer: int | jax.Array
) -> KVCache:
    """Writes k and v of the new tokens of one layer at positions lengths[slot] + i.

    Lengths do not change: `advance` raises them once all layers have been written. Until then,
    writing again overwrites.

    Args:
        cache: the cache.
        k: [T, Hkv, D], or [S, T, Hkv, D] for a padded batch, float32, bfloat16 or float16;
            converted to the cache's dtype, or quantized as in `jax_kvpage.quantize` if that is int8
            or float8_e4m3fn.
        v: like k.
        batch: which tokens belong to which slot.
        layer: int, or traced int32 scalar.

    Returns:
        The next cache.

    Raises:
        ValueError: wrong shapes, dtypes or layer, all listed in one message.
        jax.errors.JaxRuntimeError: at run time: a stale cache or closed pool, a free or repeated
            slot, malformed offsets, a layer out of range, or positions that are not mapped.
    """
    check_arrays("append_kv", k=k, v=v)
    operands, problems = _tokens.operands("append_kv", cache, batch, layer, k=k, v=v)
    params = {"spec": cache.spec}
    (epoch,) = _lowering.bind(append_kv_p, _abstract, operands, params, problems)
    return _tokens.replaced(cache, epoch)


_lowering.register_lowerings(append_kv_p, aliases={1: 0}, scratch=_scratch.checked)
_lowering.refuse_differentiation(append_kv_p)


def _batch(operands: Any, dims: Any, *, spec: CacheSpec) -> Any:
    wrong = _batching.must_be_mapped("slots")
    _batching.refuse("append_kv", _NAMES, dims, wrong)
    folded, _ = _tokens.folded(operands, dims, per_token=2)
    return append_kv_p.bind(*folded, spec=spec), [None]


_batching.register(append_kv_p, _batch)
