"""Simulates a server without a model: requests of known lengths run on counted blocks.

The duration of a step is modeled as a linear function of its tokens and their contexts. This makes
it possible to compare policies and to plan for hardware that is not available.
"""

import dataclasses
import math
from typing import Any, Literal, cast

import numpy as np

from jax_kvpage.serving.admission import Watermark
from jax_kvpage.serving.memory import BlockBudget
from jax_kvpage.serving.plan import StepPlan
from jax_kvpage.serving.request import Request, RequestRefused, Sequence, SequenceGroup
from jax_kvpage.serving.scheduler import Scheduler
from jax_kvpage.serving.swap import Fetched
from jax_kvpage.serving.workloads import Workload

__all__ = ["Reservation", "SimulationResult", "StepTime", "simulate"]

Reservation = Literal["blocks", "maximum", "power_of_two", "oracle"]


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a step. The defaults approximate an 8B model in bfloat16 on an H100.

    Attributes:
        fixed: seconds per step (reading the weights).
        per_token: seconds per token that runs.
        per_context_token: seconds per token that is attended to.
    """

    fixed: float = 7e-3
    per_token: float = 30e-6
    per_context_token: float = 45e-9

    def __call__(self, tokens: int, context: int) -> float:
        """Returns the seconds of a step.

        Args:
            tokens: tokens that run.
            context: tokens of all sequences that run, as context.
        """
        return self.fixed + self.per_token * tokens + self.per_context_token * context


@dataclasses.dataclass(frozen=True)
class SimulationResult:
    """Measurements of a simulation.

    Attributes:
        seconds: simulated time.
        steps: steps that ran something.
        finished: requests that ran to their end.
        refused: requests that could never run.
        output_tokens: tokens produced.
        computed_tokens: tokens that steps ran, including recomputed ones.
        recomputed_tokens: tokens recomputed after preemptions.
        preemptions: groups that lost their memory.
        swapped: preempted groups that were swapped out.
        stalled: steps that sequences waited for blocks, summed over sequences.
        running: sequences with memory, averaged over the time in which other requests waited, or
            over the whole time if none did.
        waste: share of the reserved memory that held no token, averaged over time.
        first_token: float64[finished]: seconds from arrival to the first token.
        latency: float64[finished]: seconds from arrival to the end.
    """

    seconds: float
    steps: int
    finished: int
    refused: int
    output_tokens: int
    computed_tokens: int
    recomputed_tokens: int
    preemptions: int
    swapped: int
    stalled: int
    running: float
    waste: float
    first_token: np.ndarray
    latency: np.ndarray

    @property
    def throughput(self) -> float:
        """Tokens produced per second."""
        return self.output_tokens / self.seconds


@dataclasses.dataclass
class _Meter:
    """Time-weighted sums."""

    busy: float = 0.0
    busy_rows: float = 0.0
    time: float = 0.0
    rows: float = 0.0
    reserved: float = 0.0
    stored: float = 0.0

    def add(self, seconds: float, rows: int, waits: bool, reserved: int, stored: int) -> None:
        self.time += seconds
        self.rows += rows * seconds
        self.busy += waits * seconds
        self.busy_rows += waits * rows * seconds
        self.reserved += reserved * seconds
        self.stored += stored * seconds


class _SwapModel:
    """An unlimited store. Transfers run one after the other and do not slow down the steps.

    Args:
        tokens_per_second: tokens whose keys and values are written or read per second.
        computed_per_second: tokens that steps compute per second.
    """

    def __init__(self, tokens_per_second: float, computed_per_second: float) -> None:
        self.now = self._free_at = 0.0
        self._speed = tokens_per_second
        self._cost = 2 * computed_per_second / tokens_per_second  # per token: written, then read
        self._held: dict[SequenceGroup, int] = {}
        self._ready: dict[SequenceGroup, float] = {}

    def swap_out(self, group: SequenceGroup) -> None:
        """Keeps the computed tokens of a preempted group."""
        self._held[group] = group.num_lost_tokens
        self._free_at = max(self._free_at, self.now) + group.num_lost_tokens / self._speed

    def wait(self) -> float:
        """Returns the time when the next group arrives; now if none is being fetched."""
        return min(self._ready.values(), default=self.now)

    def holds(self, group: SequenceGroup) -> bool:
        """See `SwapSpace`."""
        return group in self._held

    def cost(self, num_tokens: np.ndarray) -> np.ndarray:
        """See `SwapSpace`."""
        return np.ceil(num_tokens * self._cost).astype(np.int64)

    def find(self, group: SequenceGroup) -> tuple[int, int]:
        """See `SwapSpace`."""
        return self._held[group], 0

    def fetch(self, group: SequenceGroup) -> Fetched:
        """See `SwapSpace`."""
        if group not in self._ready:
            self._free_at = max(self._free_at, self.now) + self._held[group] / self._speed
            self._ready[group] = self._free_at
        if self._ready[group] > self.now:
            return "coming"
        del self._held[group], self._ready[group]
        return "here"

    def give_up(self) -> bool:
        """See `SwapSpace`. Stored groups are on disk and hold no memory."""
        return False


def _index(sequence: Sequence) -> int:
    """Index of a sequence's request in the workload."""
    return cast(int, sequence.group.request.request_id)


class _Server:
    """One simulation."""

    def __init__(
        self,
        workload: Workload,
        memory: BlockBudget,
        reservation: Reservation,
        step_time: StepTime,
        swap: _SwapModel | None,
        options: dict[str, Any],
    ) -> None:
        self.workload = workload
        self.memory = memory
        self.reservation = reservation
        self.step_time = step_time
        self.swap = swap
        self.scheduler = Scheduler(memory, swap=swap, **options)
        self.now = 0.0
        self.meter = _Meter()
        self.refused = self.computed = self.produced = self.steps = self.rows = 0
        self.stop_at = np.zeros(options["max_num_seqs"], np.int64)
        self.first_token, self.ended = np.full((2, len(workload)), np.nan)

    def run(self) -> None:
        arrivals, scheduler, added = self.workload.arrivals, self.scheduler, 0
        while added < len(arrivals) or scheduler.has_unfinished:
            if not scheduler.has_unfinished:
                self.now = max(self.now, float(arrivals[added]))
            while added < len(arrivals) and arrivals[added] <= self.now:
                self._add(added)
                added += 1
            if self.swap is not None:
                self.swap.now = self.now
            plan = scheduler.schedule(self.now)
            self.memory.carry_out(plan)
            for group in plan.swap:
                assert self.swap is not None
                self.swap.swap_out(group)
            self._run(plan)
            if plan.is_empty and self.swap is not None:
                self.now = max(self.now, self.swap.wait())

    def _add(self, index: int) -> None:
        prompt = int(self.workload.prompts[index])
        output = int(self.workload.outputs[index])
        longest = self.memory.max_seq_len
        reserve = {
            "blocks": 0,
            "maximum": longest,
            "power_of_two": min(prompt + (1 << (output - 1).bit_length()), longest),
            "oracle": prompt + output,
        }[self.reservation]
        try:
            self.scheduler.add(
                Request(
                    request_id=index,
                    num_prompt_tokens=prompt,
                    max_tokens=max(longest - prompt, 1),
                    n=self.workload.n,
                    reserve_tokens=reserve,
                )
            )
        except RequestRefused:
            self.refused += 1

    def _run(self, plan: StepPlan) -> None:
        for admission in plan.admissions:
            self._enter(admission.sequence)
        for fork in plan.forks:
            for child in fork.children:
                self._enter(child)
        self.rows -= len(plan.release)
        after = plan.begins + plan.counts
        tokens = plan.num_tokens
        seconds = self.step_time(tokens, int(after.sum())) if tokens else 0.0
        self.now += seconds
        memory, scheduler = self.memory, self.scheduler
        reserved = (memory.capacity - memory.free_blocks()) * memory.block_tokens
        self.meter.add(seconds, self.rows, scheduler.num_waiting > 0, reserved, memory.stored)
        self.computed += tokens
        self.steps += int(not plan.is_empty)
        self.produced += int(plan.samples.sum())
        for position in range(plan.num_decodes, len(plan.rows)):
            index = _index(plan.sequences[position])
            if plan.samples[position] and math.isnan(self.first_token[index]):
                self.first_token[index] = self.now
        stops = plan.samples & (after + 1 >= self.stop_at[plan.rows])
        for position in np.flatnonzero(stops).tolist():
            self._stop(plan.sequences[position])

    def _enter(self, sequence: Sequence) -> None:
        index = _index(sequence)
        stop = int(self.workload.prompts[index] + self.workload.outputs[index])
        self.stop_at[sequence.row] = stop
        self.rows += 1

    def _stop(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        if not sequence.group.live:
            self.ended[_index(sequence)] = self.now


def simulate(
    workload: Workload,
    *,
    capacity_tokens: int,
    max_seq_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    block_tokens: int = 16,
    drain_steps: int = 0,
    reservation: Reservation = "blocks",
    step_time: StepTime | None = None,
    swap_tokens_per_second: float | None = None,
    **options: Any,
) -> SimulationResult:
    """Simulates serving a workload.

    Args:
        workload: the requests.
        capacity_tokens: memory size in tokens.
        max_seq_len: maximum tokens per sequence.
        max_num_seqs: maximum sequences that run at one time.
        max_num_batched_tokens: maximum tokens per step.
        block_tokens: tokens per block.
        drain_steps: steps until released blocks become free.
        reservation: what a sequence reserves when it starts: "blocks" for its present tokens, with
            more as it grows; or room for the "maximum" length, for its output rounded up to a
            "power_of_two", or for exactly what it will need ("oracle"), like servers without
            paging. These three can use all of the memory, without fragmentation, so the results
            flatter them.
        step_time: duration model of a step; `StepTime()` if None.
        swap_tokens_per_second: tokens whose keys and values a store writes or reads per second;
            None recomputes preempted requests.
        **options: options of `Scheduler`.
    """
    memory = BlockBudget(
        capacity_tokens // block_tokens, block_tokens, max_seq_len, max_num_seqs, drain_steps
    )
    if reservation != "blocks":
        options.setdefault("admission", Watermark(0.0))  # nothing grows
    options |= {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
    step_time, swap = step_time or StepTime(), None
    if swap_tokens_per_second is not None:
        swap = _SwapModel(swap_tokens_per_second, 1 / step_time.per_token)
    server = _Server(workload, memory, reservation, step_time, swap, options)
    server.run()
    meter, stats, done = server.meter, server.scheduler.stats, ~np.isnan(server.ended)
    return SimulationResult(
        seconds=meter.time,
        steps=server.steps,
        finished=int(done.sum()),
        refused=server.refused,
        output_tokens=server.produced,
        computed_tokens=server.computed,
        recomputed_tokens=stats.recomputed_tokens,
        preemptions=stats.preemptions,
        swapped=stats.swapped,
        stalled=stats.stalled,
        running=(
            meter.busy_rows / meter.busy if meter.busy else meter.rows / max(meter.time, 1e-9)
        ),
        waste=1 - meter.stored / max(meter.reserved, 1e-9),
        first_token=(server.first_token - workload.arrivals)[done],
        latency=(server.ended - workload.arrivals)[done],
    )
