"""Which sequences speculate, and on which tokens."""

from collections.abc import Iterable

from jax_kvpage.serving.engine.config import EngineConfig
from jax_kvpage.serving.engine.tracking import SequenceState
from jax_kvpage.serving.lookup import NgramIndex

__all__ = ["guess"]


def guess(states: Iterable[SequenceState], config: EngineConfig) -> dict[SequenceState, list[int]]:
    """Guesses the next tokens of sequences that decode; every step is read back.

    Penalties depend on the tokens so far, which are not known on the device before guesses are
    verified: such sequences are left out.

    Args:
        states: sequences that have memory.
        config: of the engine.

    Returns:
        Those with a guess.
    """
    found = {}
    for state in states:
        decodes = state.computed == len(state.ids) - 1
        if state.ended or not decodes or state.request.params.has_penalties:
            continue
        if state.lookup is None:
            state.lookup = NgramIndex(config.prompt_lookup_min, config.prompt_lookup_max)
        tokens = state.lookup.guess(state.ids, config.num_speculative_tokens)
        if tokens and state.guide is not None:
            tokens = state.guide.cut(tokens)
        if tokens:
            found[state] = tokens
    return found
