"""Which waiting groups start in a step: new ones, and those that lost their memory."""

from collections.abc import Callable

from jax_kvpage.serving.admission import AdmissionPolicy, Load
from jax_kvpage.serving.builder import StepBuilder
from jax_kvpage.serving.request import SequenceGroup
from jax_kvpage.serving.rows import Rows
from jax_kvpage.serving.running import RunningSet
from jax_kvpage.serving.stats import SchedulerStats
from jax_kvpage.serving.swap import SwapSpace
from jax_kvpage.serving.trust import Trust
from jax_kvpage.serving.waiting import WaitingQueue

__all__ = ["Starter"]


class Starter:
    """Starts groups in order while there are a row, a slot, blocks and tokens for them.

    Args:
        rows: the arrays.
        running: the groups that have memory.
        queue: those that have none.
        trust: how far memory's figures can be believed.
        stats: counts what is computed again.
        admission: decides when a group may start.
        capacity: blocks in all.
        find_prefix: see `Scheduler`.
        swap: see `Scheduler`.
        cancel: ends a group that can never start.
    """

    def __init__(
        self,
        rows: Rows,
        running: RunningSet,
        queue: WaitingQueue,
        trust: Trust,
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
        self._trust = trust
        self._stats = stats
        self._admission = admission
        self._capacity = capacity
        self._find_prefix = find_prefix
        self._swap = swap
        self._cancel = cancel

    def start(self, step: StepBuilder) -> None:
        """Fills in the admissions of a step."""
        running, queue = self._running, self._queue
        load = Load(self._rows, self._capacity, step.free, step.coming)
        while step.budget > 0 and (group := queue.head()) is not None:
            key = group.request.prefix_key
            full = len(group.live) > self._rows.num_free - running.num_unforked
            full = full or group.request.slots > step.slots
            held = self._swap is not None and self._swap.holds(group)
            waits = self._find_prefix is not None and not held and running.computes(key)
            if full and not waits:
                break
            cached, spared = self._find(group, held)
            if waits and cached < running.prefix_to_cache(group):
                queue.hold(key)
                continue
            if full:
                break
            blocks = running.blocks_to_start(group) - spared
            if not running.groups and not step.coming:
                if blocks > step.free:
                    if not self._trust.is_full or (self._swap and self._swap.give_up()):
                        break
                    self._cancel(group, "capacity")
                    continue
            elif blocks > step.free or not self._admission.admits(load, group, blocks):
                break
            if held and self._swap is not None:
                fetched = self._swap.fetch(group)
                if fetched == "coming":
                    break
                if fetched == "gone":
                    continue
            queue.pop()
            self._stats.restarts(group, cached)
            load.free = step.free = step.free - blocks
            step.slots -= group.request.slots
            step.admissions.append(running.start(group, cached))
            step.run(self._rows, group.live[0])

    def _find(self, group: SequenceGroup, held: bool) -> tuple[int, int]:
        """Tokens that a group starts with, and how many of their blocks cost no free one."""
        found = (0, 0)
        if held and self._swap is not None:
            found = self._swap.find(group)
        elif self._find_prefix is not None:
            found = self._find_prefix(group)
        return min(found[0], group.live[0].num_tokens - 1), found[1]
