"""Starts waiting groups: new ones, and those that lost their memory."""

from collections.abc import Callable
from typing import Literal

from jax_kvpage.serving.admission import AdmissionPolicy, Load
from jax_kvpage.serving.backoff import Backoff
from jax_kvpage.serving.builder import StepBuilder
from jax_kvpage.serving.request import SequenceGroup
from jax_kvpage.serving.rows import Rows
from jax_kvpage.serving.running import RunningSet
from jax_kvpage.serving.stats import SchedulerStats
from jax_kvpage.serving.swap import SwapSpace
from jax_kvpage.serving.waiting import WaitingQueue

__all__ = ["Outcome", "Starter"]

Outcome = Literal["started", "aside", "later", "never"]


class Starter:
    """Starts groups in order while there are rows, slots, blocks and tokens for them.

    Args:
        rows: per-row arrays.
        running: groups that have memory.
        queue: waiting groups.
        backoff: how many of the blocks that memory reports as free can be used.
        stats: counts recomputed tokens.
        admission: decides when a group may start.
        capacity: total number of blocks.
        find_prefix: see `Scheduler`.
        swap: see `Scheduler`.
        cancel: called to end a group that can never start.
    """

    def __init__(
        self,
        rows: Rows,
        running: RunningSet,
        queue: WaitingQueue,
        backoff: Backoff,
        stats: SchedulerStats,
        admission: AdmissionPolicy,
        capacity: int,
        find_prefix: Callable[[SequenceGroup], tuple[int, int]] | None,
        swap: SwapSpace | None,
        cancel: Callable[[SequenceGroup, str], None],
    ) -> None:
        self._rows = rows
        self._running = running
        self._queue = queue
        self._backoff = backoff
        self._stats = stats
        self._admission = admission
        self._capacity = capacity
        self._find_prefix = find_prefix
        self._swap = swap
        self._cancel = cancel

    def load(self, step: StepBuilder) -> Load:
        """Returns the load that admission policies see. Call it once per step."""
        return Load(self._rows, self._capacity, step.free, step.coming)

    def start(self, step: StepBuilder) -> None:
        """Fills in the admissions of a step."""
        load = self.load(step)
        while step.budget > 0 and (group := self._queue.head()) is not None:
            outcome = self.try_start(step, load, group)
            if outcome == "never":
                self._cancel(group, "capacity")
            elif outcome == "later":
                break

    def try_start(
        self,
        step: StepBuilder,
        load: Load,
        group: SequenceGroup,
        found: tuple[int, int] | None = None,
    ) -> Outcome:
        """Starts the group at the head of the queue if possible.

        Args:
            step: the plan under construction, with some token budget left.
            load: load of this step.
            group: the head of the queue.
            found: the result of `find(group)`; None looks it up when needed.

        Returns:
            "started"; "aside" if the group waits outside the queue for another one, or must be
            looked at again; "later" if it stays at the head; "never" if it does not fit although
            nothing else runs here.
        """
        running, queue = self._running, self._queue
        full = self.is_full(step, group)
        held = self._swap is not None and self._swap.holds(group)
        waits = not held and self._computes_prefix(group)
        if full and not waits:
            return "later"
        cached, spared = found or self.find(group)
        if waits and cached < running.prefix_to_cache(group):
            queue.hold(group.request.prefix_key)
            return "aside"
        if full:
            return "later"
        blocks = running.blocks_to_start(group) - spared
        if not running.groups and not step.coming:
            if blocks > step.free:
                if not self._backoff.is_full or (self._swap and self._swap.give_up()):
                    return "later"
                return "never"
        elif blocks > step.free or not self._admission.admits(load, group, blocks):
            return "later"
        if held and self._swap is not None:
            fetched = self._swap.fetch(group)
            if fetched == "coming":
                return "later"
            if fetched == "gone":
                return "aside"
        queue.pop()
        self._stats.restarts(group, cached)
        load.free = step.free = step.free - blocks
        step.slots -= group.request.slots
        step.admissions.append(running.start(group, cached))
        step.run(self._rows, group.live[0])
        return "started"

    def find(self, group: SequenceGroup) -> tuple[int, int]:
        """Tokens that a group starts with, and how many of their blocks cost no free block."""
        found = (0, 0)
        if self._swap is not None and self._swap.holds(group):
            found = self._swap.find(group)
        elif self._find_prefix is not None:
            found = self._find_prefix(group)
        return min(found[0], group.live[0].num_tokens - 1), found[1]

    def is_full(self, step: StepBuilder, group: SequenceGroup) -> bool:
        """Whether rows or slots are missing for a group."""
        rows = self._rows.num_free - self._running.num_unforked
        return len(group.live) > rows or group.request.slots > step.slots

    def expects(self, group: SequenceGroup) -> int:
        """Prefix tokens that a running group is computing for this group."""
        return self._running.prefix_to_cache(group) if self._computes_prefix(group) else 0

    def used_blocks(self, step: StepBuilder) -> int:
        """Blocks that running groups hold, plus those promised in a step."""
        return max(self._capacity - step.free - step.coming, 0)

    def _computes_prefix(self, group: SequenceGroup) -> bool:
        looks = self._find_prefix is not None
        return looks and self._running.computes(group.request.prefix_key)
