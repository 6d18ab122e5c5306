"""Which sequences speculate, and on which tokens."""

from collections.abc import Callable, Iterable
from typing import Protocol

from jax_kvpage.serving.engine.config import EngineConfig
from jax_kvpage.serving.engine.tracking import SequenceState
from jax_kvpage.serving.lookup import NgramIndex

__all__ = ["Guesser", "PromptLookup"]


class Guesser(Protocol):
    """Guesses tokens; every step is read back before the next guess."""

    @property
    def compile_seconds(self) -> float:
        """Time spent compiling what guesses need."""

    def guess(self, states: Iterable[SequenceState]) -> dict[SequenceState, list[int]]:
        """Guesses the next tokens of sequences that decode.

        Penalties depend on the tokens so far, which are not known on the device before guesses are
        verified, and the host chooses the tokens of beams: such sequences are left out.

        Args:
            states: sequences that have memory.

        Returns:
            Those with a guess.
        """

    def follow(self, states: Iterable[SequenceState]) -> None:
        """Forgets all sequences but those that have memory."""

    def warm_up(self, progress: Callable[[int, int], None] | None) -> None:
        """Compiles what guesses need."""


class PromptLookup:
    """Guesses what followed the newest tokens the last time they occurred.

    Args:
        config: of the engine.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.compile_seconds = 0.0  # the host searches

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
        """Does nothing: an index goes with its sequence."""

    def warm_up(self, progress: Callable[[int, int], None] | None) -> None:
        """Does nothing."""
