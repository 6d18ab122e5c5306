"""Zero-copy arrays over a pool's memory, for dense kernels (`KVPool.view`)."""

import jax

from jax_kvpage._arrays import host_int
from jax_kvpage._native_pool import NativePool

__all__ = ["view"]


def _check(native: NativePool, slot: int | None) -> None:
    spec = native.spec
    if native.sharding is not None:
        raise ValueError(
            "view: each device of the mesh has a part of the cache, so one array cannot show it: "
            "read the cache with paged_attention or read_kv"
        )
    if native.place.backend != "cpu" and not native.pool.closed:
        raise ValueError(
            f"view: <KVPool {native.pool.id} on {native.device}> is in device memory, where the "
            "unmapped part of a slot cannot be read, so an array cannot show it: read "
            "the cache with paged_attention, or use a pool on a CPU device for views"
        )
    if spec.quantized:
        raise ValueError(
            f"view: {spec.dtype} storage keeps the scales of a block's tokens after them, so "
            "a slot is not one dense array: use float32, bfloat16 or float16 storage for "
            "views, or read the cache with paged_attention"
        )
    if spec.layout != "per_layer":
        raise ValueError(
            "view: one layer's keys are one dense array in the 'per_layer' layout only, this "
            f"pool has {spec.layout!r}: make it with CacheSpec(..., layout='per_layer')"
        )
    if slot is None and spec.blocks_per_range * (spec.block_tokens or 1) != spec.max_seq_len:
        raise ValueError(
            f"view: slots lie max_seq_len={spec.max_seq_len} tokens apart only if that is a "
            f"multiple of block_tokens={spec.block_tokens}: view one slot at a time, or change "
            "one of them"
        )
    if slot is not None and slot < 0:
        raise ValueError(f"view: slot {slot} does not exist")


def view(native: NativePool, layer: int, slot: int | None) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one layer, of one slot or of all; see `KVPool.view`.

    Args:
        native: the pool.
        layer: the layer's index.
        slot: an occupied slot; None for all slots.
    """
    layer = host_int("view: layer", layer)
    if slot is not None:
        slot = host_int("view: slot", slot)
    _check(native, slot)
    place = -1 if slot is None else slot
    k, v = (native.call(native.pool.view, layer, kv, place) for kv in (0, 1))
    return jax.dlpack.from_dlpack(k), jax.dlpack.from_dlpack(v)
