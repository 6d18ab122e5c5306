"""Speculation: chooses the sequences and guesses their tokens."""

from collections.abc import Callable, Iterable
from typing import Protocol

from jax_kvpage.serving.engine.config import EngineConfig
from jax_kvpage.serving.engine.tracking import SequenceState
from jax_kvpage.serving.lookup import NgramIndex

__all__ = ["Guesser", "PromptLookup"]


class Guesser(Protocol):
    """Guesses tokens. Every step must be read back before the next guess."""

    @property
    def compile_seconds(self) -> float:
        """Time spent compiling the guesser's programs."""

    def guess(self, states: Iterable[SequenceState]) -> dict[SequenceState, list[int]]:
        """Guesses the next tokens of decoding sequences.

        Skips sequences with penalties, which depend on previous tokens that the device does not
        know before guesses are verified, and beams, whose tokens the host chooses.

        Args:
            states: sequences that have memory.

        Returns:
            Guesses of the sequences that have any.
        """

    def follow(self, states: Iterable[SequenceState]) -> None:
        """Forgets all sequences but the given ones, which have memory."""

    def warm_up(self, progress: Callable[[int, int], None] | None) -> None:
        """Compiles the guesser's programs."""


class PromptLookup:
    """Guesses the tokens that followed the last occurrence of the newest tokens.

    Args:
        config: configuration of the engine.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.compile_seconds = 0.0  # the search runs on the host

    def guess(self, states: Iterable[SequenceState]) -> dict[SequenceState, list[int]]:
        """See `Guesser`."""
        config, found = self._config, {}
        for state in states:
            decodes = state.computed == len(state.ids) - 1
            if state.ended or not decodes or not state.request.can_be_guessed:
                continue
            if state.lookup is None:
                state.lookup = NgramIndex(config.prompt_lookup_min, config.prompt_lookup_max)
            tokens = state.lookup.guess(state.ids, config.num_speculative_tokens)
            if tokens and state.guide is not None:
                tokens = state.guide.cut(tokens)
            if tokens:
                found[state] = tokens
        return found

    def follow(self, states: Iterable[SequenceState]) -> None:
        """Does nothing: an index is owned by its sequence."""

    def warm_up(self, progress: Callable[[int, int], None] | None) -> None:
        """Does nothing."""
