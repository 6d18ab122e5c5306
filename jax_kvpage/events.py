"""KV events: what the prefix cache of a pool stored and removed (`KVPool.events`).

Routers and indexers that keep a copy of the index read these. The events have the names, fields and
meaning of vLLM's, and `encode` writes them as vLLM's publisher does, so that programs which read
vLLM's events read these too.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax_kvpage import _native

__all__ = ["AllBlocksCleared", "BlockRemoved", "BlockStored", "Event", "encode"]


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Blocks that can be found from now on, each the continuation of the one before.

    Attributes:
        block_hashes: the blocks' names. A hash stands for a block together with all tokens before
            it and its namespace; it is the same in all processes.
        parent_block_hash: the block before the first one, stored earlier; None: a sequence begins.
        token_ids: ids of all blocks' tokens, `block_size` for each.
        block_size: tokens of a block.
        medium: where the blocks are, "CPU" or "GPU".
        namespace: as it was given to `acquire_prefix`.
    """

    block_hashes: tuple[int, ...]
    parent_block_hash: int | None
    token_ids: tuple[int, ...]
    block_size: int
    medium: str | None
    namespace: str | None


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """Blocks that cannot be found any more; blocks that continue others go before these.

    Attributes:
        block_hashes: the blocks' names.
        medium: where they were.
    """

    block_hashes: tuple[int, ...]
    medium: str | None


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """Nothing of what was stored before can be found; what follows is stored from now on."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


def encode(events: Sequence[Event], ts: float | None = None) -> bytes:
    """Events in the form that vLLM publishes: an `EventBatch` in MessagePack.

    Structures are arrays, an event's name comes first. The fields of `BlockStored` are
    block_hashes, parent_block_hash, token_ids, block_size, lora_id (always None), medium and
    lora_name, which holds the namespace.

    Args:
        events: what `KVPool.events` returned.
        ts: when, in seconds of Unix time; None: now.

    Raises:
        ImportError: msgspec is not installed.
        ValueError: not a list of events.
    """
    try:
        import msgspec
    except ImportError as error:
        raise ImportError(
            "events.encode needs msgspec: pip install msgspec, or 'jax_kvpage[events]'"
        ) from error
    rows = [_row(event) for event in events]
    return msgspec.msgpack.encode([time.time() if ts is None else float(ts), rows])


def _row(event: Event) -> list[Any]:
    name = type(event).__name__
    match event:
        case BlockStored():
            hashes, parent, ids = event.block_hashes, event.parent_block_hash, event.token_ids
            return [
                name,
                hashes,
                parent,
                ids,
                event.block_size,
                None,
                event.medium,
                event.namespace,
            ]
        case BlockRemoved():
            return [name, event.block_hashes, event.medium]
        case AllBlocksCleared():
            return [name]
    raise ValueError(f"encode: wanted events of KVPool.events, got {event!r}")


def of_native(record: _native.PrefixEvents, block_size: int, medium: str) -> list[Event]:
    """The events of a pool; runs of blocks that continue each other become one event."""
    events: list[Event] = []
    rest = record.events
    begin = 0
    while begin < len(rest):
        first, end = rest[begin], begin + 1
        while end < len(rest) and _continues(rest[end - 1], rest[end]):
            end += 1
        run = rest[begin:end]
        hashes = tuple(event.hash for event in run)
        if first.kind == "stored":
            ids = tuple(token for event in run for token in event.tokens)
            space = record.spaces[first.space]
            namespace = space[1:] if space else None  # as `acquire_prefix` names them
            events.append(
                BlockStored(hashes, first.parent or None, ids, block_size, medium, namespace)
            )
        elif first.kind == "removed":
            events.append(BlockRemoved(hashes, medium))
        else:
            events.append(AllBlocksCleared())
        begin = end
    return events


def _continues(before: _native.PrefixEvent, event: _native.PrefixEvent) -> bool:
    if event.kind == "stored":
        return before.kind == "stored" and event.parent == before.hash
    return event.kind == before.kind == "removed"
