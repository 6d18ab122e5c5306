"""Programs of `test_mesh_faults.py`: one device of a mesh cannot run an op of a step that has
collectives.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_rig import COLLECTIVES, HEAD_DIM, make_spec, random
from replica_rig import make_mesh

import jax_kvpage as kvp

HEADS = 4
WIDTH = HEADS * HEAD_DIM
SECONDS = 20  # XLA aborts a process whose devices have waited in a collective for 40 s
_FEW = {"max_slots": 8, "max_seq_len": 128}

Step = Callable[..., Any]


def _pool(replicas: int, parts: int) -> kvp.KVPool:
    axes = {"data_axis": "dp" if replicas > 1 else None, "axis": "tp" if parts > 1 else None}
    return kvp.KVPool(make_spec(HEADS, **_FEW), "8MiB", mesh=make_mesh(replicas, parts), **axes)


def _weights() -> np.ndarray:
    return random(7, 2, HEADS, HEAD_DIM, WIDTH) / WIDTH


def _everything(array: Any) -> Any:
    return array


def _layers(
    cache: Any,
    weights: Any,
    x: Any,
    batch: Any,
    own: Step = _everything,
    add: Step = _everything,
    attends: bool = True,
) -> Any:
    """A two-layer model whose residual stream is summed over the devices of a replica.

    Args:
        own: Selects the heads of a device.
        add: Sums over devices.
        attends: Whether the model uses the cache.
    """
    for layer in range(2):
        out = kv = own(x.reshape(-1, HEADS, HEAD_DIM))
        if attends:
            out, cache = kvp.update_and_attend(kv + layer, kv, kv, cache, batch, layer=layer)
        x = x + add(jnp.einsum("thd,hdw->tw", out, weights[layer]))
    return x, kvp.advance(cache, batch) if attends else cache


def shard_step(pool: kvp.KVPool, attends: bool = True) -> Step:
    """A step under `shard_map`. Its last sum needs no result of the last op, `advance`."""
    assert pool.sharding is not None
    heads, mesh = pool.sharding.local.num_kv_heads, pool.sharding.mesh

    def own(array: Any) -> Any:
        begin = jax.lax.axis_index("tp") * heads
        return jax.lax.dynamic_slice_in_dim(array, begin, heads, 1)

    def add(array: Any) -> Any:
        return jax.lax.psum(array, "tp")

    axis, data_axis = pool.sharding.axis, pool.sharding.data_axis
    of_device = (own, add) if axis else (_everything, _everything)

    def step(cache: Any, weights: Any, x: Any, batch: Any) -> Any:
        x, cache = _layers(cache, weights, x, batch, *of_device, attends)
        return x, jax.lax.psum(x.sum(), data_axis) if data_axis else x.sum(), cache

    rows, split = pool.sharding.rows, pool.sharding.split
    specs, outs = (split, P(None, axis), rows, rows), (rows, P(), split)
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=outs))


def plain_step(pool: kvp.KVPool) -> Step:
    """The same step under plain `jit`, where the compiler inserts the collectives."""

    def step(cache: Any, weights: Any, x: Any, batch: Any) -> Any:
        x, cache = _layers(cache, weights, x, batch)
        return x, x.sum(), cache

    del pool
    return jax.jit(step)


def scanned_step(pool: kvp.KVPool) -> Step:
    """Three such steps in a scan."""
    step = shard_step(pool)

    def steps(cache: Any, weights: Any, x: Any, batch: Any) -> Any:
        def body(carry: Any, _: Any) -> Any:
            cache, x = carry
            x, total, cache = step(cache, weights, x, batch)
            return (cache, x), total

        (cache, x), totals = jax.lax.scan(body, (cache, x), length=3)
        return x, totals[-1], cache

    return jax.jit(steps)


STEPS = {"shard_map": shard_step, "jit": plain_step, "scan": scanned_step}


def _batch(pool: kvp.KVPool, slots: list[int]) -> tuple[Any, kvp.Batch]:
    """Returns the inputs of a step with one token per slot, and its batch."""
    assert pool.sharding is not None
    if pool.sharding.replicas == 1:
        return random(1, len(slots), WIDTH), kvp.Batch.decode(np.asarray(slots, np.int32))
    made = kvp.spread(pool, slots, num_sequences=2)
    return made.scatter(random(1, len(slots), WIDTH)), made.batch


def _placed(pool: kvp.KVPool, weights: Any, x: Any) -> Any:
    assert pool.sharding is not None
    mesh = pool.sharding.mesh
    return (
        jax.device_put(weights, NamedSharding(mesh, P(None, "tp"))),
        jax.device_put(x, NamedSharding(mesh, P("dp"))),
    )


def _fails(pool: kvp.KVPool, step: Step, cache: Any, slots: list[int], match: str) -> None:
    """The step ends in time and without an error, its sums are NaN, and then every call raises."""
    x, batch = _batch(pool, slots)
    begin = time.monotonic()
    _, total, after = step(cache, *_placed(pool, _weights(), x), batch)
    assert np.isnan(total)
    # More steps may be queued before the host looks.
    _, total, after = step(after, *_placed(pool, _weights(), x), batch)
    assert np.isnan(total)
    for call in (
        lambda: pool.check(after),
        lambda: pool.check(after),
        lambda: pool.slot_table(after),
        lambda: pool.acquire(after, 1),
        lambda: pool.release(after, slots[0]),
        lambda: pool.extend(slots[0], 4),
        lambda: pool.commit(slots[0], [1]),
        lambda: kvp.read_kv(after, slots[:1], 0),
    ):
        with pytest.raises(kvp.DeviceFault, match=match):
            call()
    assert time.monotonic() - begin < SECONDS


def _goes_on(pool: kvp.KVPool, step: Step, cache: Any, slots: list[int], wanted: Any) -> Any:
    """Runs a valid step."""
    x, batch = _batch(pool, slots)
    _, total, cache = step(cache, *_placed(pool, _weights(), x), batch)
    pool.check(cache)
    np.testing.assert_allclose(total, wanted, rtol=1e-4, atol=1e-4)
    return cache


def _wanted(step_name: str, sequences: int) -> list[float]:
    """Returns the sums of a step and of the step after it, on one device."""
    weights, totals = _weights(), []
    x = random(1, sequences, WIDTH)
    with kvp.KVPool(make_spec(HEADS, **_FEW), "8MiB") as pool:
        slots, cache = pool.acquire(pool.cache(), [32] * sequences)
        batch = kvp.Batch.decode(np.asarray(slots, np.int32))
        for _ in range(2):
            new = jnp.asarray(x)
            for _ in range(3 if step_name == "scan" else 1):
                new, cache = _layers(cache, weights, new, batch)
            totals.append(float(new.sum()))
        pool.check(cache)
    return totals


def bad_slot(replicas: int, parts: int, name: str) -> None:
    """One replica gets a free slot."""
    wanted = _wanted(name, replicas)
    with _pool(replicas, parts) as pool:
        step = STEPS[name](pool)
        slots, cache = pool.acquire(pool.cache(), [32] * replicas)
        first = 8 // replicas
        free = slots[-1] + 1
        assert pool.replica_of(free) == replicas - 1
        cache = _goes_on(pool, step, cache, slots, wanted[0])
        lengths = [row.length for row in pool.slot_table(cache)]
        match = (
            f"update_and_attend: slot 1 is free.* .in replica {replicas - 1}, whose slot 0 is slot "
            rf"{first * (replicas - 1)} of the pool.*pool\.cache"
        )
        _fails(pool, step, cache, [*slots, free], match)
        cache = pool.cache()
        # The other replicas have completed both steps.
        rounds = 3 if name == "scan" else 1
        assert [row.length for row in pool.slot_table(cache)] == [
            *(length + 2 * rounds for length in lengths[:-1]),
            lengths[-1],
        ]
        cache = pool.release(cache, slots)
        slots, cache = pool.acquire(cache, [32] * replicas)
        for total in wanted:
            cache = _goes_on(pool, step, cache, slots, total)
        pool.check(pool.release(cache, slots))


def less_room(replicas: int, parts: int, name: str) -> None:
    """One device has less room than the others."""
    wanted = _wanted(name, replicas)
    with _pool(replicas, parts) as pool:
        step = STEPS[name](pool)
        slots, cache = pool.acquire(pool.cache(), [32] * replicas)
        cache = _goes_on(pool, step, cache, slots, wanted[0])
        own = slots[-1] % (8 // replicas)
        pool._pool.shards[-1].retract(own, 0, 0)
        match = rf"update_and_attend: slot {own}: \d tokens wanted, 0 mapped.*pool\.cache"
        _fails(pool, step, cache, slots, match)
        cache = pool.cache()
        pool.extend(slots[-1], 32)
        lengths = [row.length for row in pool.slot_table(cache)]
        assert lengths[-1] == (3 if name == "scan" else 1)
        if replicas == 1:  # the failed device's state decides
            cache = _goes_on(pool, step, cache, slots, wanted[1])
        pool.check(pool.release(cache, slots))


def no_collectives(replicas: int, parts: int) -> None:
    """The ops add no collective to the model's own."""
    with _pool(replicas, parts) as pool:
        slots, cache = pool.acquire(pool.cache(), [32] * replicas)
        x, batch = _batch(pool, slots)
        weights, x = _placed(pool, _weights(), x)
        collectives = []
        for attends in (True, False):
            lowered = shard_step(pool, attends).lower(cache, weights, x, batch)
            text = lowered.compile().as_text()
            collectives.append(re.findall(rf" = (\S+) ({COLLECTIVES.pattern})(?:-start)?\(", text))
        assert collectives[0] == collectives[1] != []
        pool.check(cache)


def outside_of_programs(replicas: int, parts: int) -> None:
    """An op called outside a program raises its error; faults that no call has raised cause a
    warning.
    """
    with _pool(replicas, parts) as pool:
        slots, cache = pool.acquire(pool.cache(), [32] * replicas)
        x, batch = _batch(pool, slots)
        kv = jnp.asarray(x).reshape(-1, HEADS, HEAD_DIM)
        with pytest.raises(kvp.DeviceFault, match="paged_attention: slot 0, layer 1"):
            kvp.paged_attention(kv, cache, batch, layer=1)
        with pytest.raises(kvp.DeviceFault, match="paged_attention: slot 0, layer 1"):
            kvp.append_kv(cache, kv, kv, batch, layer=0)  # same generation
        old, cache = cache, pool.cache()
        cache = kvp.append_kv(cache, kv, kv, batch, layer=0)
        out = jax.jit(kvp.paged_attention, static_argnames="layer")(kv, cache, batch, layer=1)
        assert np.isnan(out).all()
        with pytest.warns(RuntimeWarning, match=r"new generation: .*slot 0, layer 1"):
            cache = pool.cache()
        # A cache of an older generation does not affect the newest one.
        assert np.isnan(
            jax.jit(kvp.paged_attention, static_argnames="layer")(kv, old, batch, layer=0)
        ).all()
        with pytest.raises(kvp.DeviceFault, match="generation"):
            pool.check(cache)
        cache = kvp.append_kv(cache, kv, kv, batch, layer=0)
        cache = pool.release(cache, slots)
        pool.check(cache)
        kept = jax.jit(kvp.set_lengths)(cache, slots[0], 0)
        del kept
        with pytest.warns(RuntimeWarning, match=r"pool is closed.*slot 0 is free"):
            pool.close()
