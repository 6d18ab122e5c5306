"""Types and values under `shard_map` on two CPU devices, in processes that are started with
them.
"""

from __future__ import annotations

import pytest
from subprocesses import run_python

_TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}

_PRELUDE = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import jax_kvpage as kvp

assert jax.device_count() == 2
mesh = jax.make_mesh((2,), ("x",))

def put(x, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))

"""


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_tables_sharded_over_sequences(implementation: str) -> None:
    run_python(
        _PRELUDE
        + f"""
rng = np.random.default_rng(0)
k, v = jnp.asarray(rng.standard_normal((2, 10, 16, 2, 32)), jnp.float32)
q = jnp.asarray(rng.standard_normal((4, 6, 32)), jnp.float32)
tables = jnp.asarray(rng.integers(0, 10, (4, 3)), jnp.int32)
lengths = jnp.asarray([1, 17, 48, 33], jnp.int32)

def attend(q, k, v, tables, lengths):
    return kvp.paged_attention_with_tables(
        q, k, v, tables, lengths, sliding_window=20, implementation={implementation!r})

want = attend(q, k, v, tables, lengths)
rows = P("x")
operands = [put(x, s) for x, s in zip((q, k, v, tables, lengths), (rows, P(), P(), rows, rows))]
mapped = jax.shard_map(attend, mesh=mesh, in_specs=(rows, P(), P(), rows, rows), out_specs=rows)
np.testing.assert_allclose(jax.jit(mapped)(*operands), want, atol=1e-6)
# Without shard_map the call works on all of it, regardless of the operands' sharding.
np.testing.assert_allclose(jax.jit(attend)(*operands), want, atol=1e-6)
""",
        env=_TWO_DEVICES,
    )


def test_a_step_keeps_track_of_what_differs_between_shards() -> None:
    """Cache and tokens may vary over different axes; a scan carries the cache."""
    run_python(
        _PRELUDE
        + """
mesh = jax.make_mesh((2, 1), ("x", "y"))
spec = kvp.CacheSpec(2, 2, 32, 4, 64, jnp.float32).resolve("cpu")
cache = kvp.KVCache(
    jnp.zeros(2, jnp.int32), jnp.zeros(1, jnp.uint32), jnp.zeros(4, jnp.int32), spec)
q, kv = jnp.zeros((2, 4, 32)), jnp.zeros((2, 2, 32))

def varies(x):
    return set(jax.typeof(x).manual_axis_type.varying)

def step(q, kv, shift):
    own = jax.tree.map(lambda x: jax.lax.pcast(x, "y", to="varying"), cache)
    batch = kvp.Batch.decode([0])
    out, new = kvp.update_and_attend(q, kv, kv, own, batch, layer=0)
    assert varies(out) == varies(new.epoch) == {"x", "y"}
    new = kvp.advance(new, batch)
    assert varies(new.lengths) == {"x", "y"}
    mapped, ok = kvp.map_slots(own, [0], 5)
    assert varies(ok) == varies(mapped.epoch) == {"y"}
    assert varies(kvp.after(own, q).epoch) == {"x", "y"}

    def body(cache, _):
        out, cache = kvp.update_and_attend(q, kv, kv, cache, batch, layer=1)
        return kvp.advance(cache, batch), out

    carry = jax.tree.map(lambda x: x + shift.astype(x.dtype), new)
    carry, outs = jax.lax.scan(body, carry, None, length=3)
    return outs, carry.epoch

rows = P("x")
specs = dict(in_specs=(rows, rows, rows), out_specs=(P(None, ("x", "y")), P(("x", "y"))))
traced = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
traced.lower(*[jax.device_put(x, NamedSharding(mesh, rows)) for x in (q, kv, jnp.zeros(2))])
""",
        env=_TWO_DEVICES,
    )


def test_reads_of_views_keep_track_of_what_differs_between_shards() -> None:
    """Also if the result varies over an axis over which neither the cache nor the views vary."""
    run_python(
        _PRELUDE
        + """
spec = kvp.CacheSpec(2, 2, 32, 4, 64, jnp.float32, layout="per_layer").resolve("cpu")
cache = kvp.KVCache(
    jnp.zeros(2, jnp.int32), jnp.zeros(1, jnp.uint32), jnp.zeros(4, jnp.int32), spec)

def step(q, view):
    out = kvp.read_views(cache, lambda keys: keys[:, 0, 0] @ q, view)
    assert set(jax.typeof(out).manual_axis_type.varying) == {"x"}
    return out

for over_q, over_view in (2, 1), (1, 2), (2, 2):
    specs = tuple(P("x") if n == 2 else P() for n in (over_q, over_view))
    shapes = ((over_q * 32, 8), (over_view * 4, 64, 2, 32))
    operands = [put(jnp.zeros(shape), s) for shape, s in zip(shapes, specs)]
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P("x"))
    assert jax.jit(mapped).lower(*operands).out_info.shape == (8, 8)
""",
        env=_TWO_DEVICES,
    )
