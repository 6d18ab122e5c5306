"""The compiled programs of the engine: a step for each bucket, and two small ones.

A step's operands travel as one int32 array, because every transfer costs as much as the next. The
cache and the sampler's state are donated.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpage.cache import Batch, KVCache
from jax_kvpage.ops.advance import advance
from jax_kvpage.ops.set_lengths import set_lengths
from jax_kvpage.serving.engine.sampling import (
    NUM_FLOATS,
    NUM_INTS,
    RowParams,
    Sampled,
    SamplerState,
    sample,
)

__all__ = ["Programs", "Step"]

# (params, cache, tokens [T], batch) -> (logits [S, vocabulary] of batch.last_rows, cache)
Step = Callable[[Any, KVCache, jax.Array, Batch], tuple[jax.Array, KVCache]]


class Programs:
    """Compiled programs of a model.

    Args:
        step: the model.
        params: its first argument.
        shapes: buckets, smallest first.
        num_rows: sequences at one time.
        max_logprobs: see `EngineConfig`.
        num_banned: see `EngineConfig.max_stop_token_ids`.

    Attributes:
        num_compiled: steps compiled so far, at most one for each bucket.
    """

    def __init__(
        self,
        step: Step,
        params: Any,
        shapes: list[tuple[int, int]],
        num_rows: int,
        max_logprobs: int,
        num_banned: int,
    ) -> None:
        self._step = step
        self._params = params
        self.shapes = shapes
        self._num_rows = num_rows
        self._max_logprobs = max_logprobs
        self._num_banned = num_banned
        self._compiled: dict[tuple[int, int], Any] = {}
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

    def initial_state(self, max_seq_len: int, device: jax.Device) -> SamplerState:
        """The sampler's state before the first step."""
        history = np.zeros((self._num_rows, max_seq_len), np.int32)
        last = np.zeros(self._num_rows, np.int32)
        return SamplerState(jax.device_put(last, device), jax.device_put(history, device))

    def pack(
        self,
        shape: tuple[int, int],
        tokens: np.ndarray,
        offsets: np.ndarray,
        slots: np.ndarray,
        rows: np.ndarray,
        positions: np.ndarray,
        sampling: np.ndarray,
    ) -> np.ndarray:
        """The operands of a step as one array, padded to a bucket.

        Args:
            shape: the bucket.
            tokens: int32[t]; -1 - row is the newest token of a row, which is on the device.
            offsets: int32[s + 1].
            slots: int32[s].
            rows: int32[s], of sequences that do not sample the number of rows.
            positions: int32[s] of the new tokens.
            sampling: int32[NUM_FLOATS + NUM_INTS + num_banned, s], floats as bits.
        """
        num_tokens, size = shape
        s, fields = len(slots), sampling.shape[0]
        packed = np.zeros(num_tokens + 1 + (4 + fields) * size, np.int32)
        packed[: len(tokens)] = tokens
        packed[num_tokens] = 0
        table = packed[num_tokens + 1 :].reshape(4 + fields, size)
        table[0, :s], table[0, s:] = offsets[1:], offsets[-1]
        table[1, :s], table[1, s:] = slots, -1
        table[2, :s], table[2, s:] = rows, self._num_rows
        table[3, :s] = positions
        table[4:, :s] = sampling
        return packed

    def run(
        self, shape: tuple[int, int], cache: KVCache, state: SamplerState, packed: np.ndarray
    ) -> tuple[KVCache, SamplerState, Sampled]:
        """Runs a step. The cache and the state are donated."""
        program = self._compiled.get(shape)
        if program is None:
            program = self.compile(shape, cache, state)
        return program(self._params, cache, state, packed)

    def compile(self, shape: tuple[int, int], cache: KVCache, state: SamplerState) -> Any:
        """Compiles a bucket's program without running it."""
        fields = NUM_FLOATS + NUM_INTS + self._num_banned
        packed = jax.ShapeDtypeStruct((shape[0] + 1 + (4 + fields) * shape[1],), jnp.int32)

        def run(params: Any, cache: KVCache, state: SamplerState, packed: jax.Array) -> Any:
            return self._run(shape, params, cache, state, packed)

        program = jax.jit(run, donate_argnums=(1, 2))
        compiled = program.lower(self._params, cache, state, packed).compile()
        self._compiled[shape] = compiled
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
        params: Any,
        cache: KVCache,
        state: SamplerState,
        packed: jax.Array,
    ) -> tuple[KVCache, SamplerState, Sampled]:
        num_tokens, size = shape
        tokens = packed[:num_tokens]
        table = packed[num_tokens + 1 :].reshape(-1, size)
        offsets = packed[num_tokens : num_tokens + 1 + size]
        newest = state.last[jnp.clip(-1 - tokens, 0, self._num_rows - 1)]
        tokens = jnp.where(tokens < 0, newest, tokens)
        batch = Batch(table[1], offsets, num_tokens=num_tokens)
        logits, cache = self._step(params, cache, tokens, batch)
        if logits.ndim != 2 or logits.shape[0] != size:
            raise ValueError(
                f"Engine: step returned logits {list(logits.shape)}, wanted [{size}, vocabulary]: "
                "those of batch.last_rows"
            )
        cache = advance(cache, batch)
        floats, ints, banned = jnp.split(table[4:], (NUM_FLOATS, NUM_FLOATS + NUM_INTS))
        floats = jax.lax.bitcast_convert_type(floats, jnp.float32)
        rows = RowParams(floats, ints, banned, table[2], table[3])
        sampled, state = sample(logits, rows, state, self._max_logprobs)
        return cache, state, sampled


def _set_history(state: SamplerState, row: jax.Array, ids: jax.Array) -> SamplerState:
    return SamplerState(state.last, state.history.at[row].set(ids))
