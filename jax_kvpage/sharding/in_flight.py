"""Waits for programs that run on the devices of a mesh.

If sequences are split or the pool is closed, a device that refuses an op leaves the others waiting
in the next sum over the mesh, and XLA then aborts the process; otherwise its results are NaN. So
before a pool starts refusing programs that were valid when they were launched, the programs in
flight must end.
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_kvpage._compat import is_tracing, no_mesh

__all__ = ["wait_for_programs"]


@functools.cache
def _sum(mesh: Any) -> Any:
    def run() -> jax.Array:
        total = jnp.zeros((), jnp.int32)
        for axis in mesh.axis_names:
            total = jax.lax.psum(total + jax.lax.axis_index(axis), axis)
        return total

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(), out_specs=PartitionSpec())
    return jax.jit(mapped)


def wait_for_programs(mesh: Any) -> None:
    """Waits until programs with sums over the mesh that were launched before have ended.

    XLA runs such programs on CPU devices one by one, in launch order, so when another one has
    ended, they all have.
    """
    if is_tracing():
        return
    with no_mesh(), contextlib.suppress(RuntimeError):
        _sum(mesh)().block_until_ready()
