"""Ops on pools whose heads or slots are sharded over a mesh: they never fail a program.

The devices of a step meet in the model's own collectives. If one device's op fails (a free slot on
one replica, missing room on one device), that device leaves the program, and the others wait for it
in the next sum until XLA aborts the process. There are two ways out:

- The devices agree on each error and fail together, as with sharded sequences (_agreement.py). That
  takes a collective per op, and is safe only if every later collective depends on the op's result.
  XLA runs independent parts of a program in any order: a sum of logits that does not depend on
  `advance` may have begun on one device when another fails there, although all fail.
- An op that cannot run does nothing and returns NaN, its program continues, and the error is kept
  for the host. That takes no collective, no device is ever missing from one, and it is what happens
  on a GPU anyway, where nothing may wait for a kernel to fail.

The second one is used (cc/cache/shared_faults.h). Wrong results cannot pass for right ones: for the
rest of the generation the device does nothing more, its contribution to a sum makes the sum NaN on
all devices, and `KVPool.check` and every host call that changes the pool raise `DeviceFault` with
the op's error message. `KVPool.cache` starts a new generation. An op that is called outside any
program raises the error itself: see `raise_kept`.

Ops on a closed pool, and programs for another spec, fail as on a single device, because they fail
on all devices.
"""

from typing import Any

import jax
import numpy as np

from jax_kvpage import _native
from jax_kvpage._native_pool import checked
from jax_kvpage.cache import KVCache
from jax_kvpage.errors import wait_for

__all__ = ["raise_kept"]


def raise_kept(cache: KVCache, results: Any) -> None:
    """Waits for an op that was called outside any program, and raises its error.

    Does nothing inside a program.

    Args:
        cache: the cache that was passed to the op.
        results: results of the op.

    Raises:
        DeviceFault: the op, or an earlier one of the same generation, has failed on a device.
    """
    handle = cache.handle
    if any(isinstance(one, jax.core.Tracer) for one in (handle, *jax.tree.leaves(results))):
        return
    wait_for(results)
    shard = np.asarray(handle.addressable_shards[0].data)
    checked(_native.take_fault_of, int(shard[0]))
