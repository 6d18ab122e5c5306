"""The engine's state of a request: its tokens, its text, and whether a token ends it."""

import numpy as np

from jax_kvpage._values import MAX_INT32
from jax_kvpage.serving.beams import BeamSearch, BeamSearchParams, Hypothesis
from jax_kvpage.serving.engine.guidance import Guide
from jax_kvpage.serving.engine.sampling import NUM_FLOATS, NUM_INTS
from jax_kvpage.serving.lookup import NgramIndex
from jax_kvpage.serving.outputs import CompletionOutput, Logprob, RequestOutput
from jax_kvpage.serving.params import SamplingParams
from jax_kvpage.serving.request import Sequence, SequenceGroup
from jax_kvpage.serving.text import Detokenize, TextBuilder

__all__ = ["RequestState", "SequenceState"]


class SequenceState:
    """One continuation of a request.

    Args:
        request: request that it belongs to.
        sequence: the scheduler's sequence.
        output: output that the caller sees.

    Attributes:
        ids: prompt and output tokens that have been read back.
        slot: slot in the pool; -1 without memory.
        row: row across all replicas while it has a slot, else -1.
        computed: tokens whose keys and values exist according to the steps that were read back.
        furthest: maximum of `computed` so far.
        committed: tokens committed to the pool.
        room: tokens that its slot has room for.
        lookup: index for prompt lookup; None if not used.
        guide: its state in the request's grammar; None without a grammar.
        ended: whether the caller has seen its end.
    """

    __slots__ = (
        "_text",
        "committed",
        "computed",
        "ended",
        "furthest",
        "guide",
        "ids",
        "lookup",
        "output",
        "request",
        "room",
        "row",
        "sequence",
        "slot",
    )

    def __init__(
        self, request: "RequestState", sequence: Sequence, output: CompletionOutput
    ) -> None:
        self.request = request
        self.sequence = sequence
        self.output = output
        self.ids = list(request.output.prompt_token_ids)
        self.slot = self.row = -1
        self.computed = self.committed = self.room = self.furthest = 0
        self.ended = False
        params = request.params
        self.lookup: NgramIndex | None = None
        self.guide = None if request.guide is None else request.guide.copy()
        self._text: TextBuilder | None = None
        if request.detokenize is not None:
            self._text = TextBuilder(request.detokenize, self.ids, params.stop)

    @property
    def is_dropped(self) -> bool:
        """Whether it has lost its scheduler row, so that its slot must be released."""
        return self.sequence.place != self.row

    def ran(self, begin: int, count: int) -> None:
        """Records that `count` tokens starting at position `begin` were computed."""
        self.computed = begin + count
        metrics = self.request.output.metrics
        metrics.num_computed_tokens += count
        if begin < self.furthest:
            metrics.num_recomputed_tokens += min(self.furthest - begin, count)
        self.furthest = max(self.furthest, self.computed)

    @property
    def final(self) -> int:
        """How many of the computed tokens can be committed now."""
        known = len(self.ids) - 1 if self.ended else len(self.ids)
        return min(self.computed, known)

    def append(self, token: int, logprobs: tuple[dict[int, Logprob], float] | None) -> bool:
        """Appends a token; returns whether it ends the sequence.

        Args:
            token: the sampled token.
            logprobs: log probabilities by token id, and that of the token; None if not requested.
        """
        output = self.output
        if self.guide is not None:
            self.guide.take(token)
        self.ids.append(token)
        output.token_ids.append(token)
        if logprobs is not None:
            assert output.logprobs is not None
            output.logprobs.append(logprobs[0])
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + logprobs[1]
        searched = 0
        if self._text is not None:
            searched = len(self._text.text)
            self._text.push(token)
        if self._ends(token, searched):
            return True
        if self.guide is not None and self.guide.is_done:
            self.end("stop")
            return True
        if len(self.ids) >= self.sequence.group.limit:
            self.end(self.sequence.group.limit_reason)
            return True
        if self._text is not None:
            output.text = self._text.shown
        return False

    def conclude(self, found: Hypothesis) -> None:
        """Outputs a continuation found by beam search, and ends the sequence."""
        output, last = self.output, found.token_ids[-1]
        output.token_ids = found.token_ids
        output.cumulative_logprob, output.score = found.logprob, found.score
        if self._text is not None:
            for token in found.token_ids:
                self._text.push(token)
        if last in self.request.params.stop_token_ids:
            self.end("stop", last)
        elif last in self.request.eos:
            self.end("stop")
        else:
            self.end(self.sequence.group.limit_reason)

    def end(self, reason: str, stop_reason: int | str | None = None) -> None:
        """Sets the finish reason and completes the text."""
        self.output.finish_reason = reason
        self.ended = True
        self.output.stop_reason = stop_reason
        if self._text is None or isinstance(stop_reason, str):
            return
        try:
            self._text.finish()
        except Exception as error:  # from the caller's `detokenize`; keeps the text so far
            self.output.finish_reason, output = "error", self.request.output
            output.error = output.error or f"{type(error).__name__}: {error}"
        self.output.text = self._text.text

    def _ends(self, token: int, searched: int) -> bool:
        params = self.request.params
        if len(self.output.token_ids) <= params.min_tokens:
            return False
        if token in params.stop_token_ids:
            self.end("stop", token)
            return True
        if token in self.request.eos:
            self.end("stop")
            return True
        found = self._text.find_stop(searched) if self._text is not None else None
        if found is None:
            return False
        text, begin = found
        end = begin + len(text) if params.include_stop_str_in_output else begin
        assert self._text is not None
        self.output.text = self._text.text[:end]
        self.end("stop", text)
        return True


class RequestState:
    """A request and its continuations.

    Args:
        output: output that the caller sees.
        params: sampling parameters.
        seed: random seed.
        eos: tokens that end it, besides those in stop_token_ids.
        detokenize: converts token ids to text; None for ids only.
        namespace: namespace of its tokens in the pool.
        guide: initial state of its grammar; None without a grammar.
        searched: parameters of the beam search; None for sampling.

    Attributes:
        group: the scheduler's group.
        sequences: all n sequences.
        scores: log probabilities of prompt tokens, by position.
        search: the beam search; None for sampling.
        beams: its sequences in the order of the search's beams.
    """

    __slots__ = (
        "_searched",
        "beams",
        "detokenize",
        "eos",
        "group",
        "guide",
        "namespace",
        "output",
        "params",
        "scores",
        "search",
        "seed",
        "sequences",
    )

    def __init__(
        self,
        output: RequestOutput,
        params: SamplingParams,
        seed: int,
        eos: tuple[int, ...],
        detokenize: Detokenize | None,
        namespace: str,
        guide: Guide | None = None,
        searched: BeamSearchParams | None = None,
    ) -> None:
        self.output = output
        self.params = params
        self.seed = seed
        self.eos = frozenset() if params.ignore_eos else frozenset(eos)
        self.detokenize = detokenize
        self.namespace = namespace
        self.guide = guide
        self.group: SequenceGroup
        self.sequences: list[SequenceState] = []
        self.scores: dict[int, dict[int, Logprob]] = {}
        if params.prompt_logprobs is not None and len(output.prompt_token_ids) == 1:
            output.prompt_logprobs = [None]
        self.search: BeamSearch | None = None
        self.beams: list[SequenceState] = []
        self._searched = searched

    @property
    def is_scoring(self) -> bool:
        """Whether log probabilities of the prompt are requested and still incomplete."""
        return self.params.prompt_logprobs is not None and self.output.prompt_logprobs is None

    @property
    def can_be_guessed(self) -> bool:
        """Whether its next tokens depend only on the sequence and the model."""
        return self._searched is None and not self.params.has_penalties

    def start(self, group: SequenceGroup) -> None:
        """Creates the state of the scheduler's sequences."""
        self.group = group
        for sequence in group.sequences:
            output = CompletionOutput(sequence.index)
            if self.params.logprobs is not None and self._searched is None:
                output.logprobs, output.cumulative_logprob = [], 0.0
            self.output.outputs.append(output)
            self.sequences.append(SequenceState(self, sequence, output))
        if self._searched is not None:
            stops = self.eos | set(self.params.stop_token_ids)
            most = group.limit - len(self.output.prompt_token_ids)
            self.search = BeamSearch(self._searched, stops, most)
            self.beams = list(self.sequences)

    def sampling_column(self, index: int, num_banned: int) -> np.ndarray:
        """Device parameters of one continuation, int32[...]; see `RowParams`."""
        params, prompt = self.params, len(self.output.prompt_token_ids)
        column = np.full(NUM_FLOATS + NUM_INTS + num_banned, -1, np.int32)
        floats = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
        )
        column[:NUM_FLOATS] = np.asarray(floats, np.float32).view(np.int32)
        seed = int(np.asarray(self.seed, np.uint32).view(np.int32))
        allowed = min(prompt + params.min_tokens, MAX_INT32)
        wanted = 0 if params.logprobs is None else 1
        column[NUM_FLOATS : NUM_FLOATS + NUM_INTS] = (
            min(max(params.top_k, 0), MAX_INT32),
            seed,
            index,
            prompt,
            allowed,
            wanted,
        )
        if params.min_tokens:
            banned = sorted({*params.stop_token_ids, *self.eos})
            column[NUM_FLOATS + NUM_INTS :][: len(banned)] = banned
        return column
