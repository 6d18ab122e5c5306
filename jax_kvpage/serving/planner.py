"""Plans the steps of the sequences in one memory.

A `Scheduler` is a planner with a queue; a `ReplicatedScheduler` has a planner for each replica and
a common queue.
"""

from collections.abc import Callable, Iterable

import numpy as np

from jax_kvpage.serving.admission import AdmissionPolicy
from jax_kvpage.serving.advance import advance, start_from, take_back, without
from jax_kvpage.serving.backoff import Backoff
from jax_kvpage.serving.builder import StepBuilder
from jax_kvpage.serving.forking import fork_ready
from jax_kvpage.serving.growth import Growth
from jax_kvpage.serving.memory import Memory
from jax_kvpage.serving.plan import Fork, StepPlan
from jax_kvpage.serving.preemption import PreemptionPolicy
from jax_kvpage.serving.queue_entry import check_sizes
from jax_kvpage.serving.request import Sequence, SequenceGroup, Status
from jax_kvpage.serving.rows import Rows
from jax_kvpage.serving.running import RunningSet
from jax_kvpage.serving.starting import Starter
from jax_kvpage.serving.stats import SchedulerStats
from jax_kvpage.serving.swap import SwapSpace
from jax_kvpage.serving.waiting import WaitingQueue

__all__ = ["Planner"]


class Planner:
    """Plans the steps of the sequences in one memory.

    Args:
        memory: see `Scheduler`.
        queue: waiting groups.
        max_num_seqs: maximum sequences that run at one time (rows).
        max_num_batched_tokens: maximum tokens per step, at least max_num_seqs.
        step_sizes: see `Scheduler`.
        preemption: chooses victims.
        admission: decides when a group may start.
        max_preemptions: see `Scheduler`.
        find_prefix: see `Scheduler`.
        swap: see `Scheduler`.
        first_row: index of row 0 among the rows of all replicas.

    Attributes:
        stats: counters.
        starter: starts groups from the queue.
    """

    def __init__(
        self,
        memory: Memory,
        queue: WaitingQueue,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        step_sizes: Iterable[int],
        preemption: PreemptionPolicy,
        admission: AdmissionPolicy,
        max_preemptions: int,
        find_prefix: Callable[[SequenceGroup], tuple[int, int]] | None = None,
        swap: SwapSpace | None = None,
        first_row: int = 0,
    ) -> None:
        check_sizes(max_num_seqs, max_num_batched_tokens)
        self.stats = SchedulerStats()
        self._memory = memory
        self._budget = max_num_batched_tokens
        self._step_sizes = tuple(sorted(step_sizes))
        self._admission = admission
        self._rows = Rows(max_num_seqs, memory.block_tokens, first_row)
        self._running = RunningSet(self._rows, memory.max_seq_len, max_preemptions)
        self._growth = Growth(self._rows, self._running, preemption, swap)
        self._queue = queue
        self._finished: list[SequenceGroup] = []
        self._ending: list[Sequence] = []  # sequences that reach their limit in the last plan
        self._forks: tuple[Fork, ...] = ()  # of the last plan
        self._room_before: dict[int, int] = {}  # of rows that grew in the last plan
        self._backoff = Backoff()
        self.starter = Starter(
            self._rows,
            self._running,
            self._queue,
            self._backoff,
            self.stats,
            self._admission,
            memory.capacity,
            find_prefix,
            swap,
            self.cancel,
        )
        self._ran = False  # whether the last plan ran anything
        self._last: StepPlan | None = None
        self._repeats = 0  # how often the last plan can be repeated before a row needs anything

    @property
    def num_running(self) -> int:
        """Groups that have memory."""
        return len(self._running.groups)

    @property
    def has_left(self) -> bool:
        """Whether anything is left to plan besides the queue, including releases."""
        return bool(self._running.groups or self._has_changes)

    @property
    def _has_changes(self) -> bool:
        """Whether the next plan must say that groups have ended or rows were released."""
        return bool(self._running.released or self._finished)

    def running(self) -> tuple[SequenceGroup, ...]:
        """Groups that have memory, in scheduling order."""
        return tuple(self._running.groups)

    def num_tokens(self, sequence: Sequence) -> int:
        """Tokens of a sequence whose ids exist once the last plan has run."""
        return int(self._rows.known[sequence.row]) if sequence.row >= 0 else sequence.num_tokens

    def finish(self, sequence: Sequence, reason: str = "stop") -> None:
        """Ends a sequence. Its slot is released by the next plan.

        A sequence that has already reached its limit only takes the new reason: the limit is known
        one step before the token.
        """
        if sequence.finish_reason is None:
            self._end(sequence, reason)
        elif sequence.finish_reason == sequence.group.limit_reason:
            sequence.finish_reason = reason

    def cancel(self, group: SequenceGroup, reason: str = "cancelled") -> None:
        """Ends all unfinished sequences of a group, wherever it stands."""
        for sequence in list(group.live):
            self._end(sequence, reason)

    def set_drafts(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Sets the drafts that sequences verify in the next plan, after their newest token.

        Args:
            rows: int[s]: decoding rows.
            counts: int[s]: number of speculated tokens. The plan's counts say how many of them run:
                fewer near a sequence's limit, beyond the token budget, or when blocks are short.
                Prompts that wait to be computed keep half of the budget that decoding sequences
                leave.
        """
        self._rows.set_drafts(rows, counts)

    def add_tokens(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Adds the tokens that the last plan produced beyond one per sequence.

        Args:
            rows: int[s]: decoding rows, each at most once.
            counts: int[s]: number of accepted drafts. The caller must roll back rejected ones.
        """
        arrays = self._rows
        arrays.known[rows] += counts
        arrays.computed[rows] += counts
        for row in rows[arrays.known[rows] >= arrays.limit[rows]].tolist():
            sequence = arrays.sequences[row]
            if sequence is not None and sequence.finish_reason is None:
                self._end(sequence, sequence.group.limit_reason)

    def settle(self) -> None:
        """Finishes the last plan, which has been carried out or refused."""
        if self._ran:
            self._backoff.ran()
        for sequence in self._ending:
            if sequence.finish_reason is None:
                self._end(sequence, sequence.group.limit_reason)
        self._ending = []
        self._running.release_donors(self._forks)

    def repeat(self) -> StepPlan | None:
        """Returns the last plan, one token later, if planning would give the same.

        That is most steps of a steady decode, and much cheaper than a new plan.
        """
        rows, last = self._rows, self._last
        if not self._repeats or last is None or self._has_changes or rows.has_drafts:
            return None
        # Prompts and shortage change the rows: then the array is another one.
        if last.rows is not rows.decodes()[0] or (rows.num_free and self._queue.head()):
            return None
        if self._running.forking:  # a cached prompt changes no rows before its siblings are forked
            return None
        self._repeats -= 1
        rows.advance_decodes()
        self._last = last.again()
        self.stats.steps += 1
        return self._last

    def begin(self) -> StepBuilder:
        """Starts a plan: looks at what memory has."""
        if self._needs_no_memory():  # most steps; asking memory may be slow
            return StepBuilder(0, 0, 0, 0, self._budget)
        memory, running = self._memory, self._running
        free = self._backoff.usable(memory.free_blocks())
        coming = memory.draining_blocks() + running.releasing
        slots = memory.free_slots() - running.promised_slots
        return StepBuilder(free, running.promised, coming, slots, self._budget)

    def plan_running(self, step: StepBuilder) -> None:
        """Adds the sequences that have memory to a plan."""
        fork_ready(self._rows, self._running, step, self._end)
        if self._rows.has_drafts:
            can_start = self._rows.num_free > self._running.num_unforked
            newcomers = can_start and self._queue.head() is not None
            pending = self._budget if newcomers else self._running.num_pending
            self._rows.trim_drafts(self._budget, pending)
        self._growth.decode(step)
        step.prefill(self._rows, self._running.prefilling)

    def end_stuck(self, step: StepBuilder) -> None:
        """Ends the oldest group if nothing can continue."""
        idle = not (len(step.decodes) or step.has_parts or step.preempted or step.coming)
        if idle and self._backoff.is_full and self._running.groups:
            self.cancel(self._running.groups[0], "capacity")

    def complete(self, step: StepBuilder) -> StepPlan:
        """Builds the plan, counts its tokens as computed, and returns its victims to the queue."""
        rows, running = self._rows, self._running
        for group in step.preempted:
            self._queue.push(group)
        step.fit(self._step_sizes)
        plan = step.build(self.stats.steps, self._finished, running.released, rows)
        plan = advance(rows, running, plan)
        self._finished, running.released, running.releasing = [], [], 0
        self._forks = plan.forks
        self._ending = [plan.sequences[position] for position in plan.ending]
        self._room_before = dict(zip(step.grown[0].tolist(), step.grown[2].tolist(), strict=True))
        for key in running.done_prefixes:
            self._queue.let_go(key)
        running.done_prefixes.clear()
        self._ran = not plan.is_empty
        self.stats.planned(plan)
        self._last, self._repeats = plan, self._num_repeats(plan)
        rows.drop_drafts()
        return plan

    def roll_back(self, step: StepBuilder) -> None:
        """Undoes a plan whose construction raised, for example in a policy of the caller.

        Its victims have lost their rows. They go back to the queue, without having been in a plan.
        """
        grown, _, room = step.grown
        self._rows.room[grown] = room
        started = [admission.sequence.group for admission in step.admissions]
        for group in reversed(started):
            self._running.unstart(group)
        for fork in reversed(step.forks):
            self._running.unfork(fork)
        for group in [*started, *step.preempted]:
            self._queue.push(group)

    def refuse(self, plan: StepPlan, sequences: Iterable[Sequence]) -> StepPlan:
        """Undoes the part of the last plan that memory refused. Must be the next call.

        The groups of these sequences do not run in this step and keep what they have; newly
        admitted ones return to their places in the queue. Later plans use fewer of the free blocks
        until memory has freed more than the plan counted on or some steps have passed. A group that
        cannot run even alone, with nothing draining, ends after several attempts ("capacity").

        Args:
            plan: the last plan. Its `release` must have been carried out.
            sequences: sequences of its `extend_rows`, admissions or fork children that got no
                memory.

        Returns:
            The plan to carry out instead.
        """
        refused, self._repeats = list(sequences), 0
        groups = dict.fromkeys(sequence.group for sequence in refused)
        left = without(plan, groups, refused)
        for row in {sequence.row for sequence in refused} & self._room_before.keys():
            self._rows.room[row] = self._room_before[row]
        for group in take_back(self._rows, self._running, plan, groups):
            self._queue.push(group)
        self._forks = left.forks
        self._ending = [left.sequences[position] for position in left.ending]
        self._backoff.refused(plan.free_blocks)
        self.stats.refused_plans += 1
        self._ran = not left.is_empty
        if self._backoff.is_final(left.is_empty and not self._memory.draining_blocks()):
            self.cancel(next(iter(groups)), "capacity")
        return left

    def found(self, plan: StepPlan, sequence: Sequence, num_cached: int) -> StepPlan:
        """Records, before `refuse`, that a sequence starts with fewer cached tokens than planned.

        Args:
            plan: the last plan, which admits the sequence.
            sequence: the sequence; it has its memory.
            num_cached: tokens found in the prefix cache.

        Returns:
            The plan to carry out instead, in which the sequence runs the same number of tokens from
            there.
        """
        self._ending = [other for other in self._ending if other is not sequence]
        return start_from(self._rows, self._running, plan, sequence, num_cached)

    def _num_repeats(self, plan: StepPlan) -> int:
        """In how many further steps the rows of a plan need no memory and reach no limit."""
        rows, decodes = self._rows, plan.rows
        if not (decodes.size and self._backoff.is_full) or rows.has_drafts:
            return 0
        if plan.extend_rows.size and decodes.size > rows.block_tokens:
            return 0  # most steps need blocks: looking for others is not worth its time
        room = rows.room[decodes] - rows.computed[decodes]
        left = rows.limit[decodes] - rows.known[decodes] - 1
        return int(np.minimum(room, left).min())

    def _end(self, sequence: Sequence, reason: str) -> None:
        group, waits = sequence.group, sequence.group.status is not Status.RUNNING
        produced = self.num_tokens(sequence) - group.request.num_prompt_tokens
        if reason not in ("cancelled", "deadline", "capacity"):
            self._admission.observe(produced)
        if self._running.end(sequence, reason):
            self._finished.append(group)
            if waits:
                self._queue.leave()

    def _needs_no_memory(self) -> bool:
        """Whether the step can only run sequences that already have room."""
        rows, running = self._rows, self._running
        can_start = rows.num_free > running.num_unforked and self._queue.head() is not None
        grows = rows.has_drafts or running.forking or rows.short().size
        return self._backoff.is_full and not (can_start or grows)
