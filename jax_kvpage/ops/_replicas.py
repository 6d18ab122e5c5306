"""Ops on a cache whose slots are split over a mesh axis: each replica works on its own slots.

A batch has a part for each replica (`jax_kvpage.spread`), with that replica's local slot numbers.
Plain lists of slots (`set_lengths`, `read_kv`) use slot numbers of the whole pool: each replica
selects its own and treats the others as padding.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpage._compat import gathered
from jax_kvpage._values import raise_all
from jax_kvpage.cache import Batch, KVCache
from jax_kvpage.sharding.heads import HeadSharding
from jax_kvpage.sharding.over_axis import AxisSharding
from jax_kvpage.spec import CacheSpec

__all__ = ["check", "has_parts", "joined", "localized", "names_slots", "parts_of"]

_SLOTS = ("slots", "batch_or_slots")  # arguments that may be slots of the whole pool
_PARTS = ("edits", "copies")  # arguments with a part for each replica, as batches have


def has_parts(name: str, value: Any) -> bool:
    """Whether an argument of an op has a part for each replica."""
    return name in _PARTS or isinstance(value, Batch)


def names_slots(arguments: dict[str, Any]) -> bool:
    """Whether an op is called with slots of the whole pool."""
    return any(name in arguments and not isinstance(arguments[name], Batch) for name in _SLOTS)


def check(
    op: str, spec: CacheSpec, sharding: HeadSharding, arguments: dict[str, Any], maps: bool
) -> None:
    """Checks arguments that have a part for each replica, for an op on the whole cache.

    Args:
        op: op name.
        spec: spec of the whole cache.
        sharding: sharding of the cache.
        arguments: arguments by name.
        maps: whether the op maps memory.

    Raises:
        ValueError: a batch does not have such parts, tokens cannot be divided into them, slots do
            not exist, or slots of the whole pool are to be mapped; lists all reasons.
    """
    replicas = sharding.replicas
    if sharding.data_axis is None:
        return
    reasons = []
    if maps and names_slots(arguments):
        # Joining the replicas' results takes a collective, and if one of them failed (a free slot),
        # the others would wait in it.
        reasons.append(
            f"the slots are split over axis {sharding.data_axis!r} of a mesh, where each replica "
            "maps memory for its own: call it inside jax.shard_map, with the replica's own slots; "
            "or call grow with a batch of jax_kvpage.spread; or make room on the host with "
            "pool.extend(slots, num_tokens)"
        )
    for name, value in arguments.items():
        if isinstance(value, Batch):
            sequences, offsets = np.size(value.slots), np.size(value.query_offsets)
            if offsets - sequences != replicas or sequences % replicas:
                reasons.append(
                    f"{name}: wanted a part for each of the {replicas} replicas, [{replicas} * S] "
                    f"slots and [{replicas} * (S + 1)] query_offsets, got [{sequences}] and "
                    f"[{offsets}]: make the batch with jax_kvpage.spread(pool, slots, lengths)"
                )
        elif name in ("q", "k", "v") and np.ndim(value) > 2 and np.shape(value)[0] % replicas:
            reasons.append(
                f"{name}: wanted as many rows for each of the {replicas} replicas, got "
                f"{list(np.shape(value))}"
            )
        elif name in _SLOTS and not _traced(value):
            numbers = np.asarray(value)
            if numbers.size and not -1 <= numbers.min() <= numbers.max() < spec.max_slots:
                reasons.append(
                    f"{name}: wanted slots of the pool, 0..{spec.max_slots - 1}, or -1, got "
                    f"{numbers.tolist()}"
                )
    raise_all(op, reasons)


def _data_axis(sharding: AxisSharding) -> str | None:
    return sharding.data_axis if isinstance(sharding, HeadSharding) else None


def _traced(value: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))


def localized(sharding: AxisSharding, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of an op as the current replica sees them, with local slots.

    Slots of other replicas become -1. A slot that no replica has becomes one that is too large,
    which the op refuses at run time.
    """
    data_axis = _data_axis(sharding)
    if data_axis is None or not names_slots(arguments):
        return arguments
    name = next(name for name in _SLOTS if name in arguments)
    slots = jnp.asarray(arguments[name])
    if not jnp.issubdtype(slots.dtype, jnp.integer):
        return arguments  # the op reports the error
    size = sharding.local.max_slots
    mine = slots // size == jax.lax.axis_index(data_axis)
    exists = (slots >= -1) & (slots < size * sharding.replicas)
    own = jnp.where(exists, jnp.where(mine, slots % size, -1), size)
    return {**arguments, name: own.astype(jnp.int32)}


def parts_of(sharding: AxisSharding, arguments: dict[str, Any], result: Any) -> Any:
    """Adds a leading replica axis to the results of an op on slots of the whole pool."""
    if _data_axis(sharding) is None or not names_slots(arguments) or isinstance(result, KVCache):
        return result
    return jax.tree.map(lambda array: array[None], result)


def joined(op: str, array: jax.Array) -> jax.Array:
    """Sums the parts of all replicas; each replica has zeros for the slots of others.

    Waits for the op first: if a replica failed, for instance on a free slot, the others would wait
    for it in the sum.

    Raises:
        ValueError: called inside a program, where it cannot wait.
        jax.errors.JaxRuntimeError: the op failed.
    """
    if isinstance(array, jax.core.Tracer):
        raise ValueError(
            f"{op}: the slots are split over a mesh axis, and in a program no device knows whether "
            "the others have failed: call it outside of jit, or inside jax.shard_map with the "
            "replica's own slots, or give it a batch of jax_kvpage.spread"
        )
    return gathered(jax.block_until_ready(array)).sum(axis=0)
