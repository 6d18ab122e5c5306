"""paged_attention: causal attention of new tokens over the cached context."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jax_kvpage import reference
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
from jax_kvpage.ops._checks import check_arrays, pool_checker, results
from jax_kvpage.ops.gather_context import gather_context_p
from jax_kvpage.spec import CacheSpec

__all__ = ["paged_attention"]

_NAMES = (
    *_batching.CACHE,
    "slots",
    "query_offsets",
    "layer",
    "q",
    "sliding_window",
    "sinks",
    "alibi_slopes",
)


def _abstract(
    *avals: Any, spec: CacheSpec, return_lse: bool, problems: tuple[str, ...] = (), **_: Any
) -> list[Any]:
    check = pool_checker("paged_attention", spec, problems)
    _tokens.check_header(check, avals)
    q, window, sinks, alibi = avals[6:]
    _attention.check_attention(check, q, window, sinks, alibi)
    check.done()
    return results(avals, *_attention.results_of(q, return_lse))


paged_attention_p = _lowering.make_primitive("paged_attention", _abstract, _attention.STATIC)


@_mesh.over_mesh(_mesh.attention, striped=attend_stripes.attention)
def paged_attention(
    q: jax.Array,
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
    """Attention of new tokens over their sequences' context, including the new tokens themselves.

    The new tokens must have been written (`append_kv`). Token i of a sequence that has n tokens in
    the cache sees positions 0 to n + i, so one op serves decode, prefill, chunked prefill and any
    mixture. The result for a sequence does not depend on the other sequences of the batch.

    Scores are scaled, soft-capped, biased (ALiBi) and masked, in this order, before the softmax.
    Kernels may round softmax weights to 16 bits before multiplying the values, as other attention
    kernels do. Under `jax.default_matmul_precision("highest")` (or "float32"), weights are not
    rounded, which is slower: on CPU, prefill with bfloat16 queries takes 1.3 times as long over
    bfloat16 and 1.9 times over quantized storage; on CUDA, tensor cores are not used.

    Args:
        q: [T, Hq, D], or [S, T, Hq, D] for a padded batch, float32, bfloat16 or float16; Hq is a
            multiple of the cache's heads.
        cache: the cache.
        batch: which tokens belong to which slot.
        layer: int, or traced int32 scalar.
        scale: factor of the scores, 1/sqrt(D) by default. Static.
        sliding_window: a token sees itself and the `sliding_window` - 1 tokens before it. An int,
            or a traced int32 scalar, where 0 or less means no window (so layers with different
            windows can be scanned).
        logits_soft_cap: c in c * tanh(score / c) (Gemma 2). Static.
        sinks: [Hq], an additional logit per head that only enters the softmax's denominator
            (attention sinks as in gpt-oss).
        alibi_slopes: [Hq], adds slope * (key position - query position) (ALiBi, Press et al.).
        return_lse: whether to also return the natural logarithm of the softmax's denominator.
        implementation: "cpu", "cuda", "xla" (pure JAX over a gathered context: slow, for
            checking), or None, the best for the platform.
        addressing: how the kernels find keys and values. "slots": in the slots' contiguous virtual
            memory. "table": by block number through the pool's own block table, like paged
            attention elsewhere. Results are bit-identical; the table is not an operand, and growth
            does not recompile anything. On CUDA, the first such program maps every block of the
            process's pools a second time, at an address given by its number. Not with "xla".
            Static.

    Returns:
        out, in q's shape and dtype; with return_lse also lse, float32 [T, Hq] or [S, T, Hq].
        Padding tokens and masked sequences get 0 and -inf.

    Raises:
        ValueError: unsupported arguments, all listed in one message; or an implementation that the
            platform does not have.
        jax.errors.JaxRuntimeError: at run time: a stale cache or closed pool, a free or repeated
            slot, malformed offsets, a layer out of range, or positions that are not mapped or not
            written.
    """
    check_arrays("paged_attention", q=q)
    operands, problems = _tokens.operands("paged_attention", cache, batch, layer, q=q)
    options = _attention.operands(sliding_window, sinks, alibi_slopes, problems)
    params = _attention.params(
        cache.spec.head_dim, scale, logits_soft_cap, return_lse, implementation, problems
    )
    params["addressing"] = _attention.check_addressing(addressing, implementation, problems)
    params["spec"] = cache.spec
    operands = (*operands, *options)
    out, lse = _lowering.bind(paged_attention_p, _abstract, operands, params, problems)
    out = _tokens.like(batch, out)
    return (out, _tokens.like(batch, lse)) if return_lse else out


def attend_gathered(*operands: Any, spec: CacheSpec, **params: Any) -> Any:
    """The op in pure JAX, except for the gather that copies the context from the arena."""
    _, _, lengths, slots, query_offsets, _, q, *options = operands
    k, v = gather_context_p.bind(*operands[:6], spec=spec)
    active = slots >= 0
    starts = jnp.where(active, lengths[jnp.maximum(slots, 0)], 0)
    del params["exact_weights"], params["addressing"]  # for kernels; weights are float32 here
    return reference.ragged_attention(q, k, v, starts, query_offsets, active, *options, **params)


_lowering.register_lowerings(
    paged_attention_p, xla=attend_gathered, scratch=_scratch.attention, plan=_plan.appended(7)
)
_lowering.refuse_differentiation(paged_attention_p)
_one_by_one = _batching.map_reader("paged_attention", _NAMES, paged_attention_p.bind)


def _batch(operands: Any, dims: Any, **params: Any) -> Any:
    own_slots = dims[3] is not None
    shared_options = all(dim is None for dim in dims[7:])
    if not (own_slots and shared_options):
        return _one_by_one(operands, dims, **params)
    _batching.refuse("paged_attention", _NAMES, dims, _batching.never_mapped)
    operands, shape = _tokens.folded(operands, dims, per_token=1)
    out, lse = paged_attention_p.bind(*operands, **params)
    return _attention.split_results(out, lse, shape, params["return_lse"]), [0, 0]


_batching.register(paged_attention_p, _batch)
