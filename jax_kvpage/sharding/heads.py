"""HeadSharding: splits a cache over a mesh, its heads over one axis and its slots over another.

It is static metadata of a `KVCache`, so that ops know the devices and the spec of one shard at
trace time. Query heads are split in order, and each device holds the key/value heads that its query
heads read. Along the data axis, each replica has its own slots.
"""

import dataclasses
from typing import Any

from jax.sharding import PartitionSpec

from jax_kvpage._values import raise_all
from jax_kvpage.sharding.over_axis import AxisSharding, mesh_problems
from jax_kvpage.spec import CacheSpec

__all__ = ["HeadSharding"]


@dataclasses.dataclass(frozen=True)
class HeadSharding(AxisSharding):
    """A cache whose heads or slots, or both, are split over devices.

    Attributes:
        mesh: the devices; all axes other than `axis` and `data_axis` have size 1.
        axis: axis that the heads are split over; None if each device has all heads.
        copies: number of devices of a replica that hold each key/value head; more than 1 if there
            are fewer heads than devices.
        data_axis: axis that the slots are split over; None if each device has all slots.
    """

    copies: int
    data_axis: str | None = None

    @classmethod
    def of(cls, spec: CacheSpec, mesh: Any, axis: Any, data_axis: Any = None) -> "HeadSharding":
        """Returns the sharding of an unresolved spec; its `local` is not resolved either.

        Raises:
            ValueError: a mesh, axis, number of heads or number of slots cannot be used; lists all
                reasons.
        """
        reasons = mesh_problems(mesh, axis=axis, data_axis=data_axis)
        devices, heads = mesh.shape[axis] if axis else 1, spec.num_kv_heads
        if heads % devices and devices % heads:
            reasons.append(
                f"num_kv_heads={heads} cannot be split over {devices} devices: one must be a "
                "multiple of the other, so that every device holds the same number of heads"
            )
        replicas = mesh.shape[data_axis] if data_axis else 1
        processes = {device.process_index for device in mesh.devices.flat}
        if data_axis and len(processes) > 1:
            reasons.append(
                f"mesh: its devices belong to {len(processes)} processes, but slots can be split "
                "(data_axis) over the devices of one process only so far: make a pool in each "
                "process"
            )
        if spec.max_slots % replicas:
            reasons.append(
                f"max_slots={spec.max_slots}, those of all {replicas} replicas together, cannot be "
                f"split over data_axis={data_axis!r}: wanted a multiple of {replicas}"
            )
        raise_all("KVPool", reasons)
        local = dataclasses.replace(
            spec,
            num_kv_heads=max(heads // devices, 1),
            max_slots=spec.max_slots // replicas,
            granule=None,
        )
        return cls(mesh, axis, local, max(devices // heads, 1), data_axis)

    @property
    def replicas(self) -> int:
        """Number of parts that the slots are split into."""
        return int(self.mesh.shape[self.data_axis]) if self.data_axis else 1

    @property
    def keeps_faults(self) -> bool:
        """True if there are other devices, which may wait in a sum (ops/_kept_faults.py)."""
        return self.size > 1

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that the cache is split over, the slots' axis first."""
        return tuple(axis for axis in (self.data_axis, self.axis) if axis is not None)

    @property
    def per_head(self) -> PartitionSpec:
        """The sharding of arrays [heads]."""
        return PartitionSpec(self.axis)

    @property
    def rows(self) -> PartitionSpec:
        """The sharding of arrays with a part for each replica, such as a batch."""
        return PartitionSpec(self.data_axis) if self.data_axis else PartitionSpec()

    def heads(self, ndim: int) -> PartitionSpec:
        """The sharding of arrays [tokens or sequences, ..., heads, dim]."""
        return PartitionSpec(self.data_axis, *[None] * (ndim - 3), self.axis, None)
