"""ShardTable: the state of the pools of all devices of a mesh, as if they were one."""

import types
from collections.abc import Callable, Sequence
from typing import Any

from jax_kvpage import _native

__all__ = ["ShardTable"]

_SUMS = ("virtual_bytes", "physical_bytes", "system_calls", "waits", "block_bytes")
_SWAP_SUMS = ("bytes_swapped_out", "bytes_swapped_in")


class ShardTable:
    """The part of `_native.Pool` for several devices that makes no decisions.

    Args:
        shards: a pool for each device, new and with the same spec.
        mirrored: whether programs run on GPUs, asynchronously to the host's tables.

    Attributes:
        shards: the pools.
        mirrored: see above.
        settle: waits until programs that free blocks have run on all devices, because which slots
            are free must not depend on the device that is asked.
    """

    def __init__(self, shards: Sequence[Any], mirrored: bool = False) -> None:
        self.shards = list(shards)
        self.mirrored = mirrored
        self.settle: Callable[[], None] = lambda: None
        self._fault: _native.StatusError | None = None  # taken from a device but not raised yet

    # ---- faults of programs, which GPUs record ----

    def prepare(self, settle: bool = True) -> None:
        """Begins a call: raises pending faults before the call has changed anything on any device.

        Args:
            settle: whether the result depends on what programs have freed.
        """
        if settle:
            self.settle()
        if self.mirrored:
            self.take_fault()

    def take_fault(self) -> None:
        """Raises the first pending fault of a device and discards the others.

        Those come from the same programs.
        """
        self.keep_faults()
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def keep_faults(self) -> None:
        """Takes the pending faults of all devices, so that `take_fault` raises the first."""
        for shard in self.shards if self.mirrored else ():
            try:
                shard.take_fault()
            except _native.StatusError as error:
                self._fault = self._fault or error

    def take_warning(self) -> str:
        """See `_native.Pool`. Warnings of all devices, without duplicates."""
        return "\n".join(dict.fromkeys(filter(None, (s.take_warning() for s in self.shards))))

    # ---- queries ----

    @property
    def id(self) -> int:
        """Id of the first shard."""
        return int(self.shards[0].id)

    @property
    def closed(self) -> bool:
        """See `_native.Pool`."""
        return all(shard.closed for shard in self.shards)

    def can_acquire(self, num_tokens: list[int]) -> Any:
        """See `_native.Pool`."""
        self.prepare()
        claims = [shard.can_acquire(num_tokens) for shard in self.shards]
        return next((claim for claim in claims if not claim.ok), claims[0])

    def shares_behind(self, slot: int, num_tokens: int) -> bool:
        """See `_native.Pool`."""
        # May differ if a truncation on GPUs has failed midway.
        return any(shard.shares_behind(slot, num_tokens) for shard in self.shards)

    def drops(self, slot: int, num_tokens: int) -> bool:
        """See `_native.Pool`."""
        return bool(self.shards[0].drops(slot, num_tokens))

    def events(self) -> Any:
        """See `_native.Pool`."""
        return self.shards[0].events()

    def committed(self, slot: int) -> list[int]:
        """See `_native.Pool`."""
        return list(self.shards[0].committed(slot))

    def block_map(self, slot: int) -> Any:
        """See `_native.Pool`."""
        return self.shards[0].block_map(slot)

    def block_owners(self, slot: int) -> Any:
        """See `_native.Pool`."""
        return self.shards[0].block_owners(slot)

    def rows(self) -> list[Any]:
        """Row of each slot that a shard has; a slot drains until it has drained on all shards."""
        rows: dict[int, Any] = {}
        for shard in self.shards:
            for row in shard.rows():
                if row.slot not in rows or (row.draining and not row.vacated):
                    rows[row.slot] = row
        return [rows[slot] for slot in sorted(rows)]

    def numbers(self) -> Any:
        """Numbers of the first shard, but with bytes and calls summed over all."""
        all_numbers = [shard.numbers() for shard in self.shards]
        first = all_numbers[0]
        own = {name: getattr(first, name) for name in dir(first) if not name.startswith("_")}
        sums = {name: sum(getattr(n, name) for n in all_numbers) for name in _SUMS + _SWAP_SUMS}
        return types.SimpleNamespace(**own | sums)

    def wait_for_drain(self, seconds: float) -> bool:
        """See `_native.Pool`."""
        return bool(self.shards[0].wait_for_drain(seconds))

    def close(self) -> None:
        """See `_native.Pool`."""
        for shard in self.shards:
            shard.close()
