"""The compiled programs of the engine: a step for each bucket, and two small ones.

With speculation each bucket has a second step, which also verifies tokens that were guessed: the
model gives logits for each of them, and the first that differs from what is sampled there is where
the sequence is rolled back to. Where prompts may be scored, a further step gives logits for all of
its tokens.

A step's operands travel as one int32 array, because every transfer costs as much as the next. The
cache and the sampler's state are donated.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jax_kvpage.cache import Batch, KVCache
from jax_kvpage.ops.advance import advance
from jax_kvpage.ops.set_lengths import set_lengths
from jax_kvpage.serving.engine.sampling import (
    NUM_FLOATS,
    NUM_INTS,
    RowParams,
    SamplerState,
    log_probabilities,
    remember,
    sample,
)

__all__ = ["Outcome", "Programs", "Step"]

# (params, cache, tokens [T], batch) -> (logits [S, vocabulary] of batch.last_rows, cache)
Step = Callable[[Any, KVCache, jax.Array, Batch], tuple[jax.Array, KVCache]]

_FIELDS = 5  # of a sequence, before its sampling parameters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outcome:
    """What is read back after a step.

    Each array costs the thread that dispatches and reads, so there are few of them.

    Attributes:
        chosen: int32[S, K + 2], all that most steps need: of each sequence a token behind each of
            its guesses and one more, -1 where the logits held NaN, and how many guesses were
            right, from the first on.
        details: int32[S * (K + 1), 2 + 2M] of these tokens, where wanted; see
            `log_probabilities`.
        scores: of a step that scores, the same for the tokens that follow those of the step, T.
    """

    chosen: jax.Array
    details: jax.Array
    scores: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _VerifiedBatch(Batch):
    """A batch whose `last_rows` are those of all tokens whose logits are wanted."""

    rows: jax.Array | None = dataclasses.field(default=None, kw_only=True)

    @property
    def last_rows(self) -> jax.Array:
        """int32[S * (K + 1)], or int32[T]."""
        assert self.rows is not None
        return self.rows


class Programs:
    """Compiled programs of a model.

    Args:
        step: the model.
        params: its first argument.
        shapes: buckets, smallest first.
        num_rows: sequences at one time.
        max_logprobs: see `EngineConfig`.
        num_banned: see `EngineConfig.max_stop_token_ids`.
        num_guesses: K, tokens of a sequence to verify at most.
        num_words: of the masks of constrained decoding; 0 without it.
        scores: whether steps may score prompts.

    Attributes:
        max_logprobs: see above.
        compile_seconds: time spent tracing and compiling them.
        num_compiled: steps compiled so far, at most one for each bucket, one more with speculation
            and one more for scores.
        variants: (bucket, guesses, whether it scores) of all of them.
    """

    def __init__(
        self,
        step: Step,
        params: Any,
        shapes: list[tuple[int, int]],
        num_rows: int,
        max_logprobs: int,
        num_banned: int,
        num_guesses: int,
        num_words: int = 0,
        scores: bool = False,
    ) -> None:
        kinds = {(0, False), (num_guesses, False)} | ({(num_guesses, True)} if scores else set())
        self.variants = [(shape, *kind) for kind in sorted(kinds) for shape in shapes]
        self._step = step
        self._params = params
        self.shapes = shapes
        self._num_rows = num_rows
        self.max_logprobs = max_logprobs
        self._num_banned = num_banned
        self.num_words = num_words
        self._no_masks: dict[int, jax.Array] = {}
        self._compiled: dict[tuple[tuple[int, int], int, bool], Any] = {}
        self.compile_seconds = 0.0
        self._set_history = jax.jit(_set_history, donate_argnums=0)
        self._set_lengths = jax.jit(set_lengths, donate_argnums=0)

    @property
    def num_compiled(self) -> int:
        """See the class."""
        return len(self._compiled)

    def bucket(self, num_tokens: int, num_sequences: int) -> tuple[int, int]:
        """The smallest shape that holds a step."""
        for shape in self.shapes:
            if num_tokens <= shape[0] and num_sequences <= shape[1]:
                return shape
        raise ValueError(f"no bucket for {num_tokens} tokens of {num_sequences} sequences")

    def initial_state(
        self, max_seq_len: int, placement: jax.Device | NamedSharding
    ) -> SamplerState:
        """The sampler's state before the first step, where the pool is."""
        history = np.zeros((self._num_rows, max_seq_len), np.int32)
        last = np.zeros(self._num_rows, np.int32)
        return SamplerState(*jax.device_put((last, history), placement))

    def pack(
        self,
        shape: tuple[int, int],
        tokens: np.ndarray,
        counts: np.ndarray,
        slots: np.ndarray,
        rows: np.ndarray,
        positions: np.ndarray,
        sampling: np.ndarray,
        guesses: np.ndarray | None = None,
    ) -> np.ndarray:
        """The operands of a step as one array, padded to a bucket.

        Args:
            shape: the bucket.
            tokens: int32[t]; -1 - row is the newest token of a row, which is on the device.
            counts: int32[s], how many of them each sequence has.
            slots: int32[s].
            rows: int32[s], of sequences that do not sample the number of rows.
            positions: int32[s] of the new tokens, if all guesses are right.
            sampling: int32[NUM_FLOATS + NUM_INTS + num_banned, s], floats as bits.
            guesses: int32[s], how many of the tokens are guesses; None without any.
        """
        num_tokens, size = shape
        s, fields = len(slots), sampling.shape[0]
        packed = np.zeros(num_tokens + 1 + (_FIELDS + fields) * size, np.int32)
        packed[: len(tokens)] = tokens
        # Offsets begin with the 0 between tokens and table.
        table = packed[num_tokens + 1 :].reshape(_FIELDS + fields, size)
        counts.cumsum(out=table[0, :s])
        table[0, s:] = len(tokens)
        table[1, :s], table[1, s:] = slots, -1
        table[2, :s], table[2, s:] = rows, self._num_rows
        table[3, :s] = positions
        if guesses is not None:
            table[4, :s] = guesses
        table[_FIELDS:, :s] = sampling
        return packed

    def run(
        self,
        shape: tuple[int, int],
        num_guesses: int,
        cache: KVCache,
        state: SamplerState,
        packed: np.ndarray,
        masks: np.ndarray | None = None,
        targets: np.ndarray | None = None,
    ) -> tuple[KVCache, SamplerState, Outcome]:
        """Runs a step of one of the variants. The cache and the state are donated.

        Args:
            shape: the bucket.
            num_guesses: 0 or K.
            cache: the newest.
            state: the newest.
            packed: see `pack`.
            masks: int32[S * (num_guesses + 1), num_words]; None if no sequence has one.
            targets: int32[t], for a step that scores: the token that follows each.
        """
        scores = targets is not None
        program = self._compiled.get((shape, num_guesses, scores))
        if program is None:
            program = self.compile(shape, num_guesses, cache, state, scores)
        following = None
        if targets is not None:
            following = np.zeros(shape[0], np.int32)
            following[: len(targets)] = targets
        wanted: Any = masks
        if masks is None and self.num_words:
            wanted = self._masks_of_nothing(shape[1] * (num_guesses + 1), state)
        return program(self._params, cache, state, packed, wanted, following)

    @staticmethod
    def read_back(outcome: Outcome) -> np.ndarray:
        """Waits for a step, and returns its `Outcome.chosen`. A single array, because each costs as
        much to read back as the next.
        """
        return np.asarray(outcome.chosen)

    def _masks_of_nothing(self, num_rows: int, state: SamplerState) -> jax.Array:
        """Masks that do not count. They stay on the device: most steps have no others."""
        if num_rows not in self._no_masks:
            masks = np.full((num_rows, self.num_words), -1, np.int32)
            self._no_masks[num_rows] = jax.device_put(masks, state.last.sharding)
        return self._no_masks[num_rows]

    def compile(
        self,
        shape: tuple[int, int],
        num_guesses: int,
        cache: KVCache,
        state: SamplerState,
        scores: bool = False,
    ) -> Any:
        """Compiles a variant without running it."""
        fields = NUM_FLOATS + NUM_INTS + self._num_banned
        packed = jax.ShapeDtypeStruct((shape[0] + 1 + (_FIELDS + fields) * shape[1],), jnp.int32)
        masks = targets = None
        if self.num_words:
            size = shape[1] * (num_guesses + 1), self.num_words
            masks = jax.ShapeDtypeStruct(size, jnp.int32)
        if scores:
            targets = jax.ShapeDtypeStruct((shape[0],), jnp.int32)

        def run(*operands: Any) -> Any:
            return self._run(shape, num_guesses, *operands)

        begin = time.monotonic()
        program = jax.jit(run, donate_argnums=(1, 2))
        compiled = program.lower(self._params, cache, state, packed, masks, targets).compile()
        self.compile_seconds += time.monotonic() - begin
        self._compiled[shape, num_guesses, scores] = compiled
        return compiled

    def set_history(self, state: SamplerState, row: int, ids: list[int]) -> SamplerState:
        """Writes the tokens so far of a sequence with penalties. The state is donated."""
        padded = np.zeros(state.history.shape[1], np.int32)
        padded[: len(ids)] = ids
        return self._set_history(state, np.int32(row), padded)

    def set_lengths(self, cache: KVCache, slots: np.ndarray, lengths: np.ndarray) -> KVCache:
        """Lowers the lengths of slots. The cache is donated."""
        padded = np.full((2, cache.spec.max_slots), -1, np.int32)
        padded[0, : len(slots)], padded[1] = slots, 0
        padded[1, : len(slots)] = lengths
        return self._set_lengths(cache, padded[0], padded[1])

    def _run(
        self,
        shape: tuple[int, int],
        num_guesses: int,
        params: Any,
        cache: KVCache,
        state: SamplerState,
        packed: jax.Array,
        masks: jax.Array | None,
        targets: jax.Array | None,
    ) -> tuple[KVCache, SamplerState, Outcome]:
        num_tokens, size = shape
        tokens = packed[:num_tokens]
        table = packed[num_tokens + 1 :].reshape(-1, size)
        offsets = packed[num_tokens : num_tokens + 1 + size]
        newest = state.last[jnp.clip(-1 - tokens, 0, self._num_rows - 1)]
        tokens = jnp.where(tokens < 0, newest, tokens)
        _, slots, rows, positions, guesses = table[:_FIELDS]
        batch = Batch(slots, offsets, num_tokens=num_tokens)
        each, behind = num_guesses + 1, jnp.zeros((size, 1), jnp.int32)
        last = batch.last_rows[:, None]
        if num_guesses:  # how far each wanted token is behind the sequence's last
            behind = jnp.maximum(guesses[:, None] - jnp.arange(each)[None], 0)
            last = last - behind
        wanted_rows = last.reshape(-1) if targets is None else jnp.arange(num_tokens)
        if num_guesses or targets is not None:
            batch = _VerifiedBatch(slots, offsets, num_tokens=num_tokens, rows=wanted_rows)
        logits, cache = self._step(params, cache, tokens, batch)
        if logits.ndim != 2 or logits.shape[0] != len(wanted_rows):
            raise ValueError(
                f"Engine: step returned logits {list(logits.shape)}, wanted "
                f"[{len(wanted_rows)}, vocabulary]: those of batch.last_rows"
            )
        cache = advance(cache, batch)
        scored, max_logprobs = None, min(self.max_logprobs, logits.shape[1])
        if targets is not None:
            scored = log_probabilities(logits.astype(jnp.float32), targets, max_logprobs)
            logits = logits[last.reshape(-1)]
        parts = jnp.split(table[_FIELDS:], (NUM_FLOATS, NUM_FLOATS + NUM_INTS))
        floats, ints, banned = (jnp.repeat(part, each, axis=1) for part in parts)
        wanted = RowParams(
            jax.lax.bitcast_convert_type(floats, jnp.float32),
            ints,
            banned,
            jnp.repeat(rows, each),
            (positions[:, None] - behind).reshape(-1),
            masks,
        )
        sampled = sample(logits, wanted, state.history, max_logprobs)
        chosen = sampled.tokens.reshape(size, each)
        right = tokens[jnp.minimum(last + 1, num_tokens - 1)] == chosen
        right = jnp.cumprod(right & (behind > 0), axis=1, dtype=jnp.int32)
        accepted = jnp.sum(right, axis=1, dtype=jnp.int32)
        positions = positions - guesses + accepted
        if num_guesses:
            cache = set_lengths(cache, jnp.where(accepted < guesses, slots, -1), positions)
        newest = jnp.take_along_axis(chosen, accepted[:, None], axis=1)[:, 0]
        state = remember(state, rows, positions, newest)
        found = jnp.where(sampled.valid.reshape(size, each), chosen, -1)
        found = jnp.concatenate([found, accepted[:, None]], axis=1)
        return cache, state, Outcome(found, sampled.details, scored)


def _set_history(state: SamplerState, row: jax.Array, ids: jax.Array) -> SamplerState:
    return SamplerState(state.last, state.history.at[row].set(ids))
