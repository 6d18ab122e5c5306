"""Speculation with a draft model that keeps its keys and values in its own pool.

Slots of that pool follow the sequences of the engine: they are acquired at the first guess, forked
for samples of one prompt, and released when a sequence ends or loses its memory. Before each step,
wrong guesses are rolled back. The draft then computes tokens that it has not seen, within the token
budget of a step, and generates the guesses, each from the previous one on the device.

The draft never affects outputs. If the draft's pool is full, a sequence runs without guesses. A
failure costs the guesses of that step; a second one in a row disables guessing with a warning.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jax_kvpage._cache_checks import host_lengths
from jax_kvpage.cache import KVCache
from jax_kvpage.errors import OutOfBlocks, shortened
from jax_kvpage.pool import KVPool
from jax_kvpage.serving.engine.config import EngineConfig
from jax_kvpage.serving.engine.packing import Operands
from jax_kvpage.serving.engine.programs import Programs, Step
from jax_kvpage.serving.engine.sampling import NUM_FLOATS, NUM_INTS, SamplerState
from jax_kvpage.serving.engine.tracking import SequenceState
from jax_kvpage.serving.engine.warm_up import warm_up

__all__ = ["Draft", "DraftModel", "check_draft"]

_MOST_FAILURES = 2  # consecutive
# Temperature, top_p, min_p, presence, frequency and repetition penalty for greedy sampling.
_GREEDY = np.asarray((0, 1, 0, 0, 0, 1), np.float32).view(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftModel:
    """A draft model; see `Engine`.

    Attributes:
        step: the model, as for `Engine`, with the same token ids.
        params: first argument of `step`.
        pool: pool for its keys and values. Nothing else may use it while the engine runs.
    """

    step: Step
    params: Any
    pool: KVPool


@dataclasses.dataclass(eq=False)
class _Follower:
    """The draft's state of a sequence.

    Attributes:
        state: the sequence.
        slot: slot in the draft's pool.
        room: tokens that the slot has room for.
        known: tokens of the sequence whose keys and values exist.
        guessed: guesses after the known tokens, except for the last; their keys and values exist
            too.
        committed: tokens committed to the pool.
    """

    state: SequenceState
    slot: int
    room: int
    known: int
    guessed: list[int] = dataclasses.field(default_factory=list)
    committed: int = 0


class Draft:
    """Guesses with a draft model.

    Args:
        model: the draft model.
        config: configuration of the engine.
        num_rows: maximum sequences at one time.

    Raises:
        ValueError: the engine does not speculate.
    """

    def __init__(self, model: DraftModel, config: EngineConfig, num_rows: int) -> None:
        if not config.num_speculative_tokens:
            raise ValueError("Engine: draft: num_speculative_tokens is 0, wanted 1 or more")
        self._pool = model.pool
        self._programs = Programs(
            model.step,
            model.params,
            config.shapes(num_rows),
            num_rows=num_rows,
            max_logprobs=0,
            num_banned=0,
            num_guesses=0,
        )
        self._num_rows = num_rows
        self._most = config.num_speculative_tokens
        self._budget = config.max_num_batched_tokens
        self._followers: dict[SequenceState, _Follower] = {}
        self._failures = 0  # consecutive
        self._is_whole = True
        self._cache: KVCache = self._pool.cache()
        self._state = self._initial_state()

    @property
    def compile_seconds(self) -> float:
        """See `Guesser`."""
        return self._programs.compile_seconds

    def warm_up(self, progress: Callable[[int, int], None] | None) -> None:
        """Compiles everything; see `EngineCore.warm_up`."""
        self._cache = warm_up(self._pool, self._cache, self._programs, self._num_rows, 0, progress)

    def guess(self, states: Iterable[SequenceState]) -> dict[SequenceState, list[int]]:
        """Guesses the next tokens of decoding sequences.

        Args:
            states: sequences that have memory. Every step must have been read back.

        Returns:
            Guesses of the sequences that have any; see `Guesser`.
        """
        found: dict[SequenceState, list[int]] = {}
        wanted = [s for s in states if s.request.can_be_guessed and not s.ended]
        self._guarded(lambda: found.update(self._guess(wanted)))
        for state, tokens in found.items():
            if state.guide is not None:
                found[state] = state.guide.cut(tokens)
        return {state: tokens for state, tokens in found.items() if tokens}

    def follow(self, states: Iterable[SequenceState]) -> None:
        """Releases the slots of sequences that have ended or lost their memory."""
        kept = {state for state in states if not state.ended}
        if not self._followers.keys() <= kept:
            self._guarded(lambda: self._keep(kept))

    def _guarded(self, work: Callable[[], None]) -> None:
        """Runs work on the pool. A failure leads to a new generation without followers."""
        if self._failures >= _MOST_FAILURES:
            return
        try:
            if not self._is_whole:
                self._restart()
            self._is_whole = False  # until the work is done: Ctrl-C may come at any time
            work()
        except Exception as error:  # tracing runs the caller's code, which may raise anything
            self._failures += 1
            if self._failures == _MOST_FAILURES:
                with contextlib.suppress(Exception):  # the first error is reported
                    self._restart()
                short = shortened(error)
                warnings.warn(
                    "Engine: the draft model has failed twice; requests go on without guesses: "
                    f"{type(short).__name__}: {short}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        else:
            self._is_whole = True

    def _restart(self) -> None:
        """Starts again with a new cache and no slots."""
        self._cache, self._state = self._pool.cache(), self._initial_state()
        self._followers.clear()
        lengths = host_lengths(self._cache)
        slots = np.flatnonzero(lengths >= 0).tolist()
        if slots:
            self._cache = self._pool.release(self._cache, slots)
        self._is_whole = True

    def _initial_state(self) -> SamplerState:
        return self._programs.initial_state(self._pool.spec.max_seq_len, self._pool.placement)

    def _keep(self, kept: set[SequenceState]) -> None:
        """Releases the slots of other sequences, if a restart has not released all slots."""
        gone = [each for state, each in self._followers.items() if state not in kept]
        if gone:
            self._cache = self._pool.release(self._cache, [each.slot for each in gone])
        for each in gone:
            del self._followers[each.state]

    def _guess(self, states: Sequence[SequenceState]) -> dict[SequenceState, list[int]]:
        self._roll_back()
        ready = [each for state in states if (each := self._ready(state)) is not None]
        ready.sort(key=lambda each: len(each.state.ids) - each.known)  # decoding sequences first
        parts: list[tuple[_Follower, int]] = []
        budget = self._budget
        for each in ready:
            last = len(each.state.ids) - (not _decodes(each.state))
            count = min(last - each.known, budget)
            if count > 0:
                parts.append((each, count))
                budget -= count
        if not parts:
            return {}
        guessing = [each for each, n in parts if each.known + n == len(each.state.ids)]
        chosen = set(map(id, guessing))
        outcomes = [
            self._run(
                np.concatenate([each.state.ids[each.known : each.known + n] for each, n in parts]),
                parts,
                [each.state.row if id(each) in chosen else self._num_rows for each, _ in parts],
            )
        ]
        places = [i for i, (each, _) in enumerate(parts) if id(each) in chosen]
        for each, count in parts:
            each.known += count
        if not guessing:
            jax.block_until_ready(outcomes[0])
            self._failures = 0
            return {}
        rows = [each.state.row for each in guessing]
        newest = -1 - np.asarray(rows, np.int32)
        ones = [(each, 1) for each in guessing]
        for _ in range(self._most - 1):
            outcomes.append(self._run(newest, ones, rows))
        first, *others = jax.device_get(outcomes)
        found = [first[places], *(other[: len(guessing)] for other in others)]
        guesses = np.concatenate([each[:, :1] for each in found], axis=1)
        if (guesses < 0).any():
            raise RuntimeError("the logits of the draft model are NaN")
        self._failures = 0
        for each, tokens in zip(guessing, guesses.tolist(), strict=True):
            each.guessed = tokens[:-1]  # the last one was not run
        return {each.state: tokens for each, tokens in zip(guessing, guesses.tolist(), strict=True)}

    def _roll_back(self) -> None:
        """Rolls back wrong guesses. The newest token of a sequence is always left to run."""
        slots, lengths = [], []
        for each in self._followers.values():
            ids, had = each.state.ids, each.known + len(each.guessed)
            for token in each.guessed:
                if each.known >= len(ids) or ids[each.known] != token:
                    break
                each.known += 1
            each.known, each.guessed = min(each.known, len(ids) - 1), []
            if each.known < had:
                slots.append(each.slot)
                lengths.append(each.known)
        if slots:
            self._cache = self._programs.set_lengths(
                self._cache, np.asarray(slots, np.int32), np.asarray(lengths, np.int32)
            )

    def _ready(self, state: SequenceState) -> _Follower | None:
        """Returns the follower of a sequence with room for its guesses, or None."""
        room = len(state.ids) + self._most - 1
        if room > self._pool.spec.max_seq_len or len(state.ids) + 1 >= state.sequence.group.limit:
            return None
        each = self._followers.get(state)
        try:
            if each is None:
                each = self._enter(state)
            if each is not None and each.room < room:
                self._pool.extend(each.slot, room)
                each.room = room
        except OutOfBlocks:
            return None
        return each

    def _enter(self, state: SequenceState) -> _Follower | None:
        """Gives a sequence a slot: a fork of a sibling's slot once that has computed the prompt."""
        prompt = len(state.request.output.prompt_token_ids)
        every = (self._followers.get(other) for other in state.request.sequences)
        sibling = next((each for each in every if each is not None), None)
        if sibling is None:
            slot, self._cache = self._pool.acquire(self._cache, len(state.ids))
            follower = _Follower(state, slot, len(state.ids), 0)
        else:
            shared = min(prompt, len(state.ids) - 1)
            if sibling.known < shared:
                return None
            if sibling.committed < shared:
                self._pool.commit(sibling.slot, state.ids[sibling.committed : shared])
                sibling.committed = shared
            (slot,), self._cache = self._pool.fork(self._cache, sibling.slot, 1, shared)
            follower = _Follower(state, slot, shared, shared, committed=shared)
        self._followers[state] = follower
        return follower

    def _run(
        self, tokens: np.ndarray, parts: Sequence[tuple[_Follower, int]], rows: Sequence[int]
    ) -> jax.Array:
        """Dispatches a step; returns its `Outcome.chosen`."""
        size = len(parts)
        sampling = np.zeros((NUM_FLOATS + NUM_INTS, size), np.int32)
        sampling[:NUM_FLOATS] = _GREEDY[:, None]
        step = Operands(
            tokens,
            np.asarray([n for _, n in parts], np.int32),
            np.asarray([each.slot for each, _ in parts], np.int32),
            np.asarray(rows, np.int32),
            np.zeros(size, np.int32),
            sampling,
        )
        packed = self._programs.pack(step)
        self._cache, self._state, outcome = self._programs.run(packed, 0, self._cache, self._state)
        return outcome.chosen


def check_draft(draft: DraftModel | None, pool: KVPool) -> None:
    """Raises a ValueError for a draft model that does not work with the engine's pool."""
    if draft is None:
        return
    if draft.pool is pool:
        raise ValueError("Engine: draft: wanted a pool that is not the engine's")
    if max(pool.replicas, draft.pool.replicas) > 1:
        raise ValueError(
            f"Engine: draft: not supported yet over pools with replicas (data_axis), here "
            f"{pool.replicas} and {draft.pool.replicas} of the draft's: use prompt lookup, "
            "or a pool and an engine for each part of the mesh"
        )


def _decodes(state: SequenceState) -> bool:
    return state.computed == len(state.ids) - 1
