"""Host integers: as int32 arrays without the silent wrap-around of NumPy and JAX, and as lists."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["as_ids", "as_int32", "as_list"]


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


def as_list(value: Any, name: str) -> tuple[list[int], bool]:
    """A host int, or a sequence of them, as a list; and whether it was one int.

    Raises:
        ValueError: neither.
    """
    array = np.asarray(value)
    if array.ndim > 1 or (array.size > 0 and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name} must be an int or a list of ints, got {value!r}")
    return [int(x) for x in array.reshape(-1)], array.ndim == 0


def as_ids(value: Any, name: str) -> list[int]:
    """Token ids as a list.

    Raises:
        ValueError: no integers, or one that int32 cannot hold.
    """
    ids, _ = as_list(value, name)
    wrong = [i for i in ids if not -(2**31) <= i < 2**31]
    if wrong:
        raise ValueError(f"{name} must be integers that fit int32, got {wrong[0]}")
    return ids
