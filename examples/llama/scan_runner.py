"""Runs requests with programs that decode many steps: admits requests as blocks allow, prefills,
scans, and releases finished requests. Without --scan, the library's engine does all this
(engine_runner.py): it decides on the host for every step, whereas a scanned program maps its own
blocks.

The schedule is the simplest one that neither wastes blocks nor ends requests early. Requests are
served first come, first served; running ones get blocks before new ones are admitted. A request
that gets no block stalls, keeps its blocks, and continues when another finishes. When all are
stalled, the last to arrive is preempted: its slot is released, and it is recomputed from its tokens
later. Only a request that cannot continue even alone ends early, with the reason "capacity".
Scheduling does not change the text of a request.

Samples of one prompt are requests of a group. The first computes the prompt; the others are forks
of a running one and share its blocks.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

import jax_kvpage

from .programs import SMALLEST_PREFILL, Programs
from .sharing import SharingMeter

__all__ = ["Request", "Sample", "ScanRunner", "memory_sample"]


@dataclasses.dataclass
class Request:
    """One prompt and its progress.

    Attributes:
      index: Place in the order of arrival; also the sequence's id for random numbers.
      prompt_ids: Token ids of the prompt, at least one.
      max_new_tokens: The most tokens to produce.
      output_ids: Tokens produced so far, including an end-of-text token.
      finish_reason: None while unfinished; "stop" (end of text), "length" (max_new_tokens, or the
        slot is full) or "capacity" (the pool cannot hold it even alone).
      slot: Slot in the cache while running, else -1.
      preemptions: How often it was preempted and recomputed.
      group: A number common to requests with the same prompt, which share its blocks; None for a
        request that shares nothing.
      cached_tokens: Number of prompt tokens that were already cached (turns.py).
    """

    index: int
    prompt_ids: list[int]
    max_new_tokens: int
    output_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    slot: int = -1
    preemptions: int = 0
    group: int | None = None
    cached_tokens: int = 0

    @property
    def tokens(self) -> list[int]:
        """Prompt and output."""
        return self.prompt_ids + self.output_ids


@dataclasses.dataclass(frozen=True)
class Sample:
    """Memory at one moment: all mapped bytes, and those of running requests."""

    seconds: float
    mapped_bytes: int
    occupied_bytes: int
    running: int


def memory_sample(pool: jax_kvpage.KVPool, seconds: float, running: int) -> Sample:
    """Samples the pool's memory."""
    stats = pool.stats()
    mapped = stats.capacity - stats.free
    return Sample(seconds, mapped, mapped - stats.parked - stats.draining, running)


class ScanRunner:
    """Generates text for a list of requests from one pool.

    Args:
      programs: The compiled model.
      pool: The pool. While the engine runs, nothing else may use it.
      stop_ids: Token ids that end a sequence.
      scan_steps: Decode steps in one compiled program.
      prefill_chunk: The most prompt tokens in one step; longer prompts take several steps.
      on_token: Called with a request and each token it produces, in order.
      on_finish: Called with each request when its finish_reason is set.

    Attributes:
      samples: Memory over time, one sample for each scan.
      sharing: Memory saved by shared blocks, while requests of a group run.
      steps: Number of decode steps.
      stalls: How often a sequence had to wait for blocks.
    """

    def __init__(
        self,
        programs: Programs,
        pool: jax_kvpage.KVPool,
        stop_ids: tuple[int, ...],
        *,
        scan_steps: int,
        prefill_chunk: int = 512,
        on_token: Callable[[Request, int], None] | None = None,
        on_finish: Callable[[Request], None] | None = None,
    ) -> None:
        self._programs = programs
        self._pool = pool
        self._spec = pool.spec
        self._cache = pool.cache()
        self._stop_ids = frozenset(stop_ids)
        self._scan_steps = scan_steps
        self._prefill_chunk = max(prefill_chunk, SMALLEST_PREFILL)
        self._on_token = on_token or (lambda request, token: None)
        self._on_finish = on_finish or (lambda request: None)
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._begin = 0.0  # start of the first run, less the compile time before it
        self.samples: list[Sample] = []
        self.sharing = SharingMeter()
        self.steps = 0
        self.stalls = 0

    @property
    def compile_seconds(self) -> float:
        """Time spent tracing and compiling so far; throughput excludes it."""
        return self._programs.compile_seconds

    def run(self, requests: Sequence[Request]) -> None:
        """Runs all requests to completion; results are stored in the requests."""
        if not self.samples:  # the clock continues in later runs
            self._begin = time.monotonic() - self._programs.compile_seconds
        self._waiting = list(requests)
        self._sample_memory()
        may_admit = True
        while self._waiting or self._running:
            if may_admit:
                self._admit()
            may_admit = True
            if self._running and not self._decode():
                # Freed blocks must go to stalled requests, or the preempted one would take them
                # back immediately.
                self._make_room()
                may_admit = False
            self._sample_memory()

    def _admit(self) -> None:
        """Gives slots to waiting requests, in order, and prefills them together."""
        admitted: list[tuple[Request, int]] = []
        while self._waiting:
            request = self._waiting[0]
            donor = self._with_prompt_of(request, self._running)
            if donor is None and self._with_prompt_of(request, [r for r, _ in admitted]):
                # Compute the prompt that this request shares first.
                self._prefill(admitted)
                admitted = []
                continue
            alone = not self._running and not admitted
            try:
                start = self._place(request, donor, wait=alone)
            except jax_kvpage.OutOfBlocks:
                start = None
            if start is None:
                if not alone:
                    break
                self._waiting.pop(0)
                request.finish_reason = "capacity"
                self._on_finish(request)
                continue
            admitted.append((self._waiting.pop(0), start))
        self._prefill(admitted)

    @staticmethod
    def _with_prompt_of(request: Request, others: Sequence[Request]) -> Request | None:
        """One of `others` whose prompt the request may share."""
        same = (other for other in others if other.group == request.group)
        return None if request.group is None else next(same, None)

    def _place(self, request: Request, donor: Request | None, wait: bool) -> int | None:
        """Gives a request a slot with room for its tokens and one more.

        `wait`, for when nothing else is running, waits for released memory to drain.

        Returns:
          How many tokens the slot already has: with a donor, all prompt tokens except the last,
          whose logits the request needs. None if a fork of the donor does not fit.

        Raises:
          OutOfBlocks: There is no room.
        """
        if donor is None:
            request.slot, self._cache = self._pool.acquire(
                self._cache, self._reserve(request), wait=wait
            )
            return 0
        shared = len(request.prompt_ids) - 1
        # Check first: the blocks of a failed attempt would drain while running requests need them.
        size, stats = self._spec.block_tokens or 1, self._pool.stats()
        own = self._spec.num_ranges * (-(-self._reserve(request) // size) - shared // size)
        if own > stats.blocks_free + stats.blocks_parked:
            return None
        (slot,), self._cache = self._pool.fork(self._cache, donor.slot, 1, shared)
        try:
            self._pool.extend(slot, self._reserve(request))
        except jax_kvpage.OutOfBlocks:
            self._cache = self._pool.release(self._cache, slot)
            raise
        request.slot = slot
        return shared

    def _reserve(self, request: Request) -> int:
        return min(len(request.tokens) + 1, self._spec.max_seq_len)

    def _prefill(self, admitted: list[tuple[Request, int]]) -> None:
        """Runs prompts, or parts of them, through the model, as many in a step as fit in a chunk.

        Args:
          admitted: Requests, each with the number of tokens that its slot already has.
        """
        self._running += [request for request, _ in admitted]
        todo = list(admitted)
        while todo:
            parts, room = [], self._prefill_chunk
            while todo and room:
                request, start = todo.pop(0)
                length = min(len(request.tokens) - start, room)
                parts.append((request, start, length))
                room -= length
                if start + length < len(request.tokens):
                    todo.insert(0, (request, start + length))
            chosen = self._run_parts(parts)
            for (request, start, length), token in zip(parts, chosen, strict=False):
                if start + length == len(request.tokens):
                    if request.group is not None:  # only committed tokens can be shared
                        known = len(self._pool.committed(request.slot))
                        self._pool.commit(request.slot, request.prompt_ids[known:])
                    self._take(request, int(token))
            self._sample_memory()
        self._release_finished()

    def _run_parts(self, parts: list[tuple[Request, int, int]]) -> np.ndarray:
        """Runs one step over parts of sequences; returns the next token of each part."""
        chosen, self._cache = self._programs.prefill(
            self._cache,
            [(r.slot, r.tokens[start : start + n], r.index) for r, start, n in parts],
            self._spec.max_slots,
        )
        return jax.device_get(chosen)

    def _lanes(self, requests: list[Request]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Latest tokens, slots and sequence ids; the lane of a sequence is its slot."""
        tokens, ids = np.zeros((2, self._spec.max_slots), np.int32)
        slots = np.full(self._spec.max_slots, -1, np.int32)
        for request in requests:
            tokens[request.slot] = request.output_ids[-1]
            slots[request.slot] = request.slot
            ids[request.slot] = request.index
        return jax.device_put((tokens, slots, ids))

    def _decode(self) -> bool:
        """Runs one scan; returns whether any sequence advanced."""
        tokens, slots, ids = self._lanes(self._running)
        remaining = np.zeros(self._spec.max_slots, np.int32)
        for request in self._running:
            remaining[request.slot] = self._remaining(request)
        result, self._cache = self._programs.scan(
            self._scan_steps, self._cache, tokens, slots, jax.device_put(remaining), ids
        )
        out, produced, active = jax.device_get((result.tokens, result.produced, result.active))
        self.steps += int(produced.any(axis=1).sum())
        for token_row, produced_row in zip(out, produced, strict=True):
            for request in self._running:
                if produced_row[request.slot]:
                    self._take(request, int(token_row[request.slot]))
        waits = [request for request in self._running if active[request.slot]]
        self.stalls += sum(not produced[-1, request.slot] for request in waits)
        self._release_finished()
        return bool(produced.any())

    def _take(self, request: Request, token: int) -> None:
        request.output_ids.append(token)
        self._on_token(request, token)
        if token in self._stop_ids:
            request.finish_reason = "stop"
        elif self._remaining(request) <= 0:
            request.finish_reason = "length"

    def _remaining(self, request: Request) -> int:
        room = self._spec.max_seq_len - len(request.tokens)
        return min(request.max_new_tokens - len(request.output_ids), room)

    def _release_finished(self) -> None:
        done = [request for request in self._running if request.finish_reason]
        if done:
            self._cache = self._pool.release(self._cache, [request.slot for request in done])
            self._running = [request for request in self._running if not request.finish_reason]
            for request in done:
                request.slot = -1
                self._on_finish(request)

    def _make_room(self) -> None:
        """Called when all are stalled: preempts the last to arrive, or ends the only one."""
        draining = self._pool.stats().draining
        if draining:
            # Released blocks become usable once the programs that may use them have run.
            jax.block_until_ready(self._cache)
            if self._pool.stats().draining < draining:
                return
        if len(self._running) == 1:
            self._running[0].finish_reason = "capacity"
            self._release_finished()
            return
        request = max(self._running, key=lambda running: running.index)
        self._running.remove(request)
        self._cache = self._pool.release(self._cache, request.slot)
        request.slot = -1
        request.preemptions += 1
        self._waiting.insert(0, request)

    def _sample_memory(self) -> None:
        seconds = time.monotonic() - self._begin - self._programs.compile_seconds
        self.samples.append(memory_sample(self._pool, seconds, len(self._running)))
        if any(request.group is not None for request in self._running):
            self.sharing.sample(self._pool)
