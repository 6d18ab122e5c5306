"""A step in flight, from dispatch to read-back, and its results."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np

from jax_kvpage.serving.engine.guidance import Guide
from jax_kvpage.serving.engine.packing import Packed
from jax_kvpage.serving.engine.programs import Outcome
from jax_kvpage.serving.engine.tracking import SequenceState
from jax_kvpage.serving.outputs import Logprob
from jax_kvpage.serving.plan import StepPlan

__all__ = ["Flight", "StepFailed", "Token"]


@dataclasses.dataclass(eq=False, slots=True)
class Flight:
    """A step in flight, from dispatch to read-back.

    Attributes:
        states: its sequences.
        rows: int32[s]: scheduler rows.
        begins: int32[s]: position of the first token.
        counts: int32[s]: number of tokens.
        samples: bool[s]: whether a token is sampled.
        num_decodes: number of leading sequences that run their newest token.
        guesses: tokens to verify after the newest one, for some of the decoding sequences.
        outcome: results on the device; None if the dispatch failed.
        packed: where its sequences are in the outcome.
        error: why the dispatch failed; also None if it was interrupted.
        retried: whether it was run again after a failure.
        accepted: int32[s]: number of accepted guesses; None without guesses and before the
            read-back.
        launched: time of dispatch, in seconds of `time.monotonic`.
    """

    states: list[SequenceState]
    rows: np.ndarray
    begins: np.ndarray
    counts: np.ndarray
    samples: np.ndarray
    num_decodes: int
    guesses: dict[SequenceState, list[int]]
    outcome: Outcome | None = None
    packed: Packed | None = None
    error: BaseException | None = None
    retried: bool = False
    accepted: np.ndarray | None = None
    launched: float = dataclasses.field(default_factory=time.monotonic)

    @classmethod
    def planned(
        cls,
        plan: StepPlan,
        states: Sequence[SequenceState],
        guesses: Mapping[SequenceState, list[int]],
    ) -> Self | None:
        """Creates the step of a plan, or None if nothing is left to run. See `Runner.launch`."""
        begins, counts = plan.begins, plan.counts
        if len(states) > plan.num_decodes:  # cached prompt tokens are not run
            found = [state.computed for state in states[plan.num_decodes :]]
            begins = begins.copy()
            begins[plan.num_decodes :] = np.maximum(begins[plan.num_decodes :], found)
            counts = plan.begins + counts - begins
        lengths = counts.tolist()
        keep = [i for i, state in enumerate(states) if lengths[i] > 0 and not state.ended]
        if not keep:
            return None
        drafts: dict[SequenceState, list[int]] = {}
        if guesses:
            decodes = zip(states[: plan.num_decodes], lengths, strict=False)
            drafts = {s: cut for s, n in decodes if (cut := guesses.get(s, [])[: n - 1])}
        flight = cls(
            list(states), plan.rows, begins, counts, plan.samples, plan.num_decodes, drafts
        )
        flight.keep(keep)
        return flight

    @property
    def num_guesses(self) -> np.ndarray | None:
        """int32[s]: number of guesses; None without guesses."""
        if not self.guesses:
            return None
        return np.asarray([len(self.guesses.get(state, ())) for state in self.states], np.int32)

    @property
    def num_prompt_tokens(self) -> int:
        """Number of tokens besides those of decoding sequences."""
        if self.num_decodes == len(self.states):
            return 0
        return sum(self.counts[self.num_decodes :].tolist())

    def guided(self) -> list[tuple[int, Guide, list[int]]]:
        """Positions of sequences that sample with a mask, their guides and guesses."""
        return [
            (i, guide, self.guesses.get(state, []))
            for i, state in enumerate(self.states)
            if (guide := state.guide) is not None and self.samples[i]
        ]

    def keep(self, places: list[int]) -> None:
        """Keeps only the sequences at these positions."""
        if len(places) == len(self.states):
            return
        self.num_decodes = sum(i < self.num_decodes for i in places)
        self.states = [self.states[i] for i in places]
        self.guesses = {s: self.guesses[s] for s in self.states if s in self.guesses}
        for name in ("rows", "begins", "counts", "samples"):
            setattr(self, name, getattr(self, name)[places])


class Token(NamedTuple):
    """A sampled token: its sequence, its id, and log probabilities if requested."""

    state: SequenceState
    token: int
    logprobs: tuple[dict[int, Logprob], float] | None


class StepFailed(RuntimeError):
    """Raised if a step failed twice.

    Attributes:
        reason: the error of the second attempt.
    """

    def __init__(self, reason: BaseException) -> None:
        super().__init__(str(reason))
        self.reason = reason
