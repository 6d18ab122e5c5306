"""update_and_attend: append_kv and paged_attention in one call."""

import dataclasses
from typing import Any, Literal

import jax

from jax_kvpage.cache import Batch, KVCache
from jax_kvpage.ops import (
    _attention,
    _batching,
    _lowering,
    _mesh,
    _plan,
    _scratch,
    _tokens,
    attend_stripes,
)
from jax_kvpage.ops._checks import EPOCH, check_arrays, pool_checker, results
from jax_kvpage.ops.append_kv import append_kv_p
from jax_kvpage.ops.paged_attention import attend_gathered
from jax_kvpage.spec import CacheSpec

__all__ = ["update_and_attend"]

_OPTIONS = ("sliding_window", "sinks", "alibi_slopes")
_NAMES = (*_batching.CACHE, "slots", "query_offsets", "layer", "q", "k", "v", *_OPTIONS)


def _abstract(
    *avals: Any, spec: CacheSpec, return_lse: bool, problems: tuple[str, ...] = (), **_: Any
) -> list[Any]:
    check = pool_checker("update_and_attend", spec, problems)
    _tokens.check_header(check, avals)
    q, k, v, *options = avals[6:]
    _attention.check_attention(check, q, *options)
    _tokens.check_kv(check, k, v)
    check.done()
    return results(avals, *_attention.results_of(q, return_lse), EPOCH)


update_and_attend_p = _lowering.make_primitive("update_and_attend", _abstract, _attention.STATIC)


@_mesh.over_mesh(_mesh.attention_and_cache, striped=attend_stripes.attention)
def update_and_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache,
    batch: Batch,
    *,
    layer: int | jax.Array,
    scale: float | None = None,
    sliding_window: int | jax.Array | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    addressing: Literal["slots", "table"] = "slots",
) -> Any:
    """Writes k and v of new tokens into one layer of the cache, then attends over the context.

    Equivalent to `append_kv` followed by `paged_attention`, in one custom call.

    Args:
        q: [T, Hq, D], or [S, T, Hq, D] for a padded batch, float32, bfloat16 or float16; Hq is a
            multiple of the cache's heads.
        k: [T, Hkv, D] or [S, T, Hkv, D], any of these dtypes; converted to the cache's dtype.
        v: like k.
        cache: the cache, with room mapped for the new tokens.
        batch: which tokens belong to which slot.
        layer: int, or traced int32 scalar.
        scale, sliding_window, logits_soft_cap, sinks, alibi_slopes, return_lse, implementation,
            addressing: as in `paged_attention`. With "table", k and v are also written through it.

    Returns:
        (out, cache), or (out, lse, cache) with return_lse: out in q's shape and dtype, lse float32
        [T, Hq] or [S, T, Hq], and the next cache. Padding tokens and masked sequences get 0 and
        -inf.

    Raises:
        ValueError: unsupported arguments, all listed in one message; or an implementation that the
            platform does not have.
        jax.errors.JaxRuntimeError: at run time: a stale cache or closed pool, a free or repeated
            slot, malformed offsets, a layer out of range, or positions that are not mapped.
    """
    check_arrays("update_and_attend", q=q, k=k, v=v)
    operands, problems = _tokens.operands("update_and_attend", cache, batch, layer, q=q, k=k, v=v)
    options = _attention.operands(sliding_window, sinks, alibi_slopes, problems)
    head_dim = cache.spec.head_dim
    static = _attention.params(
        head_dim, scale, logits_soft_cap, return_lse, implementation, problems
    )
    static["addressing"] = _attention.check_addressing(addressing, implementation, problems)
    out, lse, epoch = _lowering.bind(
        update_and_attend_p,
        _abstract,
        (*operands, *options),
        {"spec": cache.spec, **static},
        problems,
    )
    cache = dataclasses.replace(cache, epoch=epoch)
    out = _tokens.like(batch, out)
    return (out, _tokens.like(batch, lse), cache) if return_lse else (out, cache)


def _append_then_attend(*operands: Any, spec: CacheSpec, **params: Any) -> Any:
    handle, epoch, *header = operands[:6]
    q, k, v, *options = operands[6:]
    (epoch,) = append_kv_p.bind(handle, epoch, *header, k, v, spec=spec)
    out, lse = attend_gathered(handle, epoch, *header, q, *options, spec=spec, **params)
    return out, lse, epoch


_lowering.register_lowerings(
    update_and_attend_p,
    aliases={1: 2},
    xla=_append_then_attend,
    scratch=_scratch.attention,
    plan=_plan.appended(9),
)
_lowering.refuse_differentiation(update_and_attend_p)


def _batch(operands: Any, dims: Any, **params: Any) -> Any:
    needs_slots = _batching.must_be_mapped("slots")

    def wrong(name: str, dim: int | None) -> str:
        if name in _OPTIONS and dim is not None:
            return f"{name} is batched, but one call serves all elements: use in_axes=None"
        return needs_slots(name, dim)

    _batching.refuse("update_and_attend", _NAMES, dims, wrong)
    operands, shape = _tokens.folded(operands, dims, per_token=3)
    out, lse, epoch = update_and_attend_p.bind(*operands, **params)
    out, lse = _attention.split_results(out, lse, shape, params["return_lse"])
    return [out, lse, epoch], [0, 0, None]


_batching.register(update_and_attend_p, _batch)
