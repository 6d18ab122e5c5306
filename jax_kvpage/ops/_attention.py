"""The options that all attention ops take, and the checks and results they share."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpage import _compat
from jax_kvpage.ops._checks import FLOATS, Checker, show
from jax_kvpage.ops._lowering import absent, check_implementation

__all__ = ["Options", "attention_results", "check_attention", "make_options", "unpack"]


class Options(NamedTuple):
    """Attention options as a primitive takes them.

    Attributes:
        operands: window int32[], sinks f32[Hq] or f32[0], alibi f32[Hq] or f32[0].
        params: scale, soft_cap (0 is off), return_lse, implementation.
        problems: mistakes found on the way.
    """

    operands: tuple[Any, Any, Any]
    params: dict[str, Any]
    problems: list[str]


def _positive_number(name: str, value: Any, default: float, problems: list[str]) -> float:
    if value is None:
        return default
    if isinstance(value, jax.Array):
        problems.append(
            f"{name}: wanted a Python number known at trace time, got an array "
            f"{jax.typeof(value)}; make it static (a traced scale can be multiplied into q)"
        )
        return default
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        problems.append(f"{name}: wanted a positive finite number or None, got {value!r}")
        return default
    return float(value)


def _window(value: Any, problems: list[str]) -> Any:
    if value is None:
        return np.int32(0)
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        problems.append(
            "sliding_window: wanted None, an int from 1 (a token sees itself and the window - 1 "
            f"before it) or a traced int32 scalar (0 or less means no window), got {value!r}"
        )
        return np.int32(0)
    return np.int32(min(value, 2**31 - 1))


def _per_head(name: str, value: Any, problems: list[str]) -> Any:
    if value is None:
        return absent()
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        problems.append(f"{name}: wanted floating point values, got {show(array)}")
    if array.size == 0:
        problems.append(f"{name}: is empty; pass None to leave it out")
    return array.astype(jnp.float32)


def make_options(
    head_dim: int,
    *,
    scale: Any,
    sliding_window: Any,
    logits_soft_cap: Any,
    sinks: Any,
    alibi_slopes: Any,
    return_lse: bool,
    implementation: str | None,
) -> Options:
    """Turns the keyword arguments of an attention op into operands and parameters."""
    problems: list[str] = []
    check_implementation(implementation, problems)
    operands = (
        _window(sliding_window, problems),
        _per_head("sinks", sinks, problems),
        _per_head("alibi_slopes", alibi_slopes, problems),
    )
    params = {
        "scale": _positive_number("scale", scale, 1.0 / math.sqrt(max(head_dim, 1)), problems),
        "soft_cap": _positive_number("logits_soft_cap", logits_soft_cap, 0.0, problems),
        "return_lse": bool(return_lse),
        "implementation": implementation,
    }
    return Options(operands, params, problems)


def check_attention(check: Checker, q: Any, window: Any, sinks: Any, alibi: Any) -> None:
    """Checks queries against heads and head size, and per-head arrays against the queries."""
    check.array("q", q, ("T", "Hq", "D"), FLOATS)
    heads, kv_heads = check.dims.get("Hq"), check.dims.get("Hkv")
    if heads is not None and kv_heads and (heads == 0 or heads % kv_heads):
        check.add(f"q: wanted a multiple of the {kv_heads} key/value heads as heads, got {heads}")
    check.array("sliding_window", window, (), (jnp.int32,))
    for name, aval in (("sinks", sinks), ("alibi_slopes", alibi)):
        if aval.shape != (0,):
            check.array(name, aval, ("Hq",), (jnp.float32,))


def attention_results(operands: Sequence[Any], q: Any, return_lse: bool) -> list[Any]:
    """Abstract values of out and lse; without return_lse lse has no rows."""
    tokens, heads, _ = q.shape
    return [
        _compat.result_aval(operands, q.shape, q.dtype),
        _compat.result_aval(operands, (tokens if return_lse else 0, heads), jnp.float32),
    ]


def unpack(out: Any, lse: Any, return_lse: bool) -> tuple[Any, ...]:
    """The results a caller asked for."""
    return (out, lse) if return_lse else (out,)


def split_lse(lse: Any, size: int) -> Any:
    """[B * T, Hq] -> [B, T, Hq], also when there are no rows."""
    return lse.reshape(size, lse.shape[0] // size, lse.shape[1])
