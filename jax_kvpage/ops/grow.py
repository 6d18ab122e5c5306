"""grow: maps room for the new tokens of a batch; the first call of most steps."""

import functools

import jax
import jax.numpy as jnp

from jax_kvpage._compat import gathered
from jax_kvpage._values import MAX_INT32
from jax_kvpage.cache import Batch, KVCache
from jax_kvpage.ops import _mesh
from jax_kvpage.ops._checks import batch_operands, cache_operands, pool_checker
from jax_kvpage.ops.map_slots import map_slots

__all__ = ["grow"]


@_mesh.over_mesh(_mesh.cache_and_ok, replicated=True, striped=_mesh.not_striped, maps=True)
def grow(cache: KVCache, batch: Batch) -> tuple[KVCache, jax.Array]:
    """Maps physical blocks until each sequence of a batch has room for its new tokens.

    Equivalent to `map_slots(cache, batch.slots, n)`, where n is the length of each sequence plus
    its new tokens. `batch.mask(ok)` then leaves out the sequences that must wait.

    Args:
        cache: the cache; the slots must be occupied (`KVPool.acquire`).
        batch: which tokens belong to which slot.

    Returns:
        The next cache and ok, bool[S]: False if nothing was mapped, because the pool ran out of
        blocks or the sequence would exceed `cache.spec.max_seq_len`; True for padding.

    Raises:
        ValueError: wrong shapes or dtypes, all listed in one message; or the pool's sequences are
            sharded over a mesh: use `KVPool.extend` there.
        jax.errors.JaxRuntimeError: at run time: a stale cache or closed pool, a free or repeated
            slot.
    """
    arrays = cache_operands("grow", cache)
    check = pool_checker("grow", cache.spec)
    check.cache(*map(jax.typeof, arrays))
    slots, offsets = batch_operands("grow", batch)
    check.batch(jax.typeof(slots), jax.typeof(offsets))
    check.done()
    return map_slots(cache, slots, _totals(*map(gathered, (cache.lengths, slots, offsets))))


# A single program even in eager calls, so that no scalar has to be moved to the device.
@functools.partial(jax.jit, inline=True)
def _totals(lengths: jax.Array, slots: jax.Array, offsets: jax.Array) -> jax.Array:
    before = jnp.maximum(lengths[jnp.maximum(slots, 0)], 0)
    new = jnp.diff(offsets)
    # Saturated: a sum beyond int32 would wrap around to a number that seems to fit.
    total = before + jnp.minimum(new, MAX_INT32 - before)
    # Malformed offsets become a number of tokens that map_slots refuses.
    total = jnp.where((new < 0) | (offsets[:1] != 0), -1, total)
    return jnp.where(slots >= 0, total, 0)
