"""Tracks requests from arrival to end, and the outputs that callers have not seen yet."""

from collections.abc import Callable, Sequence

import numpy as np

from jax_kvpage.serving.engine.flight import Token
from jax_kvpage.serving.engine.tracking import RequestState, SequenceState
from jax_kvpage.serving.outputs import RequestOutput
from jax_kvpage.serving.request import Sequence as ScheduledSequence
from jax_kvpage.serving.request import SequenceGroup

__all__ = ["Ledger"]


class Ledger:
    """The unfinished requests, and the outputs that have changed.

    Args:
        clock: returns seconds.

    Attributes:
        states: state of each scheduler sequence.
        num_searches: beam search requests, for which each step must be read back before the next.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._requests: dict[SequenceGroup, RequestState] = {}
        self._by_output: dict[int, RequestState] = {}
        self._changed: dict[int, RequestOutput] = {}
        self.states: dict[ScheduledSequence, SequenceState] = {}
        self.num_searches = 0

    def add(self, request: RequestState, group: SequenceGroup) -> None:
        """Adds a request that the scheduler has accepted."""
        request.start(group)
        self.num_searches += request.search is not None
        self._requests[group] = request
        self._by_output[id(request.output)] = request
        self.states.update((state.sequence, state) for state in request.sequences)

    def find(self, output: RequestOutput) -> RequestState | None:
        """Returns the request of an output; None once it is forgotten."""
        return self._by_output.get(id(output))

    def request(self, group: SequenceGroup) -> RequestState | None:
        """Returns the request of a group; None once it is forgotten."""
        return self._requests.get(group)

    def requests(self) -> list[RequestState]:
        """Returns the requests whose groups have not been forgotten."""
        return list(self._requests.values())

    def tokens_of(self, group: SequenceGroup) -> tuple[np.ndarray, str]:
        """Returns the tokens of a waiting group, int32[n], and its namespace."""
        state = self.states[group.live[0]]
        return np.asarray(state.ids, np.int32), state.request.namespace

    def preempted(self, groups: Sequence[SequenceGroup]) -> None:
        """Counts preemptions."""
        for group in groups:
            self._requests[group].output.metrics.num_preemptions += 1

    def take(self, token: Token, now: float) -> bool:
        """Adds a token to its sequence; returns whether it ends the sequence before its limit."""
        state = token.state
        output, metrics = state.request.output, state.request.output.metrics
        self._changed[id(output)] = output
        if metrics.first_token is None:
            metrics.first_token = now
        if state.output.index == 0:
            metrics.token_times.append(now)
        if not state.append(token.token, token.logprobs):
            return False
        self._finish(state.request)
        return len(state.ids) < state.sequence.group.limit

    def take_beams(self, request: RequestState, now: float) -> None:
        """Adds the continuations that a beam search found, and ends the request."""
        assert request.search is not None
        output, found = request.output, request.search.finished
        output.metrics.first_token = now
        output.metrics.token_times += [now] * len(found[0].token_ids) if found else []
        for state, hypothesis in zip(request.sequences, found, strict=False):
            state.conclude(hypothesis)
        self.end(request, "stop")  # any left over, if the vocabulary is too small

    def end(self, request: RequestState, reason: str) -> None:
        """Ends the unfinished sequences of a request."""
        for state in request.sequences:
            if not state.ended:
                state.end(reason)
        self._finish(request)

    def fail(self, request: RequestState, error: BaseException) -> None:
        """Ends a request with the reason "error", unless it has ended."""
        if not request.output.finished:
            request.output.error = f"{type(error).__name__}: {error}"
            self.end(request, "error")

    def forget(self, groups: Sequence[SequenceGroup]) -> None:
        """Forgets groups that the scheduler has ended and whose steps have been read back."""
        for group in groups:
            request = self._requests.pop(group, None)
            if request is None:  # forgotten before an interrupt
                continue
            del self._by_output[id(request.output)]
            self.num_searches -= request.search is not None
            for state in request.sequences:
                if not state.ended:
                    state.end(state.sequence.finish_reason or "cancelled")
                del self.states[state.sequence]
            self._finish(request)

    def changed(self) -> list[RequestOutput]:
        """Returns the outputs that have new tokens or have ended since the previous call."""
        changed, self._changed = list(self._changed.values()), {}
        return changed

    def _finish(self, request: RequestState) -> None:
        output = request.output
        if not output.finished and all(state.ended for state in request.sequences):
            output.finished = True
            output.metrics.finished = self._clock()
            self._changed[id(output)] = output
