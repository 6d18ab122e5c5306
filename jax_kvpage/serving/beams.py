"""Beam search on the host: chooses the continuations from the most likely next tokens of each beam.

The rules are those of transformers' `generate(num_beams=W, do_sample=False)`: each step ranks the
continuations of all beams. Those that end are kept if they are among the first W; the best W of the
others continue. The search ends when no beam can become better than the worst of W finished
continuations.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Literal

import numpy as np

from jax_kvpage._values import as_tuple, is_integer, is_number, raise_all
from jax_kvpage.serving.params import SamplingParams

__all__ = ["BeamSearch", "BeamSearchParams", "Hypothesis", "Params"]

_NEVER = np.float32(-1e9)  # log probability of beams that do not exist yet


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Parameters of a beam search, and when its sequences end.

    The search is deterministic. The output has `beam_width` continuations, best first, each with
    its `CompletionOutput.score`; they are returned when the search ends.

    Attributes:
        beam_width: beams that continue in each step, and continuations in the result. The pool
            reserves twice as many slots for the request.
        max_tokens: maximum number of tokens to produce.
        ignore_eos: continue after the engine's end-of-sequence tokens.
        stop_token_ids: further tokens that end a continuation.
        length_penalty: the score is the sum of log probabilities divided by the number of tokens to
            this power; values above 0 favor long continuations, below 0 short ones.
        early_stopping: when the search ends. True: as soon as there are `beam_width` finished
            continuations. False: when the best running beam, at its present length, is no better
            than the worst finished one. "never": when it cannot become better at any length up to
            max_tokens.

    Raises:
        ValueError: values out of range; one error lists all of them.
    """

    beam_width: int
    max_tokens: int = 16
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] | list[int] = ()
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", as_tuple(self.stop_token_ids))
        reasons = [
            f"{name} is {getattr(self, name)!r}, wanted 1 or more"
            for name in ("beam_width", "max_tokens")
            if not is_integer(getattr(self, name)) or getattr(self, name) < 1
        ]
        if not isinstance(self.ignore_eos, bool):
            reasons.append(f"ignore_eos is {self.ignore_eos!r}, wanted True or False")
        ids = self.stop_token_ids
        if not isinstance(ids, tuple) or not all(is_integer(t) and 0 <= t < 2**31 for t in ids):
            reasons.append(f"stop_token_ids is {self.stop_token_ids!r}, wanted token ids")
        power = self.length_penalty
        if not is_number(power) or not math.isfinite(power):
            reasons.append(f"length_penalty is {power!r}, wanted a finite number")
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            reasons.append(f"early_stopping is {self.early_stopping!r}, wanted a bool or 'never'")
        raise_all("BeamSearchParams", reasons)

    def num_candidates(self, num_stops: int) -> int:
        """Continuations ranked per step: enough for W to continue even if the others end.

        Args:
            num_stops: number of different tokens that end a continuation.
        """
        return max(2, 1 + num_stops) * self.beam_width

    def sampling(self, num_stops: int) -> SamplingParams:
        """Returns parameters with which the sampler yields the candidates of each beam."""
        return SamplingParams(
            n=self.beam_width,
            temperature=0,
            max_tokens=self.max_tokens,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logprobs=self.num_candidates(num_stops),
        )


Params = SamplingParams | BeamSearchParams


@dataclasses.dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished continuation.

    Attributes:
        token_ids: its tokens, including the one that ended it.
        logprob: sum of the log probabilities.
        score: the sum divided by the number of tokens to the power of length_penalty.
    """

    token_ids: list[int]
    logprob: float
    score: float


class BeamSearch:
    """The running beams and the best finished continuations of one prompt, without their memory.

    Args:
        params: parameters of the request.
        stop_ids: tokens that end a continuation.
        max_tokens: maximum tokens per continuation.

    Attributes:
        tokens: output tokens of each running beam, W lists.
        finished: at most W finished continuations, best first.
        done: whether the search has ended.
    """

    def __init__(
        self, params: BeamSearchParams, stop_ids: Collection[int], max_tokens: int
    ) -> None:
        self._params = params
        self._width = params.beam_width
        self._stop_ids = frozenset(stop_ids)
        self._candidates = params.num_candidates(len(self._stop_ids))
        self._most = max_tokens
        # Only the first beam counts in the first step, because all beams have the same tokens.
        self._totals = np.full(self._width, _NEVER, np.float32)
        self._totals[0] = 0
        self.tokens: list[list[int]] = [[] for _ in range(self._width)]
        self.finished: list[Hypothesis] = []
        self.done = False

    def take(self, logprobs: np.ndarray, ids: np.ndarray) -> list[int]:
        """Advances the search by one token.

        Args:
            logprobs: float32[W, K]: log probabilities of the most likely next tokens of each beam,
                in descending order. K is `BeamSearchParams.num_candidates`, or the vocabulary size
                if that is less.
            ids: int32[W, K]: the tokens.

        Returns:
            Parent indices of the W beams that continue; empty at the end of the search.
        """
        totals = (logprobs + self._totals[:, None]).ravel()
        order = np.argsort(-totals, kind="stable")[: self._candidates]
        parents, tokens = order // logprobs.shape[1], ids.ravel()[order]
        length = len(self.tokens[0]) + 1
        outputs = [
            [*self.tokens[parent], int(token)]
            for parent, token in zip(parents, tokens, strict=True)
        ]
        ends = [length == self._most or output[-1] in self._stop_ids for output in outputs]
        for i in range(min(self._width, len(outputs))):
            if ends[i]:
                total = totals[order[i]]
                score = float(total / self._penalty(length))
                self.finished.append(Hypothesis(outputs[i], float(total), score))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[self._width :]
        kept = [i for i, end in enumerate(ends) if not end][: self._width]
        if len(kept) < self._width:  # all end here, or the vocabulary is too small
            self.done = True
            return []
        self.tokens = [outputs[i] for i in kept]
        self._totals = totals[order[kept]]
        self.done = len(self.finished) == self._width and not self._may_improve(length)
        return [] if self.done else [int(parents[i]) for i in kept]

    def _may_improve(self, length: int) -> bool:
        """Whether a running beam may become better than the worst finished continuation."""
        early = self._params.early_stopping
        if early is True:
            return False
        if early == "never" and self._params.length_penalty > 0:
            length = self._most
        return float(self._totals[0] / self._penalty(length)) > self.finished[-1].score

    def _penalty(self, length: int) -> np.float32:
        return np.float32(length**self._params.length_penalty)
