"""Runs steps: builds their operands, dispatches them, reads them back, and recovers from failures.

A step is dispatched before the one before it has been read back: the tokens that it needs are on
the device. A step that fails is run once more from a new generation of caches, together with those
dispatched after it.
"""

import dataclasses
from collections.abc import Sequence as Items

import jax
import numpy as np

from jax_kvpage.errors import shortened
from jax_kvpage.pool import KVPool
from jax_kvpage.serving.engine.programs import Programs
from jax_kvpage.serving.engine.sampling import NUM_FLOATS, NUM_INTS, Sampled
from jax_kvpage.serving.engine.slots import Slots
from jax_kvpage.serving.engine.tracking import SequenceState
from jax_kvpage.serving.outputs import Logprob
from jax_kvpage.serving.plan import StepPlan

__all__ = ["Flight", "Runner", "Token"]


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
        sampled: on the device; None if the dispatch failed.
        error: why it failed.
        retried: whether it was run again after a failure.
    """

    states: list[SequenceState]
    rows: np.ndarray
    begins: np.ndarray
    counts: np.ndarray
    samples: np.ndarray
    num_decodes: int
    sampled: Sampled | None = None
    error: BaseException | None = None
    retried: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
    """A sampled token: the sequence, the id, and log probabilities if it has them."""

    state: SequenceState
    token: int
    logprobs: tuple[dict[int, Logprob], float] | None


class Runner:
    """Runs steps.

    Args:
        programs: compiled steps.
        pool: the memory.
        slots: who has which slot.
        num_rows: sequences at one time.
        num_banned: see `EngineConfig.max_stop_token_ids`.
        max_tokens: tokens in a step at most.

    Attributes:
        flights: steps that are not read back yet, oldest first.
        steps: dispatched so far, those of recoveries aside.
        failures: steps that failed.
        generations: started after a failure of a step or of a call.
    """

    def __init__(
        self,
        programs: Programs,
        pool: KVPool,
        slots: Slots,
        num_rows: int,
        num_banned: int,
        max_tokens: int,
    ) -> None:
        self._programs = programs
        self._pool = pool
        self._slots = slots
        self._num_rows = num_rows
        self._num_banned = num_banned
        self._max_tokens = max_tokens
        self._state = programs.initial_state(pool.spec.max_seq_len, pool.device)
        self._columns = np.zeros((NUM_FLOATS + NUM_INTS + num_banned, num_rows), np.int32)
        self._newest = np.zeros(num_rows, np.int32)
        self._on_device = np.zeros(num_rows, bool)
        slots.recover = self._recover
        self.flights: list[Flight] = []
        self.steps = 0
        self.failures = 0
        self.generations = 0

    def enter(self, state: SequenceState) -> None:
        """Prepares the row of a sequence that got a slot. Nothing is in flight."""
        row = state.row
        self._columns[:, row] = state.request.sampling_column(
            state.sequence.index, self._num_banned
        )
        self._newest[row], self._on_device[row] = state.ids[-1], False
        if state.request.params.has_penalties:
            self._state = self._programs.set_history(self._state, row, state.ids)

    def launch(self, plan: StepPlan, states: Items[SequenceState]) -> None:
        """Dispatches a step; an error is kept for the read-back.

        Args:
            plan: carried out, with something to run.
            states: of its sequences.
        """
        begins, ends = plan.begins.copy(), plan.begins + plan.counts
        for i in range(plan.num_decodes, len(states)):
            begins[i] = max(begins[i], states[i].computed)  # what was found is not run
        ended = np.fromiter((state.ended for state in states), bool, len(states))
        keep = np.flatnonzero((ends > begins) & ~ended)
        if not keep.size:
            return
        flight = Flight(
            [states[i] for i in keep.tolist()],
            plan.rows[keep],
            begins[keep],
            (ends - begins)[keep],
            plan.samples[keep],
            int(np.count_nonzero(keep < plan.num_decodes)),
        )
        self.flights.append(flight)
        self.steps += 1
        self._dispatch(flight)

    def read(self) -> list[Token]:
        """Waits for the oldest step, and runs it again if it failed.

        Returns:
            Its tokens.

        Raises:
            StepFailed: it failed again.
        """
        flight = self.flights[0]
        try:
            tokens = self._fetch(flight)
        except (RuntimeError, ValueError) as error:
            self.failures += 1
            if not flight.retried:
                flight.retried = True
                self._recover()
                return self.read()
            self.flights.pop(0)
            raise StepFailed(flight, shortened(error)) from error
        self.flights.pop(0)
        for state, begin, count in zip(flight.states, flight.begins, flight.counts, strict=True):
            state.ran(int(begin), int(count))
        for token in tokens:
            if token.state.row >= 0:
                self._newest[token.state.row] = token.token
        return tokens

    def forget(self, states: Items[SequenceState]) -> None:
        """Leaves failed sequences out of the other steps, and runs those again."""
        gone = {id(state) for state in states}
        flights = []
        for flight in self.flights:
            keep = [i for i, state in enumerate(flight.states) if id(state) not in gone]
            flight.num_decodes = sum(i < flight.num_decodes for i in keep)
            flight.states = [flight.states[i] for i in keep]
            for name in ("rows", "begins", "counts", "samples"):
                setattr(flight, name, getattr(flight, name)[keep])
            if keep:
                flights.append(flight)
        self.flights = flights
        self._recover()

    def _dispatch(self, flight: Flight) -> None:
        rows, decodes = flight.rows, flight.rows[: flight.num_decodes]
        tokens = [np.where(self._on_device[decodes], -1 - decodes, self._newest[decodes])]
        for i in range(flight.num_decodes, len(flight.states)):
            begin = int(flight.begins[i])
            ids = flight.states[i].ids[begin : begin + int(flight.counts[i])]
            tokens.append(np.asarray(ids, np.int32))
        sampling = np.where(flight.samples, self._columns[:, rows], 0)
        flight.sampled, flight.error = None, None
        try:
            flight.sampled = self._run(
                np.concatenate(tokens),
                flight.counts,
                self._slots.slot[rows],
                np.where(flight.samples, rows, self._num_rows),
                flight.begins + flight.counts,
                sampling,
            )
        except (RuntimeError, ValueError, TypeError) as error:
            flight.error = error
        self._on_device[rows[flight.samples]] = True

    def _run(
        self,
        tokens: np.ndarray,
        counts: np.ndarray,
        slots: np.ndarray,
        rows: np.ndarray,
        positions: np.ndarray,
        sampling: np.ndarray,
    ) -> Sampled:
        offsets = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=offsets[1:])
        shape = self._programs.bucket(len(tokens), len(slots))
        packed = self._programs.pack(shape, tokens, offsets, slots, rows, positions, sampling)
        cache, self._state, sampled = self._programs.run(
            shape, self._slots.cache, self._state, packed
        )
        self._slots.cache = cache
        return sampled

    def _fetch(self, flight: Flight) -> list[Token]:
        """The tokens of a step; raises what it failed with."""
        if flight.sampled is None:
            assert flight.error is not None
            raise RuntimeError(f"{type(flight.error).__name__}: {flight.error}") from flight.error
        sampled = flight.sampled
        wanted = any(state.request.params.logprobs is not None for state in flight.states)
        tokens, valid = jax.device_get((sampled.tokens, sampled.valid))
        if not valid[: len(flight.states)][flight.samples].all():
            raise RuntimeError("the logits of a sequence are NaN")
        details = None
        if wanted:
            details = jax.device_get(
                (sampled.logprobs, sampled.ranks, sampled.top_ids, sampled.top_logprobs)
            )
        found = []
        for i in np.flatnonzero(flight.samples).tolist():
            state, token = flight.states[i], int(tokens[i])
            count = state.request.params.logprobs
            logprobs = None
            if count is not None and details is not None:
                own, rank, ids, values = (array[i] for array in details)
                table = {
                    int(ids[place]): Logprob(float(values[place]), place + 1)
                    for place in range(count)
                }
                table.setdefault(token, Logprob(float(own), int(rank)))
                logprobs = table, float(own)
            found.append(Token(state, token, logprobs))
        return found

    def _recover(self) -> None:
        """Starts a new generation and runs all steps again that are not read back."""
        self.generations += 1
        self._slots.cache = self._pool.cache()
        self._state = self._programs.initial_state(self._pool.spec.max_seq_len, self._pool.device)
        try:
            self._restore()
        except (RuntimeError, ValueError, TypeError) as error:
            for flight in self.flights:
                flight.sampled, flight.error = None, error
            return
        for flight in self.flights:
            self._dispatch(flight)

    def _restore(self) -> None:
        """Brings slots and rows to where the last step that was read back has left them."""
        states = self._slots.occupied()
        lengths = np.asarray(jax.device_get(self._slots.cache.lengths))
        have = {}
        for state in states:
            self._newest[state.row], self._on_device[state.row] = state.ids[-1], False
            if state.request.params.has_penalties:
                self._state = self._programs.set_history(self._state, state.row, state.ids)
            length, computed = int(lengths[state.slot]), state.computed
            if length < 0:  # on CUDA a slot is free again if its acquire did not run
                if not self._slots.acquire(state, state.room):
                    raise RuntimeError(
                        "a slot was lost with the step that failed, and memory with it"
                    )
                length, state.computed = state.computed, computed
            have[id(state)] = min(length, computed)
        slots = np.asarray([state.slot for state in states], np.int32)
        kept = np.asarray([have[id(state)] for state in states], np.int32)
        self._slots.cache = self._programs.set_lengths(self._slots.cache, slots, kept)
        for state in states:
            state.committed = len(self._pool.committed(state.slot))
            self._catch_up(state, have[id(state)])

    def _catch_up(self, state: SequenceState, begin: int) -> None:
        """Computes tokens again that were shared or copied by a program that did not run."""
        while begin < state.computed:
            ids = state.ids[begin : min(state.computed, begin + self._max_tokens)]
            self._run(
                np.asarray(ids, np.int32),
                np.asarray([len(ids)], np.int32),
                np.asarray([state.slot], np.int32),
                np.asarray([self._num_rows], np.int32),
                np.zeros(1, np.int32),
                np.zeros((self._columns.shape[0], 1), np.int32),
            )
            begin += len(ids)


class StepFailed(RuntimeError):
    """A step failed twice.

    Attributes:
        flight: the step.
        reason: why, the second time.
    """

    def __init__(self, flight: Flight, reason: BaseException) -> None:
        super().__init__(str(reason))
        self.flight = flight
        self.reason = reason
