"""One compilation serves all lengths, all slots and all pools of a spec."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

import jax_kvpage as kvp

_MAX = 80


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects an entry for every program that XLA compiles in the `with` block."""
    seen: list[str] = []
    active = True

    def listen(event: str, duration: float, **_: object) -> None:
        if active and event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    # Listeners cannot be removed through a public API; an inactive one costs a comparison.
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    active = False


@functools.partial(jax.jit, static_argnames="addressing")
def _step(
    cache: kvp.KVCache, slots: jax.Array, addressing: str = "slots"
) -> tuple[kvp.KVCache, jax.Array]:
    batch = kvp.Batch.decode(slots)
    x = jnp.ones((2, 2, 64))
    cache, ok = kvp.map_slots(cache, slots, cache.lengths[slots] + 1)
    batch = batch.mask(ok)
    for layer in range(2):
        out, cache = kvp.update_and_attend(
            x, x, x, cache, batch, layer=layer, addressing=addressing
        )
    return kvp.advance(cache, batch), out


def _life(pool: kvp.KVPool, addressing: str) -> None:
    """Runs requests of all lengths, which start, grow and end."""
    cache = pool.cache()
    slots, cache = pool.acquire(cache, [1, 17])
    for i in range(_MAX):
        cache, _ = _step(cache, jnp.asarray(slots, jnp.int32), addressing)
        pool.extend(slots[0], min(i + 5, _MAX))
    assert [int(cache.lengths[slot]) for slot in slots] == [_MAX, _MAX]
    cache = pool.release(cache, slots)
    one, cache = pool.acquire(cache, 40)
    cache = pool.release(cache, one)
    jax.block_until_ready(cache)


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("addressing", ["slots", "table"])
def test_nothing_is_compiled_twice(make_pool, layout: str, addressing: str) -> None:
    spec = kvp.CacheSpec(2, 2, 64, 4, _MAX, dtype=jnp.float32, layout=layout, block_tokens=16)
    with compilations() as first:
        _life(make_pool(spec, "8MiB"), addressing)
    assert first, "the counter does not count"
    with compilations() as again:
        _life(make_pool(spec, "4MiB"), addressing)  # another pool with another capacity
    assert again == []


def test_the_second_step_is_the_first_ones_program(make_pool) -> None:
    """From length 1 to max_seq_len, `_step` is compiled only at its first call."""
    spec = kvp.CacheSpec(2, 2, 64, 3, _MAX, dtype=jnp.float32, block_tokens=32)
    pool = make_pool(spec, "8MiB")
    slots, cache = pool.acquire(pool.cache(), [_MAX, _MAX])
    ids = jnp.asarray(slots, jnp.int32)
    cache, _ = _step(cache, ids)
    with compilations() as later:
        for _ in range(_MAX - 1):
            cache, _ = _step(cache, ids)
    assert later == []
    assert pool.slot_table(cache)[0].length == _MAX
