"""KV events: what the prefix cache of a pool stored and removed (`KVPool.events`).

Routers and indexers that keep a copy of the index read these. The events have the names, fields and
meaning of vLLM's, and `encode` writes them as vLLM's publisher does, so that programs which read
vLLM's events read these too.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jax_kvpage import _native

__all__ = ["AllBlocksCleared", "BlockRemoved", "BlockStored", "Event", "Form", "encode"]


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

Form = Literal["array", "map"]


def encode(
    events: Sequence[Event],
    ts: float | None = None,
    *,
    form: Form = "array",
    data_parallel_rank: int | None = None,
) -> bytes:
    """Events in the form that vLLM publishes: an `EventBatch` in MessagePack.

    The batch is an array. An event is an array with its name first, as vLLM wrote it up to 0.23, or
    a map with the name under "type", as vLLM 0.32 does. The fields of `BlockStored` are
    block_hashes, parent_block_hash, token_ids, block_size, lora_id (always None), medium and
    lora_name, which holds the namespace.

    Args:
        events: what `KVPool.events` returned.
        ts: when, in seconds of Unix time; None: now.
        form: of an event, "array" or "map".
        data_parallel_rank: which of several engines this is; None: not told.

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
    """An event's fields by vLLM's names, in order; those at vLLM's defaults are left out."""
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
