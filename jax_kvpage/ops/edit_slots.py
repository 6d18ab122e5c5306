"""edit_slots: the op that the pool's host calls (acquire, release, fork, ...) queue (internal).

The host call decides what happens to which slot; this op applies that to the cache value, ordered
by data dependence. A new host call needs a new opcode or a combination of opcodes, not a new op.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jax_kvpage import _native
from jax_kvpage._arrays import as_int32
from jax_kvpage.cache import KVCache
from jax_kvpage.ops import _batching, _lowering, _mesh, _scratch, _stripes
from jax_kvpage.ops._checks import EPOCH, INT32, cache_operands, pool_checker, results
from jax_kvpage.spec import CacheSpec

__all__ = [
    "DROP",
    "FORK",
    "FOUND",
    "OCCUPY",
    "SET_LENGTH",
    "SWAP_IN",
    "TRUNCATE",
    "VACATE",
    "edit_slots",
]

# Opcodes (cc/base/slot_edits.h).
OCCUPY, VACATE, SET_LENGTH, FORK, TRUNCATE, FOUND, DROP, SWAP_IN = range(8)

_NAMES = {number: name for name, number in _native.VERBS.items()}


def _abstract(*avals: Any, spec: CacheSpec, verb: int) -> list[Any]:
    handle, epoch, lengths, own, edits, copies = avals
    check = pool_checker(f"KVPool.{_NAMES[verb]}", spec)
    check.cache(handle, epoch, lengths)
    check.array("own", own, (2,), INT32)
    check.array("edits", edits, ("n", 4), INT32)
    check.array("copies", copies, ("m", 4), INT32)
    check.done()
    return results(avals, EPOCH, ((spec.max_slots,), jnp.int32))


edit_slots_p = _lowering.make_primitive("edit_slots", _abstract, static=("spec", "verb"))


@_mesh.over_mesh(_mesh.cache_only, split=("own",), striped=_stripes.edit_slots)
def edit_slots(cache: KVCache, own: Any, edits: Any, copies: Any, verb: str) -> KVCache:
    """Changes the occupancy and length of slots, then copies tokens between slots.

    All or nothing: both lists are checked before anything is changed.

    Args:
        cache: the cache.
        own: int32[2], handle of the pool that makes the call; must be the cache's.
        edits: int32[n, 4], rows of (opcode, slot, length, donor); slot -1 is padding. A slot may
            occur once. OCCUPY turns a free slot into an empty sequence, VACATE frees a slot,
            SET_LENGTH and TRUNCATE lower a length, FORK turns a free slot into a sequence with the
            first `length` tokens of slot `donor`, FOUND turns one into a sequence with `length`
            tokens that are already in its memory, DROP removes the tokens before `length`, and
            SWAP_IN turns a free slot into a sequence with `length` tokens that are already in its
            memory (CPU only).
        copies: int32[m, 4], rows of (source slot, target slot, first token, number of tokens); -1
            is padding. Copies the stored keys, values and scales of all layers to the same
            positions of the target, which then counts as written up to there. Slots must be
            occupied after the edits. A slot may be the target of only one copy, and then not a
            source.
        verb: name of the host call, with which error messages begin.

    Returns:
        The next cache.
    """
    arrays = cache_operands(verb, cache)
    operands = (
        *arrays,
        as_int32("own", own),
        as_int32("edits", edits),
        as_int32("copies", copies),
    )
    params = {"spec": cache.spec, "verb": _native.VERBS[verb]}
    epoch, lengths = _lowering.bind(edit_slots_p, _abstract, operands, params)
    return dataclasses.replace(cache, epoch=epoch, lengths=lengths)


_lowering.register_lowerings(edit_slots_p, aliases={1: 0, 2: 1}, scratch=_scratch.copies)


def _refuse_batch(operands: Any, dims: Any, *, spec: CacheSpec, verb: int) -> Any:
    del operands, dims, spec
    name = _NAMES[verb]
    raise ValueError(f"vmap of KVPool.{name}: {name} slots outside of vmap")


_batching.register(edit_slots_p, _refuse_batch)
