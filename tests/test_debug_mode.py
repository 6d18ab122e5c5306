"""KVPool(debug=True): each position may be written once per layer, unless its slot was rolled
back.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import RUN_TIME_ERRORS, Rig, append_all, make_batch

import jax_kvpage as kvp

Open = Callable[..., tuple[Rig, list[int]]]


@pytest.fixture(params=["fused", "per_layer"])
def opened(request: pytest.FixtureRequest, make_pool: Callable[..., kvp.KVPool]) -> Open:
    """Returns a function that opens a pool with two slots, of 5 and 3 tokens."""

    def make(**options: bool) -> tuple[Rig, list[int]]:
        spec = kvp.CacheSpec(
            2, 2, 64, 4, 256, dtype=jnp.float32, layout=request.param, block_tokens=32
        )
        rig = Rig(make_pool(spec, "4MiB", **options), max_tokens=8, max_sequences=3)
        slots = [rig.acquire(40), rig.acquire(40)]
        rig.write({slots[0]: 5, slots[1]: 3})
        return rig, slots

    return make


@jax.jit
def _append(cache: kvp.KVCache, batch: kvp.Batch, layer: jax.Array) -> kvp.KVCache:
    x = jnp.ones((8, 2, 64))
    return kvp.append_kv(cache, x, x, batch, layer=layer)


@jax.jit
def _attend(cache: kvp.KVCache, batch: kvp.Batch, layer: jax.Array) -> kvp.KVCache:
    x = jnp.ones((8, 2, 64))
    return kvp.update_and_attend(x, x, x, cache, batch, layer=layer)[1]


_set_lengths = jax.jit(kvp.set_lengths)


def _layers(rig: Rig, batch: kvp.Batch) -> None:
    for layer in range(2):
        rig.cache = jax.block_until_ready(_append(rig.cache, batch, layer))


@pytest.mark.parametrize("op", [_append, _attend])
def test_a_forgotten_advance_is_found(opened: Open, op: Callable[..., kvp.KVCache]) -> None:
    rig, slots = opened(debug=True)
    # Masked and empty sequences write nothing.
    _layers(rig, make_batch([(slots[0], 0), (-1, 1), (slots[1], 2)], 3))
    with pytest.raises(RUN_TIME_ERRORS) as caught:
        jax.block_until_ready(op(rig.cache, make_batch([(slots[0], 1), (slots[1], 1)], 3), 0))
    text = str(caught.value)
    assert "FAILED_PRECONDITION" in text or isinstance(caught.value, ValueError)
    assert f"slot {slots[1]}, layer 0: position 3 is already written" in text, text
    assert "advance(cache, batch) was probably forgotten" in text, text
    assert "one layer was written twice with the same layer number" in text, text
    rig.cache = rig.pool.cache()  # positions past a length no longer count as written
    rig.write({slots[0]: 2, slots[1]: 2})
    rig.check_lengths()


def test_a_layer_number_that_comes_twice_is_found(opened: Open) -> None:
    rig, slots = opened(debug=True)
    batch = make_batch([(slots[0], 2)], 3)
    cache = jax.block_until_ready(_append(rig.cache, batch, 1))
    with pytest.raises(RUN_TIME_ERRORS, match="layer 1: position 5 is already written"):
        jax.block_until_ready(_append(cache, batch, 1))


def test_rolled_back_tokens_may_be_written_again(opened: Open) -> None:
    rig, slots = opened(debug=True)
    batch = make_batch([(slots[0], 2)], 3)
    _layers(rig, batch)
    # A draft that was never advanced is dropped by setting the current length.
    for length in (5, 4):
        rig.cache = _set_lengths(rig.cache, np.asarray(slots[:1]), np.asarray([length]))
        _layers(rig, batch)
    rig.cache = kvp.advance(rig.cache, batch)
    assert rig.cache.lengths[slots[0]] == 6
    # The slot's next request starts over.
    rig.cache = rig.pool.release(rig.cache, slots[0])
    jax.block_until_ready(rig.cache)
    slot, rig.cache = rig.pool.acquire(rig.cache, 40)
    assert slot == slots[0]
    _layers(rig, make_batch([(slot, 2)], 3))


def test_steps_that_advance_are_as_without(opened: Open) -> None:
    rig, slots = opened(debug=True)
    x = jnp.ones((2, 8, 2, 64))
    for tokens in (1, 2, 8):
        rig.cache = append_all(rig.cache, x, x, make_batch([(slots[0], tokens)], 3))
    assert rig.cache.lengths[slots[0]] == 16
    rig, slots = opened()
    batch = make_batch([(slots[0], 2)], 3)
    _layers(rig, batch)
    _layers(rig, batch)  # allowed without debug


def test_debug_excludes_repeated_steps() -> None:
    spec = kvp.CacheSpec(1, 1, 64, 2, 64)
    with pytest.raises(ValueError, match="debug=True refuses to write a position twice"):
        kvp.KVPool(spec, "1MiB", debug=True, on_stale="allow")
    with pytest.raises(ValueError, match="KVPool: debug"):
        kvp.KVPool(spec, "1MiB", debug="yes")
