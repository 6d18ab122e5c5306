"""The ops under jit, scan, while_loop, cond, vmap and shard_map, with and without donation, compute
what a Python loop computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import make_batch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray
from reference_numpy import Variant, attend, check_output

import jax_kvpage as kvp

_LAYERS, _KV_HEADS, _HEADS, _DIM, _STEPS = 3, 2, 4, 64, 5


@pytest.fixture(params=["fused", "per_layer"])
def pool(request: pytest.FixtureRequest, make_pool) -> kvp.KVPool:
    spec = kvp.CacheSpec(_LAYERS, _KV_HEADS, _DIM, 4, 256, dtype=jnp.float32, layout=request.param)
    return make_pool(spec, "16MiB", poison=True)


def _tokens(seed: int = 0, steps: int = _STEPS) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k, v of two sequences for some steps: [steps, layers, 2, heads, dim]."""
    rng = np.random.default_rng(seed)

    def draw(heads: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((steps, _LAYERS, 2, heads, _DIM), np.float32))

    return draw(_HEADS), draw(_KV_HEADS), draw(_KV_HEADS)


def _reference(q: jax.Array, k: jax.Array, v: jax.Array) -> NDArray[np.float64]:
    """Decode of both sequences from nothing, in float64."""
    want = np.zeros(q.shape)
    for layer in range(_LAYERS):
        for s in range(2):
            want[:, layer, s] = attend(q[:, layer, s], k[:, layer, s], v[:, layer, s], 0)[0]
    return want


def _start(pool: kvp.KVPool) -> tuple[kvp.KVCache, kvp.Batch]:
    slots, cache = pool.acquire(pool.cache(), [_STEPS, _STEPS])
    return cache, make_batch([(slot, 1) for slot in slots])


def _unrolled(
    cache: kvp.KVCache, q: jax.Array, k: jax.Array, v: jax.Array, batch: kvp.Batch
) -> tuple[kvp.KVCache, jax.Array]:
    """One step, the layers one after the other: q, k, v [layers, 2, heads, dim]."""
    outs = []
    for layer in range(_LAYERS):
        out, cache = kvp.update_and_attend(q[layer], k[layer], v[layer], cache, batch, layer=layer)
        outs.append(out)
    return kvp.advance(cache, batch), jnp.stack(outs)


def _scanned_layers(
    cache: kvp.KVCache, q: jax.Array, k: jax.Array, v: jax.Array, batch: kvp.Batch
) -> tuple[kvp.KVCache, jax.Array]:
    """The same step with a traced layer number."""

    def body(
        cache: kvp.KVCache, x: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    ) -> tuple[kvp.KVCache, jax.Array]:
        layer, q, k, v = x
        cache = kvp.append_kv(cache, k, v, batch, layer=layer)
        return cache, kvp.paged_attention(q, cache, batch, layer=layer)

    cache, outs = jax.lax.scan(body, cache, (jnp.arange(_LAYERS), q, k, v))
    return kvp.advance(cache, batch), outs


Step = Callable[..., tuple[kvp.KVCache, jax.Array]]


@pytest.mark.parametrize("step", [_unrolled, _scanned_layers])
@pytest.mark.parametrize("how", ["eager", "jit", "donated", "scan", "scan donated", "while"])
def test_decode(pool: kvp.KVPool, step: Step, how: str) -> None:
    q, k, v = _tokens()
    cache, batch = _start(pool)
    if how in ("eager", "jit", "donated"):
        donated = {"donate_argnums": 0} if how == "donated" else {}
        call = step if how == "eager" else jax.jit(step, **donated)
        outs = []
        for i in range(_STEPS):
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
                lambda state: state[0] < _STEPS, body, (0, cache, jnp.zeros(q.shape))
            )[1:]

        cache, got = looped(cache, q, k, v)
    check_output(got, _reference(q, k, v), jnp.float32, 6.0)
    assert sorted(cache.lengths.tolist()) == [-1, -1, _STEPS, _STEPS]
    np.testing.assert_array_equal(kvp.positions(cache, batch, num_tokens=2), [_STEPS] * 2)


def test_cond_writes_only_where_it_went(pool: kvp.KVPool) -> None:
    q, k, v = _tokens()
    cache, batch = _start(pool)

    @jax.jit
    def step(cache, q, k, v, write):
        return jax.lax.cond(
            write,
            lambda cache: _unrolled(cache, q, k, v, batch),
            lambda cache: (cache, jnp.zeros(q.shape)),
            cache,
        )

    kept = [True, False, True, False, True]
    outs = []
    for i, write in enumerate(kept):
        cache, out = step(cache, q[i], k[i], v[i], write)
        outs.append(out)
    kept_index = np.flatnonzero(kept)
    want = _reference(q[kept_index], k[kept_index], v[kept_index])
    check_output(jnp.stack(outs)[kept_index], want, jnp.float32, 6.0)
    assert max(cache.lengths.tolist()) == 3


def test_masked_sequences_do_not_move(pool: kvp.KVPool) -> None:
    """`active & ok` inside a scanned program: the masked sequence is not written, not advanced, and
    its output is 0.
    """
    q, k, v = _tokens()
    cache, batch = _start(pool)
    active = jnp.asarray([[True, True], [True, False], [True, True], [True, False], [True, False]])

    @jax.jit
    def scanned(cache, q, k, v, active):
        def body(cache, x):
            active, *qkv = x
            return _unrolled(cache, *qkv, batch.mask(active))

        return jax.lax.scan(body, cache, (active, q, k, v))

    cache, got = scanned(cache, q, k, v, active)
    slots = batch.slots.tolist()
    assert cache.lengths[slots[0]] == _STEPS
    assert cache.lengths[slots[1]] == 2
    check_output(got[:, :, 0], _reference(q, k, v)[:, :, 0], jnp.float32, 6.0)
    moved = np.asarray([0, 2])
    want = _reference(q[moved], k[moved], v[moved])[:, :, 1]
    check_output(got[moved][:, :, 1], want, jnp.float32, 6.0)
    assert not np.any(np.asarray(got)[[1, 3, 4], :, 1])


def test_padding_is_silent(pool: kvp.KVPool) -> None:
    """Padding sequences with tokens of their own, tokens past the last sequence, and a batch of
    nothing else.
    """
    slot, cache = pool.acquire(pool.cache(), 8)
    q, k, v = (x[0, 0] for x in _tokens(steps=1))
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
    for layer in range(1, _LAYERS):
        cache = kvp.append_kv(cache, *wide[1:], batch, layer=layer)
    cache = kvp.advance(kvp.advance(cache, batch), nothing)
    assert int(cache.lengths[slot]) == 1


def test_positions(pool: kvp.KVPool) -> None:
    slots, cache = pool.acquire(pool.cache(), [20, 20])
    k = jnp.ones((9, _KV_HEADS, _DIM))
    batch = kvp.Batch.from_lengths(slots, [6, 3])  # which, made on the host, knows its tokens
    np.testing.assert_array_equal(kvp.positions(cache, batch), [0, 1, 2, 3, 4, 5, 0, 1, 2])
    for layer in range(_LAYERS):
        cache = kvp.append_kv(cache, k, k, batch, layer=layer)
    cache = kvp.advance(cache, batch)
    np.testing.assert_array_equal(kvp.positions(cache, batch), [6, 7, 8, 9, 10, 11, 3, 4, 5])
    masked = batch.mask(jnp.asarray([False, True]))
    np.testing.assert_array_equal(kvp.positions(cache, masked), [0] * 6 + [3, 4, 5])


def test_dropped_cache_means_no_write(pool: kvp.KVPool) -> None:
    """No JAX effect: an op whose returned cache nobody uses does not happen, and the generation
    goes on from the old cache.
    """
    q, k, v = (x[0, 0] for x in _tokens(steps=1))
    cache, batch = _start(pool)

    @jax.jit
    def drops(cache):
        kvp.append_kv(cache, k * jnp.nan, v * jnp.nan, batch, layer=0)
        return q + 1

    drops(cache)
    assert "custom_call" not in drops.lower(cache).as_text()
    out, cache = kvp.update_and_attend(q, k, v, cache, batch, layer=0)
    check_output(out, np.repeat(np.asarray(v), _HEADS // _KV_HEADS, axis=1), jnp.float32, 6.0)


def test_xla_may_not_drop_merge_or_move_the_calls(pool: kvp.KVPool) -> None:
    """The side effect is on every custom call and on no primitive; two equal appends are two."""
    q, k, v = (x[0, 0] for x in _tokens(steps=1))
    cache, batch = _start(pool)
    step = jax.jit(lambda cache: _unrolled(cache, *[jnp.stack([x] * 3) for x in (q, k, v)], batch))
    calls = [line for line in step.lower(cache).as_text().splitlines() if "@jax_kvpage_" in line]
    assert len(calls) == _LAYERS + 1
    assert all("has_side_effect = true" in line for line in calls)
    assert not step.trace(cache).jaxpr.effects

    @jax.jit
    def twice(cache):
        for layer in range(_LAYERS):
            cache = kvp.append_kv(cache, k, v, batch, layer=layer)
        cache = kvp.advance(cache, batch)
        for layer in range(_LAYERS):
            cache = kvp.append_kv(cache, k, v, batch, layer=layer)
        return kvp.advance(cache, batch)

    cache = twice(cache)
    assert max(cache.lengths.tolist()) == 2


def test_traced_window_can_be_scanned(pool: kvp.KVPool) -> None:
    """Layers with different windows share one program; a window of 0 or less means none."""
    slot, cache = pool.acquire(pool.cache(), 40)
    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.standard_normal((_LAYERS, 40, _HEADS, _DIM), np.float32))
    k, v = jnp.asarray(rng.standard_normal((2, _LAYERS, 40, _KV_HEADS, _DIM), np.float32))
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

        xs = (jnp.arange(_LAYERS), jnp.asarray(windows, jnp.int32), q, k, v)
        return jax.lax.scan(body, cache, xs)[1]

    got = step(cache, q, k, v)
    for layer, window in enumerate(windows):
        variant = Variant(sliding_window=window or None)
        want = attend(q[layer], k[layer], v[layer], 0, variant)[0]
        check_output(got[layer], want, jnp.float32, 6.0)


def test_after_orders_a_read_before_a_destruction(pool: kvp.KVPool) -> None:
    """The read and the truncation of one slot share a program; without `after` nothing would say
    which comes first.
    """
    q, k, v = _tokens()
    cache, batch = _start(pool)
    for i in range(_STEPS - 1):
        cache, _ = _unrolled(cache, q[i], k[i], v[i], batch)
    for layer in range(_LAYERS):
        cache = kvp.append_kv(cache, k[-1, layer], v[-1, layer], batch, layer=layer)

    @jax.jit
    def read_then_lower(cache):
        outs = [
            kvp.paged_attention(q[-1, layer], cache, batch, layer=layer) for layer in range(_LAYERS)
        ]
        cache = kvp.after(cache, outs)
        return kvp.set_lengths(cache, batch.slots, jnp.zeros(2, jnp.int32)), jnp.stack(outs)

    cache, got = read_then_lower(cache)
    check_output(got, _reference(q, k, v)[-1], jnp.float32, 6.0)
    assert max(cache.lengths.tolist()) == 0


def test_shard_map_keeps_types(pool: kvp.KVPool) -> None:
    """Heads are sharded in real use; on one device the types must still go through, a scan carry
    included.
    """
    q, k, v = _tokens()
    cache, batch = _start(pool)
    mesh = jax.make_mesh((1,), ("heads",))
    heads = P(None, None, None, "heads")
    q, k, v = (jax.device_put(x, NamedSharding(mesh, heads)) for x in (q, k, v))

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P(None, "heads"), P()), out_specs=P()
    )
    def forgets(cache, q, batch):
        return kvp.paged_attention(q, cache, batch, layer=0)

    # `out` varies over the axis as q does; an op that made up a fresh type would let this through.
    with pytest.raises(ValueError, match=r"vary|varying|replicat"):
        forgets(cache, q[0, 0], batch)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), heads, heads, heads, P()),
        out_specs=(P("heads"), heads),
    )
    def sharded(cache, q, k, v, batch):
        cache = jax.lax.pcast(cache, "heads", to="varying")  # each shard has its own generation
        return jax.lax.scan(lambda c, x: _unrolled(c, *x, batch), cache, (q, k, v))

    cache, got = sharded(cache, q, k, v, batch)
    check_output(got, _reference(q, k, v), jnp.float32, 6.0)


@pytest.mark.parametrize("op", ["update", "split"])
def test_vmap_folds_into_sequences(pool: kvp.KVPool, op: str) -> None:
    """An unbatched cache with batched tokens and batches: as if all sequences had been in one
    batch.
    """
    slots, cache = pool.acquire(pool.cache(), [10, 10, 10])
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((3, 6, _HEADS, _DIM), np.float32))
    k, v = jnp.asarray(rng.standard_normal((2, 3, 6, _KV_HEADS, _DIM), np.float32))
    new = [4, 6, 1]
    batches = jax.tree.map(
        lambda *x: jnp.stack(x), *[make_batch([(s, n)]) for s, n in zip(slots, new, strict=True)]
    )

    @jax.jit
    def step(cache, q, k, v, batches):
        if op == "update":
            return jax.vmap(
                lambda q, k, v, b: kvp.update_and_attend(q, k, v, cache, b, layer=0)[0]
            )(q, k, v, batches)
        cache = jax.vmap(lambda k, v, b: kvp.append_kv(cache, k, v, b, layer=0), out_axes=None)(
            k, v, batches
        )
        return jax.vmap(lambda q, b: kvp.paged_attention(q, cache, b, layer=0))(q, batches)

    got = step(cache, q, k, v, batches)
    for s, n in enumerate(new):
        check_output(got[s, :n], attend(q[s, :n], k[s], v[s], 0)[0], jnp.float32, 6.0)
        assert not np.any(got[s, n:])


def test_vmap_over_queries_only(pool: kvp.KVPool) -> None:
    q, k, v = (x[0, 0] for x in _tokens(steps=1))
    cache, batch = _start(pool)
    cache = kvp.append_kv(cache, k, v, batch, layer=0)
    many = jnp.stack([q, 2 * q, -q])
    got = jax.vmap(lambda q: kvp.paged_attention(q, cache, batch, layer=0))(many)
    for i in range(3):
        want = kvp.paged_attention(many[i], cache, batch, layer=0)
        np.testing.assert_array_equal(got[i], want)


def test_vmap_of_the_cache_or_the_layer_is_refused(pool: kvp.KVPool) -> None:
    q, k, v = (x[0, 0] for x in _tokens(steps=1))
    cache, batch = _start(pool)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), cache)
    with pytest.raises(ValueError, match=r"batch\.mask"):
        jax.vmap(lambda c: kvp.append_kv(c, k, v, batch, layer=0))(stacked)
    with pytest.raises(ValueError, match="layer"):
        jax.vmap(lambda layer: kvp.paged_attention(q, cache, batch, layer=layer))(jnp.arange(2))


def test_differentiation_is_refused_in_words(pool: kvp.KVPool) -> None:
    q, k, v = (x[0, 0] for x in _tokens(steps=1))
    cache, batch = _start(pool)
    with pytest.raises(ValueError, match="differentiated"):
        jax.grad(lambda q: kvp.update_and_attend(q, k, v, cache, batch, layer=0)[0].sum())(q)
