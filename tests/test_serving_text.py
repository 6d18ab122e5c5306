"""The text of a growing sequence, with stop strings, against a plain model."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from jax_kvpage.serving import (
    Request,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    SequenceGroup,
)
from jax_kvpage.serving.engine.tracking import RequestState, SequenceState

# Token i is _PIECES[i]. Two letters, so that stop strings are common and overlap.
_PIECES = ["a", "b", "ab", "ba", "aab", "abba", "é", ""]


def _decode(ids: Sequence[int]) -> str:
    return "".join(_PIECES[i] for i in ids)


def _state(stop: Sequence[str], min_tokens: int, include: bool) -> SequenceState:
    params = SamplingParams(
        max_tokens=100, stop=tuple(stop), min_tokens=min_tokens, include_stop_str_in_output=include
    )
    request = RequestState(
        RequestOutput(0, [0], [], RequestMetrics(0.0)), params, 0, (), _decode, ""
    )
    request.start(
        SequenceGroup(Request(request_id=0, num_prompt_tokens=1, max_tokens=100), 0, 101, "length")
    )
    return request.sequences[0]


def _first_stop(
    tokens: Sequence[int], stop: Sequence[str], min_tokens: int
) -> tuple[int, int, str]:
    """Returns (tokens read, start of the stop string, stop string), or (len(tokens), -1, "")."""
    for count in range(min_tokens + 1, len(tokens) + 1):
        before, text = len(_decode(tokens[: count - 1])), _decode(tokens[:count])
        for end in range(before + 1, len(text) + 1):
            for each in stop:
                if text[:end].endswith(each):
                    return count, end - len(each), each
    return len(tokens), -1, ""


@example(tokens=[0, 1], stop=["wxyz", "a"], min_tokens=1, include=False)  # an "a" too early
@example(tokens=[0, 1, 0, 0, 1], stop=["abaab"], min_tokens=0, include=False)  # shorter than it
@given(
    tokens=st.lists(st.integers(0, len(_PIECES) - 1), max_size=12),
    stop=st.lists(st.text("abé", min_size=1, max_size=5), max_size=3),
    min_tokens=st.integers(0, 5),
    include=st.booleans(),
)
def test_the_text_only_grows_and_never_shows_a_part_of_a_stop_string(
    tokens: list[int], stop: list[str], min_tokens: int, include: bool
) -> None:
    state = _state(stop, min_tokens, include)
    count, begin, found = _first_stop(tokens, stop, min_tokens)
    held = max((len(each) for each in stop), default=1) - 1
    shown = [""]
    for i, token in enumerate(tokens[:count]):
        ended = state.append(token, None)
        assert ended == bool(found and i == count - 1)
        assert state.output.text.startswith(shown[-1])
        shown.append(state.output.text)
        if not ended:
            assert len(shown[-1]) >= len(_decode(tokens[: i + 1])) - held
    if found:
        assert (state.output.finish_reason, state.output.stop_reason) == ("stop", found)
        expected = _decode(tokens[:count])[: begin + len(found) * include]
    else:
        state.end("cancelled")
        expected = _decode(tokens)
    assert state.output.text == expected
    for each in shown[:-1]:  # until the end, no part of what is cut or of the stop string
        assert (expected[:begin] if found else expected).startswith(each)
