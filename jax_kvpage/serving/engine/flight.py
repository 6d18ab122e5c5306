"""A step between its dispatch and its read-back, and what comes of it."""

import dataclasses
import time

import numpy as np

from jax_kvpage.serving.engine.guidance import Guide
from jax_kvpage.serving.engine.programs import Outcome
from jax_kvpage.serving.engine.tracking import SequenceState
from jax_kvpage.serving.outputs import Logprob

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
        guesses: for each of those, tokens to verify behind it.
        outcome: on the device; None if the dispatch failed.
        error: why it failed; None as well if an interrupt cut it short.
        retried: whether it was run again after a failure.
        accepted: int32[s], guesses that were right; once it is read back.
        launched: when it was dispatched, in seconds of `time.monotonic`.
    """

    states: list[SequenceState]
    rows: np.ndarray
    begins: np.ndarray
    counts: np.ndarray
    samples: np.ndarray
    num_decodes: int
    guesses: list[list[int]]
    outcome: Outcome | None = None
    error: BaseException | None = None
    retried: bool = False
    accepted: np.ndarray | None = None
    launched: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def num_guesses(self) -> np.ndarray:
        """int32[s], tokens to verify."""
        found = np.zeros(len(self.states), np.int32)
        found[: self.num_decodes] = [len(each) for each in self.guesses]
        return found

    def guided(self) -> list[tuple[int, Guide, list[int]]]:
        """Places of sequences that sample from a mask, their guides and guesses."""
        return [
            (i, guide, self.guesses[i] if i < self.num_decodes else [])
            for i, state in enumerate(self.states)
            if (guide := state.guide) is not None and self.samples[i]
        ]

    def keep(self, places: list[int]) -> None:
        """Leaves all other sequences out."""
        self.num_decodes = sum(i < self.num_decodes for i in places)
        self.guesses = [self.guesses[i] for i in places[: self.num_decodes]]
        self.states = [self.states[i] for i in places]
        for name in ("rows", "begins", "counts", "samples"):
            setattr(self, name, getattr(self, name)[places])


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
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
