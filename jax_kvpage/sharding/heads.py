"""HeadSharding: how the heads of a cache are split over an axis of a mesh.

It is static metadata of a `KVCache`, so that ops find the devices and the spec of one shard at
trace time. Query heads are split in order, and each device holds the key/value heads that its query
heads read.
"""

import dataclasses
import functools
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_kvpage._compat import manual_axes
from jax_kvpage.spec import CacheSpec

__all__ = ["HeadSharding"]


@dataclasses.dataclass(frozen=True)
class HeadSharding:
    """A cache whose heads are spread over devices.

    Attributes:
        mesh: the devices; all axes but `axis` have one.
        axis: the axis that the heads are split over.
        local: the spec of the part that one device holds.
        copies: how many devices hold each key/value head; more than 1 where there are fewer heads
            than devices.
    """

    mesh: Mesh
    axis: str
    local: CacheSpec
    copies: int

    @classmethod
    def of(cls, spec: CacheSpec, mesh: Any, axis: Any) -> "HeadSharding":
        """The sharding of an unresolved spec, whose `local` is not resolved either.

        Raises:
            ValueError: a mesh, axis or number of heads that cannot be used, with all reasons.
        """
        if not isinstance(mesh, Mesh):
            raise ValueError(
                f"KVPool: mesh: wanted a jax.sharding.Mesh (jax.make_mesh), got {mesh!r}"
            )
        if axis not in mesh.axis_names:
            names = ", ".join(map(repr, mesh.axis_names))
            raise ValueError(f"KVPool: axis: the mesh has {names}, got {axis!r}")
        reasons = []
        others = {name: n for name, n in mesh.shape.items() if name != axis and n > 1}
        if others:
            reasons.append(
                f"mesh: axes {others} are split too, but a pool is spread over one axis, {axis!r}: "
                "make a pool for each part of the mesh"
            )
        devices, heads = mesh.shape[axis], spec.num_kv_heads
        if heads % devices and devices % heads:
            reasons.append(
                f"num_kv_heads={heads} cannot be split over {devices} devices: one must be a "
                "multiple of the other, so that every device holds the same number of heads"
            )
        if reasons:
            raise ValueError("\n  - ".join(["KVPool:", *reasons]))
        local = dataclasses.replace(spec, num_kv_heads=max(heads // devices, 1), granule=None)
        return cls(mesh, axis, local, max(devices // heads, 1))

    def with_spec(self, local: CacheSpec) -> "HeadSharding":
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

    @property
    def split(self) -> PartitionSpec:
        """Of the cache's arrays: each device has its own part."""
        return PartitionSpec(self.axis)

    def heads(self, ndim: int) -> PartitionSpec:
        """Of arrays [..., heads, dim]."""
        return PartitionSpec(*[None] * (ndim - 2), self.axis, None)

    def placed(self, *parts: str | None) -> NamedSharding:
        """The sharding over the mesh with these parts."""
        return NamedSharding(self.mesh, PartitionSpec(*parts))

    @property
    def manual(self) -> bool:
        """Whether the code that is traced runs once for each shard (inside `jax.shard_map`)."""
        return self.axis in manual_axes()
