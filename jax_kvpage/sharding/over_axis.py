"""AxisSharding: common base of all ways to split a cache over axes of a mesh."""

import dataclasses
import functools
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_kvpage._compat import manual_axes
from jax_kvpage.spec import CacheSpec

__all__ = ["AxisSharding", "mesh_problems"]


def mesh_problems(mesh: Any, **axes: Any) -> list[str]:
    """Returns reasons why a pool cannot be split over these axes of a mesh.

    Args:
        mesh: a mesh.
        **axes: mesh axes or None, by the names of `KVPool`'s arguments.

    Raises:
        ValueError: `mesh` is not a mesh, or lacks one of the axes.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(f"KVPool: mesh: wanted a jax.sharding.Mesh (jax.make_mesh), got {mesh!r}")
    given = {name: axis for name, axis in axes.items() if axis is not None}
    for name, axis in given.items():
        if axis not in mesh.axis_names:
            names = ", ".join(map(repr, mesh.axis_names))
            raise ValueError(f"KVPool: {name}: the mesh has {names}, got {axis!r}")
    reasons = []
    if len(set(given.values())) < len(given):
        twice = next(iter(given.values()))
        reasons.append(f"{' and '.join(given)}: wanted two axes of the mesh, got {twice!r} twice")
    others = {other: n for other, n in mesh.shape.items() if other not in given.values() and n > 1}
    if others:
        over = " and ".join(map(repr, given.values()))
        if "sequence_axis" in given:
            rule = f"a pool is spread over one axis, {over}"
        else:
            rule = (
                "a pool is spread over one axis for its heads (axis) and one for its slots "
                f"(data_axis), here {over}: name the second axis, or"
            )
        glue = ": " if "sequence_axis" in given else " "
        reasons.append(
            f"mesh: axes {others} are split too, but {rule}{glue}make a pool for each part of the "
            "mesh"
        )
    return reasons


@dataclasses.dataclass(frozen=True)
class AxisSharding:
    """A cache that is split over devices.

    It is static metadata of a `KVCache`, so that ops know the devices and the spec of one shard at
    trace time.

    Attributes:
        mesh: the devices; all axes that the cache is not split over have size 1.
        axis: axis that heads or sequences are split over.
        local: spec of one device's part.
    """

    mesh: Mesh
    axis: str | None
    local: CacheSpec

    def with_spec(self, local: CacheSpec) -> Self:
        """Returns this sharding with the resolved spec of a shard."""
        return dataclasses.replace(self, local=local)

    @property
    def size(self) -> int:
        """Number of devices."""
        return int(self.mesh.size)

    @property
    def replicas(self) -> int:
        """Number of parts that the slots are split into; 1 if every device has all slots."""
        return 1

    @property
    def parts(self) -> int:
        """Number of devices that serve a slot together."""
        return self.size // self.replicas

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that the cache is split over."""
        return () if self.axis is None else (self.axis,)

    @functools.cached_property
    def devices(self) -> list[Any]:
        """The devices in shard order: those of the first replica, then of the second, and so on."""
        names = self.mesh.axis_names
        first = [names.index(axis) for axis in self.axes]
        return list(np.moveaxis(self.mesh.devices, first, range(len(first))).flat)

    @functools.cached_property
    def local_devices(self) -> list[Any]:
        """The devices of this process, in shard order."""
        return [device for device in self.devices if device.process_index == jax.process_index()]

    @functools.cached_property
    def processes(self) -> list[int]:
        """The processes that the devices belong to, ascending."""
        return sorted({device.process_index for device in self.devices})

    @property
    def split(self) -> PartitionSpec:
        """The sharding of the cache's arrays: each device has its own part."""
        return PartitionSpec(self.axes if len(self.axes) > 1 else self.axes[0])

    @property
    def keeps_faults(self) -> bool:
        """Whether an op that cannot run on a device lets its program continue and reports later.

        False by default: all devices agree to fail (ops/_agreement.py).
        """
        return False

    @property
    def rows(self) -> PartitionSpec:
        """The sharding of arrays with a part for each replica. By default there is one replica."""
        return PartitionSpec()

    @property
    def per_head(self) -> PartitionSpec:
        """The sharding of arrays [heads]. By default every device has all heads."""
        return PartitionSpec()

    def heads(self, ndim: int) -> PartitionSpec:
        """The sharding of arrays [..., heads, dim]. By default every device has all heads."""
        del ndim
        return PartitionSpec()

    def placed(self, spec: PartitionSpec | None = None) -> NamedSharding:
        """Returns `spec` as a sharding over the mesh; None means replicated on all devices."""
        return NamedSharding(self.mesh, PartitionSpec() if spec is None else spec)

    @property
    def manual(self) -> bool:
        """Whether the traced code runs once for each shard (inside `jax.shard_map`).

        Raises:
            ValueError: it runs once for each part of only one of two axes.
        """
        inside = [axis for axis in self.axes if axis in manual_axes()]
        if inside and len(inside) < len(self.axes):
            raise ValueError(
                f"the cache is split over the mesh axes {self.axes}, but this jax.shard_map is "
                f"over {inside} of them only: map over both, with in_specs {self.split} for the "
                "cache"
            )
        return bool(inside)
