"""Programs of `test_replicas.py` on ops, which run in a process with eight devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from mesh_rig import COLLECTIVES, HEAD_DIM, make_spec, random, step
from replica_rig import check_shards_equal, heads, make_pool, place

import jax_kvpage as kvp

_HEADS = 8


def _lengths(replicas: int) -> list[list[int]]:
    """Tokens of a prefill and a decode step: one replica gets fewer sequences than the others."""
    count = 2 * replicas - 1
    return [[5 + 7 * i % 40 for i in range(count)], [1] * count]


def _operands(kv_heads: int, tokens: int) -> list[np.ndarray]:
    shapes = ((tokens, n, HEAD_DIM) for n in (_HEADS, kv_heads, kv_heads))
    return [random(tokens + i, *shape) for i, shape in enumerate(shapes)]


def _alone(kv_heads: int, replicas: int) -> list[Any]:
    """Returns the results of a pool on one device, tokens in the order of the call."""
    lengths, results = _lengths(replicas), []
    with kvp.KVPool(make_spec(kv_heads, max_slots=16), "32MiB") as pool:
        slots, cache = pool.acquire(pool.cache(), [64] * len(lengths[0]))
        for counts in lengths:
            q, k, v = _operands(kv_heads, sum(counts))
            batch = kvp.Batch.from_lengths(slots, counts)
            outs, cache = jax.jit(step)(cache, q, k, v, batch)
            results.append(jax.tree.map(np.asarray, outs))
        pool.check(pool.release(cache, slots))
    return results


def plain_jit(replicas: int, parts: int, kv_heads: int, kind: str) -> None:
    """Each sequence gets bit for bit the result of a pool on one device; nothing is gathered."""
    wanted = _alone(kv_heads, replicas)
    with make_pool(replicas, parts, kv_heads, kind=kind) as pool:
        lengths = _lengths(replicas)
        slots, cache = pool.acquire(pool.cache(), [64] * len(lengths[0]))
        for counts, expected in zip(lengths, wanted, strict=True):
            made = kvp.spread(pool, slots, counts)
            q, k, v = (np.asarray(made.scatter(x)) for x in _operands(kv_heads, sum(counts)))
            q = place(pool, q, heads(pool))
            k, v = (place(pool, x, heads(pool, kv=True)) for x in (k, v))
            run = jax.jit(step).lower(cache, q, k, v, made.batch).compile()
            assert not COLLECTIVES.search(run.as_text())
            outs, cache = run(cache, q, k, v, made.batch)
            tokens = made.batch.num_tokens
            padding = np.setdiff1d(np.arange(replicas * tokens), made.rows)
            for (out, lse), (same, same_lse) in zip(outs, expected, strict=True):
                assert out.addressable_shards[0].data.shape == (tokens, _HEADS // parts, HEAD_DIM)
                np.testing.assert_array_equal(np.asarray(out)[made.rows], same)
                np.testing.assert_array_equal(np.asarray(lse)[made.rows], same_lse)
                assert not np.asarray(out)[padding].any()
            ends = np.cumsum(counts) - 1
            np.testing.assert_array_equal(
                np.asarray(outs[0][0])[made.last_rows], expected[0][0][ends]
            )
            np.testing.assert_array_equal(
                np.asarray(made.batch.last_rows)[made.sequences], made.last_rows
            )
        total = [sum(each) for each in zip(*lengths, strict=True)]
        table = {row.slot: row.length for row in pool.slot_table(cache)}
        assert table == dict(zip(slots, total, strict=True))
        pool.check(pool.release(cache, slots))


def in_shard_map(replicas: int, parts: int, kind: str) -> None:
    """A step that the caller maps: each replica sees its own slots, and results vary over both
    axes.
    """
    kv_heads = 4
    with make_pool(replicas, parts, kv_heads, kind=kind) as pool:
        assert pool.sharding is not None
        slots, cache = pool.acquire(pool.cache(), [32] * (2 * replicas - 1))
        made = kvp.spread(pool, slots, [3] * len(slots), num_sequences=2, num_tokens=8)
        operands = [
            place(pool, np.asarray(made.scatter(x)), heads(pool))
            for x in _operands(kv_heads, 3 * len(slots))
        ]
        split, rows = pool.sharding.split, pool.sharding.rows

        def scanned(cache: kvp.KVCache, q: Any, k: Any, v: Any, batch: kvp.Batch) -> Any:
            def layer(carry: Any, index: Any) -> Any:
                cache, q = carry
                out, cache = kvp.update_and_attend(q, k, v, cache, batch, layer=index)
                return (kvp.after(cache, out), q + out), ()

            (cache, out), _ = jax.lax.scan(layer, (cache, q), jnp.arange(2))
            last = out[batch.last_rows]
            return last, kvp.positions(cache, batch), kvp.advance(cache, batch)

        specs = (split, *[heads(pool)] * 3, rows)
        out_specs = (heads(pool), split, split)
        mesh = pool.sharding.mesh
        mapped = jax.shard_map(scanned, mesh=mesh, in_specs=specs, out_specs=out_specs)
        run = jax.jit(mapped).lower(cache, *operands, made.batch).compile()
        assert not COLLECTIVES.search(run.as_text())
        last, positions, new = run(cache, *operands, made.batch)
        assert last.shape[0] == 2 * replicas
        each = np.asarray(positions).reshape(replicas, parts, -1)  # devices of a replica agree
        assert (each == each[:, :1]).all()
        np.testing.assert_array_equal(each[:, 0].reshape(-1)[made.rows], [0, 1, 2] * len(slots))
        assert {row.length for row in pool.slot_table(new)} == {3}
        # Rolled back with the pool's slot numbers, and again under plain jit.
        new = jax.jit(lambda cache: kvp.set_lengths(cache, jnp.asarray(slots), 0))(new)
        assert {row.length for row in pool.slot_table(new)} == {0}
        outs, new = jax.jit(_plain)(new, *operands, made.batch)
        np.testing.assert_array_equal(
            np.asarray(outs)[made.last_rows], np.asarray(last)[made.sequences]
        )
        k, _ = kvp.read_kv(new, jnp.asarray(slots[::-1]), 1)
        keys = np.asarray(operands[1])[made.rows].reshape(-1, 3, kv_heads, HEAD_DIM)
        np.testing.assert_array_equal(np.asarray(k)[::-1, :3], keys)
        k, _ = kvp.read_kv(new, kvp.spread(pool, slots, [0] * len(slots)).batch, 1)
        np.testing.assert_array_equal(np.asarray(k)[_places(pool, slots), :3], keys)
        if parts > 1:
            half = jax.shard_map(
                scanned,
                mesh=mesh,
                in_specs=(P("dp"), *[P("dp")] * 3, rows),
                out_specs=P("dp"),
                axis_names={"dp"},
            )
            with pytest.raises(ValueError, match=r"is over \['dp'\] of them only: map over both"):
                jax.jit(half)(new, *operands, made.batch)
        pool.check(pool.release(new, slots))


def _places(pool: kvp.KVPool, slots: list[int]) -> np.ndarray:
    return kvp.spread(pool, slots).sequences


def _plain(cache: kvp.KVCache, q: Any, k: Any, v: Any, batch: kvp.Batch) -> Any:
    for layer in range(2):
        out, cache = kvp.update_and_attend(q, k, v, cache, batch, layer=layer)
        q = q + out
    return q, kvp.advance(cache, batch)


def mapped_in_programs(replicas: int, parts: int) -> None:
    """Each replica maps blocks for its own slots inside a program, alike on all its devices."""
    with make_pool(replicas, parts) as pool:
        assert pool.sharding is not None
        slots, cache = pool.acquire(pool.cache(), [16] * (2 * replicas))
        _shrink(pool)

        def grow(cache: kvp.KVCache, batch: kvp.Batch, wanted: Any) -> Any:
            cache, ok = kvp.map_slots(cache, batch.slots, wanted)
            cache, room = kvp.grow(cache, batch.mask(ok))
            return cache, ok, room

        made = kvp.spread(pool, slots, [200] * len(slots))
        split, rows = pool.sharding.split, pool.sharding.rows
        mapped = jax.shard_map(
            grow,
            mesh=pool.sharding.mesh,
            in_specs=(split, rows, P()),
            out_specs=(split, rows, rows),
            check_vma=parts == 1,
        )
        cache, ok, room = jax.jit(mapped)(cache, made.batch, 256)
        pool.check(cache)
        assert np.asarray(room).all()
        assert np.asarray(ok).tolist() == [True, False] + [True] * (2 * replicas - 2)
        room_of = {row.slot: row.reserved_tokens for row in pool.slot_table()}
        assert sorted(room_of.values()) == [16, *[256] * (2 * replicas - 1)]
        check_shards_equal(pool)
        for program in (kvp.map_slots, jax.jit(kvp.map_slots)):
            with pytest.raises(ValueError, match=r"call it inside jax\.shard_map.*pool\.extend"):
                program(cache, slots, 20)
        pool.check(pool.release(cache, slots))


def _shrink(pool: kvp.KVPool) -> None:
    """Leaves the first replica with memory for only one sequence of 200 tokens."""
    full = pool._pool.replicas[0]
    full.resize(10 * full.numbers().block_bytes)


def _loop(cache: kvp.KVCache, batch: kvp.Batch, *steps: Any) -> Any:
    """Decodes, growing room on the way. q, k, v [steps, rows, heads, dim]; returns out and ok."""

    def body(cache: kvp.KVCache, xs: Any) -> Any:
        cache, ok = kvp.grow(cache, batch)
        living = batch.mask(ok)
        outs, cache = step(cache, *xs, living)
        return cache, (outs, ok)

    return jax.lax.scan(body, cache, steps)


def grown_under_jit(replicas: int, parts: int) -> None:
    """A loop under plain jit that maps its own blocks gives the same as on one device."""
    count, steps = 2 * replicas - 1, 40
    operands = [
        random(i, steps, count, n, HEAD_DIM) for i, n in enumerate((_HEADS, _HEADS, _HEADS))
    ]
    with kvp.KVPool(make_spec(_HEADS, max_slots=16), "32MiB") as pool:
        slots, cache = pool.acquire(pool.cache(), [1] * count)
        batch = kvp.Batch.decode(slots)
        _, (outs, _) = jax.jit(_loop)(cache, batch, *operands)
        wanted = jax.tree.map(np.asarray, outs)
    with make_pool(replicas, parts, _HEADS) as pool:
        assert pool.sharding is not None
        slots, cache = pool.acquire(pool.cache(), [1] * count)
        made = kvp.spread(pool, slots)
        spread = [np.zeros((steps, 2 * replicas, *x.shape[2:]), x.dtype) for x in operands]
        for full, own in zip(spread, operands, strict=True):
            full[:, made.rows] = own
        placed = [place(pool, x, P(None, *heads(pool))) for x in spread]
        run = jax.jit(_loop).lower(cache, made.batch, *placed).compile()
        assert not COLLECTIVES.search(run.as_text())
        cache, (out, ok) = run(cache, made.batch, *placed)
        for own, alone in zip(jax.tree.leaves(out), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(np.asarray(own)[:, made.rows], alone)
        assert np.asarray(ok).all()
        assert [(row.length, row.reserved_tokens) for row in pool.slot_table(cache)] == (
            [(steps, steps)] * count
        )
        for replica in pool._pool.replicas if parts > 1 else ():
            numbers = replica.maps.numbers()
            assert (numbers.decisions, numbers.pending) == (steps, 0)
            assert numbers.fetched == steps * (parts - 1)
        check_shards_equal(pool)
        # One replica runs out of blocks, the others do not.
        _shrink(pool)
        made = kvp.spread(pool, slots, [200] * count)
        cache, ok = kvp.grow(cache, made.batch)
        told = np.asarray(ok)[made.sequences]
        owners = [pool.replica_of(slot) for slot in slots]
        assert [own for own, one in zip(owners, told, strict=True) if not one] == (
            [0] if owners.count(0) == 2 else []
        )
        check_shards_equal(pool)
        # A free slot fails the program on its replica; the others keep what they have mapped.
        free = next(slot for slot in range(2 * replicas) if slot not in slots)
        made = kvp.spread(pool, [free, *slots], [1, *[210] * count])
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="free"):
            pool.check(kvp.grow(cache, made.batch)[0])
        cache = pool.cache()
        check_shards_equal(pool)
        room = {row.slot: row.reserved_tokens for row in pool.slot_table(cache)}
        others = [s for s in slots if pool.replica_of(s) not in (0, pool.replica_of(free))]
        assert [room[slot] for slot in others] == [steps + 210] * len(others)
        pool.check(pool.release(cache, slots))


def refused_batches() -> None:
    """Refuses a batch without a part for each replica, and growing a list of slots."""
    with make_pool(2, 2) as pool:
        assert pool.sharding is not None
        slots, cache = pool.acquire(pool.cache(), [16, 16])
        q, k, v = _operands(4, 2)
        wanted = r"a part for each of the 2 replicas.*got \[2\] and \[3\].*jax_kvpage.spread"
        plain = kvp.Batch.decode(slots)
        with pytest.raises(ValueError, match=wanted):
            kvp.update_and_attend(q, k, v, cache, plain, layer=0)
        with pytest.raises(ValueError, match=wanted):
            kvp.advance(cache, plain)
        made = kvp.spread(pool, slots)
        with pytest.raises(ValueError, match="as many rows for each of the 2 replicas"):
            kvp.append_kv(cache, k[:1], v[:1], made.batch, layer=0)
        with pytest.raises(ValueError, match=r"num_tokens|rows"):
            kvp.append_kv(cache, *[np.repeat(x, 2, 0) for x in (k, v)], made.batch, layer=0)
        with pytest.raises(ValueError, match=r"map_slots:\n.*axis 'dp' of a mesh.*pool\.extend"):
            kvp.map_slots(cache, slots, 20)
        pool.check(pool.release(cache, slots))
