"""Parts of a step's program that each replica of a pool runs for itself.

The model's step takes the operands of all replicas, as any program over such a pool does. What
comes before and after it runs under `jax.shard_map`: rows, slots and the sampler's state are those
of the replica, and nothing goes between devices.
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
    """The replicas of a pool; a pool without `data_axis` is one.

    Args:
        sharding: of the pool.

    Attributes:
        count: how many there are.
    """

    def __init__(self, sharding: AxisSharding | None) -> None:
        split = isinstance(sharding, HeadSharding) and sharding.replicas > 1
        self._sharding = sharding if isinstance(sharding, HeadSharding) and split else None
        self.count = 1 if self._sharding is None else self._sharding.replicas

    def placement(self, placement: jax.Device | NamedSharding) -> jax.Device | NamedSharding:
        """Where arrays go that have a part for each replica.

        Args:
            placement: of what all devices of the pool have.
        """
        return placement if self._sharding is None else self._sharding.placed(self._sharding.rows)

    def shape(self, size: int, *others: int) -> jax.ShapeDtypeStruct:
        """An int32 operand [count * size, ...]."""
        sharding = None if self._sharding is None else self.placement(self._sharding.placed())
        return jax.ShapeDtypeStruct((self.count * size, *others), jnp.int32, sharding=sharding)

    def each(self, function: Callable[..., Any], has_cache: bool = False) -> Callable[..., Any]:
        """A function of the operands of one replica as one of the operands of all.

        Args:
            function: all that it takes and returns has rows, but for a cache.
            has_cache: whether its first argument and the first of its results is a cache.
        """
        sharding = self._sharding
        if sharding is None:
            return function
        rows = sharding.rows

        def call(*operands: Any) -> Any:
            caches, others = operands[:has_cache], operands[has_cache:]
            if AxisType.Explicit in sharding.mesh.axis_types:
                others = jax.tree.map(lambda array: _resharded(array, sharding), others)
            # All devices of a replica compute the same, which JAX need not prove.
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
        """Inside of `each`: a row among those of all replicas as this one has it, `num_rows` if it
        is another's.
        """
        if self._sharding is None:
            return row
        own = row - jax.lax.axis_index(self._sharding.data_axis) * num_rows
        return jnp.where((own >= 0) & (own < num_rows), own, num_rows)


def _resharded(array: jax.Array, sharding: HeadSharding) -> jax.Array:
    """An array whose type says how it is split, split by replica."""
    mesh = jax.typeof(array).sharding.mesh
    return jax.sharding.reshard(array, NamedSharding(mesh, sharding.rows))
