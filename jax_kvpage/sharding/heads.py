"""HeadSharding: how the heads of a cache are split over an axis of a mesh.

Query heads are split in order, and each device holds the key/value heads that its query heads read.
"""

import dataclasses
from typing import Any

from jax.sharding import PartitionSpec

from jax_kvpage.sharding.over_axis import AxisSharding, mesh_problems
from jax_kvpage.spec import CacheSpec

__all__ = ["HeadSharding"]


@dataclasses.dataclass(frozen=True)
class HeadSharding(AxisSharding):
    """A cache whose heads are spread over devices.

    Attributes:
        copies: how many devices hold each key/value head; more than 1 where there are fewer heads
            than devices.
    """

    copies: int

    @classmethod
    def of(cls, spec: CacheSpec, mesh: Any, axis: Any) -> "HeadSharding":
        """The sharding of an unresolved spec, whose `local` is not resolved either.

        Raises:
            ValueError: a mesh, axis or number of heads that cannot be used, with all reasons.
        """
        reasons = mesh_problems(mesh, axis, "axis")
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

    @property
    def per_head(self) -> PartitionSpec:
        """Of arrays [heads]."""
        return PartitionSpec(self.axis)

    def heads(self, ndim: int) -> PartitionSpec:
        """Of arrays [..., heads, dim]."""
        return PartitionSpec(*[None] * (ndim - 2), self.axis, None)
