"""Runs the requests of decode_llama.py on `jax_kvpage.serving.Engine`: samples, conversations,
beam search and speculative decoding.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax_kvpage
from jax_kvpage.serving import (
    BeamSearchParams,
    DraftModel,
    Engine,
    EngineConfig,
    RequestOutput,
    RequestRefused,
    SamplingParams,
    Step,
    Watermark,
)

from .sampling import Sampling
from .scan_runner import Request, Sample, memory_sample
from .sharing import SharingMeter

__all__ = ["EngineRunner"]

_SMALLEST_PREFILL = 32  # tokens of the smallest program for prompts


class EngineRunner:
    """Generates text for a list of requests from one pool. A context manager.

    Args:
      step: The step function of `model_step`.
      weights: The weights of `model_step`.
      pool: The pool. While the engine runs, nothing else may use it.
      sampling: How tokens are chosen.
      stop_ids: Token ids that end a sequence.
      num_beams: Width of beam search, which does not sample; 1 for none.
      prefill_chunk: The most prompt tokens in one step; longer prompts take several steps.
      num_guesses: Number of tokens to guess for each sequence and verify in one step; 0 for none.
      draft: The draft model that guesses them; None for prompt lookup.
      conversations: Whether requests reuse the cached tokens of earlier ones.
      on_token: Called with a request and each token it produces, in order.
      on_finish: Called with each request when its finish_reason is set.

    Attributes:
      hypotheses: For each request of a beam search, its output_ids and scores, best first.
      samples: Memory over time, one sample for each step.
      sharing: Memory saved by shared blocks, while samples or beams run.
      steps: Number of steps that produced tokens other than first ones; with beam search, of all
        steps.
    """

    def __init__(
        self,
        step: Step,
        weights: Any,
        pool: jax_kvpage.KVPool,
        sampling: Sampling,
        stop_ids: tuple[int, ...],
        *,
        num_beams: int = 1,
        prefill_chunk: int = 512,
        num_guesses: int = 0,
        draft: DraftModel | None = None,
        conversations: bool = False,
        on_token: Callable[[Request, int], None] | None = None,
        on_finish: Callable[[Request], None] | None = None,
    ) -> None:
        rows = pool.spec.max_slots // pool.replicas
        chunk = max(prefill_chunk, 16, rows * (1 + num_guesses))
        sizes, size = [rows, chunk], _SMALLEST_PREFILL
        while size < chunk:
            sizes.append(size)
            size *= 4
        config = EngineConfig(
            max_num_batched_tokens=chunk,
            buckets=tuple((size, rows) for size in sizes),
            eos_token_ids=stop_ids,
            prefix_caching=conversations,
            num_speculative_tokens=num_guesses,
            max_logprobs=max(2, 1 + len(stop_ids)) * num_beams,
            admission=Watermark(0.0),  # admit as many as fit now, to show memory at its limit
        )
        self._engine = Engine(step, weights, pool, config, draft=draft)
        self._pool = pool
        self._sampling = sampling
        self._num_beams = num_beams
        self._on_token = on_token or (lambda request, token: None)
        self._on_finish = on_finish or (lambda request: None)
        self._begin = 0.0
        self.hypotheses: list[list[dict[str, Any]]] = []
        self.samples: list[Sample] = []
        self.sharing = SharingMeter()
        self.steps = 0

    def __enter__(self) -> "EngineRunner":
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.close()

    @property
    def accepted(self) -> int:
        """The number of guessed tokens that were accepted."""
        return self._engine.stats.accepted

    @property
    def stalls(self) -> int:
        """The number of steps for which sequences waited for blocks."""
        return self._engine.stats.stalled

    @property
    def compile_seconds(self) -> float:
        """Time spent tracing and compiling so far; throughput excludes it."""
        return self._engine.stats.compile_seconds

    def run(
        self, requests: Sequence[Request], interrupted: Callable[[], bool] = lambda: False
    ) -> None:
        """Runs all requests to completion; results are stored in the requests.

        Args:
          requests: The requests.
          interrupted: Called before each step. Once it returns true, the unfinished requests end
            with the reason "cancelled".
        """
        if not self.samples:  # the clock continues in later runs
            self._begin = time.monotonic()
        groups: dict[object, list[Request]] = {}
        for request in requests:
            key = ("alone", request.index) if request.group is None else request.group
            groups.setdefault(key, []).append(request)
        self._sample_memory(False)
        outputs: list[tuple[RequestOutput, list[Request]]] = []
        for group in groups.values():
            try:
                outputs.append((self._add(group), group))
            except RequestRefused:
                for request in group:
                    request.finish_reason = "capacity"
                    self._on_finish(request)
        shares = self._num_beams > 1 or len(groups) < len(requests)
        try:
            while self._engine.has_unfinished:
                if interrupted():
                    for output, _ in outputs:
                        self._engine.cancel(output)
                before = [_tokens(output) for output, _ in outputs]
                steps = self._engine.stats.steps
                self._engine.step()
                if self._num_beams > 1:  # beam search returns its tokens at the end
                    self.steps += self._engine.stats.steps - steps
                else:
                    after = [_tokens(output) for output, _ in outputs]
                    self.steps += any(a > b > 0 for a, b in zip(after, before, strict=True))
                for output, group in outputs:
                    self._take(output, group)
                self._sample_memory(shares and self._engine.stats.running > 0)
        finally:  # an exception or Ctrl-C
            for output, _ in outputs:
                self._engine.cancel(output)
        if self._num_beams > 1:
            found = {id(group[0]): output for output, group in outputs}
            self.hypotheses += [_hypotheses(found.get(id(request))) for request in requests]

    def _add(self, group: list[Request]) -> RequestOutput:
        """Queues the samples of a prompt, or its beam search."""
        first, how = group[0], self._sampling
        params: SamplingParams | BeamSearchParams
        if self._num_beams > 1:
            params = BeamSearchParams(beam_width=self._num_beams, max_tokens=first.max_new_tokens)
        else:
            params = SamplingParams(
                n=len(group),
                temperature=how.temperature,
                top_k=how.top_k,
                top_p=how.top_p,
                seed=how.seed_of(first.index),
                max_tokens=first.max_new_tokens,
            )
        return self._engine.add_request(first.prompt_ids, params)

    def _take(self, output: RequestOutput, group: list[Request]) -> None:
        """Copies the results of a step to the requests."""
        if group[0].finish_reason is None and not group[0].output_ids:
            group[0].cached_tokens = output.metrics.num_cached_tokens
        group[0].preemptions = output.metrics.num_preemptions
        for request, each in zip(group, output.outputs, strict=False):
            if request.finish_reason is not None:
                continue
            for token in each.token_ids[len(request.output_ids) :]:
                request.output_ids.append(token)
                self._on_token(request, token)
            if each.finish_reason == "error":
                raise RuntimeError(output.error)
            if each.finish_reason is not None:
                request.finish_reason = each.finish_reason
                self._on_finish(request)

    def _sample_memory(self, shares: bool) -> None:
        stats = self._engine.stats
        seconds = time.monotonic() - self._begin - stats.compile_seconds
        self.samples.append(memory_sample(self._pool, seconds, stats.running))
        if shares:
            self.sharing.sample(self._pool)


def _tokens(output: RequestOutput) -> int:
    """The number of tokens of all continuations so far."""
    return sum(len(each.token_ids) for each in output.outputs)


def _hypotheses(output: RequestOutput | None) -> list[dict[str, Any]]:
    """The sequences of a beam search; none if it was refused."""
    found = output.outputs if output is not None else []
    return [{"output_ids": each.token_ids, "score": each.score} for each in found]
