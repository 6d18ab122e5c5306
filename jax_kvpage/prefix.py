"""Host calls on the prefix cache: sequences found by their tokens."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jax_kvpage import events as kv_events
from jax_kvpage._arrays import as_bool, host_int, host_ints, token_ids_of
from jax_kvpage._native_pool import NativePool
from jax_kvpage._queue import PrefixRequest, Queue
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
        slots: the slot of the request, or a list; None for one that waits for another of its call.
        num_cached: tokens that the slot has already, or a list.
        cache: the next cache.
        wait_for: for each request of the call the index of the one that it waits for, or None.
        num_stored: how many more tokens the pool's store has, or a list: `prefetch` brings them.
            0 without a store.
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
        """A tuple of the first three."""
        made = super().__new__(cls, slots, num_cached, cache)
        made.wait_for = wait_for
        made.num_stored = num_stored
        return made


class PrefixCalls:
    """The part of `KVPool` that finds sequences by their tokens.

    The idea of matching prefixes is that of SGLang's RadixAttention (Zheng et al., 2024) and vLLM's
    automatic prefix caching. Here what is found costs nothing to read: it lies in the slot's own
    contiguous memory, and a slot whose sequence goes on is taken over as it stands.
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
        """Occupies a slot that begins with as many of the request's tokens as are in memory.

        What counts as in memory: tokens that were committed (`commit`) to sequences of the same
        namespace which this call has acquired, and to their forks, running or released; a released
        one once its slot has drained (`pool.check` of the cache waits for that). The slot
        that holds them is adopted where its sequence goes on or is asked for again, which costs no
        system call and no copy; otherwise whole blocks are mapped read-only in an empty slot, and
        the tokens of the last, partial one are copied. Blocks of released sequences stay until
        their memory is needed: the least valuable go first.

        The length of the slot starts at `num_cached`: run the model on `token_ids[num_cached:]`,
        and commit these.

        Args:
            cache: the newest cache.
            token_ids: ids of the request's tokens, int32[n] or a list of ints; or a list of such
                for several requests, all or none. An int32 array is fastest. Any int32 is an id:
                content that is not text (images) can be given negative ids made of its hash.
            num_tokens: tokens to map room for, if more than the ids; one number, or one for each.
            namespace: sequences are found in their own namespace only (a model, an adapter, a
                tenant); None is one of them.
            whole: whether the last token may be found as well. Its logits are not recomputed then.
            match_unit: `num_cached` is a multiple of this many tokens.
            min_cached: fewer tokens than this do not count as found.

        Returns:
            `(slot, num_cached, cache)`, with lists for several requests. Of requests in one call
            that begin with the same new tokens (a block at least) the first one gets a slot; the
            others get None and `result.wait_for[i]`, the index of the first: ask again for them
            once it has committed these tokens. `result.num_stored` says how many more tokens the
            pool's store has behind those that were found; `stored_prefix` and `prefetch` are for
            those who want them in memory first.

        Raises:
            OutOfBlocks: not enough physical blocks; nothing has changed.
            OutOfSlots: not enough slots; nothing has changed.
            ValueError: ids that int32 cannot hold, more than max_seq_len tokens, a cache of
                another spec.
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
        """Tokens that `acquire_prefix` would find for a request now, for schedulers.

        Args:
            token_ids: ids of the request's tokens, int32[n] or a list of ints.
            namespace: as for `acquire_prefix`.
            whole: as for `acquire_prefix`.

        Raises:
            ValueError: ids that int32 cannot hold.
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
        """Protects the blocks of those tokens that are in memory now from eviction.

        Args:
            token_ids: ids of the first tokens of a sequence, a system prompt for instance.
            namespace: as for `acquire_prefix`.
            ttl: seconds until the pin ends by itself; None: it lasts until `unpin`.
            max_share: the share of the pool's blocks that pins may hold in all. A pin that would
                pass it holds the first tokens only.

        Returns:
            How many of the tokens are pinned. Pins of the same tokens are counted: each needs its
            `unpin`.

        Raises:
            ValueError: ids that int32 cannot hold, a negative ttl, a share that is none.
            DeviceFault: an earlier program failed on the device; nothing has changed.
            PoolClosed: the pool is closed.
        """
        ids, space = one_sequence("pin", token_ids), namespace_key("pin", namespace)
        seconds = -1.0 if ttl is None else _number("pin: ttl", ttl, math.inf)
        share = _number("pin: max_share", max_share, 1.0)
        return self._native.call(self._pool.pin, space, ids, share, seconds)

    def unpin(self, token_ids: Any, namespace: str | None = None) -> None:
        """Takes one pin of the same tokens away; does nothing if there is none.

        Raises:
            ValueError: ids that int32 cannot hold.
            DeviceFault: an earlier program failed on the device; nothing has changed.
            PoolClosed: the pool is closed.
        """
        self._native.call(
            self._pool.unpin, namespace_key("unpin", namespace), one_sequence("unpin", token_ids)
        )

    def hint(
        self, session: Any, what: Literal["retain", "drop"], namespace: str | None = None
    ) -> None:
        """Tells the cache whether a sequence will be asked for again.

        Args:
            session: ids of its tokens.
            what: "drop": its own tokens go before others when memory is needed, what other
                sequences have in common with it stays. "retain": it counts as just used, and for
                longer than what was used once.
            namespace: as for `acquire_prefix`.

        Raises:
            ValueError: ids that int32 cannot hold, another hint.
            DeviceFault: an earlier program failed on the device; nothing has changed.
            PoolClosed: the pool is closed.
        """
        if what not in ("retain", "drop"):
            raise ValueError(f"hint: wanted 'retain' or 'drop', got {what!r}")
        ids, space = one_sequence("hint", session, "session"), namespace_key("hint", namespace)
        self._native.call(self._pool.hint, space, ids, what == "retain")

    def evict(self, num_bytes: int | None = None) -> int:
        """Drops what can be found, the least valuable first.

        What live sequences map, and what is pinned, stays.

        Args:
            num_bytes: how much memory is to come free; None: all that can.

        Returns:
            The bytes that have come free.

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

        Replaying all events gives the whole blocks that can be found; partial blocks are not
        published. The pool records from the first call on. That call, and one before which more
        happened than is kept (65,536 blocks), begin with `AllBlocksCleared` and store all blocks.
        `jax_kvpage.events.encode` writes events for vLLM's readers.

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
    """The compiled index's name of a namespace.

    Raises:
        ValueError: neither a str nor None.
    """
    if name is None:
        return ""
    if not isinstance(name, str):
        raise ValueError(
            f"{call}: namespace: wanted a str or None, got {type(name).__name__} {name!r}"
        )
    return f"={name}"  # never the one of None


def one_sequence(call: str, value: Any, name: str = "token_ids") -> np.ndarray:
    """The ids of one sequence, int32[n].

    Raises:
        ValueError: ids that int32 cannot hold, or several sequences.
    """
    ids, single = token_ids_of(f"{call}: {name}", value)
    if not single:
        raise ValueError(f"{call}: {name}: wanted the ids of one sequence, got {len(ids)} lists")
    return ids[0]


def _number(name: str, value: Any, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= high:
        raise ValueError(f"{name}: wanted a number from 0 to {high}, got {value!r}")
    return float(value)
