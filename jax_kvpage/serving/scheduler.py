"""The scheduler: which sequences run in each step, and the memory they get.

A request goes from `add` through the queue to a row: it is admitted once blocks and a slot are
available, computes its prompt in chunks that fit the token budget, alongside decoding sequences,
and then runs one token per step. When blocks run out, it may wait with its memory for a few steps,
or lose its memory and return later. It ends at its limit, or when the caller says so.

Each step serves unfinished sequences first and new ones after them, first come first served, as in
vLLM (Kwon et al., 2023). A plan must be carried out before the next is requested, but its results
need not be known: the scheduler only has to be called for sequences that change state. Nothing
depends on clocks, hashes or random numbers: equal calls give equal plans.
"""

from collections.abc import Callable, Iterable

from jax_kvpage.serving.admission import AdmissionPolicy, ExpectedGrowth
from jax_kvpage.serving.memory import Memory
from jax_kvpage.serving.plan import StepPlan
from jax_kvpage.serving.planner import Planner
from jax_kvpage.serving.preemption import CostAware, PreemptionPolicy
from jax_kvpage.serving.queue_entry import QueueEntry
from jax_kvpage.serving.request import Request, SequenceGroup
from jax_kvpage.serving.swap import SwapSpace
from jax_kvpage.serving.waiting import WaitingQueue

__all__ = ["Scheduler"]


class Scheduler(Planner):
    """Plans steps.

    A server's loop, in which step k may still run while step k + 1 is planned:

        while scheduler.has_unfinished:
            plan = scheduler.schedule(time.monotonic())
            refused = [...]  # carry out release, forks, admissions, extensions, in this order
            if refused:
                plan = scheduler.refuse(plan, refused)
            ...  # queue the step; then read the tokens of the step before it, and `finish`
                 # sequences that stopped

    A sequence that stops is therefore in one plan too many, whose token is ignored. A preempted
    sequence still gets the token of the step in flight, and is recomputed by a later plan.

    Args:
        memory: memory that the scheduler manages.
        max_num_seqs: maximum sequences that run at one time (rows).
        max_num_batched_tokens: maximum tokens per step, at least max_num_seqs.
        step_sizes: token counts of the compiled steps, to which others are padded. Prompt chunks
            are cut smaller where that saves much padding. If empty, steps are not padded.
        preemption: chooses victims; `CostAware()` if None.
        admission: decides when a group may start; `ExpectedGrowth()` if None.
        max_preemptions: a group preempted this many times is only admitted with room up to its
            limit, and is not preempted again.
        max_num_waiting: maximum groups in the queue; None for no limit.
        find_prefix: returns the tokens of a group that the prefix cache holds, and how many of
            their blocks are shared with running sequences and so cost no free block; None without a
            cache.
        swap: store for preempted sequences; None recomputes them.

    Attributes:
        stats: counters.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        step_sizes: Iterable[int] = (),
        preemption: PreemptionPolicy | None = None,
        admission: AdmissionPolicy | None = None,
        max_preemptions: int = 4,
        max_num_waiting: int | None = None,
        find_prefix: Callable[[SequenceGroup], tuple[int, int]] | None = None,
        swap: SwapSpace | None = None,
    ) -> None:
        queue = WaitingQueue()
        super().__init__(
            memory,
            queue,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            step_sizes=step_sizes,
            preemption=preemption or CostAware(),
            admission=admission or ExpectedGrowth(),
            max_preemptions=max_preemptions,
            find_prefix=find_prefix,
            swap=swap,
        )
        self._entry = QueueEntry(memory, queue, self.stats, max_num_seqs, max_num_waiting)

    @property
    def num_waiting(self) -> int:
        """Groups in the queue."""
        return self._queue.num_waiting

    @property
    def has_unfinished(self) -> bool:
        """Whether anything is left to plan, including releases."""
        return bool(self.has_left or self.num_waiting)

    def add(self, request: Request) -> SequenceGroup:
        """Queues a request.

        Returns:
            The group of its sequences. A sequence ends at max_tokens or the memory's max_seq_len
            ("length"), or where the whole memory could not hold more ("capacity").

        Raises:
            RequestRefused: the request can never run, or the queue is full.
        """
        return self._entry.add(request)

    def schedule(self, now: float = float("-inf")) -> StepPlan:
        """Plans the next step. The previous plan must have been carried out, or refused.

        If a policy or `find_prefix` raises, nothing has changed, except that groups may have been
        preempted.

        Args:
            now: current time, for deadlines.
        """
        self.settle()
        for group in self._entry.deadlines.passed(now):
            self.cancel(group, "deadline")
        if (same := self.repeat()) is not None:
            return same
        step = self.begin()
        try:
            self.plan_running(step)
            if step.takes_new:
                self.starter.start(step)
            else:
                self.end_stuck(step)
        except BaseException:
            self.roll_back(step)
            raise
        return self.complete(step)
