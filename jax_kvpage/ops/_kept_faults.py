"""Ops on pools whose heads or slots are spread over a mesh: none fails a program.

The devices of a step meet in collectives that are the model's own. When one device's op fails (a
free slot on one replica, room that one device has not got), the device leaves the program, and the
others wait for it in the next sum until XLA ends the process. Two ways out were weighed:

- The devices agree on each error and fail together, as where sequences are spread (_agreement.py).
  That takes a collective an op, and is safe only if every later collective needs the op's result.
  XLA runs independent parts of a program in any order: a sum of logits that does not wait for
  `advance` may have begun on one device when another fails there, though all do.
- An op that cannot run does nothing, returns NaN, and its program goes on; the error is kept for
  the host. It takes no collective, no device is ever missing in one, and it is what happens on a
  GPU anyway, where nothing may wait for a kernel to fail.

The second one is used (cc/cache/shared_faults.h). Nothing wrong passes for right: in that
generation the device does nothing more, what it adds to a sum is NaN on all devices, and
`KVPool.check` and every host call that changes the pool raise `DeviceFault`, with the text that the
op would have failed with. `KVPool.cache` starts a new generation. An op that is called outside of
any program raises the error itself: see `raise_kept`.

Ops on a closed pool, and programs for another spec, fail as on one device: they do on all devices.
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
    """Waits for an op that was called outside of any program, and raises what it failed with.

    Inside of one it does nothing.

    Args:
        cache: that the op was called with.
        results: of the op.

    Raises:
        DeviceFault: the op, or one of the same generation before it, has failed on a device.
    """
    handle = cache.handle
    if any(isinstance(one, jax.core.Tracer) for one in (handle, *jax.tree.leaves(results))):
        return
    wait_for(results)
    shard = np.asarray(handle.addressable_shards[0].data)
    checked(_native.take_fault_of, int(shard[0]))
