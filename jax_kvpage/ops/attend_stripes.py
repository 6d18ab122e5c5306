"""Attention over sequences that are spread over a mesh (sharding/stripes.py).

Each device attends over the tokens that it holds, and the partial results are merged by the
logarithms of their softmax denominators, as in the split-KV decoding of FlashAttention
(Flash-Decoding), vLLM's decode context parallelism and Helix Parallelism (arXiv 2507.07120). Only
queries' results go between devices, keys and values never do.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpage import reference
from jax_kvpage.ops import _attention, _batching, _lowering, _stripes, _tokens
from jax_kvpage.ops._checks import Checker, pool_checker, results
from jax_kvpage.ops.append_kv import append_kv_p
from jax_kvpage.ops.gather_context import gather_context_p
from jax_kvpage.sharding.stripes import StripeSharding
from jax_kvpage.spec import CacheSpec

__all__ = ["attend_to_limits_p", "attention", "merged"]

_NAMES = (*_batching.CACHE, "slots", "query_offsets", "layer", "q", "limits")
_OPTIONS = ("sliding_window", "sinks", "alibi_slopes")


def _abstract(
    *avals: Any, spec: CacheSpec, return_lse: bool, problems: tuple[str, ...] = (), **_: Any
) -> list[Any]:
    check = pool_checker("paged_attention", spec, problems)
    _tokens.check_header(check, avals)
    q, limits, *options = avals[6:]
    _attention.check_attention(check, q, *options)
    check.array("limits", limits, ("T",), (jnp.int32,))
    check.done()
    return results(avals, *_attention.results_of(q, return_lse))


# As paged_attention, but limits int32[T] say up to which position each new token sees, at least 0
# and not falling within a sequence; the lengths only say which slots are occupied. CPU only.
attend_to_limits_p = _lowering.make_primitive("attend_to_limits", _abstract, _attention.STATIC)


def _attend_gathered(*operands: Any, spec: CacheSpec, **params: Any) -> Any:
    """The op in pure JAX, except for the gather that copies the context from the arena."""
    handle, epoch, lengths, slots, offsets, layer, q, limits, *options = operands
    del params["exact_weights"], params["addressing"]  # for kernels; weights are float32 here
    if q.shape[0] == 0:
        return jnp.zeros_like(q), jnp.zeros((0, q.shape[1]), jnp.float32)
    counts = jnp.diff(offsets)
    active = (slots >= 0) & (counts > 0)
    # The last token of each context is gathered as a new one.
    before = limits[jnp.maximum(offsets[1:] - 1, 0)]
    target = jnp.where(active, slots, spec.max_slots)
    lengths = lengths.at[target].set(before, mode="drop")
    ends = jnp.cumsum(active.astype(jnp.int32), dtype=jnp.int32)
    ones = jnp.concatenate([offsets[:1], offsets[:1] + ends])
    context = (handle, epoch, lengths, slots, ones, layer)
    k, v = gather_context_p.bind(*context, spec=spec)
    starts = jnp.zeros_like(slots)
    return reference.ragged_attention(
        q, k, v, starts, offsets, active, *options, limits=limits, **params
    )


_lowering.register_lowerings(attend_to_limits_p, xla=_attend_gathered)
_lowering.refuse_differentiation(attend_to_limits_p)
_batching.register(
    attend_to_limits_p,
    _batching.map_reader("paged_attention", (*_NAMES, *_OPTIONS), attend_to_limits_p.bind),
)


def merged(
    out: jax.Array, lse: jax.Array, sinks: jax.Array | None, axis: str
) -> tuple[jax.Array, jax.Array]:
    """Attention over the keys of all devices of an axis, in float32.

    Args:
        out: [T, Hq, D], of the keys of this device; 0 where there are none.
        lse: float32 [T, Hq], the logarithm of its softmax denominator; -inf where there are none.
        sinks: float32 [Hq], logits that join the denominator once; or None.
        axis: of the mesh.

    Returns:
        out, in its dtype, and lse, alike on all devices; 0 and -inf for tokens that see nothing.
    """
    highest = jax.lax.pmax(lse, axis)
    sees = highest != -jnp.inf
    if sinks is not None:
        highest = jnp.maximum(highest, sinks[None])
    # Without a finite maximum there is nothing to subtract; NaN stays NaN by the weights.
    shift = jnp.where(jnp.isfinite(highest), highest, 0.0)
    weights = jnp.exp(lse - shift)
    sums, total = jax.lax.psum((out.astype(jnp.float32) * weights[:, :, None], weights), axis)
    if sinks is not None:
        total = total + jnp.exp(sinks[None] - shift)
    whole = jnp.where(sees[:, :, None], sums / total[:, :, None], 0.0)
    return whole.astype(out.dtype), jnp.where(sees, jnp.log(total) + shift, -jnp.inf)


def _unserved(arguments: dict[str, Any]) -> list[str]:
    """Options that local positions and a merge cannot give, and why."""
    problems = []
    spread = "over a cache whose sequences are spread over a mesh"
    if arguments.get("sliding_window") is not None:
        problems.append(
            f"sliding_window: not served {spread}, where a window is no run of a device's own "
            "tokens: leave it out, or keep such layers in a pool on one device (a window is short)"
        )
    if arguments.get("alibi_slopes") is not None:
        problems.append(
            f"alibi_slopes: not served {spread}, where devices know distances in their own tokens "
            "only: use a pool on one device, or with its heads spread (axis=...)"
        )
    if arguments.get("addressing", "slots") != "slots":
        problems.append(f"addressing: only 'slots' is served {spread}: leave it out")
    return problems


def _check_options(
    window: Any, sinks: Any, alibi: Any, problems: list[str]
) -> Callable[[Checker, Any], None]:
    def check(checker: Checker, q: Any) -> None:
        for problem in problems:
            checker.add(problem)
        _attention.check_attention(checker, q, *map(jax.typeof, (window, sinks, alibi)))

    return check


def attention(op: Any, sharding: StripeSharding, arguments: dict[str, Any]) -> Any:
    """`paged_attention`, or `update_and_attend` where there are k and v, on one device."""
    name, cache = op.__name__, arguments["cache"]
    problems = _unserved(arguments)
    window, sinks, alibi = _attention.operands(
        *(arguments.get(option) for option in _OPTIONS), problems
    )
    wants_lse = arguments.get("return_lse", False)
    static = _attention.params(
        cache.spec.head_dim,
        arguments.get("scale"),
        arguments.get("logits_soft_cap"),
        True,
        arguments.get("implementation"),
        problems,
    )
    check = _check_options(window, sinks, alibi, problems)
    operands = _stripes.checked_tokens(name, arguments, check)
    handle, epoch, lengths, slots, offsets, layer, q, *kv = operands
    part = _stripes.Part.of(sharding, lengths, slots, offsets, q.shape[0])
    if kv:
        k, v = (jnp.asarray(array)[part.source] for array in kv)
        own = (handle, epoch, part.lengths, slots, part.offsets, layer)
        (epoch,) = append_kv_p.bind(*own, k, v, spec=sharding.local)
    seen = (handle, epoch, part.lengths, part.seen_slots, part.seen_offsets, layer)
    none = (np.int32(0), _lowering.absent(), _lowering.absent())
    out, lse = attend_to_limits_p.bind(
        *seen, q, part.limits, *none, spec=sharding.local, addressing="slots", **static
    )
    given = sinks if sinks.shape[0] else None
    out, lse = (_tokens.like(arguments["batch"], x) for x in merged(out, lse, given, sharding.axis))
    result = (out, lse) if wants_lse else (out,)
    if kv:
        return (*result, dataclasses.replace(cache, epoch=epoch))
    return result if wants_lse else out
