"""The devices of a mesh: whether they are GPUs, and how much memory a pool on them gets."""

from typing import Any

from jax_kvpage._capacity import DEFAULT_PERCENT, capacity_bytes, parse_percent
from jax_kvpage._cuda import place_of
from jax_kvpage.sharding.over_axis import AxisSharding

__all__ = ["on_gpus", "refuse_gpus", "total_bytes"]


def on_gpus(sharding: AxisSharding) -> bool:
    """Returns whether the devices are GPUs, each with its own memory.

    Raises:
        ValueError: only some of them are GPUs, or no pool can live there.
    """
    found = {place_of(device).backend == "cuda": device for device in sharding.local_devices}
    if len(found) > 1:
        raise ValueError(
            f"KVPool: mesh: {found[True]} is a GPU and {found[False]} is not: wanted devices of "
            "one platform"
        )
    return True in found


def refuse_gpus(argument: str, sharding: AxisSharding) -> None:
    """Refuses an argument that pools over several GPUs do not support yet.

    Raises:
        ValueError: the devices are GPUs.
    """
    if on_gpus(sharding):
        raise ValueError(
            f"KVPool: {argument}: on CPU devices only so far; over the GPUs of one process a pool "
            "can have its heads split (mesh=, axis=), or make one KVPool on each GPU and run the "
            "step under jax.shard_map with that pool's cache in each shard"
        )


def total_bytes(
    capacity: Any, sharding: AxisSharding, op: str = "KVPool", held: int = 0, blocks: int = 0
) -> int:
    """Returns the total capacity of all devices, in bytes.

    Args:
        capacity: as for `KVPool`. On GPUs, a share applies to each GPU, and the GPU with the least
            memory determines all, because their pools have the same size.
        sharding: sharding of the pool, resolved or not.
        op: name of the call, for messages.
        held: bytes that the pool already holds on all devices; they count as available.
        blocks: current capacity of each device, in blocks.

    Raises:
        ValueError: a capacity or device cannot work.
        KVPageError: the CUDA driver refused.
    """
    places = [place_of(device) for device in sharding.local_devices]
    if on_gpus(sharding):
        if capacity is not None and parse_percent(capacity) is None:
            return capacity_bytes(op, capacity, sharding.local, places[0])
        each = held // sharding.size
        return sharding.size * min(
            capacity_bytes(op, capacity, sharding.local, place, each, blocks) for place in places
        )
    total = capacity_bytes(op, capacity, sharding.local, places[0], held, blocks)
    if capacity is None:  # all devices share the machine's memory; `total` is what one can use
        share = f"{DEFAULT_PERCENT[places[0].platform]}%"
        most = capacity_bytes(op, share, sharding.local, places[0], held, blocks)
        total = min(total * sharding.size, most)
    return total
