"""Options, checks and results that all attention ops share."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpage import _compat
from jax_kvpage._arrays import as_bool, as_int32, to_device
from jax_kvpage._values import MAX_INT32, is_integer, is_number
from jax_kvpage.ops import _batching
from jax_kvpage.ops._checks import FLOATS, Checker, show
from jax_kvpage.ops._lowering import ADDRESSINGS, absent, check_implementation

__all__ = [
    "STATIC",
    "check_addressing",
    "check_attention",
    "operands",
    "params",
    "results_of",
    "split_results",
]

# Static parameters of the attention primitives.
STATIC = (
    "spec",
    "scale",
    "soft_cap",
    "exact_weights",
    "return_lse",
    "implementation",
    "addressing",
)


# Kernels use powers of two: a scale is multiplied by log2(e) in float32.
_LEAST = float(np.finfo(np.float32).tiny)
_MOST = float(np.finfo(np.float32).max) * math.log(2)


def _positive_number(name: str, value: Any, default: float, problems: list[str]) -> float:
    if value is None:
        return default
    if isinstance(value, jax.Array):
        problems.append(
            f"{name}: wanted a Python number known at trace time, got an array "
            f"{jax.typeof(value)}; make it static (a traced scale can be multiplied into q)"
        )
        return default
    if not is_number(value) or not _LEAST <= value <= _MOST:
        problems.append(
            f"{name}: wanted a positive number that float32 can hold ({_LEAST:.2g} to {_MOST:.2g}) "
            f"or None, got {value!r}"
        )
        return default
    return float(value)


def _window(value: Any, problems: list[str]) -> Any:
    if value is None:
        return np.int32(0)
    if isinstance(value, (jax.Array, np.ndarray)):
        return as_int32("sliding_window", value)
    if not is_integer(value) or value < 1:
        problems.append(
            "sliding_window: wanted None, an int from 1 (a token sees itself and the window - 1 "
            f"before it) or a traced int32 scalar (0 or less means no window), got {value!r}"
        )
        return np.int32(0)
    return np.int32(min(value, MAX_INT32))


def _per_head(name: str, value: Any, problems: list[str]) -> Any:
    if value is None:
        return absent()
    try:
        known = not isinstance(value, jax.Array) and not hasattr(value, "__jax_array__")
        array = np.asarray(value) if known else jnp.asarray(value)
    except (TypeError, ValueError):  # nested lists of different lengths
        array = np.asarray(None)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        problems.append(f"{name}: wanted floating point values, got {show(array)}")
        return absent()
    if array.size == 0:
        problems.append(f"{name}: is empty; pass None to leave it out")
    return to_device(array.astype(jnp.float32))


def operands(window: Any, sinks: Any, alibi_slopes: Any, problems: list[str]) -> tuple[Any, ...]:
    """Converts options to operands: window int32[], sinks and alibi f32[Hq], or f32[0] for None."""
    return (
        _window(window, problems),
        _per_head("sinks", sinks, problems),
        _per_head("alibi_slopes", alibi_slopes, problems),
    )


# Precisions and algorithms of matrix products that require full float32. (Those between float32 and
# 16 bits are meant to be fast, so choosing one must not make attention slower.)
_FULL = ("highest", "float32", "F32_F32_F32", "F64_F64_F64")


def _wants_exact_weights() -> bool:
    """Whether `jax.default_matmul_precision` requires full float32."""
    return _compat.matmul_precision() in _FULL


def params(
    head_dim: int, scale: Any, soft_cap: Any, lse: bool, implementation: Any, problems: list[str]
) -> dict[str, Any]:
    """Returns the static options, where soft_cap 0 means off.

    exact_weights follows JAX's matrix product precision.
    """
    check_implementation(implementation, problems)
    return {
        "scale": _positive_number("scale", scale, 1.0 / math.sqrt(max(head_dim, 1)), problems),
        "soft_cap": _positive_number("logits_soft_cap", soft_cap, 0.0, problems),
        "exact_weights": _wants_exact_weights(),
        "return_lse": as_bool("return_lse", lse),
        "implementation": implementation,
    }


def check_addressing(addressing: Any, implementation: Any, problems: list[str]) -> str:
    """Checks and returns the addressing of an op on a pool."""
    if not isinstance(addressing, str) or addressing not in ADDRESSINGS:
        problems.append(
            f"addressing: wanted {' or '.join(map(repr, ADDRESSINGS))}, got {addressing!r}"
        )
        return ADDRESSINGS[0]
    if addressing == "table" and implementation == "xla":
        problems.append(
            "addressing: 'table' is for kernels, but implementation='xla' copies the context out "
            "of the slots; leave out one of the two"
        )
    return addressing


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


def results_of(q: Any, return_lse: bool) -> tuple[Any, Any]:
    """Shape and dtype of out and lse; without return_lse, lse has no rows."""
    tokens, heads, _ = q.shape
    return (q.shape, q.dtype), ((tokens if return_lse else 0, heads), jnp.float32)


def split_results(out: Any, lse: Any, shape: tuple[int, int], return_lse: bool) -> tuple[Any, Any]:
    """out [B * T, Hq, D] and lse [B * T, Hq], or without rows, as [B, T, ...]."""
    rows = (shape[0], shape[1] if return_lse else 0)
    return _batching.split_rows(out, shape), _batching.split_rows(lse, rows)
