"""The scheduler of several replicas: one queue, and one planner per replica.

Groups wait in one queue, first come first served, and are placed when they start, on the replica
where they cost least (`jax_kvpage.sharding.placement`). From then on a group belongs to its
replica, which gives it memory and, when it runs out, preempts only its own groups: the other
replicas continue. A preempted group is placed again. One step serves all replicas.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items

import numpy as np

from jax_kvpage.serving.admission import AdmissionPolicy, ExpectedGrowth, Load
from jax_kvpage.serving.builder import StepBuilder
from jax_kvpage.serving.joining import joined
from jax_kvpage.serving.memory import Memory
from jax_kvpage.serving.plan import StepPlan
from jax_kvpage.serving.planner import Planner
from jax_kvpage.serving.preemption import CostAware, PreemptionPolicy
from jax_kvpage.serving.queue_entry import QueueEntry
from jax_kvpage.serving.request import Request, Sequence, SequenceGroup
from jax_kvpage.serving.starting import Outcome
from jax_kvpage.serving.stats import SchedulerStats
from jax_kvpage.serving.waiting import WaitingQueue
from jax_kvpage.sharding.placement import Request as Placed
from jax_kvpage.sharding.placement import place

__all__ = ["ReplicatedScheduler"]


class ReplicatedScheduler:
    """Plans steps of several replicas, with the interface of `Scheduler`.

    Args:
        memories: memory of each replica, all of the same size.
        max_num_seqs: maximum sequences that run on a replica at one time. Replica r has the
            `max_num_seqs` rows starting at `r * max_num_seqs`.
        max_num_batched_tokens: maximum tokens of a replica per step.
        step_sizes: as for `Scheduler`, in tokens of a replica.
        preemption: as for `Scheduler`; each replica gets a copy.
        admission: as for `Scheduler`; each replica gets a copy.
        max_preemptions: as for `Scheduler`.
        max_num_waiting: as for `Scheduler`.
        find_prefix: as for `Scheduler`, with the replica as its second argument.
    """

    def __init__(
        self,
        memories: Items[Memory],
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        step_sizes: Iterable[int] = (),
        preemption: PreemptionPolicy | None = None,
        admission: AdmissionPolicy | None = None,
        max_preemptions: int = 4,
        max_num_waiting: int | None = None,
        find_prefix: Callable[[SequenceGroup, int], tuple[int, int]] | None = None,
    ) -> None:
        self._queue = WaitingQueue()
        self._size = max_num_seqs
        self._block_tokens = memories[0].block_tokens
        self._planners = [
            Planner(
                memory,
                self._queue,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                step_sizes=step_sizes,
                preemption=copy.deepcopy(preemption) or CostAware(),
                admission=copy.deepcopy(admission) or ExpectedGrowth(),
                max_preemptions=max_preemptions,
                find_prefix=None if find_prefix is None else _of_replica(find_prefix, replica),
                first_row=replica * max_num_seqs,
            )
            for replica, memory in enumerate(memories)
        ]
        self._first_rows = [replica * max_num_seqs for replica in range(len(memories))]
        self._plans: list[StepPlan] = []  # of the last step
        # Counts refusals. Groups without a replica, which end while they wait, are counted here
        # too.
        self._first = self._planners[0]
        self._entry = QueueEntry(
            memories[0], self._queue, self._first.stats, max_num_seqs, max_num_waiting
        )

    @property
    def stats(self) -> SchedulerStats:
        """Counters summed over the replicas, except for the steps, which they share."""
        every = [dataclasses.astuple(planner.stats) for planner in self._planners]
        sums = SchedulerStats(*(sum(column) for column in zip(*every, strict=True)))
        return dataclasses.replace(sums, steps=self._first.stats.steps)

    @property
    def num_running(self) -> int:
        """Groups that have memory."""
        return sum(planner.num_running for planner in self._planners)

    @property
    def num_waiting(self) -> int:
        """Groups in the queue."""
        return self._queue.num_waiting

    @property
    def has_unfinished(self) -> bool:
        """Whether anything is left to plan, including releases."""
        return bool(self.num_waiting or any(planner.has_left for planner in self._planners))

    def running(self) -> tuple[SequenceGroup, ...]:
        """Groups that have memory, replica by replica."""
        return tuple(group for planner in self._planners for group in planner.running())

    def add(self, request: Request) -> SequenceGroup:
        """See `Scheduler`. A request must fit into one replica."""
        return self._entry.add(request)

    def finish(self, sequence: Sequence, reason: str = "stop") -> None:
        """See `Scheduler`."""
        self._owner(sequence.group).finish(sequence, reason)

    def cancel(self, group: SequenceGroup, reason: str = "cancelled") -> None:
        """See `Scheduler`."""
        self._owner(group).cancel(group, reason)

    def set_drafts(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """See `Scheduler`."""
        for planner, own in self._split(rows):
            planner.set_drafts(rows[own] % self._size, counts[own])

    def add_tokens(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """See `Scheduler`."""
        for planner, own in self._split(rows):
            planner.add_tokens(rows[own] % self._size, counts[own])

    def schedule(self, now: float = float("-inf")) -> StepPlan:
        """Plans the next step of all replicas; see `Scheduler`."""
        for planner in self._planners:
            planner.settle()
        for group in self._entry.deadlines.passed(now):
            self.cancel(group, "deadline")
        steps = [planner.begin() for planner in self._planners]
        try:
            for planner, step in zip(self._planners, steps, strict=True):
                planner.plan_running(step)
            self._start([replica for replica, step in enumerate(steps) if step.takes_new], steps)
            for planner, step in zip(self._planners, steps, strict=True):
                if not step.takes_new:
                    planner.end_stuck(step)
        except BaseException:
            for planner, step in zip(self._planners, steps, strict=True):
                planner.roll_back(step)
            raise
        # Victims go to the queue here, so that none starts elsewhere in the same plan.
        self._plans = [
            planner.complete(step) for planner, step in zip(self._planners, steps, strict=True)
        ]
        return joined(self._plans, self._first_rows)

    def refuse(self, plan: StepPlan, sequences: Iterable[Sequence]) -> StepPlan:
        """See `Scheduler`. Only the replicas of these sequences are affected."""
        del plan  # the replicas keep their own parts of it
        refused: dict[int, list[Sequence]] = {}
        for sequence in sequences:
            refused.setdefault(self._replica(sequence.group), []).append(sequence)
        for replica, own in refused.items():
            self._plans[replica] = self._planners[replica].refuse(self._plans[replica], own)
        return joined(self._plans, self._first_rows)

    def found(self, plan: StepPlan, sequence: Sequence, num_cached: int) -> StepPlan:
        """See `Scheduler`."""
        del plan
        replica = self._replica(sequence.group)
        planner, own = self._planners[replica], self._plans[replica]
        self._plans[replica] = planner.found(own, sequence, num_cached)
        return joined(self._plans, self._first_rows)

    def _replica(self, group: SequenceGroup) -> int:
        return group.first_row // self._size

    def _owner(self, group: SequenceGroup) -> Planner:
        return self._planners[self._replica(group)] if group.index >= 0 else self._first

    def _split(self, rows: np.ndarray) -> Iterable[tuple[Planner, np.ndarray]]:
        """Yields the planners of some rows, and the positions of the rows that belong to each."""
        replicas = rows // self._size
        for replica in np.unique(replicas).tolist():
            yield self._planners[replica], np.flatnonzero(replicas == replica)

    def _start(self, replicas: list[int], steps: Items[StepBuilder]) -> None:
        """Starts groups in order, each on the cheapest replica that can take it.

        Args:
            replicas: replicas that accept new groups.
            steps: plans under construction of all replicas.
        """
        loads = {r: self._planners[r].starter.load(steps[r]) for r in replicas}
        while (group := self._queue.head()) is not None:
            ready = [replica for replica in replicas if self._looks(replica, steps[replica], group)]
            outcomes = self._try(group, ready, steps, loads)
            if outcomes and outcomes[-1] in ("started", "aside"):
                continue
            if outcomes.count("never") < len(steps):
                break
            self.cancel(group, "capacity")

    def _looks(self, replica: int, step: StepBuilder, group: SequenceGroup) -> bool:
        """Whether a replica may start a group or let it wait for a prefix being computed."""
        starter = self._planners[replica].starter
        waits = starter.expects(group) > 0
        return step.budget > 0 and (waits or not starter.is_full(step, group))

    def _try(
        self,
        group: SequenceGroup,
        replicas: list[int],
        steps: Items[StepBuilder],
        loads: dict[int, Load],
    ) -> list[Outcome]:
        """Tries to start a group on the replicas in turn; returns the outcomes."""
        starters = [self._planners[replica].starter for replica in replicas]
        found = [starter.find(group) for starter in starters]
        # A prefix that another group is computing counts as found: this group waits for it.
        cached = [
            max(starter.expects(group), tokens)
            for starter, (tokens, _) in zip(starters, found, strict=True)
        ]
        used = [
            starter.used_blocks(steps[replica]) * self._block_tokens
            for starter, replica in zip(starters, replicas, strict=True)
        ]
        outcomes: list[Outcome] = []

        def starts(index: int, members: list[int], missing: list[int]) -> bool:
            del members, missing  # of one group
            step, load = steps[replicas[index]], loads[replicas[index]]
            outcomes.append(starters[index].try_start(step, load, group, found[index]))
            return outcomes[-1] in ("started", "aside")

        tokens = group.live[0].num_tokens
        place([Placed(tokens, tokens, cached)], used, self._block_tokens, starts)
        return outcomes


def _of_replica(
    find_prefix: Callable[[SequenceGroup, int], tuple[int, int]], replica: int
) -> Callable[[SequenceGroup], tuple[int, int]]:
    return lambda group: find_prefix(group, replica)
