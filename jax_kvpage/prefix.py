"""Host calls on the prefix cache, which finds sequences by their tokens."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jax_kvpage import events as kv_events
from jax_kvpage._arrays import as_bool, host_int, host_ints, token_ids_of
from jax_kvpage._native_pool import NativePool
from jax_kvpage._queue import PrefixRequest, Queue
from jax_kvpage._values import as_text, host_float
from jax_kvpage.cache import KVCache
from jax_kvpage.spec import CacheSpec

__all__ = ["PrefixCalls", "PrefixSlots", "namespace_key", "one_sequence"]


class _PrefixSlots(NamedTuple):
    slots: Any
    num_cached: Any
    cache: KVCache


class PrefixSlots(_PrefixSlots):
    """What `acquire_prefix` returns: a tuple of three.

    Attributes:
        slots: the slot of the request, or a list; None for a request that must wait for another one
            of the same call.
        num_cached: number of tokens that the slot already has, or a list.
        cache: the next cache.
        wait_for: for each request, the index of the request that it must wait for, or None.
        num_stored: how many more tokens the pool's store has, or a list; `prefetch` reads them. 0
            without a store.
    """

    wait_for: list[int | None]
    num_stored: Any

    def __new__(
        cls,
        slots: Any,
        num_cached: Any,
        cache: KVCache,
        wait_for: list[int | None],
        num_stored: Any = 0,
    ) -> "PrefixSlots":
        """Makes a tuple of the first three; the others are attributes."""
        made = super().__new__(cls, slots, num_cached, cache)
        made.wait_for = wait_for
        made.num_stored = num_stored
        return made


class PrefixCalls:
    """The calls of `KVPool` that find sequences by their tokens.

    Prefix matching follows SGLang's RadixAttention (Zheng et al., 2024) and vLLM's automatic prefix
    caching. Here a cached prefix costs nothing extra to read: it is part of the slot's contiguous
    memory, and a slot whose sequence is continued is reused as it is.
    """

    spec: CacheSpec
    device: jax.Device
    _native: NativePool
    _pool: Any
    _queue: Queue

    def acquire_prefix(
        self,
        cache: KVCache,
        token_ids: Any,
        num_tokens: int | Sequence[int] | None = None,
        namespace: str | None = None,
        *,
        whole: bool = False,
        match_unit: int = 1,
        min_cached: int = 1,
    ) -> PrefixSlots:
        """Occupies a slot that starts with the longest prefix of the request that is in memory.

        The cache has the tokens that were committed (`commit`) to sequences of the same namespace
        acquired by this call, and to their forks, running or released; those of a released
        sequence once its slot has drained (`pool.check` of the cache waits for that). If the
        request repeats or continues a released sequence, its slot is reused, which takes no system
        call and no copy; otherwise full blocks are mapped read-only in an empty slot, and the
        tokens of the last, partial block are copied. Blocks of released sequences stay until their
        memory is needed; the least valuable are evicted first.

        The length of the slot starts at `num_cached`: run the model on `token_ids[num_cached:]`,
        and commit these tokens.

        Args:
            cache: the newest cache.
            token_ids: the request's token ids, int32[n] or a list of ints; or a list of these for
                several requests, all or none. An int32 array is fastest. Any int32 is valid:
                content other than text (images) can have negative ids made from its hash.
            num_tokens: tokens to map room for, if more than the ids; one number, or a list.
            namespace: only sequences of the same namespace (a model, an adapter, a tenant) are
                found; None is a namespace too.
            whole: whether the last token may be found too. Its logits are then not recomputed.
            match_unit: `num_cached` is rounded down to a multiple of this.
            min_cached: a shorter prefix than this does not count as found.

        Returns:
            `(slot, num_cached, cache)`, with lists for several requests. If several requests in a
            call begin with the same new tokens (at least a block), only the first gets a slot; the
            others get None, and `result.wait_for[i]` is the index of the first: acquire them again
            once it has committed these tokens. `result.num_stored` is how many more tokens after
            the cached ones the pool's store has; to read them before acquiring, use `stored_prefix`
            and `prefetch`.

        Raises:
            OutOfBlocks: not enough physical blocks; nothing has changed.
            OutOfSlots: not enough slots; nothing has changed.
            ValueError: ids that do not fit int32, more than max_seq_len tokens, a cache of another
                spec.
            DeviceFault: an earlier program failed on the device; nothing has changed.
            PoolClosed: the pool is closed.
        """
        self._queue.check_cache("acquire_prefix", cache)
        ids, single = token_ids_of("acquire_prefix: token_ids", token_ids)
        rooms = [0] * len(ids)
        if num_tokens is not None:
            rooms, one = host_ints("acquire_prefix: num_tokens", num_tokens)
            rooms = rooms * len(ids) if one else rooms
        if len(rooms) != len(ids):
            raise ValueError(f"acquire_prefix: {len(ids)} requests, but {len(rooms)} num_tokens")
        if any(room < 0 for room in rooms):
            raise ValueError(f"acquire_prefix: num_tokens: wanted at least 0, got {min(rooms)}")
        request = PrefixRequest(
            ids,
            rooms,
            namespace_key("acquire_prefix", namespace),
            as_bool("acquire_prefix: whole", whole),
            host_int("acquire_prefix: match_unit", match_unit, low=1),
            host_int("acquire_prefix: min_cached", min_cached, low=0),
        )
        claim, cache = self._queue.acquire_prefix(cache, request)
        slots = [None if slot < 0 else slot for slot in claim.slots]
        leaders = [None if leader < 0 else leader for leader in claim.leaders]
        if single:
            return PrefixSlots(slots[0], claim.tokens[0], cache, leaders, claim.stored[0])
        return PrefixSlots(slots, claim.tokens, cache, leaders, claim.stored)

    def find_prefix(
        self, token_ids: Any, namespace: str | None = None, *, whole: bool = False
    ) -> int:
        """The number of tokens that `acquire_prefix` would find now, for schedulers.

        Args:
            token_ids: the request's token ids, int32[n] or a list of ints.
            namespace: as for `acquire_prefix`.
            whole: as for `acquire_prefix`.

        Raises:
            ValueError: ids that do not fit int32.
            DeviceFault: an earlier program failed on the device.
            PoolClosed: the pool is closed.
        """
        ids = one_sequence("find_prefix", token_ids)
        space = namespace_key("find_prefix", namespace)
        whole = as_bool("find_prefix: whole", whole)
        return self._native.call(self._pool.find_prefix, space, ids, whole)

    def pin(
        self,
        token_ids: Any,
        namespace: str | None = None,
        *,
        ttl: float | None = None,
        max_share: float = 0.2,
    ) -> int:
        """Protects the blocks of those of the tokens that are in memory now from eviction.

        Args:
            token_ids: the first token ids of a sequence, for example a system prompt.
            namespace: as for `acquire_prefix`.
            ttl: seconds until the pin expires; None: it lasts until `unpin`.
            max_share: the share of the pool's blocks that all pins together may hold. A pin that
                would exceed it covers the first tokens only.

        Returns:
            How many of the tokens are pinned. Pins of the same tokens are counted: each needs an
            `unpin`.

        Raises:
            ValueError: ids that do not fit int32, a negative ttl, an invalid share.
            DeviceFault: an earlier program failed on the device; nothing has changed.
            PoolClosed: the pool is closed.
        """
        ids, space = one_sequence("pin", token_ids), namespace_key("pin", namespace)
        seconds = -1.0 if ttl is None else host_float("pin: ttl", ttl, 0, math.inf)
        share = host_float("pin: max_share", max_share, 0, 1.0)
        return self._native.call(self._pool.pin, space, ids, share, seconds)

    def unpin(self, token_ids: Any, namespace: str | None = None) -> None:
        """Removes one pin of the same tokens; does nothing if there is none.

        Raises:
            ValueError: ids that do not fit int32.
            DeviceFault: an earlier program failed on the device; nothing has changed.
            PoolClosed: the pool is closed.
        """
        self._native.call(
            self._pool.unpin, namespace_key("unpin", namespace), one_sequence("unpin", token_ids)
        )

    def hint(
        self, session: Any, what: Literal["retain", "drop"], namespace: str | None = None
    ) -> None:
        """Tells the cache whether a sequence will be needed again.

        Args:
            session: the token ids of the sequence.
            what: "drop": the tokens that it shares with no other sequence are evicted first when
                memory is needed. "retain": it counts as just used, and is kept longer than
                sequences that were used once.
            namespace: as for `acquire_prefix`.

        Raises:
            ValueError: ids that do not fit int32, another hint.
            DeviceFault: an earlier program failed on the device; nothing has changed.
            PoolClosed: the pool is closed.
        """
        if what not in ("retain", "drop"):
            raise ValueError(f"hint: wanted 'retain' or 'drop', got {what!r}")
        ids, space = one_sequence("hint", session, "session"), namespace_key("hint", namespace)
        self._native.call(self._pool.hint, space, ids, what == "retain")

    def evict(self, num_bytes: int | None = None) -> int:
        """Evicts cached prefixes, the least valuable first.

        Blocks that live sequences map, and pinned ones, stay.

        Args:
            num_bytes: how much memory to free; None: as much as possible.

        Returns:
            The number of bytes freed.

        Raises:
            ValueError: a negative number.
            DeviceFault: an earlier program failed on the device; nothing has changed.
            PoolClosed: the pool is closed.
        """
        blocks = 2**62
        if num_bytes is not None:
            wanted = host_int("evict: num_bytes", num_bytes, low=0, high=2**62)
            blocks = -(-wanted // self._native.block_bytes)
        return self._native.call(self._pool.evict, blocks) * self._native.block_bytes

    def events(self) -> list[kv_events.Event]:
        """What the prefix cache stored and removed since the last call.

        Replaying all events gives the full blocks that can be found; partial blocks are not
        published. Recording begins with the first call. That call, and any call after which events
        were lost because too many were pending (65,536 blocks), returns `AllBlocksCleared` and then
        stores all blocks. `jax_kvpage.events.encode` encodes events for consumers of vLLM's.

        Returns:
            `BlockStored`, `BlockRemoved` and `AllBlocksCleared` of `jax_kvpage.events`, in order.

        Raises:
            DeviceFault: an earlier program failed on the device.
            PoolClosed: the pool is closed.
        """
        record = self._native.call(self._pool.events)
        medium = "CPU" if self.device.platform == "cpu" else "GPU"
        return kv_events.of_native(record, self.spec.block_tokens or 1, medium)


def namespace_key(call: str, name: Any) -> str:
    """The name of a namespace in the compiled index.

    Raises:
        ValueError: neither a str nor None, or a str that UTF-8 cannot encode.
    """
    if name is None:
        return ""
    # Differs from the key of None.
    return f"={as_text(f'{call}: namespace', name, 'a str or None')}"


def one_sequence(call: str, value: Any, name: str = "token_ids") -> np.ndarray:
    """Converts the ids of one sequence to int32[n].

    Raises:
        ValueError: ids that do not fit int32, or several sequences.
    """
    ids, single = token_ids_of(f"{call}: {name}", value)
    if not single:
        raise ValueError(f"{call}: {name}: wanted the ids of one sequence, got {len(ids)} lists")
    return ids[0]
