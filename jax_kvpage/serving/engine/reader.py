"""Reads steps back: hands out their tokens, and queues updates for the scheduler.

A plan may only be refused if the scheduler has not been called since. It therefore learns the
results of a step only after the plan has been carried out or given up.
"""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from jax_kvpage.serving.engine.beams import Beams
from jax_kvpage.serving.engine.flight import Flight, StepFailed, Token
from jax_kvpage.serving.engine.ledger import Ledger
from jax_kvpage.serving.engine.prefill_rate import PrefillRate
from jax_kvpage.serving.engine.runner import Runner
from jax_kvpage.serving.engine.scheduling import AnyScheduler
from jax_kvpage.serving.engine.slots import Slots
from jax_kvpage.serving.engine.tracking import RequestState

__all__ = ["Reader"]


class Reader:
    """Reads steps back.

    Args:
        runner: dispatches the steps.
        scheduler: scheduler to update.
        ledger: unfinished requests.
        slots: slots of their sequences.
        clock: returns seconds.
        prefill_rate: measured speed of the engine.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: AnyScheduler,
        ledger: Ledger,
        slots: Slots,
        clock: Callable[[], float],
        prefill_rate: PrefillRate,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._ledger = ledger
        self._slots = slots
        self._clock = clock
        self._prefill_rate = prefill_rate
        self._beams = Beams(slots, ledger, runner.choose)
        self._news: list[Callable[[], None]] = []

    def read(self, ahead: int = 0) -> None:
        """Reads back the oldest steps until `ahead` are left in flight."""
        while len(self._runner.flights) > ahead:
            self._read()

    def tell(self) -> None:
        """Passes all queued updates to the scheduler."""
        news, self._news = self._news, []
        for tell in news:
            tell()

    def _read(self) -> None:
        """Reads back the oldest step and hands out its tokens."""
        flight = self._runner.flights[0]
        try:
            tokens = self._runner.read()
        except StepFailed as failure:
            requests = self._fail((state.request for state in flight.states), failure.reason)
            self._runner.forget([state for request in requests for state in request.sequences])
            return
        self._prefill_rate.read(flight.num_prompt_tokens, flight.launched)
        if flight.accepted is not None and flight.accepted.any():
            self._news.append(partial(self._tell_accepted, flight, flight.accepted))
        now = self._clock()
        try:
            searches: dict[RequestState, list[Token]] = {}
            for token in tokens:
                if token.state.ended:  # it may have run one step too many
                    continue
                if token.state.request.search is not None:
                    searches.setdefault(token.state.request, []).append(token)
                else:
                    self._take(token, now)
            for request, found in searches.items():
                self._search(request, found, now)
        except BaseException as error:  # Ctrl-C: some tokens are lost
            self._fail((state.request for state in flight.states), error)
            raise
        for state in flight.states:
            self._slots.commit_blocks(state)

    def _take(self, token: Token, now: float) -> None:
        try:
            ends = self._ledger.take(token, now)
        except Exception as error:  # from the caller's `detokenize`
            self._fail([token.state.request], error)
            return
        if ends:
            self._news.append(partial(self._scheduler.finish, token.state.sequence, "stop"))

    def _search(self, request: RequestState, tokens: list[Token], now: float) -> None:
        try:
            ends = self._beams.go_on(request, tokens, now)
        except Exception as error:  # from `detokenize`, or other users took the pool's memory
            self._fail([request], error)
            return
        for state in request.sequences if ends else ():
            self._news.append(partial(self._scheduler.finish, state.sequence, "stop"))

    def _tell_accepted(self, flight: Flight, accepted: np.ndarray) -> None:
        rows = [state.sequence.place for state in flight.states]
        # A sequence that was given up has lost its row, and another one may have it now.
        kept = (accepted > 0) & (flight.rows == rows)
        self._scheduler.add_tokens(flight.rows[kept], accepted[kept])

    def _fail(self, requests: Iterable[RequestState], error: BaseException) -> list[RequestState]:
        """Ends requests with the reason "error"."""
        found = list(dict.fromkeys(requests))
        for request in found:
            self._ledger.fail(request, error)
            self._news.append(partial(self._scheduler.cancel, request.group, "error"))
        return found
