"""Meshes and shardings outside `shard_map`: ops on a pool refuse a program that is sharded over
devices, host calls ignore a mesh that is set, and batches may be sharded.
"""

from __future__ import annotations

import pytest
from subprocesses import run_python

_TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}

_PRELUDE = """
import jax, jax.numpy as jnp, numpy as np, pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jax_kvpage as kvp

mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.{kind},))
spec = kvp.CacheSpec(2, 2, 32, 4, 64, jnp.float32, block_tokens=16)
rng = np.random.default_rng(0)
q = jnp.asarray(rng.standard_normal((2, 2, 4, 32)), jnp.float32)  # devices, tokens, heads, dim
kv = jnp.asarray(rng.standard_normal((2, 2, 2, 32)), jnp.float32)

def put(x, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))

def step(cache, q, kv, slots):
    batch = kvp.Batch.decode(slots)
    for layer in range(2):
        out, cache = kvp.update_and_attend(q, kv, kv, cache, batch, layer=layer)
    return out, kvp.advance(cache, batch)

"""

_kinds = pytest.mark.parametrize("kind", ["Auto", "Explicit"])


@_kinds
def test_ops_in_programs_that_are_spread_over_devices(kind: str) -> None:
    run_python(
        _PRELUDE.replace("{kind}", kind)
        + """
pool = kvp.KVPool(spec, "1MiB")
slots, cache = pool.acquire(pool.cache(), [16, 16])
batch = kvp.Batch.decode(slots)
table = pool.slot_table()
ops = {
    "append_kv": lambda c, q, kv: kvp.append_kv(c, kv, kv, batch, layer=0),
    "paged_attention": lambda c, q, kv: kvp.paged_attention(q, c, batch, layer=0),
    "read_kv / paged_attention .xla.": lambda c, q, kv: kvp.paged_attention(
        q, c, batch, layer=0, implementation="xla"),
    "read_kv": lambda c, q, kv: kvp.read_kv(c, slots, 0),
    "update_and_attend": lambda c, q, kv: kvp.update_and_attend(q, kv, kv, c, batch, layer=0),
    "advance": lambda c, q, kv: kvp.advance(c, batch),
    "map_slots": lambda c, q, kv: kvp.map_slots(c, slots, 20),
    "set_lengths": lambda c, q, kv: kvp.set_lengths(c, slots, 0),
    "after": lambda c, q, kv: kvp.after(c, q),
}
for q_spec in (P(), P("x"), P(None, "x")):
    spread = jax.tree.map(lambda x: put(x, P()), cache)
    operands = spread, put(q[0], q_spec), put(kv[0], q_spec)
    for name, op in ops.items():
        for call in (op, jax.jit(op)):
            wanted = f"^{name}.*: .*2 devices.*jax.shard_map.*one KVPool"
            with pytest.raises(ValueError, match=wanted):
                call(*operands)
# shard_map over some of the axes leaves the others to the compiler.
wide = jax.make_mesh((1, 2), ("x", "y"))
some = jax.shard_map(
    ops["append_kv"], mesh=wide, in_specs=P(), out_specs=P(), axis_names={"x"})
alike = jax.tree.map(
    lambda x: jax.device_put(np.asarray(x), NamedSharding(wide, P())), (cache, q[0], kv[0]))
with pytest.raises(ValueError, match="append_kv: .*2 devices.*over all axes"):
    jax.jit(some)(*alike)
for call in (lambda c: pool.acquire(c, 16), lambda c: pool.release(c, slots), pool.check):
    with pytest.raises(ValueError, match="is on .*one KVPool on each"):
        call(spread)
assert pool.slot_table() == table
out, cache = jax.jit(step)(cache, q[0], kv[0], jnp.asarray(slots))  # all goes on
assert [row.length for row in pool.slot_table(cache)] == [1, 1]
# A mesh of one device is fine.
one = NamedSharding(jax.make_mesh((1,), ("x",), axis_types=(AxisType.{kind},)), P("x"))
cache = jax.tree.map(lambda x: jax.device_put(x, one), cache)
out, cache = jax.jit(step)(cache, q[0], kv[0], jnp.asarray(slots))
cache = pool.release(cache, slots)
pool.check(cache)
""".replace("{kind}", kind),
        env=_TWO_DEVICES,
    )


@_kinds
def test_host_calls_while_a_mesh_is_set(kind: str) -> None:
    run_python(
        _PRELUDE.replace("{kind}", kind)
        + """
for device in jax.devices():
    with jax.set_mesh(mesh), kvp.KVPool(spec, "1MiB", device) as pool:
        cache = pool.cache()
        slot, cache = pool.acquire(cache, 16)
        slots, cache = pool.acquire(cache, [16, 16], wait=True)
        pool.extend(slot, 20)
        pool.commit(slot, jnp.asarray([1, 2]))
        assert [row.length for row in pool.slot_table(cache)] == [0, 0, 0]
        cache = pool.release(cache, [slot, *slots])
        pool.check(cache)
        assert all(x.devices() == {device} for x in jax.tree.leaves(cache))
        assert pool.stats().slots_occupied == 0
        assert jax.sharding.get_mesh() == mesh
""",
        env=_TWO_DEVICES,
    )


@_kinds
def test_one_pool_a_device(kind: str) -> None:
    """The solution that the error recommends: a step under shard_map, each shard with its own
    pool's cache.
    """
    run_python(
        _PRELUDE.replace("{kind}", kind)
        + """
pools = [kvp.KVPool(spec, "1MiB", device) for device in jax.devices()]
starts = [pool.acquire(pool.cache(), [16, 16]) for pool in pools]
slots = np.concatenate([slots for slots, _ in starts])
wanted = []
with kvp.KVPool(spec, "1MiB") as alone:
    for i in range(2):
        own, cache = alone.acquire(alone.cache(), [16, 16])
        wanted.append([])
        for _ in range(3):
            out, cache = jax.jit(step)(cache, q[i], kv[i], jnp.asarray(own))
            wanted[-1].append(np.asarray(out))
        alone.release(cache, own)

def joined(*shards):
    shape = (sum(x.shape[0] for x in shards),)
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, P("x")), shards)

rows = P("x")
sharded_step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=rows, out_specs=rows))
with jax.set_mesh(mesh):
    cache = jax.tree.map(joined, *[cache for _, cache in starts])
    operands = [put(x.reshape(4, *x.shape[2:]), rows) for x in (q, kv)]
    for i in range(3):
        out, cache = sharded_step(cache, *operands, put(slots, rows))
        np.testing.assert_allclose(out, np.concatenate([w[i] for w in wanted]), atol=1e-6)
    for i, pool in enumerate(pools):
        own = jax.tree.map(lambda x: x.addressable_shards[i].data, cache)
        assert [row.length for row in pool.slot_table(own)] == [3, 3]
        pool.check(pool.release(own, starts[i][0]))
""",
        env=_TWO_DEVICES,
    )


@_kinds
def test_batches_of_sharded_arrays(kind: str) -> None:
    run_python(
        _PRELUDE.replace("{kind}", kind)
        + """
slots, lengths = np.int32([2, 0]), np.int32([3, 1])
pool = kvp.KVPool(spec, "1MiB")
_, cache = pool.acquire(pool.cache(), [16, 16, 16])
cache = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), cache)

def make_padded(slots, lengths, mask):
    one = kvp.Batch.padded(slots, lengths, 4)
    two = kvp.Batch.from_mask(slots, mask)
    return [x for b in (one, two) for x in (b.starts, b.last_rows, kvp.positions(cache, b))]

def check_padded(made):
    for starts, rows, positions in (made[:3], made[3:]):
        np.testing.assert_array_equal(starts, [1, 3])
        np.testing.assert_array_equal(rows, [3, 7])
        np.testing.assert_array_equal(positions, [[0, 0, 1, 2], [0] * 4])

def make(slots, lengths, keep):
    batch = kvp.Batch.from_lengths(slots, lengths, num_tokens=5)
    return batch.query_offsets, kvp.positions(cache, batch), batch.mask(keep).slots, batch.last_rows

def check(made):
    np.testing.assert_array_equal(made[0], [0, 3, 4])
    np.testing.assert_array_equal(made[1], [0, 1, 2, 0, 0])
    np.testing.assert_array_equal(made[2], [-1, 0])
    np.testing.assert_array_equal(made[3], [2, 3])

for specs in ((P("x"), P("x")), (P(), P("x")), (P("x"), P()), (P(), P())):
    operands = [put(x, s) for x, s in zip((slots, lengths), specs)]
    for keep_spec in specs:
        keep = put(np.asarray([False, True]), keep_spec)
        check(make(*operands, keep))
        check(jax.jit(make)(*operands, keep))
        with jax.set_mesh(mesh):
            check(jax.jit(make)(*operands, keep))
    mask = put(np.asarray([[0, 1, 1, 1], [0, 0, 0, 1]], bool), specs[1])
    check_padded(make_padded(*operands, mask))
    check_padded(jax.jit(make_padded)(*operands, mask))
with jax.set_mesh(mesh):
    check(make(list(slots), list(lengths), np.asarray([False, True])))
    offsets = put(np.int32([0, 3, 4, 4]), P())
    batch = kvp.Batch(put(np.int32([2, 0, 1, -1]), P("x")), put(np.int32([0, 3, 4, 5, 5]), P()))
    lengths = put(np.int32([7, 8, 9, -1]), P("x"))
    sharded = kvp.KVCache(cache.handle, cache.epoch, lengths, cache.spec)
    got = jax.jit(lambda c, b: kvp.positions(c, b, num_tokens=6))(
        jax.tree.map(lambda x: x if x is lengths else put(np.asarray(x), P()), sharded), batch)
    np.testing.assert_array_equal(got, [9, 10, 11, 7, 8, 0])
""",
        env=_TWO_DEVICES,
    )
