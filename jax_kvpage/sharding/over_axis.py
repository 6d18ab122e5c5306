"""AxisSharding: what all ways of spreading a cache over an axis of a mesh have in common."""

import dataclasses
import functools
from typing import Any, Self

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_kvpage._compat import manual_axes
from jax_kvpage.spec import CacheSpec

__all__ = ["AxisSharding", "mesh_problems"]


def mesh_problems(mesh: Any, axis: Any, name: str) -> list[str]:
    """Why a pool cannot be spread over this axis of a mesh.

    Args:
        mesh: a mesh.
        axis: one of its axes.
        name: of the argument of `KVPool` that is the axis.

    Raises:
        ValueError: no mesh, or an axis that it does not have.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(f"KVPool: mesh: wanted a jax.sharding.Mesh (jax.make_mesh), got {mesh!r}")
    if axis not in mesh.axis_names:
        names = ", ".join(map(repr, mesh.axis_names))
        raise ValueError(f"KVPool: {name}: the mesh has {names}, got {axis!r}")
    others = {other: n for other, n in mesh.shape.items() if other != axis and n > 1}
    if not others:
        return []
    return [
        f"mesh: axes {others} are split too, but a pool is spread over one axis, {axis!r}: "
        "make a pool for each part of the mesh"
    ]


@dataclasses.dataclass(frozen=True)
class AxisSharding:
    """A cache that is spread over devices.

    It is static metadata of a `KVCache`, so that ops find the devices and the spec of one shard at
    trace time.

    Attributes:
        mesh: the devices; all axes but `axis` have one.
        axis: the axis that the cache is split over.
        local: the spec of the part that one device holds.
    """

    mesh: Mesh
    axis: str
    local: CacheSpec

    def with_spec(self, local: CacheSpec) -> Self:
        """The same with the resolved spec of a shard."""
        return dataclasses.replace(self, local=local)

    @property
    def size(self) -> int:
        """The number of devices."""
        return int(self.mesh.shape[self.axis])

    @functools.cached_property
    def devices(self) -> list[Any]:
        """In the order of the shards."""
        return list(self.mesh.devices.flat)

    @functools.cached_property
    def local_devices(self) -> list[Any]:
        """Those of this process, in the order of the shards."""
        return [device for device in self.devices if device.process_index == jax.process_index()]

    @functools.cached_property
    def processes(self) -> list[int]:
        """The processes that the devices belong to, ascending."""
        return sorted({device.process_index for device in self.devices})

    @property
    def split(self) -> PartitionSpec:
        """Of the cache's arrays: each device has its own part."""
        return PartitionSpec(self.axis)

    @property
    def per_head(self) -> PartitionSpec:
        """Of arrays [heads]. Here: every device has all heads."""
        return PartitionSpec()

    def heads(self, ndim: int) -> PartitionSpec:
        """Of arrays [..., heads, dim]. Here: every device has all heads."""
        del ndim
        return PartitionSpec()

    def placed(self, *parts: str | None) -> NamedSharding:
        """The sharding over the mesh with these parts."""
        return NamedSharding(self.mesh, PartitionSpec(*parts))

    @property
    def manual(self) -> bool:
        """Whether the code that is traced runs once for each shard (inside `jax.shard_map`)."""
        return self.axis in manual_axes()
