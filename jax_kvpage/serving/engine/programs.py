"""The compiled programs of the engine: a step for each bucket, and two small ones.

With speculation, each bucket has a second step, which also verifies guesses: the model computes
logits for each of them, and the sequence is rolled back to the first guess that differs from the
sampled token. If prompts may be scored, a further step computes logits for all of its tokens.

The cache and the sampler state are donated. If the pool has replicas, a step serves all of them:
tokens, batch and logits have a part for each, as made by `jax_kvpage.spread`.
"""

import dataclasses
import functools
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
from jax_kvpage.serving.engine.packing import FIELDS, Operands, Packed, Packer
from jax_kvpage.serving.engine.replicas import Replicas
from jax_kvpage.serving.engine.sampling import (
    NUM_FLOATS,
    NUM_INTS,
    RowParams,
    SamplerState,
    log_probabilities,
    remember,
    sample,
)
from jax_kvpage.serving.engine.verifying import VerifiedBatch, places_behind
from jax_kvpage.sharding.over_axis import AxisSharding

__all__ = ["Outcome", "Programs", "Step"]

# (params, cache, tokens [T], batch) -> (logits [S, vocabulary] of batch.last_rows, cache)
Step = Callable[[Any, KVCache, jax.Array, Batch], tuple[jax.Array, KVCache]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of a step that are read back.

    Each array costs time in the thread that dispatches and reads, so there are few of them.

    Attributes:
        chosen: int32[S, K + 2]: all that most steps need. For each sequence, the tokens sampled
            after its newest token and after each of its guesses (-1 if the logits contained NaN),
            then the number of leading guesses that were right.
        details: int32[S * (K + 1), 2 + 2M]: log probabilities of these tokens if requested; see
            `log_probabilities`.
        scores: the same for the token following each of the T tokens of a scoring step; else None.
    """

    chosen: jax.Array
    details: jax.Array
    scores: jax.Array | None


class Programs:
    """Compiled programs of a model.

    Args:
        step: the model.
        params: first argument of `step`.
        shapes: buckets, smallest first.
        num_rows: maximum sequences of a replica at one time.
        max_logprobs: see `EngineConfig`.
        num_banned: see `EngineConfig.max_stop_token_ids`.
        num_guesses: K, maximum tokens to verify per sequence.
        num_words: words of the masks for constrained decoding; 0 without it.
        scores: whether steps may score prompts.
        sharding: sharding of the pool.

    Attributes:
        max_logprobs: see above.
        compile_seconds: time spent tracing and compiling them.
        num_compiled: steps compiled so far: per bucket at most one, plus one with speculation and
            one for scoring.
        variants: (bucket, guesses, whether it scores) of all steps.
    """

    def __init__(
        self,
        step: Step,
        params: Any,
        shapes: list[tuple[int, int]],
        *,
        num_rows: int,
        max_logprobs: int,
        num_banned: int,
        num_guesses: int,
        num_words: int = 0,
        scores: bool = False,
        sharding: AxisSharding | None = None,
    ) -> None:
        kinds = {(0, False), (num_guesses, False)} | ({(num_guesses, True)} if scores else set())
        self.variants = [(shape, *kind) for kind in sorted(kinds) for shape in shapes]
        self._step = step
        self._params = params
        self.shapes = shapes
        self._num_rows = num_rows
        self._replicas = Replicas(sharding)
        slots = 0 if sharding is None else sharding.local.max_slots
        self._packer = Packer(num_rows, self._replicas.count, slots)
        self.max_logprobs = max_logprobs
        self._num_banned = num_banned
        self.num_words = num_words
        self._no_masks: dict[int, jax.Array] = {}
        self._compiled: dict[tuple[tuple[int, int], int, bool], Any] = {}
        self.compile_seconds = 0.0
        self._set_history = jax.jit(self._write_history, donate_argnums=0)
        self._set_lengths = jax.jit(set_lengths, donate_argnums=0)

    @property
    def num_compiled(self) -> int:
        """See the class."""
        return len(self._compiled)

    def bucket(self, num_tokens: int, num_sequences: int) -> tuple[int, int]:
        """Returns the smallest shape that holds a step."""
        for shape in self.shapes:
            if num_tokens <= shape[0] and num_sequences <= shape[1]:
                return shape
        raise ValueError(f"no bucket for {num_tokens} tokens of {num_sequences} sequences")

    def initial_state(
        self, max_seq_len: int, placement: jax.Device | NamedSharding
    ) -> SamplerState:
        """Returns the initial sampler state, placed where the pool is."""
        count = self._num_rows * self._replicas.count
        history = np.zeros((count, max_seq_len), np.int32)
        last = np.zeros(count, np.int32)
        where = self._replicas.placement(placement)
        return SamplerState(*jax.device_put((last, history), where))

    def pack(self, step: Operands) -> Packed:
        """Packs the operands of a step into one array, padded to a bucket."""
        return self._packer.pack(self.bucket, step)

    def step_rows(self, packed: Packed) -> int:
        """R * S, the capacity of a step in sequences."""
        return self._replicas.count * packed.shape[1]

    def run(
        self,
        packed: Packed,
        num_guesses: int,
        cache: KVCache,
        state: SamplerState,
        masks: np.ndarray | None = None,
        targets: np.ndarray | None = None,
    ) -> tuple[KVCache, SamplerState, Outcome]:
        """Runs a step variant. The cache and the state are donated.

        Args:
            packed: see `pack`.
            num_guesses: 0 or K.
            cache: the newest cache.
            state: the newest state.
            masks: int32[R * S * (num_guesses + 1), num_words] for R replicas; None if no sequence
                has a mask.
            targets: int32[t]: the token that follows each token, for a step that scores.
        """
        shape, scores = packed.shape, targets is not None
        program = self._compiled.get((shape, num_guesses, scores))
        if program is None:
            program = self.compile(shape, num_guesses, cache, state, scores)
        count, following = self._replicas.count, None
        if targets is not None:
            following = np.zeros(count * shape[0], np.int32)
            following[packed.tokens] = targets
        wanted: Any = masks
        if masks is None and self.num_words:
            wanted = self._masks_of_nothing(count * shape[1] * (num_guesses + 1), state)
        return program(self._params, cache, state, packed.operands, wanted, following)

    @staticmethod
    def read_back(outcome: Outcome) -> np.ndarray:
        """Waits for a step and returns its `Outcome.chosen`, a single array, as each has a cost."""
        return np.asarray(outcome.chosen)

    def _masks_of_nothing(self, num_rows: int, state: SamplerState) -> jax.Array:
        """Masks that do not apply, kept on the device because most steps use no others."""
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
        packed = self._replicas.shape(shape[0] + 1 + (FIELDS + fields) * shape[1])
        masks = targets = None
        if self.num_words:
            masks = self._replicas.shape(shape[1] * (num_guesses + 1), self.num_words)
        if scores:
            targets = self._replicas.shape(shape[0])

        def run(*operands: Any) -> Any:
            return self._run(shape, num_guesses, *operands)

        begin = time.monotonic()
        program = jax.jit(run, donate_argnums=(1, 2))
        compiled = program.lower(self._params, cache, state, packed, masks, targets).compile()
        self.compile_seconds += time.monotonic() - begin
        self._compiled[shape, num_guesses, scores] = compiled
        return compiled

    def set_history(self, state: SamplerState, row: int, ids: list[int]) -> SamplerState:
        """Sets the token history of a sequence with penalties. The state is donated."""
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
        """The program: the model's step for all replicas, and the rest for each replica."""
        scores = targets is not None
        each, form = self._replicas.each, (shape, num_guesses, scores)
        tokens, batch = each(functools.partial(self._unpack, form))(state, packed)
        logits, cache = self._step(params, cache, tokens, batch)
        wanted = tokens.shape[0] if scores else batch.slots.shape[0] * (num_guesses + 1)
        if logits.ndim != 2 or logits.shape[0] != wanted:
            raise ValueError(
                f"Engine: step returned logits {list(logits.shape)}, wanted "
                f"[{wanted}, vocabulary]: those of batch.last_rows"
            )
        choose = each(functools.partial(self._choose, form), has_cache=True)
        cache, (state, outcome) = choose(
            cache, logits, state, tokens, batch, packed, masks, targets
        )
        return cache, state, outcome

    def _unpack(
        self, form: tuple[tuple[int, int], int, bool], state: SamplerState, packed: jax.Array
    ) -> tuple[jax.Array, Batch]:
        """Unpacks the inputs of the model's step, for one replica.

        Args:
            form: the bucket, the number of guesses (K or 0), and whether the step scores.
            state: state before the step.
            packed: see `Packer`.
        """
        (num_tokens, size), num_guesses, scores = form
        tokens = packed[:num_tokens]
        table = packed[num_tokens + 1 :].reshape(-1, size)
        offsets = packed[num_tokens : num_tokens + 1 + size]
        newest = state.last[jnp.clip(-1 - tokens, 0, self._num_rows - 1)]
        tokens = jnp.where(tokens < 0, newest, tokens)
        batch = Batch(table[1], offsets, num_tokens=num_tokens)
        if not (num_guesses or scores):
            return tokens, batch
        last = batch.last_rows[:, None] - places_behind(table[4], num_guesses)
        rows = jnp.arange(num_tokens) if scores else last.reshape(-1)
        return tokens, VerifiedBatch(table[1], offsets, num_tokens=num_tokens, rows=rows)

    def _choose(
        self,
        form: tuple[tuple[int, int], int, bool],
        cache: KVCache,
        logits: jax.Array,
        state: SamplerState,
        tokens: jax.Array,
        batch: Batch,
        packed: jax.Array,
        masks: jax.Array | None,
        targets: jax.Array | None,
    ) -> tuple[KVCache, tuple[SamplerState, Outcome]]:
        """Chooses tokens after the model's step and rolls back wrong guesses, for one replica."""
        (num_tokens, size), num_guesses, _ = form
        table = packed[num_tokens + 1 :].reshape(-1, size)
        _, slots, rows, positions, guesses = table[:FIELDS]
        each, behind = num_guesses + 1, places_behind(guesses, num_guesses)
        last = Batch(slots, batch.query_offsets, num_tokens=num_tokens).last_rows[:, None] - behind
        cache = advance(cache, batch)
        scored, max_logprobs = None, min(self.max_logprobs, logits.shape[1])
        if targets is not None:
            scored = log_probabilities(logits.astype(jnp.float32), targets, max_logprobs)
            logits = logits[last.reshape(-1)]
        parts = jnp.split(table[FIELDS:], (NUM_FLOATS, NUM_FLOATS + NUM_INTS))
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
        return cache, (state, Outcome(found, sampled.details, scored))

    def _write_history(self, state: SamplerState, row: jax.Array, ids: jax.Array) -> SamplerState:
        def write(history: jax.Array) -> jax.Array:
            own = self._replicas.own_row(row, self._num_rows)
            return history.at[own].set(ids, mode="drop")

        return SamplerState(state.last, self._replicas.each(write)(state.history))
