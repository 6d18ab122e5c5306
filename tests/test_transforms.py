"""Under jit, scan, while_loop and cond, with and without donation, the ops give the results of a
Python loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_steps import (
    DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    STEPS,
    make_spec,
    random_tokens,
    reference,
    scanned_layers,
    start,
    unrolled,
)
from harness import make_batch
from reference_numpy import Variant, attend, check_output

import jax_kvpage as kvp


@pytest.fixture(params=["fused", "per_layer"])
def pool(request: pytest.FixtureRequest, make_pool) -> kvp.KVPool:
    return make_pool(make_spec(request.param), "16MiB", poison=True)


Step = Callable[..., tuple[kvp.KVCache, jax.Array]]


@pytest.mark.covering(2)
@pytest.mark.parametrize("step", [unrolled, scanned_layers])
@pytest.mark.parametrize("how", ["eager", "jit", "donated", "scan", "scan donated", "while"])
def test_decode(pool: kvp.KVPool, step: Step, how: str) -> None:
    q, k, v = random_tokens()
    cache, batch = start(pool)
    if how in ("eager", "jit", "donated"):
        donated = {"donate_argnums": 0} if how == "donated" else {}
        call = step if how == "eager" else jax.jit(step, **donated)
        outs = []
        for i in range(STEPS):
            cache, out = call(cache, q[i], k[i], v[i], batch)
            outs.append(out)
        got = jnp.stack(outs)
    elif how.startswith("scan"):

        @functools.partial(jax.jit, donate_argnums=0 if "donated" in how else ())
        def scanned(cache, q, k, v):
            return jax.lax.scan(lambda c, x: step(c, *x, batch), cache, (q, k, v))

        cache, got = scanned(cache, q, k, v)
    else:

        @jax.jit
        def looped(cache, q, k, v):
            def body(state):
                i, cache, outs = state
                cache, out = step(cache, q[i], k[i], v[i], batch)
                return i + 1, cache, outs.at[i].set(out)

            return jax.lax.while_loop(
                lambda state: state[0] < STEPS, body, (0, cache, jnp.zeros(q.shape))
            )[1:]

        cache, got = looped(cache, q, k, v)
    check_output(got, reference(q, k, v), jnp.float32, 6.0)
    assert sorted(cache.lengths.tolist()) == [-1, -1, STEPS, STEPS]
    np.testing.assert_array_equal(kvp.positions(cache, batch, num_tokens=2), [STEPS] * 2)


def test_cond_writes_only_where_it_went(pool: kvp.KVPool) -> None:
    q, k, v = random_tokens()
    cache, batch = start(pool)

    @jax.jit
    def step(cache, q, k, v, write):
        return jax.lax.cond(
            write,
            lambda cache: unrolled(cache, q, k, v, batch),
            lambda cache: (cache, jnp.zeros(q.shape)),
            cache,
        )

    kept = [True, False, True, False, True]
    outs = []
    for i, write in enumerate(kept):
        cache, out = step(cache, q[i], k[i], v[i], write)
        outs.append(out)
    kept_index = np.flatnonzero(kept)
    want = reference(q[kept_index], k[kept_index], v[kept_index])
    check_output(jnp.stack(outs)[kept_index], want, jnp.float32, 6.0)
    assert max(cache.lengths.tolist()) == 3


def test_masked_sequences_do_not_move(pool: kvp.KVPool) -> None:
    """`active & ok` inside a scanned program: the masked sequence is not written or advanced, and
    its output is 0.
    """
    q, k, v = random_tokens()
    cache, batch = start(pool)
    active = jnp.asarray([[True, True], [True, False], [True, True], [True, False], [True, False]])

    @jax.jit
    def scanned(cache, q, k, v, active):
        def body(cache, x):
            active, *qkv = x
            return unrolled(cache, *qkv, batch.mask(active))

        return jax.lax.scan(body, cache, (active, q, k, v))

    cache, got = scanned(cache, q, k, v, active)
    slots = batch.slots.tolist()
    assert cache.lengths[slots[0]] == STEPS
    assert cache.lengths[slots[1]] == 2
    check_output(got[:, :, 0], reference(q, k, v)[:, :, 0], jnp.float32, 6.0)
    moved = np.asarray([0, 2])
    want = reference(q[moved], k[moved], v[moved])[:, :, 1]
    check_output(got[moved][:, :, 1], want, jnp.float32, 6.0)
    assert not np.any(np.asarray(got)[[1, 3, 4], :, 1])


def test_padding_is_silent(pool: kvp.KVPool) -> None:
    """Padding sequences with tokens, tokens past the last sequence, a batch with only padding."""
    slot, cache = pool.acquire(pool.cache(), 8)
    q, k, v = (x[0, 0] for x in random_tokens(steps=1))
    wide = [jnp.concatenate([x] * 4) for x in (q, k, v)]  # 8 tokens
    batch = make_batch([(-1, 2), (slot, 1), (-1, 3)])
    out, lse, cache = kvp.update_and_attend(*wide, cache, batch, layer=0, return_lse=True)
    assert np.all(np.isfinite(out[2]))
    assert np.all(np.isfinite(lse[2]))
    others = np.asarray([0, 1, 3, 4, 5, 6, 7])
    assert not np.any(np.asarray(out)[others])
    assert np.all(np.isneginf(np.asarray(lse)[others]))
    np.testing.assert_array_equal(kvp.positions(cache, batch, num_tokens=8), [0] * 8)
    nothing = make_batch([(-1, 8)])
    cache, ok = kvp.map_slots(cache, jnp.full(3, -1, jnp.int32), jnp.full(3, 10**6, jnp.int32))
    assert ok.tolist() == [True] * 3
    out, cache = kvp.update_and_attend(*wide, cache, nothing, layer=0)
    assert not np.any(out)
    for layer in range(1, LAYERS):
        cache = kvp.append_kv(cache, *wide[1:], batch, layer=layer)
    cache = kvp.advance(kvp.advance(cache, batch), nothing)
    assert int(cache.lengths[slot]) == 1


def test_positions(pool: kvp.KVPool) -> None:
    slots, cache = pool.acquire(pool.cache(), [20, 20])
    k = jnp.ones((9, KV_HEADS, DIM))
    batch = kvp.Batch.from_lengths(slots, [6, 3])  # made on the host, it knows its number of tokens
    np.testing.assert_array_equal(kvp.positions(cache, batch), [0, 1, 2, 3, 4, 5, 0, 1, 2])
    for layer in range(LAYERS):
        cache = kvp.append_kv(cache, k, k, batch, layer=layer)
    cache = kvp.advance(cache, batch)
    np.testing.assert_array_equal(kvp.positions(cache, batch), [6, 7, 8, 9, 10, 11, 3, 4, 5])
    masked = batch.mask(jnp.asarray([False, True]))
    np.testing.assert_array_equal(kvp.positions(cache, masked), [0] * 6 + [3, 4, 5])


def test_dropped_cache_means_no_write(pool: kvp.KVPool) -> None:
    """There is no JAX effect: an op whose returned cache is unused does not run, and the generation
    continues from the old cache.
    """
    q, k, v = (x[0, 0] for x in random_tokens(steps=1))
    cache, batch = start(pool)

    @jax.jit
    def drops(cache):
        kvp.append_kv(cache, k * jnp.nan, v * jnp.nan, batch, layer=0)
        return q + 1

    drops(cache)
    assert "custom_call" not in drops.lower(cache).as_text()
    out, cache = kvp.update_and_attend(q, k, v, cache, batch, layer=0)
    check_output(out, np.repeat(np.asarray(v), HEADS // KV_HEADS, axis=1), jnp.float32, 6.0)


def test_xla_may_not_drop_merge_or_move_the_calls(pool: kvp.KVPool) -> None:
    """Each custom call has a side effect, but no primitive has a JAX effect; two equal appends stay
    two.
    """
    q, k, v = (x[0, 0] for x in random_tokens(steps=1))
    cache, batch = start(pool)
    step = jax.jit(lambda cache: unrolled(cache, *[jnp.stack([x] * 3) for x in (q, k, v)], batch))
    calls = [line for line in step.lower(cache).as_text().splitlines() if "@jax_kvpage_" in line]
    assert len(calls) == LAYERS + 1
    assert all("has_side_effect = true" in line for line in calls)
    assert not step.trace(cache).jaxpr.effects

    @jax.jit
    def twice(cache):
        for layer in range(LAYERS):
            cache = kvp.append_kv(cache, k, v, batch, layer=layer)
        cache = kvp.advance(cache, batch)
        for layer in range(LAYERS):
            cache = kvp.append_kv(cache, k, v, batch, layer=layer)
        return kvp.advance(cache, batch)

    cache = twice(cache)
    assert max(cache.lengths.tolist()) == 2


def test_traced_window_can_be_scanned(pool: kvp.KVPool) -> None:
    """Layers with different windows share one program; a window of 0 or less means no window."""
    slot, cache = pool.acquire(pool.cache(), 40)
    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.standard_normal((LAYERS, 40, HEADS, DIM), np.float32))
    k, v = jnp.asarray(rng.standard_normal((2, LAYERS, 40, KV_HEADS, DIM), np.float32))
    batch = make_batch([(slot, 40)])
    windows = [4, 0, 17]

    @jax.jit
    def step(cache, q, k, v):
        def body(cache, x):
            layer, window, q, k, v = x
            out, cache = kvp.update_and_attend(
                q, k, v, cache, batch, layer=layer, sliding_window=window
            )
            return cache, out

        xs = (jnp.arange(LAYERS), jnp.asarray(windows, jnp.int32), q, k, v)
        return jax.lax.scan(body, cache, xs)[1]

    got = step(cache, q, k, v)
    for layer, window in enumerate(windows):
        variant = Variant(sliding_window=window or None)
        want = attend(q[layer], k[layer], v[layer], 0, variant)[0]
        check_output(got[layer], want, jnp.float32, 6.0)


def test_after_orders_a_read_before_a_destruction(pool: kvp.KVPool) -> None:
    """One program reads a slot and truncates it; without `after`, nothing would say which comes
    first.
    """
    q, k, v = random_tokens()
    cache, batch = start(pool)
    for i in range(STEPS - 1):
        cache, _ = unrolled(cache, q[i], k[i], v[i], batch)
    for layer in range(LAYERS):
        cache = kvp.append_kv(cache, k[-1, layer], v[-1, layer], batch, layer=layer)

    @jax.jit
    def read_then_lower(cache):
        outs = [
            kvp.paged_attention(q[-1, layer], cache, batch, layer=layer) for layer in range(LAYERS)
        ]
        cache = kvp.after(cache, outs)
        return kvp.set_lengths(cache, batch.slots, jnp.zeros(2, jnp.int32)), jnp.stack(outs)

    cache, got = read_then_lower(cache)
    check_output(got, reference(q, k, v)[-1], jnp.float32, 6.0)
    assert max(cache.lengths.tolist()) == 0
