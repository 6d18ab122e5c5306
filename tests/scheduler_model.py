"""A plain model of the effects of a scheduler's plans, which checks each plan.

Memory is lists of block numbers and sequences are token counts; only the plans are shared with the
code under test. `Server` carries out plans and simulates the language model.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from jax_kvpage.serving import (
    Request,
    Scheduler,
    Sequence,
    SequenceGroup,
    Status,
    StepPlan,
    Watermark,
)
from jax_kvpage.serving.swap import Fetched


class PlainMemory:
    """Blocks by number: which sequence holds which, and which are draining."""

    def __init__(
        self, capacity: int, block_tokens: int, max_seq_len: int, max_slots: int, drain_steps: int
    ) -> None:
        self.capacity, self.block_tokens, self.max_seq_len = capacity, block_tokens, max_seq_len
        self.slots = max_slots
        self.of: dict[Sequence, list[int]] = {}
        self.draining: list[tuple[set[int], int]] = [(set(), 0) for _ in range(drain_steps)]

    def used(self) -> set[int]:
        return {block for blocks in self.of.values() for block in blocks}

    def _drains(self) -> set[int]:
        return {b for blocks, _ in self.draining for b in blocks}

    def free_blocks(self) -> int:
        return self.capacity - len(self.used() | self._drains())

    def draining_blocks(self) -> int:
        return len(self._drains())

    def free_slots(self) -> int:
        return self.slots - len(self.of) - sum(slots for _, slots in self.draining)

    def release(self, sequences: list[Sequence]) -> None:
        given = {block for sequence in sequences for block in self.of.pop(sequence)}
        self.draining.append((given - self.used(), len(sequences)))
        self.draining.pop(0)

    def extend(self, sequence: Sequence, tokens: int) -> None:
        have = self.of.setdefault(sequence, [])
        free = iter(sorted(set(range(self.capacity)) - self.used() - self._drains()))
        while len(have) * self.block_tokens < tokens:
            block = next(free, None)
            assert block is not None, "a plan takes blocks that are not there"
            have.append(block)
        assert self.free_slots() >= 0, "a plan takes slots that are not there"

    def fork(self, parent: Sequence, child: Sequence, tokens: int) -> None:
        self.of[child] = self.of[parent][: tokens // self.block_tokens]


class PlainSwap:
    """A swap space that keeps groups waiting, and loses some.

    Args:
        seed: Seed of the random outcomes.
        cost: Cost of swapping a token, in computed tokens.
    """

    def __init__(self, seed: int = 0, cost: float = 0.5) -> None:
        self.random = random.Random(seed)
        self.factor = cost
        self.held: dict[SequenceGroup, int] = {}
        self.left: dict[SequenceGroup, int] = {}  # `fetch` calls until a group is back
        self.back: list[SequenceGroup] = []
        self.lost: list[SequenceGroup] = []

    def swap_out(self, group: SequenceGroup, num_tokens: int) -> None:
        assert group not in self.held
        assert group.request.slots == 1
        self.held[group] = num_tokens

    def holds(self, group: SequenceGroup) -> bool:
        return group in self.held

    def cost(self, num_tokens: np.ndarray) -> np.ndarray:
        return np.ceil(num_tokens * self.factor).astype(np.int64)

    def find(self, group: SequenceGroup) -> tuple[int, int]:
        return self.held[group], 0

    def fetch(self, group: SequenceGroup) -> Fetched:
        left = self.left.setdefault(group, self.random.randint(0, 3))
        self.left[group] -= 1
        if left > 0:
            return "coming"
        here = self.random.random() < 0.8
        (self.back if here else self.lost).append(group)
        self.forget(group)
        return "here" if here else "gone"

    def give_up(self) -> bool:
        had = bool(self.held)
        self.held.clear()
        self.left.clear()
        return had

    def forget(self, group: SequenceGroup) -> None:
        self.held.pop(group, None)
        self.left.pop(group, None)


class Server:
    """Runs a scheduler step by step.

    Args:
        memory: The memory to use.
        seed: Seed of refusals and drafts.
        swap: Swap space for preempted groups.
        options: Options of the scheduler.
    """

    def __init__(
        self, memory: PlainMemory, seed: int = 0, swap: PlainSwap | None = None, **options: Any
    ) -> None:
        self.memory = memory
        self.swap = swap
        self.scheduler = Scheduler(memory, swap=swap, **options)
        self.options = options
        self.groups: list[SequenceGroup] = []
        self.rows: dict[int, Sequence] = {}
        self.computed: dict[Sequence, int] = {}
        self.known: dict[Sequence, int] = {}
        self.wanted: dict[Sequence, int] = {}
        self.reported: list[SequenceGroup] = []
        self.random = random.Random(seed)
        self.now = 0.0
        self.steps = 0
        self.recomputed = 0
        self.plans: list[Any] = []

    def add(self, wanted: int = 1 << 30, **request: Any) -> SequenceGroup:
        """Adds a request whose sequences stop after `wanted` tokens."""
        group = self.scheduler.add(Request(request_id=len(self.groups), **request))
        self.groups.append(group)
        for sequence in group.sequences:
            self.known[sequence] = group.request.num_prompt_tokens
            self.wanted[sequence] = wanted
        return group

    def step(self, refusals: float = 0.0, drafts: int = 0) -> StepPlan:
        """Carries out one plan and checks it.

        Args:
            refusals: Probability that memory refuses a claim of the plan.
            drafts: Most draft tokens per sequence.
        """
        if drafts and self.rows:
            rows = np.asarray(sorted(self.rows))
            counts = [self.random.randint(0, drafts) for _ in rows]
            self.scheduler.set_drafts(rows, np.asarray(counts))
        waiting = [g for g in self.groups if g.status in (Status.WAITING, Status.PREEMPTED)]
        stopped = {s for s in self.computed if s.finish_reason}
        before = [g for g in self.groups if g.status is Status.RUNNING]
        plan = self.scheduler.schedule(self.now)
        self.plans.append((plan.release, plan.rows.tolist(), plan.counts.tolist()))
        self.steps += 1
        self.reported += plan.finished
        self._check_swaps(plan)
        self._check_victims(plan, before)
        self._release(plan, stopped)
        for admission in plan.admissions:
            if admission.num_cached and self.random.random() < refusals:
                less = self.random.randrange(admission.num_cached)
                plan = self.scheduler.found(plan, admission.sequence, less)
        claims = [a.sequence for a in plan.admissions]
        claims += [child for fork in plan.forks for child in fork.children]
        claims += [self.rows[row] for row in plan.extend_rows.tolist()]
        refused = [claim for claim in claims if self.random.random() < refusals]
        if refused:
            plan = self.scheduler.refuse(plan, refused)
        else:
            self._check_order(plan, waiting)
        self._claim(plan)
        self._run(plan)
        return plan

    def run(self, most: int = 20000, refusals: float = 0.0) -> None:
        """Steps until every request has finished."""
        while self.scheduler.has_unfinished:
            self.step(refusals)
            assert self.steps < most, "no end"
        self.check_end()

    def check_end(self) -> None:
        """Asserts that nothing is left, and that every request has finished once, with a reason."""
        for _ in range(len(self.memory.draining) + 1):
            self.step()
        assert not self.memory.of
        assert self.memory.free_blocks() == self.memory.capacity
        assert self.memory.free_slots() == self.memory.slots
        assert sorted(g.arrival for g in self.reported) == [g.arrival for g in self.groups]
        assert all(s.finish_reason for group in self.groups for s in group.sequences)
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0

    def _check_victims(self, plan: StepPlan, before: list[SequenceGroup]) -> None:
        """Victims are not the oldest, of the lowest priority, and not preempted too often."""
        running = [g for g in before if g not in plan.finished]
        for group in plan.preempted:
            assert group.order > min(g.order for g in running)
            assert group.request.priority == max(g.request.priority for g in running)
            assert group.num_preemptions <= self.options.get("max_preemptions", 4)
        if plan.preempted or plan.num_stalled:
            assert not plan.admissions

    def _check_swaps(self, plan: StepPlan) -> None:
        """Victims are swapped out exactly if that is cheaper, and come back complete."""
        assert set(plan.swap) <= set(plan.preempted)
        if self.swap is None:
            assert not plan.swap
            return
        cheaper = self.swap.factor < 1
        for group in plan.preempted:
            alone = group.request.slots == 1 and group.num_lost_tokens > 1
            assert (group in plan.swap) == (alone and cheaper) or group.num_lost_tokens < 3
        for group in plan.swap:
            (sequence,) = group.sequences
            self.swap.swap_out(group, self.computed[sequence])
        for group in plan.finished:
            self.swap.forget(group)
        for admission in plan.admissions:
            group = admission.sequence.group
            if group in self.swap.back:
                self.swap.back.remove(group)
                wanted = min(group.num_lost_tokens, self.known[admission.sequence] - 1)
                assert admission.num_cached == wanted
        assert not self.swap.back, "a group that was back did not start"

    def _release(self, plan: StepPlan, stopped: set[Sequence]) -> None:
        assert len(set(plan.release)) == len(plan.release)
        gone = [self.rows.pop(row) for row in plan.release]
        lost = {s for group in plan.preempted for s in group.sequences}
        for sequence in gone:
            del self.computed[sequence]
            assert sequence in lost or sequence.finish_reason or sequence in stopped
        for group in plan.preempted:  # the whole group is preempted
            assert not any(s in self.computed for s in group.sequences)
        self.memory.release(gone)

    def _claim(self, plan: StepPlan) -> None:
        for fork in plan.forks:
            assert self.computed[fork.parent] >= fork.num_tokens
            for child, room in zip(fork.children, fork.room, strict=True):
                self._enter(child, fork.num_tokens)
                self.memory.fork(fork.parent, child, fork.num_tokens)
                self.memory.extend(child, room)
                self.known[child] = max(self.known[child], fork.num_tokens + 1)
        for admission in plan.admissions:
            self._enter(admission.sequence, admission.num_cached)
            self.memory.extend(admission.sequence, admission.num_tokens)
        for row, tokens in zip(plan.extend_rows.tolist(), plan.extend_tokens.tolist(), strict=True):
            self.memory.extend(self.rows[row], tokens)

    def _enter(self, sequence: Sequence, computed: int) -> None:
        assert sequence.row not in self.rows
        self.rows[sequence.row] = sequence
        self.computed[sequence] = computed

    def _run(self, plan: StepPlan) -> None:
        assert plan.num_tokens <= self.options["max_num_batched_tokens"]
        assert len(self.rows) <= self.options["max_num_seqs"]
        assert len(set(plan.rows.tolist())) == len(plan.rows)
        ending = []
        for i, sequence in enumerate(plan.sequences):
            begin, count = int(plan.begins[i]), int(plan.counts[i])
            assert self.rows[int(plan.rows[i])] is sequence
            assert begin == self.computed[sequence]
            drafts = count - 1 if i < plan.num_decodes else 0
            assert 1 <= count - drafts <= self.known[sequence] - begin
            assert begin + count <= sequence.group.limit - 1
            assert begin + count <= len(self.memory.of[sequence]) * self.memory.block_tokens
            assert bool(plan.samples[i]) == (begin + count - drafts == self.known[sequence])
            self.computed[sequence] += count - drafts
            if plan.samples[i]:
                self.known[sequence] += 1
                if self.known[sequence] == sequence.group.limit:
                    ending.append(i)
        assert tuple(ending) == tuple(sorted(plan.ending))
        self._check_groups(plan)
        self._accept(plan)
        for i, sequence in enumerate(plan.sequences):
            produced = self.known[sequence] - sequence.group.request.num_prompt_tokens
            if plan.samples[i] and produced >= self.wanted[sequence]:
                self.scheduler.finish(sequence)

    def _accept(self, plan: StepPlan) -> None:
        """Accepts a random number of each sequence's drafts."""
        speculating = np.flatnonzero(plan.counts[: plan.num_decodes] > 1)
        if not speculating.size:
            return
        accepted = [self.random.randint(0, int(plan.counts[i]) - 1) for i in speculating]
        for i, more in zip(speculating.tolist(), accepted, strict=True):
            self.known[plan.sequences[i]] += more
            self.computed[plan.sequences[i]] += more
        if any(accepted):
            self.scheduler.add_tokens(plan.rows[speculating], np.asarray(accepted))

    def _check_groups(self, plan: StepPlan) -> None:
        """Of a group's decoding sequences, either all run or none."""
        runs = set(plan.sequences)
        for group in {s.group for s in self.computed}:
            ready = [
                s in runs
                for s in group.sequences
                if s in self.computed and not s.finish_reason and self._decodes(s, plan)
            ]
            assert len(set(ready)) <= 1, "a part of a group runs"
            if group.request.lockstep and any(ready):
                assert not group.unforked, "a sequence runs ahead of its siblings"
                assert len(ready) == len(group.live), "a sequence runs ahead of its siblings"

    def _decodes(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Returns whether a sequence runs, or could have run, with its newest token only."""
        if sequence in plan.sequences:
            return plan.sequences.index(sequence) < plan.num_decodes
        return self.known[sequence] - self.computed[sequence] == 1

    def _check_order(self, plan: StepPlan, waiting: list[SequenceGroup]) -> None:
        """Nobody is overtaken, neither in the queue nor when blocks are short."""
        for admission in plan.admissions:
            group = admission.sequence.group
            for other in waiting:
                follows = other.request.prefix_key is not None  # may wait for its leader
                if other.status in (Status.WAITING, Status.PREEMPTED) and not follows:
                    assert group.order < other.order, f"{group} overtakes {other}"
        if plan.num_stalled:
            grows = {self.rows[row].group.order for row in plan.extend_rows.tolist()}
            runs = {s.group.index for s in plan.sequences}
            stalled = {
                s.group.order
                for s in self.computed
                if s.group.index not in runs and not s.finish_reason and not s.group.unforked
            }
            assert not grows or not stalled or max(grows) < min(stalled)


def small_server(capacity: int = 100, drain: int = 0, seqs: int = 8, **options: Any) -> Server:
    """Returns a server with little memory and a small token budget."""
    memory = PlainMemory(capacity, 16, 1024, seqs + 4, drain)
    options = {"max_num_batched_tokens": 64, "admission": Watermark()} | options
    return Server(memory, max_num_seqs=seqs, **options)
