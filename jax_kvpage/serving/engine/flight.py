"""A step between its dispatch and its read-back, and what comes of it."""

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


@dataclasses.dataclass(eq=False)
class Flight:
    """A step between its dispatch and its read-back.

    Attributes:
        states: its sequences.
        rows: int32[s], of the scheduler.
        begins: int32[s], position of the first token.
        counts: int32[s], tokens.
        samples: bool[s], whether a token is sampled.
        num_decodes: sequences that run their newest token.
        guesses: of some of those, tokens to verify behind it.
        outcome: on the device; None if the dispatch failed.
        packed: says where its sequences are in the outcome.
        error: why it failed; None as well if an interrupt cut it short.
        retried: whether it was run again after a failure.
        accepted: int32[s], guesses that were right; None without any, and before the read-back.
        launched: when it was dispatched, in seconds of `time.monotonic`.
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
        """The step of a plan; None if nothing is left to run. For arguments see `Runner.launch`."""
        begins, counts = plan.begins, plan.counts
        if len(states) > plan.num_decodes:  # what was found of a prompt is not run
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
        """int32[s], tokens to verify; None without any."""
        if not self.guesses:
            return None
        return np.asarray([len(self.guesses.get(state, ())) for state in self.states], np.int32)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens beside those of sequences that decode."""
        return sum(self.counts[self.num_decodes :].tolist())

    def guided(self) -> list[tuple[int, Guide, list[int]]]:
        """Places of sequences that sample from a mask, their guides and guesses."""
        return [
            (i, guide, self.guesses.get(state, []))
            for i, state in enumerate(self.states)
            if (guide := state.guide) is not None and self.samples[i]
        ]

    def keep(self, places: list[int]) -> None:
        """Leaves all other sequences out."""
        if len(places) == len(self.states):
            return
        self.num_decodes = sum(i < self.num_decodes for i in places)
        self.states = [self.states[i] for i in places]
        self.guesses = {s: self.guesses[s] for s in self.states if s in self.guesses}
        for name in ("rows", "begins", "counts", "samples"):
            setattr(self, name, getattr(self, name)[places])


class Token(NamedTuple):
    """A sampled token: the sequence, the id, and log probabilities if it has them."""

    state: SequenceState
    token: int
    logprobs: tuple[dict[int, Logprob], float] | None


class StepFailed(RuntimeError):
    """A step failed twice.

    Attributes:
        reason: why, the second time.
    """

    def __init__(self, reason: BaseException) -> None:
        super().__init__(str(reason))
        self.reason = reason
