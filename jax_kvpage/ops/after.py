"""after: orders later ops on a cache after a value that was computed from it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_kvpage.cache import KVCache
from jax_kvpage.ops import _batching, _lowering, _mesh
from jax_kvpage.ops._checks import EPOCH, Checker, cache_operands, results

__all__ = ["after"]


def _abstract(epoch: Any, *values: Any) -> list[Any]:
    check = Checker("after")
    check.array("cache.epoch", epoch, (1,), (jnp.uint32,))
    check.done()
    return results((epoch, *values), EPOCH)


after_p = _lowering.make_primitive("after", _abstract, static=())


@_mesh.over_mesh(
    _mesh.cache_only,
    refused="there the compiler might gather `value` on every device: call it inside jax.shard_map",
)
def after(cache: KVCache, value: Any) -> KVCache:
    """Returns the same cache, but ordered after the computation of `value`.

    If a program reads a cache and also changes it destructively (for instance lowers a length), and
    neither result depends on the other, their order is undefined. `cache = after(cache, out)`
    defines it.

    Args:
        cache: the cache.
        value: an array or a tree of arrays.

    Returns:
        A cache that depends on every array of `value`.

    Raises:
        ValueError: the cache has the wrong shape.
    """
    _, epoch, _ = cache_operands("after", cache)
    arrays = [leaf for leaf in jax.tree.leaves(value) if isinstance(leaf, jax.Array)]
    # The epoch is an integer, so no gradient flows through it, and none is an error.
    operands = (epoch, *(jax.lax.stop_gradient(_plain(x)) for x in arrays))
    (epoch,) = _lowering.bind(after_p, _abstract, operands, {})
    return dataclasses.replace(cache, epoch=epoch)


def _plain(array: jax.Array) -> jax.Array:
    """Returns the data of a random key, which is not an array to XLA; other arrays unchanged."""
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(array) if is_key else array


_lowering.register_lowerings(after_p, aliases={0: 0})


def _batch(operands: Any, dims: Any) -> Any:
    names = ("cache.epoch", *["value"] * (len(operands) - 1))
    _batching.refuse("after", names, dims, _batching.never_mapped)
    return after_p.bind(*operands), [None]


_batching.register(after_p, _batch)
