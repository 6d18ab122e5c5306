"""Host integers as int32 arrays, without the silent wrap-around of NumPy and JAX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["as_int32"]


def as_int32(name: str, values: Any) -> jax.Array:
    """Host integers (int, list, tuple, NumPy) as an int32 array; JAX arrays as they are.

    What is not made of integers keeps its dtype: abstract evaluation names it among the other
    mistakes. What does not fit cannot be shown there, for JAX would cut it down to 32 bits.

    Args:
        name: what to call the values in an error.
        values: integers.

    Raises:
        ValueError: an integer that int32 cannot hold.
    """
    if isinstance(values, jax.Array):
        return values
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iuO":
        return jnp.asarray(array)
    if array.size and not -(2**31) <= array.min() <= array.max() < 2**31:
        wrong = array.min() if array.min() < -(2**31) else array.max()
        raise ValueError(f"{name}: wanted integers that fit int32, got {wrong}")
    return jnp.asarray(array.astype(np.int32))
