"""Continuous batching of requests on a pool, step by step.

Each call of `step` plans a step, acquires and releases memory for it, dispatches it, and reads back
the previous one. All calls must come from one thread; `AsyncEngine` runs an engine in its own
thread.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from jax_kvpage.errors import PoolClosed
from jax_kvpage.pool import KVPool
from jax_kvpage.serving.beams import Params
from jax_kvpage.serving.engine.config import EngineConfig
from jax_kvpage.serving.engine.counters import collect
from jax_kvpage.serving.engine.draft import Draft, DraftModel, check_draft
from jax_kvpage.serving.engine.guessing import Guesser, PromptLookup
from jax_kvpage.serving.engine.guidance import Guidance
from jax_kvpage.serving.engine.intake import Intake
from jax_kvpage.serving.engine.interrupts import HeldInterrupts
from jax_kvpage.serving.engine.ledger import Ledger
from jax_kvpage.serving.engine.pool_memory import PoolMemory
from jax_kvpage.serving.engine.prefill_rate import PrefillRate
from jax_kvpage.serving.engine.programs import Programs, Step
from jax_kvpage.serving.engine.reader import Reader
from jax_kvpage.serving.engine.runner import Runner
from jax_kvpage.serving.engine.scheduling import make_scheduler
from jax_kvpage.serving.engine.slots import Slots
from jax_kvpage.serving.engine.stats import EngineStats, SequenceMemory
from jax_kvpage.serving.engine.swapping import store_below
from jax_kvpage.serving.engine.tracking import SequenceState
from jax_kvpage.serving.engine.warm_up import warm_up
from jax_kvpage.serving.outputs import RequestOutput
from jax_kvpage.serving.params import SamplingParams
from jax_kvpage.serving.plan import StepPlan
from jax_kvpage.serving.request import SequenceGroup
from jax_kvpage.serving.structured import StructuredOutputsParams
from jax_kvpage.serving.text import Detokenize

__all__ = ["EngineCore"]


class EngineCore:
    """The part of `Engine` that runs steps; see `Engine`.

    Attributes:
        config: the options.
        scheduler: decides what runs.
        closed: whether `close` was called.
    """

    def __init__(
        self,
        step: Step,
        params: Any,
        pool: KVPool,
        config: EngineConfig | None = None,
        *,
        detokenize: Detokenize | None = None,
        tokenizer: Any = None,
        draft: DraftModel | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config = config or EngineConfig()
        replicas = pool.replicas
        rows = config.rows(pool.spec.max_slots // replicas)
        self._pool = pool
        self._clock = clock
        self._memory = PoolMemory(pool)
        self._prefill_rate = PrefillRate()
        self._ledger = Ledger(clock)
        tokens_of = self._ledger.tokens_of if config.prefix_caching else None
        swap = store_below(pool, self._prefill_rate, tokens_of)
        self.scheduler = make_scheduler(config, self._memory, rows, self._find_prefix, swap)
        guidance = None if tokenizer is None else Guidance(tokenizer, config.eos_token_ids)
        self._programs = Programs(
            step,
            params,
            config.shapes(rows),
            num_rows=rows,
            max_logprobs=config.max_logprobs,
            num_banned=config.max_stop_token_ids,
            num_guesses=config.num_speculative_tokens,
            num_words=0 if guidance is None else guidance.num_words,
            scores=config.prompt_logprobs,
            sharding=pool.sharding,
        )
        check_draft(draft, pool)
        self._guesser: Guesser = Draft(draft, config, rows) if draft else PromptLookup(config)
        self._num_rows = rows * replicas
        self._slots = Slots(pool, self._memory, self._num_rows, config.prefix_caching, swap)
        self._start()
        self._intake = Intake(
            config, self.scheduler, self._ledger, self._memory, detokenize, clock, guidance
        )
        self._finished: list[SequenceGroup] = []  # ended by the scheduler, to be forgotten
        self._gave_up = False  # whether a plan was not carried out
        self.closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to do."""
        left = self.scheduler.has_unfinished or self._runner.flights or self._finished
        return bool(left or self._gave_up)

    @property
    def stats(self) -> EngineStats:
        """Counters so far, and what is running now."""
        return collect(self.scheduler, self._runner, self._programs, self._guesser)

    def memory(self) -> list[SequenceMemory]:
        """The memory that each running sequence uses and has reserved."""
        return self._slots.memory()

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles everything that the engine will run.

        Args:
            progress: called with the number of programs done and the total. The programs of a draft
                model come first and are counted separately.

        Raises:
            RuntimeError: there are unfinished requests.
        """
        if not all(request.output.finished for request in self._ledger.requests()):
            raise RuntimeError("Engine.warm_up: wanted no unfinished requests")
        while self.has_unfinished:  # pending releases
            self.step()
        self._guesser.warm_up(progress)
        self._slots.cache = warm_up(
            self._pool,
            self._slots.cache,
            self._programs,
            self._num_rows // self._pool.replicas,
            self.config.max_stop_token_ids,
            progress,
        )
        self._start()

    def add_request(
        self,
        prompt: Sequence[int],
        params: Params | None = None,
        *,
        request_id: object = None,
        priority: int = 0,
        deadline: float | None = None,
        namespace: str | None = None,
    ) -> RequestOutput:
        """Queues a request.

        Args:
            prompt: token ids, at least one.
            params: sampling or beam search parameters; `SamplingParams()` if None.
            request_id: id for the output; None numbers the requests.
            priority: lower numbers go first.
            deadline: time on the engine's clock when the request ends with the reason "deadline".
            namespace: requests only find tokens of earlier requests with the same namespace (a
                tenant, an adapter); None is a namespace too. `namespace_of` returns its name in the
                pool.

        Returns:
            The output of the request, which `step` updates.

        Raises:
            ValueError: the engine cannot serve the prompt or the parameters.
            RequestRefused: the request can never run, or the queue is full.
            RuntimeError: the engine is closed.
        """
        if self.closed:
            raise RuntimeError("Engine: closed")
        return self._intake.add(
            prompt,
            SamplingParams() if params is None else params,
            request_id=request_id,
            priority=priority,
            deadline=deadline,
            namespace=namespace,
        )

    def compile_grammar(self, wanted: StructuredOutputsParams) -> None:
        """Compiles a grammar before the requests that use it. Thread-safe.

        Raises:
            ValueError: the grammar is invalid, or the engine has no tokenizer.
        """
        self._intake.guidance().compile(wanted)

    def namespace_of(self, name: str | None = None) -> str:
        """Returns the pool's name for a namespace, for `KVPool.pin` and `hint`."""
        return self._intake.namespace_of(name)

    def cancel(self, output: RequestOutput, reason: str = "cancelled") -> None:
        """Ends a request immediately. Its memory is released by the next step.

        Args:
            output: the output returned by `add_request`; a finished one does not change.
            reason: its finish reason.
        """
        with HeldInterrupts():
            request = self._ledger.find(output)
            if request is not None and not output.finished:
                self.scheduler.cancel(request.group, reason)
                self._ledger.end(request, reason)

    def step(self) -> list[RequestOutput]:
        """Runs a step.

        Returns:
            Outputs of the requests that have new tokens or have ended since the previous call.

        Raises:
            PoolClosed: the pool is closed, and all requests have ended with the reason "error".
                After any other exception, only the requests of this step have ended, and none if a
                policy raised it; the others continue.
            KeyboardInterrupt: Ctrl-C. The step has completed, and requests continue. A second
                Ctrl-C does not wait for the step: it acts like any other exception.
        """
        with HeldInterrupts():
            self._step()
        return self._ledger.changed()

    def close(self) -> None:
        """Ends all requests ("cancelled") and releases their memory. May be called twice."""
        with HeldInterrupts():
            self.closed = True
            for request in self._ledger.requests():
                self.cancel(request.output)
            with contextlib.suppress(PoolClosed):  # then there is nothing to release
                while self.has_unfinished:
                    self.step()
            self._guesser.follow([])

    def _step(self) -> None:
        speculates = self.config.num_speculative_tokens > 0
        try:
            self._memory.look()
            if self._gave_up:
                self._clean_up()
            guesses = self._guesser.guess(self._slots.occupied()) if speculates else {}
            if guesses:
                rows = np.asarray([state.row for state in guesses], np.int32)
                counts = np.asarray([len(each) for each in guesses.values()], np.int32)
                self.scheduler.set_drafts(rows, counts)
            plan = self.scheduler.schedule(self._clock())
        except PoolClosed as error:
            self._abandon(error)
            raise
        self._finished += plan.finished
        try:
            plan = self._carry_out(plan, guesses)
        except BaseException as error:  # such as Ctrl-C, or the pool was closed
            sequences = [*plan.sequences, *(fork.parent for fork in plan.forks)]
            sequences += [admission.sequence for admission in plan.admissions]
            self._give_up((sequence.group for sequence in sequences), error)
            raise
        if speculates:
            self._guesser.follow(self._slots.occupied())
        if plan.is_empty and self.scheduler.has_unfinished:
            self._slots.wait(self._memory.is_draining)

    def _find_prefix(self, group: SequenceGroup, replica: int) -> tuple[int, int]:
        """Cached tokens of a group, and 0: how many of their blocks are in use is unknown."""
        return self._slots.find(self._ledger.states[group.live[0]], replica), 0

    def _start(self) -> None:
        """Creates a runner without steps in flight."""
        self._runner = Runner(
            self._programs,
            self._pool,
            self._slots,
            self._num_rows,
            self.config.max_stop_token_ids,
            self.config.max_num_batched_tokens,
            self.config.num_speculative_tokens,
        )
        self._reader = Reader(
            self._runner, self.scheduler, self._ledger, self._slots, self._clock, self._prefill_rate
        )

    def _carry_out(self, plan: StepPlan, guesses: Mapping[SequenceState, list[int]]) -> StepPlan:
        """Changes memory, dispatches the step, and reads back the previous one.

        Returns:
            The plan without the sequences that memory refused.
        """
        self._runner.settle()
        if plan.is_empty or plan.release or self._finished or plan.forks or plan.admissions:
            self._reader.read()
        states = self._ledger.states
        for group in plan.swap:
            self._slots.swap_out(states[group.sequences[0]])
        if plan.release:
            self._slots.release_dropped()
        self._ledger.preempted(plan.preempted)
        new = [a.sequence for a in plan.admissions]
        new += [child for fork in plan.forks for child in fork.children]
        plan = self._slots.claim(plan, self.scheduler, states)
        for sequence in new:
            if states[sequence].row >= 0:
                self._runner.enter(states[sequence])
        self._ledger.forget(self._finished)
        self._slots.forget(self._finished)
        self._finished.clear()
        if not plan.is_empty:
            self._runner.launch(plan, [states[s] for s in plan.sequences], guesses)
        lockstep = self._runner.in_lockstep or self._ledger.num_searches
        self._reader.read(ahead=0 if lockstep else 1)
        self._reader.tell()
        return plan

    def _give_up(self, groups: Iterable[SequenceGroup], error: BaseException) -> None:
        """Ends requests whose step was not completed."""
        self._reader.tell()
        self._gave_up = True
        for group in dict.fromkeys(groups):
            request = self._ledger.request(group)
            if request is not None:
                self._ledger.fail(request, error)
            self.scheduler.cancel(group, "error")

    def _clean_up(self) -> None:
        """Releases what an abandoned step left behind, before its rows are reused."""
        try:
            self._runner.settle()
            self._reader.read()
            self._reader.tell()
            self._slots.release_dropped()
        except BaseException as error:
            self._give_up(self.scheduler.running(), error)
            raise
        self._gave_up = False

    def _abandon(self, error: BaseException) -> None:
        """Ends all requests and forgets their memory, because the pool is closed."""
        self._runner.flights.clear()
        self._give_up((request.group for request in self._ledger.requests()), error)
        self._finished += self.scheduler.schedule(self._clock()).finished
        self._ledger.forget(self._finished)
        self._finished.clear()
        self._slots.abandon()
        self._gave_up = False
