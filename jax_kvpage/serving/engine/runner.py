"""Runs steps: builds operands, dispatches, reads results back, and recovers from failures.

A step is dispatched before the previous one has been read back: the tokens that it needs are
already on the device. A failed step is retried once from a new generation of caches, together with
the steps dispatched after it.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Items

import jax
import numpy as np

from jax_kvpage._cache_checks import host_lengths
from jax_kvpage.errors import shortened
from jax_kvpage.pool import KVPool
from jax_kvpage.serving.engine.flight import Flight, StepFailed, Token
from jax_kvpage.serving.engine.launcher import Launcher
from jax_kvpage.serving.engine.logprobs import logprob_table
from jax_kvpage.serving.engine.packing import Operands, Packed
from jax_kvpage.serving.engine.programs import Programs
from jax_kvpage.serving.engine.repetition import Repetition
from jax_kvpage.serving.engine.sampling import NUM_FLOATS, NUM_INTS
from jax_kvpage.serving.engine.scoring import take_scores, targets_of
from jax_kvpage.serving.engine.slots import Slots
from jax_kvpage.serving.engine.tracking import SequenceState
from jax_kvpage.serving.plan import StepPlan

__all__ = ["Runner"]


class Runner:
    """Runs steps.

    Args:
        programs: compiled steps.
        pool: the memory.
        slots: assignment of slots to sequences.
        num_rows: maximum sequences at one time.
        num_banned: see `EngineConfig.max_stop_token_ids`.
        max_tokens: maximum tokens per step.
        num_guesses: maximum tokens to verify per sequence.

    Attributes:
        flights: steps that have not been read back, oldest first.
        steps: steps dispatched so far, without retries.
        drafted: speculated tokens that were verified.
        accepted: speculated tokens that were accepted.
        failures: steps that failed.
        generations: cache generations started after a step or call failed.
    """

    def __init__(
        self,
        programs: Programs,
        pool: KVPool,
        slots: Slots,
        num_rows: int,
        num_banned: int,
        max_tokens: int,
        num_guesses: int,
    ) -> None:
        self._programs = programs
        self._pool = pool
        self._slots = slots
        self._num_rows = num_rows
        self._num_banned = num_banned
        self._max_tokens = max_tokens
        self._num_guesses = num_guesses
        self._launcher = Launcher(programs, pool, slots, num_guesses)
        self._columns = np.zeros((NUM_FLOATS + NUM_INTS + num_banned, num_rows), np.int32)
        # The newest token of each row as a step takes it: its id, or -1 - row if it is on the
        # device.
        self._newest = np.zeros(num_rows, np.int32)
        self._repetition = Repetition()
        slots.recover = self._recover
        self._recovering = False
        self._restored = True  # whether slots and rows match the newest generation
        self.flights: list[Flight] = []
        self.steps = 0
        self.drafted = 0
        self.accepted = 0
        self.failures = 0
        self.generations = 0

    @property
    def in_lockstep(self) -> bool:
        """Whether the newest step must be read back before the next one is dispatched."""
        guided = self._programs.num_words and self.flights and self.flights[-1].guided()
        return bool(self._num_guesses or guided)

    def enter(self, state: SequenceState) -> None:
        """Prepares the row of a sequence that got a slot. Nothing may be in flight."""
        row = state.row
        self._columns[:, row] = state.request.sampling_column(
            state.sequence.index, self._num_banned
        )
        self.choose(state)
        if state.request.params.has_penalties:
            self._launcher.set_history(row, state.ids)

    def choose(self, state: SequenceState) -> None:
        """Uses the host's newest token of a sequence, which the device may not have."""
        self._newest[state.row] = state.ids[-1]
        self._repetition.forget()

    def launch(
        self,
        plan: StepPlan,
        states: Items[SequenceState],
        guesses: Mapping[SequenceState, list[int]],
    ) -> None:
        """Dispatches a step; an error is raised later, by `read`.

        Args:
            plan: a plan that has been carried out, with something to run.
            states: states of its sequences.
            guesses: tokens to verify; the plan says how many of them are run.
        """
        flight = Flight.planned(plan, states, guesses)
        if flight is None:
            return
        self.flights.append(flight)
        self.steps += 1
        self._dispatch(flight)

    def settle(self) -> None:
        """Retries a failed recovery; nothing else can run before."""
        if not (self._restored or self.flights):  # reading flights back also recovers
            self._recover()

    def read(self) -> list[Token]:
        """Waits for the oldest step, and retries it if it failed.

        Returns:
            The tokens of the step, in order for each sequence.

        Raises:
            StepFailed: the retry failed too.
        """
        flight = self.flights[0]
        try:
            tokens, accepted = self._fetch(flight)
        except Exception as error:
            self.failures += 1
            if not flight.retried:
                flight.retried = True
                self._recover()
                return self.read()
            self.flights.pop(0)
            raise StepFailed(shortened(error)) from error
        self.flights.pop(0)
        kept, guesses, flight.accepted = flight.counts, flight.num_guesses, accepted
        if guesses is not None and accepted is not None:
            kept = kept - guesses + accepted
            self.drafted += int(guesses.sum())
            self.accepted += int(accepted.sum())
        for state, begin, count in zip(
            flight.states, flight.begins.tolist(), kept.tolist(), strict=True
        ):
            state.ran(begin, count)
        return tokens

    def forget(self, states: Items[SequenceState]) -> None:
        """Removes failed sequences from the other steps in flight, and runs those again."""
        gone = {id(state) for state in states}
        flights = []
        for flight in self.flights:
            keep = [i for i, state in enumerate(flight.states) if id(state) not in gone]
            if keep:
                flight.keep(keep)
                flights.append(flight)
        self.flights = flights
        self._recover()

    def _dispatch(self, flight: Flight) -> None:
        flight.outcome, flight.packed, flight.error = None, None, None
        try:
            packed = self._repetition.next(flight) or self._pack(flight)
            flight.outcome = self._launcher.run(
                packed,
                bool(flight.guesses),
                flight.guided() if self._programs.num_words else [],
                targets_of(flight),
            )
            flight.packed = packed
        except Exception as error:  # tracing runs the caller's code, which may raise anything
            flight.error = error

    def _pack(self, flight: Flight) -> Packed:
        rows, places, sampling = flight.rows, flight.rows, self._columns[:, flight.rows]
        tokens = self._tokens(flight)
        if flight.num_decodes < len(flight.states):  # prompt chunks may not sample
            places = np.where(flight.samples, rows, self._num_rows)
            sampling = np.where(flight.samples, sampling, 0)
        sampled = rows[flight.samples]
        self._newest[sampled] = -1 - sampled
        step = Operands(
            tokens,
            flight.counts,
            self._slots.slot[rows],
            places,
            flight.begins + flight.counts,
            sampling,
            flight.num_guesses,
        )
        packed = self._programs.pack(step)
        self._repetition.keep(flight, step, packed)
        return packed

    def _tokens(self, flight: Flight) -> np.ndarray:
        """Token operands of a step, int32[t]; see `Operands`."""
        newest = self._newest[flight.rows[: flight.num_decodes]]
        parts = [newest]
        if flight.guesses:
            parts = [
                np.asarray([token, *flight.guesses.get(state, ())], np.int32)
                for token, state in zip(newest, flight.states, strict=False)
            ]
        for i in range(flight.num_decodes, len(flight.states)):
            begin = int(flight.begins[i])
            ids = flight.states[i].ids[begin : begin + int(flight.counts[i])]
            parts.append(np.asarray(ids, np.int32))
        return np.concatenate(parts)

    def _fetch(self, flight: Flight) -> tuple[list[Token], np.ndarray | None]:
        """Reads the tokens of a step, and the number of accepted guesses if there were any.

        Raises the error with which the step failed.
        """
        if flight.outcome is None or flight.packed is None:
            if flight.error is None:  # Ctrl-C while it was compiled
                raise RuntimeError("the dispatch was interrupted")
            raise RuntimeError(f"{type(flight.error).__name__}: {flight.error}") from flight.error
        rows = self._programs.read_back(flight.outcome).tolist()
        chosen = [rows[index] for index in flight.packed.sequences]
        accepted = None
        if flight.guesses:
            accepted = np.where(flight.samples, np.asarray([row[-1] for row in chosen]), 0)
        if flight.outcome.scores is not None:
            take_scores(flight, jax.device_get(flight.outcome.scores)[flight.packed.tokens])
        found, details = [], None
        places = zip(flight.states, flight.samples.tolist(), chosen, strict=True)
        for i, (state, samples, row) in enumerate(places):
            if not samples:
                continue
            count = state.request.params.logprobs
            for place, token in enumerate(row[: row[-1] + 1]):
                if token < 0:
                    raise RuntimeError("the logits of a sequence are NaN")
                logprobs = None
                if count is not None:
                    if details is None:
                        details = jax.device_get(flight.outcome.details)
                    at = flight.packed.sequences[i] * (len(row) - 1) + place
                    logprobs = logprob_table(token, count, details[at])
                found.append(Token(state, token, logprobs))
        return found, accepted

    def _recover(self) -> None:
        """Starts a new generation and reruns all steps that have not been read back.

        If slots cannot be restored, all those steps fail.

        Raises:
            RuntimeError: a call failed during a recovery, or there is no step that could fail.
        """
        if self._recovering:
            raise RuntimeError("a call on the pool failed while the engine recovered")
        self.generations += 1
        self._restored = False
        self._repetition.forget()
        self._slots.cache = self._pool.cache()
        self._launcher.restart()
        self._recovering = True
        try:
            self._restore()
        except BaseException as error:
            for flight in self.flights:
                flight.outcome, flight.error = None, error
            if not self.flights or not isinstance(error, Exception):
                raise
            return
        finally:
            self._recovering = False
        self._restored = True
        for flight in self.flights:
            self._dispatch(flight)

    def _restore(self) -> None:
        """Restores slots and rows to their state after the last step that was read back."""
        lengths = host_lengths(self._slots.cache)
        runs = {id(state) for flight in self.flights for state in flight.states}
        for state in self._slots.occupied():
            if state.is_dropped and lengths[state.slot] < 0 and id(state) not in runs:
                self._slots.leave(state)  # its slot was to be released
        states = self._slots.occupied()
        have = {}
        for state in states:
            self.choose(state)
            if state.request.params.has_penalties:
                self._launcher.set_history(state.row, state.ids)
            length, computed = int(lengths[state.slot]), state.computed
            if length < 0:  # on CUDA, a slot is free again if its acquire did not run
                if not self._slots.acquire(state, state.room):
                    raise RuntimeError(
                        "the failed step lost a slot, and there is no memory to acquire it again"
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
        """Recomputes tokens that were to be shared or copied by a program that did not run."""
        while begin < state.computed:
            ids = state.ids[begin : min(state.computed, begin + self._max_tokens)]
            step = Operands(
                np.asarray(ids, np.int32),
                np.asarray([len(ids)], np.int32),
                np.asarray([state.slot], np.int32),
                np.asarray([self._num_rows], np.int32),
                np.zeros(1, np.int32),
                np.zeros((self._columns.shape[0], 1), np.int32),
            )
            self._launcher.run(self._programs.pack(step))
            begin += len(ids)
