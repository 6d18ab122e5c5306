"""The parts of a step's program that run separately on each replica of a pool.

The model's step takes the operands of all replicas, like any program on such a pool. What comes
before and after it runs under `jax.shard_map`: rows, slots and the sampler state are local to the
replica, and nothing is sent between devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

from jax_kvpage.sharding.heads import HeadSharding
from jax_kvpage.sharding.over_axis import AxisSharding

__all__ = ["Replicas"]


class Replicas:
    """The replicas of a pool; a pool without `data_axis` has one.

    Args:
        sharding: sharding of the pool.

    Attributes:
        count: number of replicas.
    """

    def __init__(self, sharding: AxisSharding | None) -> None:
        split = isinstance(sharding, HeadSharding) and sharding.replicas > 1
        self._sharding = sharding if isinstance(sharding, HeadSharding) and split else None
        self.count = 1 if self._sharding is None else self._sharding.replicas

    def placement(self, placement: jax.Device | NamedSharding) -> jax.Device | NamedSharding:
        """Returns the placement of arrays that have a part for each replica.

        Args:
            placement: placement of arrays that are replicated on all devices of the pool.
        """
        return placement if self._sharding is None else self._sharding.placed(self._sharding.rows)

    def shape(self, size: int, *others: int) -> jax.ShapeDtypeStruct:
        """Describes an int32 operand [count * size, ...]."""
        sharding = None if self._sharding is None else self.placement(self._sharding.placed())
        return jax.ShapeDtypeStruct((self.count * size, *others), jnp.int32, sharding=sharding)

    def each(self, function: Callable[..., Any], has_cache: bool = False) -> Callable[..., Any]:
        """Turns a function of one replica's operands into a function of the operands of all.

        Args:
            function: function whose arguments and results all have rows, except for a cache.
            has_cache: whether the first argument and the first result are caches.
        """
        sharding = self._sharding
        if sharding is None:
            return function
        rows = sharding.rows

        def call(*operands: Any) -> Any:
            caches, others = operands[:has_cache], operands[has_cache:]
            if AxisType.Explicit in sharding.mesh.axis_types:
                others = jax.tree.map(lambda array: _resharded(array, sharding), others)
            # All devices of a replica compute the same values, so JAX need not check it.
            mapped = jax.shard_map(
                function,
                mesh=sharding.mesh,
                in_specs=(*[sharding.split] * len(caches), *[rows] * len(others)),
                out_specs=(sharding.split, rows) if has_cache else rows,
                check_vma=False,
            )
            return mapped(*caches, *others)

        return call

    def own_row(self, row: Any, num_rows: int) -> Any:
        """Converts a row of all replicas to this replica's, inside `each`.

        Returns `num_rows` if the row belongs to another replica.
        """
        if self._sharding is None:
            return row
        own = row - jax.lax.axis_index(self._sharding.data_axis) * num_rows
        return jnp.where((own >= 0) & (own < num_rows), own, num_rows)


def _resharded(array: jax.Array, sharding: HeadSharding) -> jax.Array:
    """Splits an array with an explicit sharding by replica."""
    mesh = jax.typeof(array).sharding.mesh
    return jax.sharding.reshard(array, NamedSharding(mesh, sharding.rows))
