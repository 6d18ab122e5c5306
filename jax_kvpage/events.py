"""KV events: what the prefix cache of a pool stored and removed (`KVPool.events`).

Routers and indexers that keep a copy of the index consume these. The events have the names, fields
and meaning of vLLM's, and `encode` writes them like vLLM's publisher, so that consumers of vLLM's
events can read them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jax_kvpage import _native

__all__ = ["AllBlocksCleared", "BlockRemoved", "BlockStored", "Event", "Form", "encode"]


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Blocks that can be found from now on; each one continues the one before.

    Attributes:
        block_hashes: the hash of each block, over its namespace, its tokens and all tokens before
            it; the same in all processes.
        parent_block_hash: the hash of the block before the first one, stored earlier; None at the
            beginning of a sequence.
        token_ids: the token ids of all blocks, `block_size` for each.
        block_size: tokens in a block.
        medium: where the blocks are, "CPU" or "GPU".
        namespace: the namespace passed to `acquire_prefix`.
    """

    block_hashes: tuple[int, ...]
    parent_block_hash: int | None
    token_ids: tuple[int, ...]
    block_size: int
    medium: str | None
    namespace: str | None


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """Blocks that can no longer be found; a block is removed before the one that it continues.

    Attributes:
        block_hashes: the hash of each block.
        medium: where they were, "CPU" or "GPU".
    """

    block_hashes: tuple[int, ...]
    medium: str | None


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """Discards all blocks of earlier events; the events that follow store the present ones."""


Event = BlockStored | BlockRemoved | AllBlocksCleared

Form = Literal["array", "map"]


def encode(
    events: Sequence[Event],
    ts: float | None = None,
    *,
    form: Form = "array",
    data_parallel_rank: int | None = None,
) -> bytes:
    """Encodes events like vLLM: as an `EventBatch` in MessagePack.

    The batch is an array. An event is an array that begins with its name, as in vLLM up to 0.23, or
    a map with the name under "type", as in vLLM 0.32. The fields of `BlockStored` are block_hashes,
    parent_block_hash, token_ids, block_size, lora_id (always None), medium and lora_name, which
    holds the namespace.

    Args:
        events: the result of `KVPool.events`.
        ts: Unix time in seconds; None: now.
        form: encoding of an event, "array" or "map".
        data_parallel_rank: the rank of this engine among several; None: omitted.

    Raises:
        ImportError: msgspec is not installed.
        ValueError: not a list of events, or another form.
    """
    try:
        import msgspec
    except ImportError as error:
        raise ImportError(
            "events.encode needs msgspec: pip install msgspec, or 'jax_kvpage[events]'"
        ) from error
    if form not in ("array", "map"):
        raise ValueError(f"encode: form: wanted 'array' or 'map', got {form!r}")
    fields = [_fields(event) for event in events]
    rows = [list(each.values()) if form == "array" else each for each in fields]
    batch: list[Any] = [time.time() if ts is None else float(ts), rows]
    if data_parallel_rank is not None:
        batch.append(data_parallel_rank)
    return msgspec.msgpack.encode(batch)


def _fields(event: Event) -> dict[str, Any]:
    """An event's fields under vLLM's names, in order; omits fields that keep vLLM's defaults."""
    name = type(event).__name__
    match event:
        case BlockStored():
            return {
                "type": name,
                "block_hashes": event.block_hashes,
                "parent_block_hash": event.parent_block_hash,
                "token_ids": event.token_ids,
                "block_size": event.block_size,
                "lora_id": None,
                "medium": event.medium,
                "lora_name": event.namespace,
            }
        case BlockRemoved():
            return {"type": name, "block_hashes": event.block_hashes, "medium": event.medium}
        case AllBlocksCleared():
            return {"type": name}
    raise ValueError(f"encode: wanted events of KVPool.events, got {event!r}")


def of_native(record: _native.PrefixEvents, block_size: int, medium: str) -> list[Event]:
    """Converts a pool's events; consecutive blocks are merged into one event."""
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
            namespace = space[1:] if space else None  # the inverse of `namespace_key`
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
