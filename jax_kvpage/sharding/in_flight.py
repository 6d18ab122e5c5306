"""Waiting for programs that run on the devices of a mesh.

Where sequences are spread, or the pool is closed, a device that refuses an op leaves the others in
the next sum over the mesh, and XLA then ends the process; elsewhere its results are NaN. So before
a pool refuses programs that were in order when they were started, those that are in flight end
first.
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
    """Waits until programs with sums over the mesh, which were started before, have ended.

    XLA runs such programs on CPU devices one after the other, in the order in which they were
    started: when a further one has ended they all have.
    """
    if is_tracing():
        return
    with no_mesh(), contextlib.suppress(RuntimeError):
        _sum(mesh)().block_until_ready()
