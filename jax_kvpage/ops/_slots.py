"""Shared by ops over a list of slots with one number each."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_kvpage._arrays import as_host_array, to_device
from jax_kvpage.cache import KVCache
from jax_kvpage.ops import _batching
from jax_kvpage.ops._checks import INT32, Checker, cache_operands

__all__ = ["check", "flattened", "operands", "replaced"]


def operands(op: str, cache: KVCache, slots: Any, name: str, values: Any) -> tuple[Any, ...]:
    """Returns the cache's arrays, slots [n] and values [n]; scalars are broadcast."""
    arrays = cache_operands(op, cache)
    slots = as_host_array(f"{op}: slots", slots)
    values = as_host_array(f"{op}: {name}", values)
    if slots.ndim == 0:
        slots = slots[None]
    if values.ndim == 0:
        spread = np.broadcast_to if isinstance(values, np.ndarray) else jnp.broadcast_to
        values = spread(values, slots.shape)
    return *arrays, to_device(slots), to_device(values)


def check(checker: Checker, name: str, avals: Sequence[Any]) -> None:
    """Checks cache, slots [n] and the values [n] called `name`."""
    handle, epoch, lengths, slots, values = avals
    checker.cache(handle, epoch, lengths)
    checker.array("slots", slots, ("n",), INT32)
    checker.array(name, values, ("n",), INT32)


def replaced(cache: KVCache, epoch: Any, lengths: Any = None) -> KVCache:
    """The next cache."""
    if lengths is None:
        return dataclasses.replace(cache, epoch=epoch)
    return dataclasses.replace(cache, epoch=epoch, lengths=lengths)


def flattened(
    op: str, name: str, operands: Sequence[Any], dims: Any
) -> tuple[list[Any], tuple[int, int]]:
    """Merges the calls of all elements of a mapped axis into one call.

    Returns:
        The operands, and the size of the axis with the number of slots of each element.
    """
    names = (*_batching.CACHE, "slots", name)
    _batching.refuse(op, names, dims, _batching.must_be_mapped("slots"))
    size = _batching.axis_size(operands, dims)
    count = operands[3].shape[1 - dims[3]]
    merged = _batching.flatten_rows(operands[3:], dims[3:], size)
    return [*operands[:3], *merged], (size, count)
