"""A failure in the middle of a step or scan costs only the program in which it happened: the other
sequences lose neither a token nor a bit.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import ON_DEVICE, RUN_TIME_ERRORS, settle

import jax_kvpage as kvp

_LAYERS, _KV_HEADS, _HEADS, _DIM, _VOCAB, _SEQUENCES = 3, 2, 4, 32, 50, 3
_BLOCK = 32


def _tables() -> dict[str, jax.Array]:
    """Returns a toy language model: a table lookup per layer, attention, and a product that selects
    the next token.
    """
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    return {
        "q": draw(_LAYERS, _VOCAB, _HEADS, _DIM),
        "k": draw(_LAYERS, _VOCAB, _KV_HEADS, _DIM),
        "v": draw(_LAYERS, _VOCAB, _KV_HEADS, _DIM),
        "head": draw(_LAYERS * _HEADS * _DIM, _VOCAB),
    }


def _one(
    cache: kvp.KVCache, tokens: jax.Array, slots: jax.Array, bad_layer: jax.Array
) -> tuple[kvp.KVCache, jax.Array, jax.Array]:
    """Runs one decode step. The call of layer `bad_layer` fails, after earlier layers have written
    their tokens.
    """
    tables = _tables()
    batch = kvp.Batch.decode(slots)
    outs = []
    for layer in range(_LAYERS):
        number = jnp.where(bad_layer == layer, 99, layer)
        out, cache = kvp.update_and_attend(
            tables["q"][layer][tokens],
            tables["k"][layer][tokens],
            tables["v"][layer][tokens],
            cache,
            batch,
            layer=number,
        )
        outs.append(out)
    hidden = jnp.stack(outs, axis=1).reshape(_SEQUENCES, -1)
    return kvp.advance(cache, batch), jnp.argmax(hidden @ tables["head"], axis=-1), hidden


@functools.partial(jax.jit, donate_argnames="cache")
def _step(cache, tokens, slots, bad_layer):
    return _one(cache, tokens, slots, bad_layer)


@functools.partial(jax.jit, donate_argnames="cache")
def _scan(cache, tokens, slots, bad_layers):
    """Runs a step for each element of `bad_layers`; -1 means no failure."""

    def body(carry, bad_layer):
        cache, tokens = carry
        cache, tokens, hidden = _one(cache, tokens, slots, bad_layer)
        return (cache, tokens), (tokens, hidden)

    (cache, _), (tokens, hidden) = jax.lax.scan(body, (cache, tokens), bad_layers)
    return cache, tokens, hidden


_GOOD = jnp.asarray(-1, jnp.int32)
_START = jnp.asarray([3, 14, 15], jnp.int32)
_STEPS = 20


@functools.cache
def _undisturbed() -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and hidden states [steps, sequences, ...] of a run without failures."""
    with kvp.KVPool(_spec("fused"), "32MiB") as pool:
        slots, cache = pool.acquire(pool.cache(), [64] * _SEQUENCES)
        tokens, rows, bits = _START, [], []
        for _ in range(_STEPS):
            cache, tokens, hidden = _step(cache, tokens, jnp.asarray(slots, jnp.int32), _GOOD)
            rows.append(np.asarray(tokens))
            bits.append(np.asarray(hidden))
    return np.stack(rows), np.stack(bits)


def _spec(layout: str) -> kvp.CacheSpec:
    return kvp.CacheSpec(
        _LAYERS, _KV_HEADS, _DIM, 4, 128, dtype=jnp.float32, layout=layout, block_tokens=_BLOCK
    )


@pytest.fixture(params=["fused", "per_layer"])
def pool(request: pytest.FixtureRequest, make_pool) -> kvp.KVPool:
    return make_pool(_spec(request.param), "8MiB", poison=True)


def _check_rest(
    pool: kvp.KVPool,
    cache: kvp.KVCache,
    slots: list[int],
    tokens: np.ndarray,
    done: int,
    survivors: list[int],
) -> None:
    """Asserts that the survivors now produce, bit for bit, what they would have produced without
    the failure.
    """
    want_tokens, want_hidden = _undisturbed()
    ids = jnp.asarray([s if i in survivors else -1 for i, s in enumerate(slots)], jnp.int32)
    tokens = jnp.asarray(tokens)
    for i in range(done, _STEPS):
        cache, tokens, hidden = _step(cache, tokens, ids, _GOOD)
        np.testing.assert_array_equal(np.asarray(tokens)[survivors], want_tokens[i][survivors])
        np.testing.assert_array_equal(np.asarray(hidden)[survivors], want_hidden[i][survivors])


@pytest.mark.parametrize("bad_layer", range(_LAYERS))
def test_failure_in_the_middle_of_a_step(pool: kvp.KVPool, bad_layer: int) -> None:
    slots, cache = pool.acquire(pool.cache(), [64] * _SEQUENCES)
    ids, tokens = jnp.asarray(slots, jnp.int32), _START
    for _ in range(7):
        cache, tokens, _ = _step(cache, tokens, ids, _GOOD)
    with pytest.raises(RUN_TIME_ERRORS, match="layer"):
        settle(_step(cache, tokens, ids, jnp.asarray(bad_layer, jnp.int32)))
    cache = pool.cache()
    assert [int(cache.lengths[slot]) for slot in slots] == [7] * _SEQUENCES
    cache = pool.release(cache, slots[1])
    _check_rest(pool, cache, slots, tokens, 7, [0, 2])


@pytest.mark.parametrize(("fails_at", "bad_layer"), [(0, 0), (3, 1), (5, 2)])
def test_failure_in_the_middle_of_a_scan(pool: kvp.KVPool, fails_at: int, bad_layer: int) -> None:
    """The tokens of a failed scan are lost with it; the lengths tell how far it got, and are set
    back to what the host knows.
    """
    slots, cache = pool.acquire(pool.cache(), [64] * _SEQUENCES)
    ids = jnp.asarray(slots, jnp.int32)
    cache, rows, _ = _scan(cache, _START, ids, jnp.full(6, -1, jnp.int32))
    np.testing.assert_array_equal(rows, _undisturbed()[0][:6])
    bad = jnp.full(6, -1, jnp.int32).at[fails_at].set(bad_layer)
    with pytest.raises(RUN_TIME_ERRORS, match="layer"):
        settle(_scan(cache, rows[-1], ids, bad))
    cache = pool.cache()
    # On a GPU, the steps after the failed one still run, on whatever it returned as tokens.
    came_to = 6 + (5 if ON_DEVICE else fails_at)
    assert [int(cache.lengths[slot]) for slot in slots] == [came_to] * _SEQUENCES
    cache = kvp.set_lengths(cache, ids, jnp.full(_SEQUENCES, 6, jnp.int32))
    _check_rest(pool, cache, slots, rows[-1], 6, [0, 1, 2])


def test_one_sequence_runs_out_of_memory_in_a_scan(pool: kvp.KVPool) -> None:
    """The usual failure: one slot runs out of mapped memory in a program that serves all three."""
    slots, cache = pool.acquire(pool.cache(), [64, 1, 64])
    ids = jnp.asarray(slots, jnp.int32)
    # Sequence 1 starts 4 tokens before the end of its only block; the tokens before that do not
    # matter here.
    filler = jnp.zeros((_BLOCK - 4, _KV_HEADS, _DIM))
    batch = kvp.Batch.from_lengths([slots[1]], [_BLOCK - 4])
    for layer in range(_LAYERS):
        cache = kvp.append_kv(cache, filler, filler, batch, layer=layer)
    cache = kvp.advance(cache, batch)
    tokens = _START
    cache, tokens, _ = _step(cache, tokens, ids, _GOOD)
    known = np.asarray(tokens)
    with pytest.raises(RUN_TIME_ERRORS, match=f"(?s)slot {slots[1]}.*{_BLOCK + 1}.*{_BLOCK}"):
        settle(_scan(cache, tokens, ids, jnp.full(6, -1, jnp.int32)))
    cache = pool.cache()
    assert [int(cache.lengths[slot]) for slot in slots] == [4, _BLOCK, 4]
    cache = pool.release(cache, slots[1])
    keep = jnp.asarray([slots[0], slots[2]], jnp.int32)
    cache = kvp.set_lengths(cache, keep, jnp.asarray([1, 1], jnp.int32))
    _check_rest(pool, cache, slots, known, 1, [0, 2])


def test_programs_queued_behind_a_failure_fail_too(pool: kvp.KVPool) -> None:
    slots, cache = pool.acquire(pool.cache(), [64] * _SEQUENCES)
    ids = jnp.asarray(slots, jnp.int32)
    cache, tokens, _ = _step(cache, _START, ids, _GOOD)
    known = np.asarray(tokens)

    def queue() -> object:
        value, newest = cache, tokens
        for bad in (-1, 1, -1, -1):
            value, newest, _ = _step(value, newest, ids, jnp.asarray(bad, jnp.int32))
        return settle(value)

    with pytest.raises(RUN_TIME_ERRORS):
        queue()
    cache = pool.cache()
    came_to = 4 if ON_DEVICE else 2
    assert [int(cache.lengths[slot]) for slot in slots] == [came_to] * _SEQUENCES
    cache = kvp.set_lengths(cache, ids, jnp.ones(_SEQUENCES, jnp.int32))
    _check_rest(pool, cache, slots, known, 1, [0, 1, 2])
