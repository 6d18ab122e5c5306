"""Quantized storage of keys and values (int8, float8_e4m3fn).

This is the reference; the kernels write the same bits. Symmetric quantization with one float32
scale for each row, where a row is a token's key (or value) in one KV head:

- scale = amax * (1 / largest), where largest is 127 or 448; a scale below the smallest normal
  float32 becomes 0, because programs that flush subnormal numbers could not read it.
- element = x * (1 / scale), rounded to nearest even; 0 if the scale is 0, so rows of zeros stay
  zeros.
- A row that contains an infinity or a NaN has scale NaN and elements 0: the whole row reads as NaN,
  so that the problem shows wherever the token is read, and nowhere else.

The error of a dequantized element is at most scale / 2 (int8), or at most the larger of 1/16 of its
magnitude and scale / 1024 (float8_e4m3fn).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["dequantize", "quantize"]

# The largest magnitude of a scaled element. int8 does not use -128.
_LARGEST = {np.dtype(jnp.int8): 127.0, np.dtype(jnp.float8_e4m3fn): 448.0}


def quantize(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Quantizes rows along the last axis.

    Args:
        x: [..., D], float32, bfloat16 or float16.
        dtype: int8 or float8_e4m3fn.

    Returns:
        Elements [..., D] of `dtype` and their scales, float32 [...].

    Raises:
        ValueError: another dtype.
    """
    dtype = np.dtype(dtype)
    if dtype not in _LARGEST:
        known = " or ".join(kind.name for kind in _LARGEST)
        raise ValueError(f"quantize: dtype must be {known}, got {dtype.name}")
    x = x.astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(x), axis=-1)
    amax = jnp.max(jnp.abs(x), axis=-1, initial=0.0)
    # An explicit reciprocal, because XLA may or may not replace a division by one.
    scale = amax * (np.float32(1) / np.float32(_LARGEST[dtype]))
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 0.0, scale)
    stored = finite & (scale > 0)
    inverse = 1.0 / jnp.where(stored, scale, 1.0)
    scaled = jnp.where(stored[..., None], x * inverse[..., None], 0.0)
    elements = (jnp.round(scaled) if dtype == jnp.int8 else scaled).astype(dtype)
    return elements, jnp.where(finite, scale, jnp.nan)


def dequantize(elements: jax.Array, scale: jax.Array) -> jax.Array:
    """Dequantizes rows.

    Args:
        elements: [..., D], int8 or float8_e4m3fn.
        scale: float32 [...].

    Returns:
        float32 [..., D].
    """
    return elements.astype(jnp.float32) * scale[..., None]
