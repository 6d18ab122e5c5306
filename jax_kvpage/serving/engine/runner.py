"""Runs steps: builds their operands, dispatches them, reads them back, and recovers from failures.

A step is dispatched before the one before it has been read back: the tokens that it needs are on
the device. A step that fails is run once more from a new generation of caches, together with those
dispatched after it.
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
from jax_kvpage.serving.engine.packing import Operands
from jax_kvpage.serving.engine.programs import Programs
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
        slots: who has which slot.
        num_rows: sequences at one time.
        num_banned: see `EngineConfig.max_stop_token_ids`.
        max_tokens: tokens in a step at most.
        num_guesses: tokens of a sequence to verify at most.

    Attributes:
        flights: steps that are not read back yet, oldest first.
        steps: dispatched so far, those of recoveries aside.
        drafted: guessed tokens that were verified.
        accepted: those that were right.
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
        # The newest token of each row as a step takes it: its id, or -1 - row for the one that is
        # on the device.
        self._newest = np.zeros(num_rows, np.int32)
        slots.recover = self._recover
        self._recovering = False
        self._restored = True  # whether slots and rows are those of the newest generation
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
        """Prepares the row of a sequence that got a slot. Nothing is in flight."""
        row = state.row
        self._columns[:, row] = state.request.sampling_column(
            state.sequence.index, self._num_banned
        )
        self.choose(state)
        if state.request.params.has_penalties:
            self._launcher.set_history(row, state.ids)

    def choose(self, state: SequenceState) -> None:
        """Hears that the host knows the newest token of a sequence, and the device may not."""
        self._newest[state.row] = state.ids[-1]

    def launch(
        self,
        plan: StepPlan,
        states: Items[SequenceState],
        guesses: Mapping[SequenceState, list[int]],
    ) -> None:
        """Dispatches a step; an error is kept for the read-back.

        Args:
            plan: carried out, with something to run.
            states: of its sequences.
            guesses: tokens that may follow; the plan says how many of them are verified.
        """
        flight = Flight.planned(plan, states, guesses)
        if flight is None:
            return
        self.flights.append(flight)
        self.steps += 1
        self._dispatch(flight)

    def settle(self) -> None:
        """Tries a recovery again that failed; nothing can go on before."""
        if not (self._restored or self.flights):  # reading flights back does it, too
            self._recover()

    def read(self) -> list[Token]:
        """Waits for the oldest step, and runs it again if it failed.

        Returns:
            Its tokens, those of a sequence in order.

        Raises:
            StepFailed: it failed again.
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
        """Leaves failed sequences out of the other steps, and runs those again."""
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
        rows, places, sampling = flight.rows, flight.rows, self._columns[:, flight.rows]
        tokens = self._tokens(flight)
        if flight.num_decodes < len(flight.states):  # parts of prompts may sample nothing
            places = np.where(flight.samples, rows, self._num_rows)
            sampling = np.where(flight.samples, sampling, 0)
        sampled = rows[flight.samples]
        self._newest[sampled] = -1 - sampled
        flight.outcome, flight.packed, flight.error = None, None, None
        try:
            step = Operands(
                tokens,
                flight.counts,
                self._slots.slot[rows],
                places,
                flight.begins + flight.counts,
                sampling,
                flight.num_guesses,
            )
            flight.outcome, flight.packed = self._launcher.run(
                step,
                flight.guided() if self._programs.num_words else [],
                targets_of(flight),
            )
        except Exception as error:  # tracing runs the caller's code, which may raise anything
            flight.error = error

    def _tokens(self, flight: Flight) -> np.ndarray:
        """What a step runs, int32[t]; see `Operands`."""
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
        """The tokens of a step, and how many guesses were right, if there were any; raises what it
        failed with.
        """
        if flight.outcome is None or flight.packed is None:
            if flight.error is None:  # Ctrl-C while it was compiled
                raise RuntimeError("the dispatch was interrupted")
            raise RuntimeError(f"{type(flight.error).__name__}: {flight.error}") from flight.error
        chosen = self._programs.read_back(flight.outcome)[flight.packed.sequences]
        each = chosen.shape[1] - 1
        accepted = np.where(flight.samples, chosen[:, -1], 0) if flight.guesses else None
        if flight.outcome.scores is not None:
            take_scores(flight, jax.device_get(flight.outcome.scores)[flight.packed.tokens])
        found, details = [], None
        places = zip(flight.states, flight.samples.tolist(), chosen.tolist(), strict=True)
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
                    at = int(flight.packed.sequences[i]) * each + place
                    logprobs = logprob_table(token, count, details[at])
                found.append(Token(state, token, logprobs))
        return found, accepted

    def _recover(self) -> None:
        """Starts a new generation and runs all steps again that are not read back.

        If slots cannot be restored, all those steps fail.

        Raises:
            RuntimeError: a call that is part of a recovery asks for another, or there is no step to
                fail.
        """
        if self._recovering:
            raise RuntimeError("a call on the pool failed while the engine recovered")
        self.generations += 1
        self._restored = False
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
        """Brings slots and rows to where the last step that was read back has left them."""
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
            step = Operands(
                np.asarray(ids, np.int32),
                np.asarray([len(ids)], np.int32),
                np.asarray([state.slot], np.int32),
                np.asarray([self._num_rows], np.int32),
                np.zeros(1, np.int32),
                np.zeros((self._columns.shape[0], 1), np.int32),
            )
            self._launcher.run(step)
            begin += len(ids)
