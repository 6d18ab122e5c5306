"""positions: the position of each new token of a batch in its sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpage import reference
from jax_kvpage._arrays import host_int, to_device
from jax_kvpage._compat import gathered
from jax_kvpage.cache import Batch, KVCache
from jax_kvpage.ops import _mesh, _tokens
from jax_kvpage.ops._checks import batch_operands, cache_operands, pool_checker

__all__ = ["positions"]


@_mesh.over_mesh(_mesh.everywhere, replicated=True)
def positions(cache: KVCache, batch: Batch, *, num_tokens: int | None = None) -> jax.Array:
    """Returns the positions of the new tokens, lengths[slot] + i, as needed by rotary embeddings.

    Args:
        cache: the cache.
        batch: which tokens belong to which slot.
        num_tokens: T, the length of the token axis. Optional if the batch knows it, and outside
            jit, where it defaults to the number of tokens that the sequences own.

    Returns:
        int32[T], or int32[S, T] for a padded batch; 0 for padding tokens and masked sequences.

    Raises:
        ValueError: T is unknown, or num_tokens differs from the batch's; or wrong shapes and
            dtypes.
    """
    arrays = cache_operands("positions", cache)
    check = pool_checker("positions", cache.spec)
    check.cache(*map(jax.typeof, arrays))
    slots, offsets = batch_operands("positions", batch)
    check.batch(jax.typeof(slots), jax.typeof(offsets))
    if num_tokens is not None:
        num_tokens = host_int("positions: num_tokens", num_tokens, low=0)
    if None not in (num_tokens, batch.num_tokens) and num_tokens != batch.num_tokens:
        check.add(f"num_tokens: got {num_tokens}, but batch.num_tokens is {batch.num_tokens}")
    tokens = batch.num_tokens if num_tokens is None else num_tokens
    if tokens is None and not check.problems:
        tokens = _last_offset(offsets)
        if tokens is None:
            check.add(
                "num_tokens: the number of tokens T is a shape, and under jit neither the batch "
                "nor the call says it: use positions(cache, batch, num_tokens=q.shape[0]), "
                "Batch.decode, Batch.from_lengths or Batch(slots, query_offsets, num_tokens=T)"
            )
    check.done()
    assert tokens is not None
    rows = tokens
    if batch.starts is not None:
        rows *= slots.shape[0]
        slots, offsets = _tokens.expanded(batch, slots, offsets, check.problems)
        check.done()
    if slots.shape[0] == 0:
        return _tokens.like(batch, to_device(np.zeros((rows,), np.int32)))
    slots, offsets, lengths = map(gathered, (slots, offsets, cache.lengths))
    return _tokens.like(batch, _positions(slots, offsets, lengths, rows))


# A single program even in eager calls, so that no scalar has to be moved to the device.
@functools.partial(jax.jit, static_argnums=3, inline=True)
def _positions(slots: jax.Array, offsets: jax.Array, lengths: jax.Array, tokens: int) -> jax.Array:
    sequence, index, owned = reference.token_owners(offsets, slots >= 0, tokens)
    begin = lengths[jnp.maximum(slots, 0)][sequence]
    return jnp.where(owned, begin + index, 0)


def _last_offset(offsets: jax.Array) -> int | None:
    """The number of tokens that sequences own, or None if offsets are traced."""
    try:
        return int(np.asarray(offsets)[-1])
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        return None
