"""Creates the implementation of a `KVPool` over a mesh, according to its axes."""

from typing import Any

from jax_kvpage._cuda import place_of
from jax_kvpage._native_pool import NativePool, PoolOptions
from jax_kvpage._queue import Queue
from jax_kvpage._store_checks import check_store
from jax_kvpage.sharding.devices import refuse_gpus
from jax_kvpage.sharding.heads import HeadSharding
from jax_kvpage.sharding.pools import check_alone, sharded
from jax_kvpage.sharding.process_queue import over_processes
from jax_kvpage.sharding.replicas import replicated
from jax_kvpage.sharding.sequences import sequence_parallel
from jax_kvpage.sharding.stripes import StripeSharding
from jax_kvpage.spec import CacheSpec

__all__ = ["over_mesh"]


def over_mesh(
    spec: CacheSpec,
    capacity: Any,
    options: PoolOptions,
    mesh: Any,
    axis: Any,
    sequence_axis: Any,
    data_axis: Any,
    store: Any,
    **others: Any,
) -> tuple[NativePool, Queue]:
    """Returns the compiled pools and the queue; see `KVPool` for the arguments.

    Args:
        spec: spec of the whole cache.
        capacity: capacity of all devices.
        options: pool options.
        mesh: the devices.
        axis: axis that heads are split over; or None.
        sequence_axis: axis that sequences are split over; or None.
        data_axis: axis that slots are split over; or None.
        store: store for swapped sequences; or None.
        **others: arguments that cannot be combined with a mesh.

    Raises:
        ValueError: arguments cannot work, alone or together.
        KVPageError: the store is for the other platform.
        OutOfBlocks: the capacity exceeds the available memory.
        PoolClosed: the store is closed.
    """
    check_alone(mesh, axis, sequence_axis, data_axis, **others)
    if sequence_axis is not None:
        if store is not None:
            raise ValueError(
                "KVPool: store: not with sequence_axis: nothing is committed there, because a "
                "device does not know what other devices hold of a sequence, and only committed "
                "tokens are swapped: leave it out"
            )
        stripes = StripeSharding.of(spec, mesh, sequence_axis)
        refuse_gpus("sequence_axis", stripes)
        return sequence_parallel(spec, capacity, stripes, options)
    heads = HeadSharding.of(spec, mesh, axis, data_axis)
    if store is not None:
        check_store(store, place_of(heads.devices[0]), None)
        if len(heads.processes) > 1:
            raise ValueError(
                f"KVPool: store: the mesh is over {len(heads.processes)} processes, which do not "
                "swap together so far: leave it out, or make a pool in each process"
            )
    if data_axis is not None:
        refuse_gpus("data_axis", heads)
        return replicated(spec, capacity, heads, options)
    if heads.local_devices == heads.devices:
        return sharded(spec, capacity, heads, options)
    refuse_gpus("mesh: devices of several processes", heads)
    return over_processes(spec, capacity, heads, options)
