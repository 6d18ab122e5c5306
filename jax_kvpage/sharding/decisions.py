"""Decisions that all shards of a pool make alike, including those about swapped sequences."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from jax_kvpage import _native

__all__ = ["Edits", "ShardedDecision", "SwapCalls", "claimed", "joint_swapped"]

Edits = list[tuple[int, int, int, int]]

_CLAIMED = ("slots", "tokens", "shared", "sources", "leaders")


class ShardedDecision:
    """The decisions of all shards, which are equal."""

    def __init__(self, size: int) -> None:
        self.parts = [_native.Decision() for _ in range(size)]

    @property
    def edits(self) -> Edits:
        """Edits of any shard; they were compared."""
        return self.parts[0].edits


def claimed(claim: Any) -> Any:
    """Returns the parts of a successful claim that must be equal on all shards."""
    return tuple(getattr(claim, name) for name in _CLAIMED)


def joint_swapped(store: Any, size: int) -> _native.JointSwapped:
    """Creates what `ShardedPool.swap_out` fills: a sequence with a part on each shard.

    Args:
        store: the compiled store.
        size: number of shards.
    """
    return _native.JointSwapped([_native.Swapped(store) for _ in range(size)])


class SwapCalls:
    """The part of `ShardedPool` that swaps sequences, whose parts move together.

    See cc/cache/joint_swap.h for what happens between calls.
    """

    shards: list[Any]
    maps: _native.JointMaps
    together: Callable[[], AbstractContextManager[None]]
    undo: Callable[[ShardedDecision], None]
    _alike: Callable[..., Any]

    def swap_out(self, decision: ShardedDecision, swapped: _native.JointSwapped, slot: int) -> None:
        """See `_native.Pool`."""
        parts = swapped.parts
        self._alike(
            "swap_out",
            lambda i: self.shards[i].swap_out(decision.parts[i], parts[i], slot),
            lambda done: self.undo(decision),
            lambda i, result: decision.parts[i].edits,
            settle=False,
        )
        self.maps.join_swapped(swapped)

    def prefetch_swapped(self, swapped: _native.JointSwapped) -> Any:
        """See `_native.Pool`. Nothing is read before all shards have allocated blocks."""

        def undo(done: Sequence[int]) -> None:
            with self.together():
                for i in done:
                    swapped.cancel_read(i)

        return self._alike(
            "prefetch",
            lambda i: self.shards[i].start_read(swapped, i),
            undo,
            lambda i, claim: claim.ok,
        )

    def swap_in(
        self, decision: ShardedDecision, swapped: _native.JointSwapped, recover: bool
    ) -> Any:
        """See `_native.Pool`."""
        parts = swapped.parts
        return self._alike(
            "swap_in",
            lambda i: self.shards[i].swap_in(decision.parts[i], parts[i], recover),
            lambda done: self.undo(decision),
            lambda i, claim: (decision.parts[i].edits, claimed(claim)),
        )

    def swap_writes(self) -> int:
        """See `_native.Pool`."""
        return max(shard.swap_writes() for shard in self.shards)
