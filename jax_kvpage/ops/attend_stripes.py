"""Attention over sequences that are sharded over a mesh (sharding/stripes.py).

Each device attends over the tokens that it holds, and the partial results are merged by their
log-sum-exp, as in the split-KV decoding of FlashAttention (Flash-Decoding), vLLM's decode context
parallelism and Helix Parallelism (arXiv 2507.07120). Only the queries' results are sent between
devices, never keys and values.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpage.ops import _attention, _lowering, _stripes, _tokens
from jax_kvpage.ops._agreement import (
    FAULT,
    agreed,
    agreed_fault,
    refuse_batching,
    try_append_kv_p,
)
from jax_kvpage.ops._checks import Checker, results
from jax_kvpage.sharding.stripes import StripeSharding
from jax_kvpage.spec import CacheSpec

__all__ = ["attend_to_limits_p", "attention", "merged"]


def _abstract(*avals: Any, spec: CacheSpec, return_lse: bool, **_: Any) -> list[Any]:
    del spec
    return results(avals, *_attention.results_of(avals[6], return_lse), FAULT)


# Like paged_attention, but with limits int32[T] after q: the last position that each new token
# sees, at least 0 and not decreasing within a sequence. Lengths only tell which slots are occupied.
# The last result is FAULT. Shapes are checked before.
attend_to_limits_p = _lowering.make_primitive("attend_to_limits", _abstract, _attention.STATIC)
_lowering.register_lowerings(attend_to_limits_p, name="paged_attention")
_lowering.refuse_differentiation(attend_to_limits_p)
refuse_batching(attend_to_limits_p, "paged_attention")


def merged(
    out: jax.Array, lse: jax.Array, sinks: jax.Array | None, axis: str
) -> tuple[jax.Array, jax.Array]:
    """Merges attention over the keys of all devices of an axis, in float32.

    Args:
        out: [T, Hq, D], over the keys of this device; 0 if there are none.
        lse: float32 [T, Hq], the logarithm of its softmax denominator; -inf if there are no keys.
        sinks: float32 [Hq], logits that are added to the denominator once; or None.
        axis: mesh axis.

    Returns:
        out, in its dtype, and lse, equal on all devices; 0 and -inf for tokens that see nothing.
    """
    highest = jax.lax.pmax(lse, axis)
    sees = highest != -jnp.inf
    if sinks is not None:
        highest = jnp.maximum(highest, sinks[None])
    # Without a finite maximum there is nothing to subtract; the weights keep NaN as NaN.
    shift = jnp.where(jnp.isfinite(highest), highest, 0.0)
    weights = jnp.exp(lse - shift)
    sums, total = jax.lax.psum((out.astype(jnp.float32) * weights[:, :, None], weights), axis)
    if sinks is not None:
        total = total + jnp.exp(sinks[None] - shift)
    whole = jnp.where(sees[:, :, None], sums / total[:, :, None], 0.0)
    return whole.astype(out.dtype), jnp.where(sees, jnp.log(total) + shift, -jnp.inf)


def _unserved(arguments: dict[str, Any]) -> list[str]:
    """Returns problems with options that cannot be computed from local positions and merged."""
    problems = []
    spread = "over a cache whose sequences are spread over a mesh"
    if arguments.get("sliding_window") is not None:
        problems.append(
            f"sliding_window: not supported {spread}, where a device has only every n-th part "
            "of a window: leave it out, or keep such layers in a pool on one device (windows are "
            "short)"
        )
    if arguments.get("alibi_slopes") is not None:
        problems.append(
            f"alibi_slopes: not supported {spread}, where a device does not know the distance "
            "between its tokens: use a pool on one device, or one with split heads (axis=...)"
        )
    if arguments.get("addressing", "slots") != "slots":
        problems.append(f"addressing: only 'slots' is served {spread}: leave it out")
    if arguments.get("implementation") not in (None, "cpu"):
        problems.append(f"implementation: only 'cpu' is served {spread}: leave it out")
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
    """Runs `paged_attention`, or `update_and_attend` if there are k and v, on one device."""
    name, cache = op.__name__, arguments["cache"]
    problems = _unserved(arguments)
    window, sinks, alibi = _attention.operands(
        None, arguments.get("sinks"), arguments.get("alibi_slopes"), problems
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
    faults: list[jax.Array] = []
    if kv:
        k, v = (jnp.asarray(array)[part.source] for array in kv)
        own = (handle, epoch, part.lengths, slots, part.offsets, layer)
        epoch, appended = try_append_kv_p.bind(*own, k, v, spec=sharding.local)
        faults.append(appended)
    seen = (handle, epoch, part.lengths, part.seen_slots, part.seen_offsets, layer)
    none = (np.int32(0), _lowering.absent(), _lowering.absent())
    out, lse, attended = attend_to_limits_p.bind(
        *seen, q, part.limits, *none, spec=sharding.local, addressing="slots", **static
    )
    fault = agreed_fault([*faults, attended], sharding.axis)
    given = sinks if sinks.shape[0] else None
    epoch, *whole = agreed(fault, epoch, *merged(out, lse, given, sharding.axis))
    out, lse = (_tokens.like(arguments["batch"], array) for array in whole)
    result = (out, lse) if wants_lse else (out,)
    if kv:
        return (*result, dataclasses.replace(cache, epoch=epoch))
    return result if wants_lse else out
