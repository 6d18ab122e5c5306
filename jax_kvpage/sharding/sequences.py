"""The implementation of a `KVPool` whose sequences are split over a mesh (stripes.py).

The devices' pools decide in step, as with split heads (shards.py): each maps room for the same
number of tokens, that of the device which holds most of the sequence. So a slot has the same number
everywhere, and each device has at most one stripe of room that was not requested. Callers use token
counts of whole sequences, which are converted here to those of a device.
"""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from jax_kvpage._compat import no_mesh
from jax_kvpage._native_pool import PoolOptions
from jax_kvpage.cache import KVCache
from jax_kvpage.ops.edit_slots import TRUNCATE
from jax_kvpage.ops.set_lengths import set_lengths
from jax_kvpage.sharding.devices import total_bytes
from jax_kvpage.sharding.pools import ShardedNativePool, ShardedQueue, resolved
from jax_kvpage.sharding.shards import ShardedDecision, ShardedPool
from jax_kvpage.sharding.stripes import StripeSharding
from jax_kvpage.spec import CacheSpec

__all__ = ["SequenceNativePool", "SequencePool", "SequenceQueue", "sequence_parallel"]


def sequence_parallel(
    spec: CacheSpec, capacity: Any, sharding: StripeSharding, options: PoolOptions
) -> tuple["SequenceNativePool", "SequenceQueue"]:
    """Creates the compiled pools and the queue; see `KVPool` for the arguments.

    Raises:
        ValueError: a capacity, spec or device cannot work.
        OutOfBlocks: the capacity exceeds the available memory.
    """
    total = total_bytes(capacity, sharding)
    native = SequenceNativePool(*resolved(spec, sharding, total), options)
    return native, SequenceQueue(native)


def _refused(call: str, why: str, way: str) -> Callable[..., NoReturn]:
    """Creates a method that refuses a call of the compiled pool that is not supported here."""

    def refuse(self: Any, *args: Any) -> NoReturn:
        del self, args
        raise ValueError(f"{call}: the pool's sequences are spread over a mesh: {why}; {way}")

    return refuse


_WHOLE = "a device does not know what other devices hold of a sequence"
_ELSEWHERE = "use a pool on one device, or one with its heads spread (axis=...)"


class SequencePool(ShardedPool):
    """`_native.Pool` for several devices, called with tokens of whole sequences.

    Args:
        shards: a pool for each device, new and with the same spec.
        sharding: resolved sharding of the sequences.
        max_seq_len: maximum tokens of a whole sequence.
    """

    def __init__(self, shards: Sequence[Any], sharding: StripeSharding, max_seq_len: int) -> None:
        super().__init__(shards)
        self._sharding = sharding
        self._max_seq_len = max_seq_len

    def _shares(self, op: str, num_tokens: Sequence[int]) -> list[int]:
        """Converts token counts of whole sequences to those of a device."""
        for tokens in num_tokens:
            if not 0 <= tokens <= self._max_seq_len:
                raise ValueError(
                    f"{op}: num_tokens: wanted 0 to max_seq_len={self._max_seq_len}, got {tokens}"
                )
        return [self._sharding.share(tokens) for tokens in num_tokens]

    def acquire(self, decision: ShardedDecision, num_tokens: list[int]) -> Any:
        """See `_native.Pool`."""
        return super().acquire(decision, self._shares("acquire", num_tokens))

    def extend(self, slots: list[int], num_tokens: list[int]) -> Any:
        """See `_native.Pool`."""
        return super().extend(slots, self._shares("extend", num_tokens))

    def can_acquire(self, num_tokens: list[int]) -> Any:
        """See `_native.Pool`."""
        return super().can_acquire(self._shares("can_acquire", num_tokens))

    def truncate(self, decision: ShardedDecision, *args: Any) -> Any:
        """See `_native.Pool`."""
        slots, num_tokens = args
        room = {row.slot: row.reserved for row in self.rows()}
        for slot, tokens in zip(slots, num_tokens, strict=True):
            most = room.get(slot, self._max_seq_len)
            if tokens > most:
                raise ValueError(
                    f"truncate: slot {slot}: num_tokens is {tokens}, wanted 0..{most}, for which "
                    "there is room"
                )
        return super().truncate(decision, slots, self._shares("truncate", num_tokens))

    def rows(self) -> list[Any]:
        """Row of each slot that a shard has, with room in tokens of the whole sequence."""
        rows = []
        for row in super().rows():
            names = [name for name in dir(row) if not name.startswith("_")]
            whole = types.SimpleNamespace(**{name: getattr(row, name) for name in names})
            whole.reserved = self._sharding.position(0, row.reserved)
            rows.append(whole)
        return rows

    commit = _refused("commit", f"token ids would not be used, because {_WHOLE}", "leave it out")
    fork = _refused("fork", f"nothing is shared there, because {_WHOLE}", _ELSEWHERE)
    acquire_prefix = _refused(
        "acquire_prefix",
        f"it has no prefix cache, because {_WHOLE}",
        "use acquire and compute the whole prompt",
    )
    find_prefix = pin = unpin = hint = _refused(
        "find_prefix, pin, unpin, hint", f"it has no prefix cache, because {_WHOLE}", _ELSEWHERE
    )
    drop_before = _refused(
        "drop_before",
        "sliding windows are not supported there, so every token is needed",
        "truncate and release give memory back",
    )


class SequenceNativePool(ShardedNativePool):
    """The compiled pools of a `KVPool` with split sequences."""

    sharding: StripeSharding

    def joined(self, shards: Sequence[Any]) -> SequencePool:
        """Joins the pools of all devices."""
        return SequencePool(shards, self.sharding, self.spec.max_seq_len)


class SequenceQueue(ShardedQueue):
    """Queues the programs of such a pool, whose caches have lengths of whole sequences."""

    _sharding: StripeSharding

    def first_cache(self, generation: list[tuple[int, int, list[int]]]) -> KVCache:
        """Returns the first cache of a generation, with the longest prefixes that all devices have.

        Args:
            generation: number, epoch and lengths of each shard.
        """
        sharding = self._sharding
        here = np.asarray([lengths for _, _, lengths in generation], np.int32)
        devices = np.arange(sharding.size, dtype=np.int32)[:, None]
        # The position of the next token of each device: it has all of its tokens before that.
        ends = np.where(here < 0, -1, sharding.position(devices, here)).astype(np.int32)
        least = ends.min(axis=0)
        wanted = np.where(least < 0, -1, sharding.tokens_on(devices, least))
        longer = (wanted != here).any(axis=0)
        parts = np.where(longer, ends, least).astype(np.int32)
        cache = self.joined_cache(generation, parts)
        if not longer.any():
            return cache
        slots = np.flatnonzero(longer).astype(np.int32)
        with self._lock, no_mesh():
            return set_lengths(cache, *map(self.put, (slots, least[slots])))

    def truncate(self, cache: KVCache, slots: Sequence[int], num_tokens: Sequence[int]) -> KVCache:
        """See `Queue`."""
        lengths = dict(zip(slots, num_tokens, strict=True))
        with self._lock:
            decision = self._native.decision()
            try:
                attempt = functools.partial(self._native.pool.truncate, decision, slots, num_tokens)
                self.claim("truncate", attempt)
                edits = [
                    (opcode, slot, lengths[slot] if opcode == TRUNCATE else length, donor)
                    for opcode, slot, length, donor in decision.edits
                ]
                return self.run("truncate", cache, edits)
            except BaseException:
                self._native.pool.undo(decision)
                raise
