"""The expected results of the ops, written as plainly as possible: float64 NumPy attention and a
Python model of the cache.

Nothing here is shared with the package: a mistake would have to be made twice to go unnoticed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Variant:
    """The attention variants of one call; the defaults switch everything off."""

    scale: float | None = None
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    sinks: NDArray[np.float32] | None = None
    alibi_slopes: NDArray[np.float32] | None = None


PLAIN = Variant()


def attend(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, num_before: int, variant: Variant = PLAIN
) -> tuple[Array, Array]:
    """Computes the attention of one sequence's new tokens over its whole context, one token and one
    head at a time.

    Args:
        q: [n, q_heads, head_dim], the new tokens.
        k: [num_before + n or more, kv_heads, head_dim]; rows past the new tokens are not read.
        v: Like k.
        num_before: Number of tokens before the new ones.

    Returns:
        out: float64 [n, q_heads, head_dim]; lse: float64 [n, q_heads], natural log of the
        denominator.
    """
    q64, k64, v64 = (np.asarray(x, np.float64) for x in (q, k, v))
    n, q_heads, head_dim = q64.shape
    group = q_heads // k64.shape[1]
    scale = head_dim**-0.5 if variant.scale is None else variant.scale
    out = np.zeros_like(q64)
    lse = np.zeros((n, q_heads))
    for i in range(n):
        position = num_before + i
        first = 0
        if variant.sliding_window is not None and variant.sliding_window > 0:
            first = max(0, position - variant.sliding_window + 1)
        keys = np.arange(first, position + 1)
        for h in range(q_heads):
            logits = scale * (k64[keys, h // group] @ q64[i, h])
            if variant.logits_soft_cap is not None:
                logits = variant.logits_soft_cap * np.tanh(logits / variant.logits_soft_cap)
            if variant.alibi_slopes is not None:
                logits = logits + float(variant.alibi_slopes[h]) * (keys - position)
            top = logits.max()
            if variant.sinks is not None:
                top = max(top, float(variant.sinks[h]))
            weights = np.exp(logits - top)
            total = weights.sum()
            if variant.sinks is not None:
                total += np.exp(float(variant.sinks[h]) - top)
            out[i, h] = weights @ v64[keys, h // group] / total
            lse[i, h] = top + np.log(total)
    return out, lse


def attend_ragged(
    q: ArrayLike,
    contexts: Sequence[tuple[ArrayLike, ArrayLike] | None],
    num_before: Sequence[int],
    query_offsets: Sequence[int],
    variant: Variant = PLAIN,
) -> tuple[Array, Array]:
    """Applies `attend` to each sequence of a ragged batch; context None is padding (0 and -inf)."""
    q64 = np.asarray(q, np.float64)
    out = np.zeros_like(q64)
    lse = np.full(q64.shape[:2], -np.inf)
    for s, context in enumerate(contexts):
        tokens = slice(query_offsets[s], query_offsets[s + 1])
        if context is not None and tokens.stop > tokens.start:
            out[tokens], lse[tokens] = attend(q64[tokens], *context, num_before[s], variant)
    return out, lse


def quantized_rows(x: ArrayLike, dtype: object) -> tuple[Array, NDArray[np.float32]]:
    """Quantizes rows (the last axis) to int8 or float8_e4m3fn with one scale each; `x` is finite.

    Returns:
        elements: float64, the stored numbers; scale: float32, one dimension less.
    """
    x32 = np.asarray(x, np.float32)
    int8 = jnp.dtype(dtype) == jnp.int8
    scale = np.max(np.abs(x32), axis=-1) * (np.float32(1) / np.float32(127 if int8 else 448))
    scale[scale < np.finfo(np.float32).tiny] = 0.0
    inverse = np.float32(1) / np.where(scale > 0, scale, np.float32(1))
    scaled = np.where(scale[..., None] > 0, x32 * inverse[..., None], np.float32(0))
    scaled = scaled.astype(np.float64)
    if int8:
        return np.rint(scaled), scale
    # Three mantissa bits; below 2^-6 the step is fixed.
    exponent = np.maximum(np.frexp(scaled)[1] - 1, -6)
    step = np.ldexp(1.0, exponent - 3)
    return np.rint(scaled / step) * step, scale


def is_quantized(dtype: object) -> bool:
    """Returns whether the cache stores scales for this dtype."""
    return jnp.dtype(dtype) in (jnp.int8, jnp.float8_e4m3fn)


def rounded(x: ArrayLike, dtype: object) -> Array:
    """Returns the values of `x` after storing as `dtype`, in float64."""
    if is_quantized(dtype):
        elements, scale = quantized_rows(x, dtype)
        return elements * scale[..., None].astype(np.float64)
    return np.asarray(np.asarray(x, np.float32).astype(jnp.dtype(dtype)), np.float64)


def tolerance(dtype: object, values: ArrayLike) -> float:
    """Returns how far `out` may be from the reference if arithmetic is float32 and the result is
    rounded to `dtype`.

    One rounding of the result is eps / 2 of its magnitude; twice that leaves room for ties. The
    float32 part (dot products of up to 256 terms, exponentials, sums over a few hundred keys) stays
    well below 100 float32 eps.
    """
    size = float(np.max(np.abs(np.asarray(values, np.float64)), initial=1.0))
    own = 0.0 if jnp.dtype(dtype) == jnp.float32 else float(jnp.finfo(dtype).eps)
    return size * (own + 100 * float(np.finfo(np.float32).eps))


def check_output(
    got: ArrayLike, want: Array, dtype: object, values: ArrayLike, note: object = ""
) -> None:
    """Asserts that `got` equals `want` up to `tolerance` and has no NaN."""
    got64 = np.asarray(got, np.float64)
    assert got64.shape == want.shape
    assert np.all(np.isfinite(got64)), f"not finite: {note}"
    worst = float(np.max(np.abs(got64 - want), initial=0.0))
    allowed = tolerance(dtype, values)
    assert worst <= allowed, f"off by {worst:.3g}, {allowed:.3g} allowed: {note}"


def check_lse(got: ArrayLike, want: Array, note: object = "") -> None:
    """Asserts that the log-sum-exps agree: -inf in the same places, float32 accuracy elsewhere."""
    got64 = np.asarray(got, np.float64)
    assert np.array_equal(np.isneginf(got64), np.isneginf(want)), note
    finite = np.isfinite(want)
    scale = np.maximum(1.0, np.abs(want[finite]))
    worst = float(np.max(np.abs(got64[finite] - want[finite]) / scale, initial=0.0))
    assert worst <= 200 * float(np.finfo(np.float32).eps), f"lse off by {worst:.3g}: {note}"


class CacheModel:
    """The expected contents of a cache: for each live slot and layer, the K and V written so far,
    and its length.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, dtype: object) -> None:
        self.num_layers = num_layers
        self.dtype = dtype
        self._empty = np.zeros((0, num_kv_heads, head_dim))
        self.lengths: dict[int, int] = {}
        self._k: dict[tuple[int, int], Array] = {}
        self._v: dict[tuple[int, int], Array] = {}

    def acquire(self, slot: int) -> None:
        assert slot not in self.lengths, f"slot {slot} was handed out twice"
        self.lengths[slot] = 0
        for layer in range(self.num_layers):
            self._k[slot, layer] = self._v[slot, layer] = self._empty

    def fork(self, donor: int, slot: int, length: int) -> None:
        self.acquire(slot)
        self.lengths[slot] = length
        for layer in range(self.num_layers):
            self._k[slot, layer] = self._k[donor, layer][:length]
            self._v[slot, layer] = self._v[donor, layer][:length]

    def release(self, slot: int) -> None:
        del self.lengths[slot]

    def append(self, slot: int, layer: int, k: ArrayLike, v: ArrayLike) -> None:
        """Writes at the slot's length, overwriting any earlier write that was not advanced."""
        kept = self.lengths[slot]
        self._k[slot, layer] = np.concatenate([self._k[slot, layer][:kept], rounded(k, self.dtype)])
        self._v[slot, layer] = np.concatenate([self._v[slot, layer][:kept], rounded(v, self.dtype)])

    def advance(self, slot: int, num_tokens: int) -> None:
        self.lengths[slot] += num_tokens

    def truncate(self, slot: int, length: int) -> None:
        self.lengths[slot] = length

    def context(self, slot: int, layer: int) -> tuple[Array, Array]:
        """Returns everything written to the slot, including new tokens that are not yet
        advanced.
        """
        return self._k[slot, layer], self._v[slot, layer]
