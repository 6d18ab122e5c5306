"""Checks that a host call can use the cache that it was given."""

import jax
import numpy as np

from jax_kvpage._compat import is_tracing
from jax_kvpage._native_pool import NativePool
from jax_kvpage.cache import KVCache

__all__ = ["FIELDS", "arrays_of", "check_array", "check_devices", "check_newest", "host_lengths"]

FIELDS = ("handle", "epoch", "lengths")
_DTYPES = {"handle": np.dtype("int32"), "epoch": np.dtype("uint32"), "lengths": np.dtype("int32")}


def arrays_of(cache: KVCache) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arrays of a cache in the order of `FIELDS`."""
    return cache.handle, cache.epoch, cache.lengths


def check_array(op: str, name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless an array of a cache has this shape and the right dtype."""
    if array.shape != shape or array.dtype != _DTYPES[name]:
        raise ValueError(
            f"{op}: cache.{name}: wanted {_DTYPES[name]}{list(shape)}, got "
            f"{array.dtype}{list(array.shape)}"
        )


def check_devices(op: str, name: str, array: jax.Array, device: jax.Device) -> None:
    """Raises a ValueError unless an array of a cache is on its pool's only device."""
    if array.sharding.device_set != {device}:
        raise ValueError(
            f"{op}: cache.{name} is on {sorted(map(str, array.sharding.device_set))}, "
            f"but the pool is on {device}: a cache stays on its pool's device; with several "
            "devices make one pool over the mesh (KVPool(..., mesh=mesh, axis=...)), or one KVPool "
            "on each, and run the step under jax.shard_map with that pool's cache in each shard"
        )


def check_newest(op: str, cache: KVCache, native: NativePool) -> None:
    """Raises a ValueError unless the cache has the pool's spec and its arrays are alive."""
    if not isinstance(cache, KVCache):
        raise ValueError(f"{op}: cache must be a KVCache (from pool.cache()), got {type(cache)}")
    arrays = arrays_of(cache)
    if any(isinstance(array, jax.core.Tracer) for array in arrays) or is_tracing():
        raise ValueError(
            f"{op} is a host call and cannot be traced: call it outside of jit; inside a "
            "program, map_slots makes room, and set_lengths and batch.mask change who takes part"
        )
    for array in arrays:
        if not isinstance(array, jax.Array):
            raise ValueError(
                f"{op}: wanted a cache made of JAX arrays, got one of {type(array).__name__}, "
                "as jax.device_get and jax.eval_shape return: pass the cache that this pool's "
                "newest call or program returned, or start a new generation with pool.cache()"
            )
    if any(array.is_deleted() for array in arrays):
        raise ValueError(
            f"{op}: this cache was donated to a program and is gone: pass the cache that the "
            "program returned, or start a new generation with pool.cache()"
        )
    if cache.spec != native.spec:
        raise ValueError(
            f"{op}: the cache has a different spec from <KVPool {native.pool.id} on "
            f"{native.device}>: {cache.spec} instead of {native.spec}; pass the cache "
            "that this pool's newest call returned"
        )


def host_lengths(cache: KVCache) -> np.ndarray:
    """The lengths of a cache, int32[max_slots]; over a mesh, as on the first device of each
    replica, or, with devices of several processes, on this process's first device.

    Waits for the program that computes them, and raises its error if it failed.
    """
    if cache.sharding is None:
        return np.asarray(jax.device_get(cache.lengths))
    # Not the whole array: some of its devices may belong to other processes.
    shards = sorted(cache.lengths.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    firsts = [shard.data for shard in shards[:: cache.sharding.parts]]
    return np.concatenate(jax.device_get(firsts))
