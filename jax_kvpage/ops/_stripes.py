"""Ops on one device of a cache whose sequences are sharded over a mesh (sharding/stripes.py).

The cache has the lengths of whole sequences, equal on all devices, so each device computes its
share of them without communication. The device's own pool only knows local lengths.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_kvpage import reference
from jax_kvpage._arrays import as_int32
from jax_kvpage.cache import Batch, KVCache
from jax_kvpage.ops import _slots, _tokens
from jax_kvpage.ops._agreement import (
    agreed,
    agreed_fault,
    try_advance_p,
    try_append_kv_p,
    try_set_lengths_p,
)
from jax_kvpage.ops._checks import batch_operands, cache_operands, check_arrays, pool_checker
from jax_kvpage.sharding.stripes import StripeSharding

__all__ = [
    "Part",
    "advance",
    "append_kv",
    "checked_tokens",
    "device_of",
    "edit_slots",
    "lengths_here",
    "read_kv",
    "set_lengths",
]

# Opcodes of `edit_slots` that take the length of the whole sequence (cc/base/slot_edits.h).
_SET_LENGTH, _TRUNCATE = 2, 4

Op = Callable[..., Any]


def device_of(sharding: StripeSharding) -> jax.Array:
    """The index of this device."""
    return jax.lax.axis_index(sharding.axis)


def lengths_here(sharding: StripeSharding, lengths: Any) -> jax.Array:
    """int32[max_slots]: tokens of each sequence that this device holds; -1 for free slots."""
    return jnp.where(lengths < 0, -1, sharding.tokens_on(device_of(sharding), lengths))


def _local(sharding: StripeSharding, cache: KVCache) -> KVCache:
    """Returns the cache of this device's own pool."""
    lengths = lengths_here(sharding, cache.lengths)
    return dataclasses.replace(cache, lengths=lengths, spec=sharding.local, sharding=None)


def _agreed(
    sharding: StripeSharding, cache: KVCache, epoch: Any, fault: Any, lengths: Any = None
) -> KVCache:
    """Returns the next cache; fails on all devices if one of them has failed."""
    fault = agreed_fault([fault], sharding.axis)
    lengths = cache.lengths if lengths is None else lengths
    epoch, lengths, _ = agreed(fault, epoch, lengths)
    return dataclasses.replace(cache, epoch=epoch, lengths=lengths)


def _begins(lengths: Any, slots: Any) -> jax.Array:
    """int32[S]: length of each sequence; 0 for padding and free slots."""
    return jnp.where(slots >= 0, jnp.maximum(lengths[jnp.maximum(slots, 0)], 0), 0)


@dataclasses.dataclass(frozen=True)
class Part:
    """One device's part of a ragged batch.

    Attributes:
        lengths: int32[max_slots]: lengths in its own pool.
        offsets: int32[S+1]: offsets of the new tokens that it holds, packed.
        source: int32[T]: index in the batch of each of these new tokens.
        seen_slots, seen_offsets: int32[2 S] and int32[2 S + 1]: the sequences, with the new tokens
            that see any of this device's tokens. An entry with slot -1 before each sequence owns
            the other tokens.
        limits: int32[T]: the last local position that each new token sees.
    """

    lengths: jax.Array
    offsets: jax.Array
    source: jax.Array
    seen_slots: jax.Array
    seen_offsets: jax.Array
    limits: jax.Array

    @classmethod
    def of(
        cls, sharding: StripeSharding, lengths: Any, slots: Any, offsets: Any, tokens: int
    ) -> "Part":
        """Returns this device's part of a batch.

        Args:
            sharding: sharding of the cache.
            lengths: int32[max_slots]: lengths of whole sequences.
            slots: int32[S].
            offsets: int32[S+1].
            tokens: T.
        """
        device, here = device_of(sharding), lengths_here(sharding, lengths)
        if slots.shape[0] == 0 or tokens == 0:
            none = jnp.zeros((tokens,), jnp.int32)
            padding = jnp.full((2 * slots.shape[0],), -1, jnp.int32)
            zeros = jnp.zeros((2 * slots.shape[0] + 1,), jnp.int32)
            return cls(here, _own_offsets(sharding, lengths, slots, offsets), none, padding,
                       zeros, none)  # fmt: skip
        begins, counts = _begins(lengths, slots), jnp.diff(offsets)
        own = _own_offsets(sharding, lengths, slots, offsets, tokens)
        every = jnp.ones(slots.shape, bool)
        sequence, index, _ = reference.token_owners(own, every, tokens)
        first = sharding.tokens_on(device, begins)[sequence]
        new = sharding.position(device, first + index) - begins[sequence]
        source = jnp.clip(offsets[sequence] + new, 0, tokens - 1)

        sequence, index, _ = reference.token_owners(offsets, every, tokens)
        limits = sharding.tokens_on(device, begins[sequence] + index + 1) - 1
        # The first tokens of a sequence are on other devices, so some tokens may see nothing here.
        blind = jnp.clip(device * sharding.stripe_tokens - begins, 0, counts)
        bounds = jnp.stack([offsets[:-1] + blind, offsets[1:]], axis=1).reshape(-1)
        seen = jnp.stack([jnp.full_like(slots, -1), slots], axis=1).reshape(-1)
        return cls(here, own, source, seen, jnp.concatenate([offsets[:1], bounds]), limits)


def _own_offsets(
    sharding: StripeSharding, lengths: Any, slots: Any, offsets: Any, tokens: int | None = None
) -> jax.Array:
    """int32[S+1]: offsets of the new tokens that this device holds.

    They begin at -1, which every op refuses at run time, if the batch is malformed. (A decreasing
    number of tokens yields decreasing offsets here too.)
    """
    device, begins = device_of(sharding), _begins(lengths, slots)
    ends = begins + jnp.diff(offsets)
    counts = sharding.tokens_on(device, ends) - sharding.tokens_on(device, begins)
    first = offsets[:1]
    if tokens is not None:
        first = jnp.where(offsets[-1:] <= tokens, first, -1)
    return jnp.concatenate([first, first + jnp.cumsum(counts, dtype=jnp.int32)])


def checked_tokens(
    op: str, arguments: dict[str, Any], check: Callable[[Any, Any], None] | None = None
) -> tuple[Any, ...]:
    """Checks shapes and dtypes of an op over tokens, and returns its operands.

    Args:
        op: op name.
        arguments: arguments by name; q, k and v are the tokens.
        check: additional checks, called with the checker and q.

    Returns:
        handle, epoch, lengths, slots, offsets, layer, and the tokens as rows [T, heads, dim].

    Raises:
        ValueError: lists all mistakes.
    """
    cache, batch = arguments["cache"], arguments["batch"]
    tokens = {name: arguments[name] for name in ("q", "k", "v") if name in arguments}
    check_arrays(op, **tokens)
    operands, problems = _tokens.operands(op, cache, batch, arguments["layer"], **tokens)
    avals = [jax.typeof(operand) for operand in operands]
    checker = pool_checker(op, cache.spec, problems)
    _tokens.check_header(checker, avals)
    rows = dict(zip(tokens, avals[_tokens.HEADER :], strict=True))
    if check is not None:
        check(checker, rows["q"])
    if "k" in rows:
        _tokens.check_kv(checker, rows["k"], rows["v"])
    checker.done()
    return operands


def append_kv(op: Op, sharding: StripeSharding, arguments: dict[str, Any]) -> KVCache:
    """Each device writes its own tokens."""
    cache = arguments["cache"]
    *_, lengths, slots, offsets, layer, k, v = checked_tokens("append_kv", arguments)
    part = Part.of(sharding, lengths, slots, offsets, k.shape[0])
    k, v = jnp.asarray(k)[part.source], jnp.asarray(v)[part.source]
    own = (cache.handle, cache.epoch, part.lengths, slots, part.offsets, layer)
    done = try_append_kv_p.bind(*own, k, v, spec=sharding.local)
    return _agreed(sharding, cache, *done)


def advance(op: Op, sharding: StripeSharding, arguments: dict[str, Any]) -> KVCache:
    """Advances the device's own pool by its own tokens."""
    cache, batch = arguments["cache"], arguments["batch"]
    slots, offsets = batch_operands("advance", batch)
    check = pool_checker("advance", cache.spec)
    check.cache(*map(jax.typeof, cache_operands("advance", cache)))
    check.batch(jax.typeof(slots), jax.typeof(offsets))
    check.done()
    own = _own_offsets(sharding, cache.lengths, slots, offsets)
    here = lengths_here(sharding, cache.lengths)
    epoch, _, fault = try_advance_p.bind(
        cache.handle, cache.epoch, here, slots, own, spec=sharding.local
    )
    target = jnp.where(slots >= 0, slots, cache.spec.max_slots)
    lengths = cache.lengths.at[target].add(jnp.diff(offsets), mode="drop")
    return _agreed(sharding, cache, epoch, fault, lengths)


def _lowered(sharding: StripeSharding, old: Any, new: Any) -> jax.Array:
    """Returns the local length for a new length; too large on all devices if that is too large."""
    device = device_of(sharding)
    return jnp.where(new > old, new, sharding.tokens_on(device, new))


def set_lengths(op: Op, sharding: StripeSharding, arguments: dict[str, Any]) -> KVCache:
    """Sets the device's own pool to its share of the lengths."""
    cache = arguments["cache"]
    operands = _slots.operands(
        "set_lengths", cache, arguments["slots"], "lengths", arguments["lengths"]
    )
    check = pool_checker("set_lengths", cache.spec)
    _slots.check(check, "lengths", [jax.typeof(operand) for operand in operands])
    check.done()
    *_, slots, values = operands
    new = jnp.where(values < 0, values, _lowered(sharding, _begins(cache.lengths, slots), values))
    here = lengths_here(sharding, cache.lengths)
    epoch, _, fault = try_set_lengths_p.bind(
        cache.handle, cache.epoch, here, slots, new, spec=sharding.local
    )
    target = jnp.where(slots >= 0, slots, cache.spec.max_slots)
    lengths = cache.lengths.at[target].set(values, mode="drop")
    return _agreed(sharding, cache, epoch, fault, lengths)


def edit_slots(op: Op, sharding: StripeSharding, arguments: dict[str, Any]) -> KVCache:
    """Converts the whole-sequence lengths in edits to local ones. There are no copies."""
    cache, edits = arguments["cache"], as_int32("edits", arguments["edits"])
    opcode, slots, length = edits[:, 0], edits[:, 1], edits[:, 2]
    lowers = (slots >= 0) & ((opcode == _SET_LENGTH) | (opcode == _TRUNCATE))
    old = _begins(cache.lengths, slots)
    here = jnp.where(lowers, _lowered(sharding, old, length), length)
    local = op(
        _local(sharding, cache),
        arguments["own"],
        edits.at[:, 2].set(here),
        arguments["copies"],
        arguments["verb"],
    )
    lengths = jnp.where(local.lengths < 0, -1, jnp.maximum(cache.lengths, 0))
    target = jnp.where(lowers, slots, cache.spec.max_slots)
    lengths = lengths.at[target].set(length, mode="drop")
    return dataclasses.replace(cache, epoch=local.epoch, lengths=lengths)


def read_kv(op: Op, sharding: StripeSharding, arguments: dict[str, Any]) -> Any:
    """Reads the device's own tokens, in order."""
    cache, wanted = arguments["cache"], arguments["batch_or_slots"]
    if isinstance(wanted, Batch):
        slots, offsets = batch_operands("read_kv", wanted)
        wanted = Batch(slots, _own_offsets(sharding, cache.lengths, slots, offsets))
    return op(_local(sharding, cache), wanted, arguments["layer"])
