"""Log probabilities of prompt tokens, collected while the prompt is computed in chunks."""

import math

import numpy as np

from jax_kvpage.serving.engine.flight import Flight
from jax_kvpage.serving.engine.logprobs import logprob_table
from jax_kvpage.serving.engine.tracking import SequenceState

__all__ = ["take_scores", "targets_of"]


def targets_of(flight: Flight) -> np.ndarray | None:
    """Returns the token that follows each token of a step, int32[t], or None without scoring."""
    scoring = _scoring(flight)
    if not scoring:
        return None
    targets = np.zeros(int(flight.counts.sum()), np.int32)
    for state, place, begin, end in scoring:
        following = state.ids[begin + 1 : end + 1]
        targets[place : place + len(following)] = following
    return targets


def take_scores(flight: Flight, scores: np.ndarray) -> None:
    """Passes the scores of a step to its requests.

    Args:
        flight: the step.
        scores: int32[t, ...], from `log_probabilities`.

    Raises:
        RuntimeError: a score is NaN.
    """
    for state, place, begin, end in _scoring(flight):
        request, prompt = state.request, state.request.output.prompt_token_ids
        count = request.params.prompt_logprobs
        assert count is not None
        for position in range(begin + 1, min(end + 1, len(prompt))):
            row = scores[place + position - begin - 1]
            table, own = logprob_table(prompt[position], count, row)
            if math.isnan(own):
                raise RuntimeError("the logits of a prompt are NaN")
            request.scores[position] = table
        if len(request.scores) == len(prompt) - 1:
            tables = (request.scores[position] for position in range(1, len(prompt)))
            request.output.prompt_logprobs = [None, *tables]


def _scoring(flight: Flight) -> list[tuple[SequenceState, int, int, int]]:
    """Sequences whose prompt chunk is scored: index of its first token, begin and end position.

    Decoding sequences have at most the last prompt token left, which no prompt token follows.
    """
    found, first = [], flight.num_decodes
    if not any(state.request.is_scoring for state in flight.states[first:]):
        return []
    place = int(flight.counts[:first].sum())
    for i, state in enumerate(flight.states[first:], first):
        begin, count = int(flight.begins[i]), int(flight.counts[i])
        if state.request.is_scoring:
            found.append((state, place, begin, begin + count))
        place += count
    return found
