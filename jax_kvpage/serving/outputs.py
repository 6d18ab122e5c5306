"""Outputs of the engine."""

import dataclasses

__all__ = ["CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput"]


@dataclasses.dataclass(frozen=True, slots=True)
class Logprob:
    """Log probability of a token.

    Attributes:
        logprob: natural logarithm, before penalties and temperature.
        rank: 1 for the most likely token.
    """

    logprob: float
    rank: int


@dataclasses.dataclass(slots=True)
class CompletionOutput:
    """One continuation of a prompt.

    Attributes:
        index: from 0 to n - 1.
        token_ids: tokens produced, the stop token included.
        text: their text without the stop string; "" without a detokenizer. While the output is
            unfinished, trailing characters that may change or be part of a stop string are held
            back.
        logprobs: for each token, the requested log probabilities by token id; None if not
            requested.
        cumulative_logprob: sum over the chosen tokens; None without logprobs or beam search.
        score: score by which beam search ranks the continuation; None otherwise.
        finish_reason: None while unfinished; "stop" (a stop token or stop string), "length",
            "capacity" (memory is full), "cancelled", "deadline" or "error".
        stop_reason: the token id or string that ended it; None for the end-of-sequence token.
    """

    index: int
    token_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    score: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclasses.dataclass(slots=True)
class RequestMetrics:
    """Times, in seconds of `time.monotonic`, and counts.

    Attributes:
        arrival: when the request was added.
        first_token: when its first token was produced; None before.
        finished: when it ended; None before.
        token_times: when each token of its first continuation was produced.
        num_cached_tokens: tokens found in the prefix cache, summed over all admissions.
        num_computed_tokens: tokens run through the model.
        num_recomputed_tokens: of these, tokens that had already been computed before a preemption.
        num_preemptions: how often the request lost its memory and was recomputed.
    """

    arrival: float
    first_token: float | None = None
    finished: float | None = None
    token_times: list[float] = dataclasses.field(default_factory=list)
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_preemptions: int = 0


@dataclasses.dataclass(slots=True)
class RequestOutput:
    """A request and what it has produced so far.

    Attributes:
        request_id: as given to the engine.
        prompt_token_ids: the prompt.
        outputs: its n continuations.
        metrics: times and counts.
        finished: whether all continuations have ended.
        error: what went wrong, if a finish_reason is "error".
        prompt_logprobs: for each prompt token, the requested log probabilities by token id, and
            None for the first; None if not requested or until the prompt is computed.
    """

    request_id: object
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    finished: bool = False
    error: str | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
