"""The ops under shard_map, vmap and grad: mapped, folded into sequences, or refused."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_steps import (
    DIM,
    HEADS,
    KV_HEADS,
    make_spec,
    random_tokens,
    reference,
    start,
    unrolled,
)
from harness import make_batch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from reference_numpy import attend, check_output

import jax_kvpage as kvp


@pytest.fixture(params=["fused", "per_layer"])
def pool(request: pytest.FixtureRequest, make_pool) -> kvp.KVPool:
    return make_pool(make_spec(request.param), "16MiB", poison=True)


def test_shard_map_keeps_types(pool: kvp.KVPool) -> None:
    """In real use heads are sharded; the types must also work on one device, including a scan
    carry.
    """
    q, k, v = random_tokens()
    cache, batch = start(pool)
    mesh = jax.make_mesh((1,), ("heads",))
    heads = P(None, None, None, "heads")
    q, k, v = (jax.device_put(x, NamedSharding(mesh, heads)) for x in (q, k, v))

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P(None, "heads"), P()), out_specs=P()
    )
    def forgets(cache, q, batch):
        return kvp.paged_attention(q, cache, batch, layer=0)

    # `out` varies over the axis as q does; a newly made type would fail here.
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
        return jax.lax.scan(lambda c, x: unrolled(c, *x, batch), cache, (q, k, v))

    cache, got = sharded(cache, q, k, v, batch)
    check_output(got, reference(q, k, v), jnp.float32, 6.0)


@pytest.mark.parametrize("op", ["update", "split"])
def test_vmap_folds_into_sequences(pool: kvp.KVPool, op: str) -> None:
    """An unbatched cache with batched tokens and batches: as if all sequences had been in one
    batch.
    """
    slots, cache = pool.acquire(pool.cache(), [10, 10, 10])
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((3, 6, HEADS, DIM), np.float32))
    k, v = jnp.asarray(rng.standard_normal((2, 3, 6, KV_HEADS, DIM), np.float32))
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
    q, k, v = (x[0, 0] for x in random_tokens(steps=1))
    cache, batch = start(pool)
    cache = kvp.append_kv(cache, k, v, batch, layer=0)
    many = jnp.stack([q, 2 * q, -q])
    got = jax.vmap(lambda q: kvp.paged_attention(q, cache, batch, layer=0))(many)
    for i in range(3):
        want = kvp.paged_attention(many[i], cache, batch, layer=0)
        np.testing.assert_array_equal(got[i], want)


def test_vmap_of_the_cache_or_the_layer_is_refused(pool: kvp.KVPool) -> None:
    q, k, v = (x[0, 0] for x in random_tokens(steps=1))
    cache, batch = start(pool)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), cache)
    with pytest.raises(ValueError, match=r"batch\.mask"):
        jax.vmap(lambda c: kvp.append_kv(c, k, v, batch, layer=0))(stacked)
    with pytest.raises(ValueError, match="layer"):
        jax.vmap(lambda layer: kvp.paged_attention(q, cache, batch, layer=layer))(jnp.arange(2))


def test_differentiation_is_refused_in_words(pool: kvp.KVPool) -> None:
    q, k, v = (x[0, 0] for x in random_tokens(steps=1))
    cache, batch = start(pool)
    with pytest.raises(ValueError, match="differentiated"):
        jax.grad(lambda q: kvp.update_and_attend(q, k, v, cache, batch, layer=0)[0].sum())(q)
