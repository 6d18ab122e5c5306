"""Converts callers' integers: to Python ints for host calls, to int32 arrays for programs.

Every host call converts its arguments here before it does anything else, so that a bad argument
raises ValueError and changes nothing. Values that NumPy or JAX would wrap silently are refused.
"""

import contextlib
import functools
import numbers
import operator
from array import array as packed
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpage import _compat
from jax_kvpage._values import MAX_INT32, is_integer

__all__ = [
    "as_bool",
    "as_host_array",
    "as_int32",
    "host_int",
    "host_ints",
    "per_slot",
    "to_device",
    "token_ids_of",
]

_MIN, _MAX = -MAX_INT32 - 1, MAX_INT32


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _wrong(name: str, wanted: str, value: Any) -> ValueError:
    if isinstance(value, jax.core.Tracer):
        return ValueError(
            f"{name}: wanted {wanted} known to the host, got the traced {jax.typeof(value)}: make "
            "this call outside of jit, scan and vmap, or give it a Python value"
        )
    return ValueError(f"{name}: wanted {wanted}, got {type(value).__name__} {_show(value)}")


def _is_bool(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) == np.bool_


def _int_of(value: Any) -> int | None:
    """The value as an int; None if it is not an integer, including traced values and bools."""
    if type(value) is int:
        return value
    if _is_bool(value) or isinstance(value, jax.core.Tracer) or getattr(value, "ndim", 0) != 0:
        return None
    if isinstance(value, jax.Array):  # an explicit copy, which transfer guards permit
        value = jax.device_get(value)
    try:
        return operator.index(value)
    except TypeError:
        return None


def host_int(name: str, value: Any, low: int = _MIN, high: int = _MAX) -> int:
    """Converts an int, or a NumPy or JAX scalar, to a Python int.

    Args:
        name: what to call the value in an error, "commit: slot".
        value: the argument.
        low: the smallest value allowed.
        high: the largest value allowed.

    Raises:
        ValueError: not an integer, traced, or out of range.
    """
    number = _int_of(value)
    if number is None:
        raise _wrong(name, "an int", value)
    if not low <= number <= high:
        raise ValueError(f"{name}: wanted an int from {low} to {high}, got {number}")
    return number


def host_ints(name: str, value: Any) -> tuple[list[int], bool]:
    """Converts one integer, or a sequence of integers, to a list of Python ints.

    Sequences are lists, tuples, ranges and one-dimensional arrays. Sets have no order and
    generators can be read only once, so both are refused.

    Args:
        name: what to call the value in an error, "acquire: num_tokens".
        value: the argument.

    Returns:
        The ints, and whether the value was a single integer.

    Raises:
        ValueError: neither of these, or an integer that does not fit int32.
    """
    plain = isinstance(value, (list, tuple)) and set(map(type, value)) == {int}
    if plain and min(value) >= _MIN and max(value) <= _MAX:  # fast path for most calls
        return list(value), False
    number = _int_of(value)
    if number is not None:
        return [host_int(name, number)], True
    wanted = "an int, or a list, tuple or one-dimensional array of ints"
    array = isinstance(value, (np.ndarray, jax.Array))
    if isinstance(value, jax.core.Tracer) or not (array or isinstance(value, (list, tuple, range))):
        raise _wrong(name, wanted, value)
    if array:
        # The dtype of an empty array does not matter: NumPy makes it float64 by default.
        if value.ndim != 1 or (value.size and not jnp.issubdtype(value.dtype, jnp.integer)):
            got = f"{value.dtype}{list(value.shape)}"
            raise ValueError(f"{name}: wanted {wanted}, got {got}")
        value = jax.device_get(value).tolist()
    return [host_int(f"{name}[{i}]", element) for i, element in enumerate(value)], False


def token_ids_of(name: str, value: Any) -> tuple[list[np.ndarray], bool]:
    """Converts token ids to int32 arrays, one for each sequence.

    Args:
        name: what to call the value in an error, "acquire_prefix: token_ids".
        value: the ids of one sequence (a list, tuple, range or one-dimensional array of ints), or a
            list of such sequences.

    Returns:
        The arrays, and whether the value was a single sequence.

    Raises:
        ValueError: neither of these, or an id that does not fit int32.
    """
    nested = isinstance(value, (list, tuple)) and any(not _is_scalar(x) for x in value[:1])
    if not nested:
        return [_token_ids(name, value)], True
    return [_token_ids(f"{name}[{i}]", ids) for i, ids in enumerate(value)], False


def _is_scalar(value: Any) -> bool:
    return isinstance(value, numbers.Number) or getattr(value, "ndim", None) == 0


def _token_ids(name: str, value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray) and value.dtype == np.int32 and value.ndim == 1:
        return np.ascontiguousarray(value)
    if isinstance(value, list) and value and is_integer(value[0]):  # what tokenizers return
        # Rejects everything except bools and integers that fit; faster than np.array.
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            array = np.frombuffer(packed("i", value), np.int32)
            if not any(_is_bool(value[i]) for i in np.flatnonzero(array >> 1 == 0).tolist()):
                return array
    ids, single = host_ints(name, value)
    if single:
        raise _wrong(name, "a list, tuple or one-dimensional array of ints", value)
    return np.asarray(ids, np.int32)


def as_bool(name: str, value: Any) -> bool:
    """Converts a bool of Python or NumPy to a Python bool.

    Raises:
        ValueError: anything else; the truth value of an int or a string is not used.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise _wrong(name, "True or False", value)
    return bool(value)


def as_host_array(name: str, values: Any) -> Any:
    """Converts integers to an int32 array: of NumPy if the host knows the values, else of JAX.

    Numbers that are not integers keep their dtype: abstract evaluation reports them together with
    the op's other errors. An integer out of range must be refused here, because JAX would truncate
    it to 32 bits.

    Args:
        name: what to call the values in an error.
        values: an int, list, tuple, range or NumPy array, or a JAX array, which keeps its dtype
            unless that is int64. List elements may be JAX scalars, including traced ones.

    Raises:
        ValueError: an integer that does not fit int32, or not an array of numbers.
    """
    if isinstance(values, jax.Array):
        return _narrowed(values)
    wanted = "an int32 array, or a list of ints"
    if isinstance(values, (list, tuple)):
        if any(isinstance(element, jax.core.Tracer) for element in values):
            return _stacked(name, values)
        values = [jax.device_get(x) if isinstance(x, jax.Array) else x for x in values]
        if any(map(_is_bool, values)) and not all(map(_is_bool, values)):
            raise _wrong(name, wanted, values)
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise _wrong(name, wanted, values) from error
    if array.dtype.kind == "O" and not all(isinstance(x, int) for x in array.flat):
        raise _wrong(name, wanted, values)
    if array.size and array.dtype.kind not in "iuO":
        # JAX arrays cannot hold text, dates or records.
        if not jnp.issubdtype(array.dtype, jnp.number) and array.dtype != np.bool_:
            raise _wrong(name, wanted, values)
        return array
    if array.size and not _MIN <= array.min() <= array.max() <= _MAX:
        wrong = array.min() if array.min() < _MIN else array.max()
        raise ValueError(f"{name}: wanted integers that fit int32, got {wrong}")
    return array.astype(np.int32)


def _stacked(name: str, values: Any) -> jax.Array:
    """Stacks a list that contains traced scalars into an int32 array."""
    elements = []
    for i, value in enumerate(values):
        if isinstance(value, jax.core.Tracer):
            if value.ndim != 0 or not jnp.issubdtype(value.dtype, jnp.integer):
                raise _wrong(f"{name}[{i}]", "an integer scalar", value)
            elements.append(value.astype(jnp.int32))
        else:
            elements.append(jnp.int32(host_int(f"{name}[{i}]", value)))
    return jnp.stack(elements)


def _narrowed(array: jax.Array) -> jax.Array:
    """Converts int64, which jax.numpy uses for integers under jax_enable_x64, to int32.

    Values out of range are clipped to the limits of int32, which the op refuses when it runs.
    """
    if array.dtype != np.int64:
        return array
    return _clipped(array)


@functools.partial(jax.jit, inline=True)
def _clipped(array: jax.Array) -> jax.Array:
    return jnp.clip(array, _MIN, _MAX).astype(jnp.int32)


def as_int32(name: str, values: Any) -> jax.Array:
    """Like `as_host_array`, but always returns a JAX array."""
    return to_device(as_host_array(name, values))


def to_device(array: Any) -> jax.Array:
    """Converts a host array to a JAX array, by an explicit transfer if transfer guards are on."""
    if isinstance(array, jax.Array):
        return array
    if _compat.guards_transfers():
        return jax.device_put(array)
    return jnp.asarray(array)


def per_slot(op: str, slot: Any, num_tokens: Any) -> tuple[list[int], list[int]]:
    """Converts arguments to lists of slots and of numbers of tokens, of the same length."""
    slots, _ = host_ints(f"{op}: slot", slot)
    tokens, single = host_ints(f"{op}: num_tokens", num_tokens)
    if single:
        tokens = tokens * len(slots)
    if len(slots) != len(tokens):
        raise ValueError(f"{op}: {len(slots)} slots, but {len(tokens)} num_tokens")
    return slots, tokens
