"""A rig with a cache and a plain model of its contents, and jitted steps that pad every batch to
one static shape.

Compile time dominates a small test, so everything that may vary is passed as data: the programs
below are compiled once per spec, token count and set of static variants, and serve all batches.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from reference_numpy import (
    PLAIN,
    Array,
    CacheModel,
    Variant,
    attend_ragged,
    is_quantized,
    rounded,
)

import jax_kvpage as kvp

# The exceptions that JAX raises when a handler fails. Small programs, which the fast dispatch path
# runs inline, raise the second one, with the same text.
RUN_TIME_ERRORS = (jax.errors.JaxRuntimeError, ValueError)
# Pools on devices that record faults until they are asked for them (CUDA); tests/gpu registers its
# pools here.
ON_DEVICE: list[kvp.KVPool] = []


def settle(value: Any) -> Any:
    """Waits for a value, and raises its programs' errors on any platform."""
    jax.block_until_ready(value)
    for pool in ON_DEVICE:
        if not pool.closed:
            pool.extend([], [])  # changes nothing, but checks for faults first
    return value


@functools.partial(jax.jit, donate_argnames="cache")
def append_all(cache: kvp.KVCache, k: jax.Array, v: jax.Array, batch: kvp.Batch) -> kvp.KVCache:
    """Writes k, v [layers, T, Hkv, D] in every layer and advances."""
    for layer in range(k.shape[0]):
        cache = kvp.append_kv(cache, k[layer], v[layer], batch, layer=layer)
    return kvp.advance(cache, batch)


@functools.partial(
    jax.jit,
    donate_argnames="cache",
    static_argnames=("one_call", "scale", "soft_cap", "implementation"),
)
def attend_all(
    cache: kvp.KVCache,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    batch: kvp.Batch,
    window: jax.Array | None,
    sinks: jax.Array | None,
    alibi: jax.Array | None,
    *,
    one_call: bool = True,
    scale: float | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, kvp.KVCache]:
    """Runs one step over all layers; returns out [layers, T, Hq, D], lse [layers, T, Hq] and the
    advanced cache.
    """
    outs, lses = [], []
    for layer in range(q.shape[0]):
        options = {
            "layer": layer,
            "scale": scale,
            "sliding_window": window,
            "logits_soft_cap": soft_cap,
            "sinks": sinks,
            "alibi_slopes": alibi,
            "return_lse": True,
            "implementation": implementation,
        }
        if one_call:
            out, lse, cache = kvp.update_and_attend(
                q[layer], k[layer], v[layer], cache, batch, **options
            )
        else:
            cache = kvp.append_kv(cache, k[layer], v[layer], batch, layer=layer)
            out, lse = kvp.paged_attention(q[layer], cache, batch, **options)
        outs.append(out)
        lses.append(lse)
    return jnp.stack(outs), jnp.stack(lses), kvp.advance(cache, batch)


def make_batch(sequences: Sequence[tuple[int, int]], num_sequences: int | None = None) -> kvp.Batch:
    """Makes a batch of (slot, new tokens), padded to `num_sequences` with empty sequences of slot
    -1.
    """
    padding = (num_sequences or len(sequences)) - len(sequences)
    slots = [slot for slot, _ in sequences] + [-1] * padding
    offsets = np.cumsum([0] + [n for _, n in sequences] + [0] * padding)
    return kvp.Batch(
        slots=jnp.asarray(slots, jnp.int32), query_offsets=jnp.asarray(offsets, jnp.int32)
    )


def input_dtype(spec: kvp.CacheSpec) -> np.dtype:
    """Returns the dtype for new keys and values: the stored dtype, or float32 if that is
    quantized.
    """
    return np.dtype(jnp.float32 if is_quantized(spec.dtype) else spec.dtype)


class Rig:
    """A pool's newest cache, and a model of the expected contents."""

    def __init__(
        self,
        pool: kvp.KVPool,
        *,
        group: int = 1,
        query_dtype: object = jnp.float32,
        max_tokens: int = 48,
        max_sequences: int = 6,
        seed: int = 0,
    ) -> None:
        self.pool, self.spec = pool, pool.spec
        self.cache = pool.cache()
        self.query_heads = group * self.spec.num_kv_heads
        self.query_dtype = query_dtype
        self.max_tokens, self.max_sequences = max_tokens, max_sequences
        self.rng = np.random.default_rng(seed)
        self.model = CacheModel(
            self.spec.num_layers, self.spec.num_kv_heads, self.spec.head_dim, self.spec.dtype
        )

    def acquire(self, num_tokens: int) -> int:
        slot, self.cache = self.pool.acquire(self.cache, num_tokens)
        self.model.acquire(slot)
        return slot

    def acquire_scattered(self, num_tokens: Sequence[int]) -> list[int]:
        """Acquires slots and grows them in turns, one block at a time, so that no slot gets
        adjacent blocks.
        """
        slots = [self.acquire(1) for _ in num_tokens]
        step = self.spec.block_tokens
        for reserved in range(2 * step, max(num_tokens, default=0) + step, step):
            for i in self.rng.permutation(len(slots)):
                if reserved - step < num_tokens[i]:
                    self.pool.extend(slots[i], min(reserved, self.spec.max_seq_len))
        return slots

    def release(self, *slots: int) -> None:
        self.cache = self.pool.release(self.cache, list(slots))
        for slot in slots:
            self.model.release(slot)

    def random_kv(self, num_tokens: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        shape = (self.spec.num_layers, num_tokens, self.spec.num_kv_heads, self.spec.head_dim)
        return (
            self.rng.standard_normal(shape, np.float32),
            self.rng.standard_normal(shape, np.float32),
        )

    def random_q(self, num_tokens: int) -> NDArray[np.float32]:
        shape = (self.spec.num_layers, num_tokens, self.query_heads, self.spec.head_dim)
        return self.rng.standard_normal(shape, np.float32)

    def write(self, new_tokens: Mapping[int, int]) -> None:
        """Appends random tokens, in as many batches as the static shape requires."""
        left = dict(new_tokens)
        while any(left.values()):
            room, chosen = self.max_tokens, []
            for slot in list(left)[: self.max_sequences]:
                n = min(left[slot], room)
                chosen.append((slot, n))
                room -= n
            self.write_kv(chosen, *self.random_kv(self.max_tokens))
            for slot, n in chosen:
                left[slot] -= n
            left = {slot: n for slot, n in left.items() if n}

    def append(self, sequences: Sequence[tuple[int, int]]) -> None:
        """Appends random tokens in every layer without advancing, so that they stay new tokens."""
        k, v = self.random_kv(sum(n for _, n in sequences))
        for layer in range(self.spec.num_layers):
            self.cache = kvp.append_kv(
                self.cache,
                jnp.asarray(k[layer]),
                jnp.asarray(v[layer]),
                make_batch(sequences),
                layer=layer,
            )
        self._model_append(sequences, k, v)

    def write_kv(self, sequences: Sequence[tuple[int, int]], k: Array, v: Array) -> None:
        """Appends k, v [layers, T, Hkv, D] for one batch of (slot, n), and advances."""
        batch = make_batch(sequences, max(self.max_sequences, len(sequences)))
        dtype = input_dtype(self.spec)
        self.cache = append_all(self.cache, jnp.asarray(k, dtype), jnp.asarray(v, dtype), batch)
        self._model_append(sequences, k, v)
        for slot, n in sequences:
            if slot >= 0:
                self.model.advance(slot, n)

    def step(
        self,
        sequences: Sequence[tuple[int, int]],
        variant: Variant = PLAIN,
        *,
        one_call: bool = True,
        implementation: str | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], Array, Array]:
        """Runs one step with random tokens.

        Returns:
            out and lse as computed, then out and lse of the reference; all
            [layers, max_tokens, Hq(, D)].
        """
        k, v = self.random_kv(self.max_tokens)
        q = self.random_q(self.max_tokens)
        batch = make_batch(sequences, self.max_sequences)
        dtype = input_dtype(self.spec)
        window, sinks, slopes = (
            None if x is None else jnp.asarray(x)
            for x in (variant.sliding_window, variant.sinks, variant.alibi_slopes)
        )
        out, lse, self.cache = attend_all(
            self.cache,
            jnp.asarray(q, self.query_dtype),
            jnp.asarray(k, dtype),
            jnp.asarray(v, dtype),
            batch,
            window,
            sinks,
            slopes,
            one_call=one_call,
            scale=variant.scale,
            soft_cap=variant.logits_soft_cap,
            implementation=implementation,
        )
        self._model_append(sequences, k, v)
        want_out, want_lse = self.reference(sequences, q, variant)
        for slot, n in sequences:
            if slot >= 0:
                self.model.advance(slot, n)
        return np.asarray(out, np.float32), np.asarray(lse), want_out, want_lse

    def reference(
        self, sequences: Sequence[tuple[int, int]], q: Array, variant: Variant = PLAIN
    ) -> tuple[Array, Array]:
        """Returns the attention of q [layers, T, Hq, D] for tokens that are appended but not yet
        advanced.
        """
        offsets = np.cumsum([0] + [n for _, n in sequences])
        per_layer = [
            attend_ragged(
                rounded(q[layer], self.query_dtype),
                [None if slot < 0 else self.model.context(slot, layer) for slot, _ in sequences],
                [0 if slot < 0 else self.model.lengths[slot] for slot, _ in sequences],
                offsets,
                variant,
            )
            for layer in range(self.spec.num_layers)
        ]
        return np.stack([out for out, _ in per_layer]), np.stack([lse for _, lse in per_layer])

    def check_lengths(self) -> None:
        """Asserts that the device's lengths are the model's, and -1 for every free slot."""
        want = np.full(self.spec.max_slots, -1)
        for slot, length in self.model.lengths.items():
            want[slot] = length
        np.testing.assert_array_equal(np.asarray(self.cache.lengths), want)

    def _model_append(self, sequences: Sequence[tuple[int, int]], k: Array, v: Array) -> None:
        offsets = np.cumsum([0] + [n for _, n in sequences])
        for s, (slot, _) in enumerate(sequences):
            if slot >= 0:
                tokens = slice(offsets[s], offsets[s + 1])
                for layer in range(self.spec.num_layers):
                    self.model.append(slot, layer, k[layer, tokens], v[layer, tokens])


# Loop iterations of `_busy_cpu` that take about half a second.
_BUSY_ROUNDS = 1000
# Matrix products per call of `_busy_gpu`, each 1.1 TFLOP or 20 ms in float32 on an H200, and calls
# per unit: three seconds, because what a test calls meanwhile may have to be compiled.
_BUSY_PRODUCTS = 25
_BUSY_CALLS = 6
_BUSY_WIDTH = 8192


def busy(times: int) -> jax.Array:
    """Returns a value that takes `times` half seconds or more to compute, as a program in flight:
    the call returns at once.
    """
    device = jax.config.jax_default_device or jax.devices()[0]
    if device.platform == "cpu":
        return _busy_cpu(times * _BUSY_ROUNDS)
    x = _busy_start(0.5)
    for _ in range(times * _BUSY_CALLS):
        x = _busy_gpu(x)
    return x[0, 0]


@jax.jit
def _busy_cpu(rounds: int) -> jax.Array:
    def body(_: int, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ x)

    return jax.lax.fori_loop(0, rounds, body, jnp.ones((300, 300)))[0, 0]


@jax.jit
def _busy_start(phase: float) -> jax.Array:
    return jnp.sin(phase + jnp.arange(_BUSY_WIDTH**2, dtype=jnp.float32)).reshape(_BUSY_WIDTH, -1)


# On a GPU, a loop with a traced trip count makes the host wait for its condition, so the call would
# only return when the value is ready. Hence a few large kernels, queued at once. Autotuning them
# would gain nothing.
@functools.partial(jax.jit, compiler_options={"xla_gpu_autotune_level": 0})
def _busy_gpu(x: jax.Array) -> jax.Array:
    for _ in range(_BUSY_PRODUCTS):
        x = jnp.tanh(jnp.matmul(x, x, precision=jax.lax.Precision.HIGHEST))
    return x
