"""Beam search on a paged cache: beams share their blocks, and `KVPool.reorder` continues them.

The rules are those of transformers' `generate(num_beams=W, do_sample=False)` with its defaults
(length_penalty 1, early_stopping False): a step looks at the best continuations of all beams; those
that end are kept if they are among the first W, the W best of the others go on, and the search ends
when no beam can become better than the worst of W finished ones.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

import jax_kvpage

from .generate import Request, Sample, memory_sample
from .model import Llama
from .programs import Programs
from .sampling import Sampling
from .sharing import SharingMeter

__all__ = ["BeamEngine", "BeamPrograms", "Hypothesis"]

_NEVER = np.float32(-1e9)  # log probability of beams that do not exist yet


class BeamPrograms(Programs):
    """The compiled programs of a model, which give the most likely next tokens of each lane.

    Args:
      model: The model; its weights are shared, not copied.
      num_beams: Width of the search.
      stop_ids: Token ids that end a sequence.
      implementation: As for `jax_kvpage.update_and_attend`.

    Attributes:
      num_beams: Width of the search.
      stop_ids: Token ids that end a sequence.
      candidates: Continuations looked at in a step: enough for W to remain when every beam's stop
        ids are among them.
    """

    def __init__(
        self,
        model: Llama,
        num_beams: int,
        stop_ids: tuple[int, ...],
        implementation: str | None = None,
    ) -> None:
        super().__init__(model, Sampling(), stop_ids, implementation)
        self.num_beams = num_beams
        self.stop_ids = stop_ids
        self.candidates = max(2, 1 + len(stop_ids)) * num_beams

    def _choose(
        self, logits: jax.Array, sequence_ids: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Log probabilities, float32 `[S, K]` in falling order, and their tokens, int32 `[S, K]`.

        No step needs more than K of one lane.
        """
        del sequence_ids, positions
        count = min(self.candidates, logits.shape[-1])
        return jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), count)


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A finished sequence.

    Attributes:
      output_ids: Tokens after the prompt, an end-of-text token included.
      score: Sum of their log probabilities over their number.
    """

    output_ids: list[int]
    score: float


class Beams:
    """The running beams and the best finished ones of one prompt, without their memory.

    Attributes:
      tokens: Output of each running beam, W lists.
      finished: At most W, the best first.
      done: Whether the search has ended.
    """

    def __init__(self, num_beams: int, stop_ids: Sequence[int], max_new_tokens: int) -> None:
        self._width = num_beams
        self._stop_ids = frozenset(stop_ids)
        self._most = max_new_tokens
        # Only the first lane counts in the first step: the others have the same tokens.
        self._totals = np.full(num_beams, _NEVER, np.float32)
        self._totals[0] = 0
        self.tokens: list[list[int]] = [[] for _ in range(num_beams)]
        self.finished: list[Hypothesis] = []
        self.done = False

    def take(self, log_probs: np.ndarray, ids: np.ndarray, candidates: int) -> list[int]:
        """Goes on by a token.

        Args:
          log_probs: float32 `[W, K]`, the most likely next tokens of each beam.
          ids: int32 `[W, K]`.
          candidates: How many continuations of all beams to look at.

        Returns:
          The parents of the beams that go on, W indices; empty at the end of the search.
        """
        totals = (log_probs + self._totals[:, None]).ravel()
        order = np.argsort(-totals, kind="stable")[:candidates]
        parents, tokens = order // log_probs.shape[1], ids.ravel()[order]
        length = len(self.tokens[0]) + 1
        outputs = [
            [*self.tokens[parent], int(token)]
            for parent, token in zip(parents, tokens, strict=True)
        ]
        ends = [length == self._most or output[-1] in self._stop_ids for output in outputs]
        self.finished += [
            Hypothesis(outputs[i], float(totals[order[i]] / np.float32(length)))
            for i in range(self._width)
            if ends[i]
        ]
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[self._width :]
        kept = [i for i, end in enumerate(ends) if not end][: self._width]
        if not kept:
            self.done = True
            return []
        self.tokens = [outputs[i] for i in kept]
        self._totals = totals[order[kept]]
        full = len(self.finished) == self._width
        self.done = full and self._totals[0] / length <= self.finished[-1].score
        return [] if self.done else [int(parents[i]) for i in kept]


class BeamEngine:
    """Runs beam search for a list of requests, one after the other, from one pool.

    Args:
      programs: The compiled model.
      pool: The memory, of at least 2W slots: `reorder` needs new ones before old ones have drained.
      on_token: Called with a request and each token of its best sequence, when that is known.
      on_finish: Called with each request after its tokens.

    Attributes:
      hypotheses: For each request run, its finished sequences, the best first.
      samples: Memory over time, one for each step.
      sharing: Memory saved by shared blocks.
      steps: Decode steps run.
      stalls: Always 0: a step that finds no block ends the search.
    """

    def __init__(
        self,
        programs: BeamPrograms,
        pool: jax_kvpage.KVPool,
        *,
        on_token: Callable[[Request, int], None] | None = None,
        on_finish: Callable[[Request], None] | None = None,
    ) -> None:
        self._programs = programs
        self._pool = pool
        self._cache = pool.cache()
        self._width = programs.num_beams
        self._ids = jax.device_put(np.zeros(self._width, np.int32))
        self._on_token = on_token or (lambda request, token: None)
        self._on_finish = on_finish or (lambda request: None)
        self._begin = 0.0
        self.hypotheses: list[list[Hypothesis]] = []
        self.samples: list[Sample] = []
        self.sharing = SharingMeter()
        self.steps = 0
        self.stalls = 0

    def run(self, requests: Sequence[Request]) -> None:
        """Runs all requests to their end; the best sequences are in the requests."""
        self._begin = time.monotonic() - self._programs.compile_seconds
        for request in requests:
            found = self._search(request)
            self.hypotheses.append(found)
            for token in found[0].output_ids if found else ():
                request.output_ids.append(token)
                self._on_token(request, token)
            if not found:
                request.finish_reason = "capacity"
            elif found[0].output_ids[-1] in self._programs.stop_ids:
                request.finish_reason = "stop"
            else:
                request.finish_reason = "length"
            self._on_finish(request)

    def _search(self, request: Request) -> list[Hypothesis]:
        """The finished sequences of a prompt; none if the pool has no blocks left for its beams."""
        room = self._pool.spec.max_seq_len - len(request.prompt_ids)
        beams = Beams(self._width, self._programs.stop_ids, min(request.max_new_tokens, room))
        slots: list[int] = []
        try:
            slot, self._cache = self._pool.acquire(self._cache, len(request.prompt_ids), wait=True)
            slots = [slot]
            log_probs, ids = self._prefill(slot, request.prompt_ids)
            while parents := beams.take(log_probs, ids, self._programs.candidates):
                slots, self._cache = self._pool.reorder(self._cache, slots, parents)
                result = self._step(slots, [tokens[-1] for tokens in beams.tokens])
                if result is None:
                    return []
                log_probs, ids = result
        except jax_kvpage.OutOfBlocks:
            return []
        finally:
            if slots:
                self._cache = self._pool.release(self._cache, slots)
        return beams.finished

    def _prefill(self, slot: int, prompt: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Runs the prompt in the first lane, and returns its most likely next tokens."""
        likely, self._cache = self._programs.prefill(self._cache, [(slot, prompt, 0)], self._width)
        self._pool.commit(slot, prompt)
        self._sample_memory(1)
        return jax.device_get(likely)

    def _step(self, slots: list[int], tokens: list[int]) -> tuple[np.ndarray, np.ndarray] | None:
        """Runs a token of each beam; None if a beam found no block."""
        newest, lanes = jax.device_put((np.asarray(tokens, np.int32), np.asarray(slots, np.int32)))
        likely, produced, self._cache = self._programs.decode(self._cache, newest, lanes, self._ids)
        likely, produced = jax.device_get((likely, produced))
        if not produced.all():
            return None
        for slot, token in zip(slots, tokens, strict=True):
            self._pool.commit(slot, token)
        self.steps += 1
        self._sample_memory(self._width)
        return likely

    def _sample_memory(self, running: int) -> None:
        seconds = time.monotonic() - self._begin - self._programs.compile_seconds
        self.samples.append(memory_sample(self._pool, seconds, running))
        self.sharing.sample(self._pool)
