"""Programs of `test_mesh_sequence.py`, which run in a process with eight devices."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from mesh_rig import HEAD_DIM, Failing, check_equal, make_spec, random, step, write, written

import jax_kvpage as kvp
from jax_kvpage import _native

# With stripes of 16 tokens: nothing, one token, both sides of a stripe's end, several rounds.
_ROWS = 160  # tokens in all, with padding
_STEPS = ([0, 1, 15, 16, 17, 100, 5], [1] * 7, [40, 16, 1, 0, 33, 1, 59], [1, 0, 1, 1, 1, 1, 1])


def make_mesh(size: int, kind: str = "Auto") -> Mesh:
    types = (getattr(AxisType, kind),)
    return jax.make_mesh((size,), ("sp",), axis_types=types, devices=jax.devices()[:size])


def make_pool(size: int, *, kind: str = "Auto", debug: bool = False, **changes: Any) -> kvp.KVPool:
    """Makes a pool with sequences split over `size` devices; size 0 means an ordinary pool."""
    over: dict[str, Any] = {"mesh": make_mesh(size, kind), "sequence_axis": "sp"} if size else {}
    return kvp.KVPool(make_spec(2, max_slots=8, **changes), "8MiB", debug=debug, **over)


def _tokens(seed: int, count: int, dtype: Any = np.float32) -> list[jax.Array]:
    shapes = ((count, heads, HEAD_DIM) for heads in (6, 2, 2))
    return [random(seed + i, *shape).astype(dtype) for i, shape in enumerate(shapes)]


def _operands(pool: kvp.KVPool, arrays: Any) -> Any:
    """Places arrays on all devices of the pool."""
    return jax.device_put(arrays, pool.placement)


def attention(sizes: tuple[int, ...], dtype: Any = jnp.float32, atol: float = 3e-6) -> None:
    """Prefill, decode and chunks in one batch equal one device's, and only results are combined."""
    wanted = _attention(0, "Auto", dtype)
    for i, size in enumerate(sizes):
        got = _attention(size, ("Auto", "Explicit")[i % 2], dtype)
        for a, b in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
            np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=atol)


def _attention(size: int, kind: str, dtype: Any) -> Any:
    compute = dtype if dtype == jnp.bfloat16 else np.float32
    with make_pool(size, kind=kind, dtype=dtype) as pool:
        slots, cache = pool.acquire(pool.cache(), [200] * 7)
        run, got = None, []
        for i, counts in enumerate(_STEPS):
            batch = kvp.Batch.from_lengths(slots, counts, num_tokens=_ROWS)
            q, k, v = _operands(pool, _tokens(10 * i, _ROWS, compute))
            positions = kvp.positions(cache, batch)
            if run is None:
                run = jax.jit(step, donate_argnums=0).lower(cache, q, k, v, batch).compile()
                if size:
                    _check_collectives(run.as_text(), q)
            outs, cache = run(cache, q, k, v, batch)
            got.append(jax.tree.map(np.asarray, (outs, positions)))
        sums = np.sum(_STEPS, axis=0).tolist()
        assert [row.length for row in pool.slot_table(cache)] == sums
        got.append(jax.tree.map(np.asarray, kvp.read_kv(cache, slots, 1)))
        pool.check(pool.release(cache, slots))
    return got


def _check_collectives(text: str, q: jax.Array) -> None:
    """The only collectives are sums and maxima of attention results."""
    assert not re.search(r"all-gather|all-to-all|collective-permute|reduce-scatter", text)
    largest = 0
    for types in re.findall(r"= (.*) all-reduce\(", text):
        for dims in re.findall(r"\[([\d,]*)\]", types):
            largest = max(largest, int(np.prod([int(n) for n in dims.split(",") if n])))
    assert largest == q.size


def in_shard_map(kind: str) -> None:
    """A scanned step under shard_map; separate ops; sinks, soft cap, scale; padded batches."""
    sinks = random(1, 6)
    options = {"sinks": sinks, "logits_soft_cap": 20.0, "scale": 0.3, "return_lse": True}

    def scanned(cache: kvp.KVCache, q: Any, k: Any, v: Any, batch: kvp.Batch) -> Any:
        def layer(carry: Any, index: Any) -> Any:
            cache, q = carry
            cache = kvp.append_kv(cache, k, v, batch, layer=index)
            out, lse = kvp.paged_attention(q, cache, batch, layer=index, **options)
            return (cache, q + out), lse

        (cache, out), lse = jax.lax.scan(layer, (cache, q), jnp.arange(2))
        return out, lse, kvp.advance(cache, batch)

    dtype, atol = (jnp.bfloat16, 2e-2) if kind == "Auto" else (jnp.float32, 3e-6)
    results = []
    for devices in (0, 4):
        with make_pool(devices, kind=kind, debug=True, dtype=dtype) as pool:
            slots, cache = pool.acquire(pool.cache(), [64, 64, 64])
            run = jax.jit(scanned)
            if devices:
                assert pool.sharding is not None
                specs = {
                    "in_specs": (P("sp"), P(), P(), P(), P()),
                    "out_specs": (P(), P(), P("sp")),
                }
                run = jax.jit(jax.shard_map(scanned, mesh=pool.sharding.mesh, **specs))
            got = []
            for i, counts in enumerate(([30, 0, 17], [3, 30, 9], [1, 1, 0])):
                batch = kvp.Batch.padded(slots, counts, 30)
                arrays = [x.reshape(3, 30, -1, HEAD_DIM) for x in _tokens(i, 90)]
                out, lse, cache = run(cache, *_operands(pool, arrays), batch)
                got.append((np.asarray(out), np.asarray(lse)))
            cache = kvp.set_lengths(cache, slots[:2], [20, 31])
            cache = pool.truncate(cache, slots[2], 16)
            assert [row.length for row in pool.slot_table(cache)] == [20, 31, 16]
            batch = kvp.Batch.padded(slots, [1, 30, 2], 30)
            out, lse, cache = run(
                cache, *_operands(pool, arrays), batch.mask(np.array([1, 1, 0]) > 0)
            )
            got.append((np.asarray(out), np.asarray(lse)))
            assert [row.length for row in pool.slot_table(cache)] == [21, 61, 16]
            results.append(got)
            pool.check(pool.release(cache, slots))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def long_sequence(size: int) -> None:
    """A sequence too long for one device, whose memory is split evenly."""
    tokens = 1000
    spec = make_spec(2, max_slots=2, max_seq_len=1024)
    token_bytes = spec.token_bytes
    of_one = tokens * token_bytes * 3 // 2 // size  # more than a share, less than the sequence
    with kvp.KVPool(spec, of_one) as alone, pytest.raises(kvp.OutOfBlocks):
        alone.acquire(alone.cache(), tokens)
    q, k, v = (random(i, tokens, heads, HEAD_DIM) for i, heads in enumerate((2, 2, 2)))
    over = {"mesh": make_mesh(size), "sequence_axis": "sp"}
    with kvp.KVPool(spec, of_one * size, **over) as pool:
        slot, cache = pool.acquire(pool.cache(), 64)
        pool.extend(slot, tokens)
        for begin in range(0, tokens, 250):
            batch = kvp.Batch.from_lengths([slot], [250])
            own = slice(begin, begin + 250)
            outs, cache = jax.jit(step)(cache, q[own], k[own], v[own], batch)
        pool.check(cache)
        scores = np.einsum("qhd,khd->hqk", q[own], k) / np.sqrt(HEAD_DIM)
        visible = np.arange(tokens)[None] <= np.arange(750, 1000)[:, None]
        weights = np.exp(np.where(visible, scores, -np.inf))
        wanted = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
        np.testing.assert_allclose(outs[0][0], wanted, atol=3e-6)
        unit = 32 * size  # one block of 32 tokens on each device
        blocks = -(-tokens // unit)
        stats = pool.stats()
        assert stats.mapped == blocks * unit * token_bytes
        assert stats.reserved_virtual == 2 * 1024 * token_bytes
        for shard in pool._pool.shards:
            numbers = shard.numbers()
            assert numbers.blocks_mapped == blocks
            assert numbers.physical_bytes == blocks * 32 * token_bytes
            assert numbers.virtual_bytes == 2 * 1024 * token_bytes // size
        with pytest.raises(kvp.OutOfBlocks):
            pool.acquire(cache, tokens)
        pool.check(pool.release(cache, slot))
        again, cache = pool.acquire(pool.cache(), tokens)
        assert pool.stats().mapped == stats.mapped
        pool.check(pool.release(cache, again))


def failed_calls() -> None:
    """A call that fails on one device takes effect on none."""
    broken = _native.StatusError(_native.Code.INTERNAL, _native.Reason.NONE, "injected")
    calls = {
        "acquire": lambda pool, cache, a, b: pool.acquire(cache, [40, 8]),
        "extend": lambda pool, cache, a, b: pool.extend([a, b], [250, 190]),
        "truncate": lambda pool, cache, a, b: pool.truncate(cache, a, 3),
        "start_edits": lambda pool, cache, a, b: pool.release(cache, [a, b]),
    }
    with make_pool(4) as pool:
        (a, b), cache = pool.acquire(pool.cache(), [50, 60])
        cache = write(pool, cache, a, range(40), commit=False)
        shards = pool._pool.shards
        before = pool.slot_table()
        for name, call in calls.items():
            for at in (1, 3):
                for error in (broken, KeyboardInterrupt()):
                    shard = shards[at]
                    failing = shards[at] = Failing(shard, name, error)
                    with pytest.raises((kvp.KVPageError, KeyboardInterrupt)):
                        call(pool, cache, a, b)
                    shards[at] = shard
                    assert failing.calls == 1, name
                    assert pool.slot_table() == before, name
                    check_equal(pool)
        last = shards[3]
        last.resize(last.numbers().block_bytes * 3)  # only this device has less
        assert not pool.can_acquire(250)
        for call in (lambda: pool.acquire(cache, 250), lambda: pool.extend([a, b], 250)):
            with pytest.raises(kvp.OutOfBlocks):
                call()
            assert pool.slot_table() == before
        cache = write(pool, cache, a, range(40, 60), commit=False)
        np.testing.assert_array_equal(written(cache, a, 60)[:, 1], range(60))
        pool.check(pool.release(cache, [a, b]))


def failed_programs() -> None:
    """An op that cannot run on one device fails on all of them at once, and the pool stays
    usable.
    """
    errors = (jax.errors.JaxRuntimeError, ValueError)

    def separate(cache: Any, q: Any, k: Any, v: Any, batch: Any) -> Any:
        cache = kvp.append_kv(cache, k, v, batch, layer=0)
        return kvp.paged_attention(q, cache, batch, layer=0), cache

    with make_pool(4) as pool:
        slots, cache = pool.acquire(pool.cache(), [64, 64])
        ready = kvp.Batch.from_lengths(slots, [40, 1])
        outs, cache = jax.jit(step)(cache, *_tokens(0, 41), ready)

        def fails(match: str, call: Any, *args: Any) -> None:
            nonlocal cache
            with pytest.raises(errors, match=match):
                jax.block_until_ready(call(*args))
            cache = pool.cache()
            assert [row.length for row in pool.slot_table(cache)] == [40, 1]

        long = kvp.Batch.from_lengths(slots, [120, 1])  # 64 tokens take one block on each device
        operands = _tokens(0, 121)
        for run in (jax.jit(step), jax.jit(separate)):
            fails(
                "append_kv: slot 0: 48 tokens wanted, 32 mapped.*of one device",
                run,
                cache,
                *operands,
                long,
            )
            free = kvp.Batch.from_lengths([slots[0], 5], [1, 1])
            fails("append_kv: slot 5 is free", run, cache, *_tokens(0, 2), free)
            rising = kvp.Batch(slots, [0, 2, 9], num_tokens=2)
            fails("query_offsets", run, cache, *_tokens(0, 2), rising)
            assert pool.sharding is not None
            own = jax.tree.map(lambda x: x.addressable_shards[2].data, cache)
            own = kvp.KVCache(
                own.handle, own.epoch, own.lengths.at[:2].set([8, 0]), pool.sharding.local
            )
            jax.block_until_ready(kvp.set_lengths(own, slots, [8, 0]))  # on this device only
            two = kvp.Batch.decode(slots)
            fails("append_kv: stale cache", run, cache, *_tokens(0, 2), two)
        fails("advance: slot 0: .* written in layers", kvp.advance, cache, ready)
        fails("set_lengths: slot 0: length 41 wanted", kvp.set_lengths, cache, slots, [41, 0])
        attend, unwritten = functools.partial(kvp.paged_attention, layer=0), "layer 0: .* written"
        fails(f"paged_attention: slot 0, {unwritten}", attend, _tokens(0, 41)[0], cache, ready)
        own = jax.tree.map(lambda x: x.addressable_shards[2].data, cache)
        own = kvp.KVCache(own.handle, own.epoch, own.lengths.at[0].set(8), pool.sharding.local)
        jax.block_until_ready(kvp.set_lengths(own, slots[:1], [3]))  # this device has lost 5 tokens
        cache = pool.cache()
        assert [row.length for row in pool.slot_table(cache)] == [35, 1]
        again, cache = jax.jit(step)(
            cache, *(x[35:] for x in _tokens(0, 41)), kvp.Batch.from_lengths(slots, [5, 1])
        )
        np.testing.assert_allclose(again[1][0][:5], outs[1][0][35:40], atol=3e-6)
        pool.check(pool.release(cache, slots))


def refusals() -> None:
    """Unsupported uses are refused with a clear message."""
    mesh, spec = make_mesh(4), make_spec(2)
    wide = jax.make_mesh((2, 2), ("dp", "sp"), devices=jax.devices()[:4])
    arguments: dict[str, Any]
    for arguments, wanted in (
        ({"sequence_axis": "sp"}, "wanted a mesh too"),
        ({"mesh": mesh, "sequence_axis": "tp"}, "sequence_axis: the mesh has 'sp', got 'tp'"),
        ({"mesh": mesh, "sequence_axis": "sp", "axis": "sp"}, "give one of them"),
        ({"mesh": wide, "sequence_axis": "sp"}, "spread over one axis"),
        ({"mesh": mesh, "sequence_axis": "sp", "device": jax.devices()[0]}, "device: cannot"),
    ):
        with pytest.raises(ValueError, match=wanted):
            kvp.KVPool(spec, "4MiB", **arguments)
    with pytest.raises(ValueError, match=r"max_seq_len=250: wanted a multiple of 64.*192 or 256"):
        kvp.KVPool(make_spec(2, max_seq_len=250), "4MiB", mesh=mesh, sequence_axis="sp")
    with make_pool(4) as pool:
        assert pool.sharding is not None
        slots, cache = pool.acquire(pool.cache(), [16, 0])
        batch = kvp.Batch.decode(slots)
        q, k, v = _tokens(0, 2)
        for call, wanted in (
            (lambda: pool.acquire(cache, 257), "num_tokens: wanted 0 to max_seq_len=256, got 257"),
            (lambda: pool.acquire(cache, -1), "num_tokens: wanted 0 to"),
            (lambda: pool.extend(slots, 300), "extend: num_tokens: wanted 0 to"),
            (
                lambda: pool.truncate(cache, slots[0], 65),
                r"wanted 0\.\.64, for which there is room",
            ),
            (
                lambda: pool.truncate(cache, 3, 257),  # a free slot
                r"slot 3: num_tokens is 257, wanted 0\.\.256",
            ),
            (lambda: pool.commit(slots[0], [1]), "commit: .*leave it out"),
            (lambda: pool.fork(cache, slots[0], 1), "fork: .*use a pool on one device"),
            (lambda: pool.acquire_prefix(cache, [1, 2]), "acquire_prefix: .*use acquire"),
            (lambda: pool.find_prefix([1, 2]), "find_prefix.*no prefix cache"),
            (lambda: pool.drop_before(cache, slots[0], 0), "drop_before: .*truncate"),
            (lambda: pool.swap_out(cache, slots[0]), "no store: .*without sequence_axis"),
            (lambda: pool.view(0), "no array|each device of the mesh has a part"),
            (lambda: kvp.map_slots(cache, slots, 20), r"map_slots: .*pool\.extend"),
            (lambda: kvp.grow(cache, batch), r"grow: .*pool\.extend"),
            (lambda: kvp.append_kv(cache, k, v[:1], batch, layer=2), r"layer: .*\s.*v: wanted"),
        ):
            with pytest.raises(ValueError, match=wanted):
                call()
        options: dict[str, Any]
        for options, wanted in (
            ({"sliding_window": 4, "alibi_slopes": np.ones(6)}, r"sliding_window.*\s.*alibi"),
            ({"addressing": "table", "implementation": "xla"}, r"addressing.*\s.*implementation"),
            ({"sinks": np.ones(3)}, "sinks: wanted"),
            ({"scale": -1.0}, "scale: wanted"),
        ):
            with pytest.raises(ValueError, match=wanted):
                kvp.update_and_attend(q, k, v, cache, batch, layer=0, **options)
        with pytest.raises(ValueError, match="vmap of append_kv: not served"):
            jax.vmap(lambda k: kvp.append_kv(cache, k, k, batch, layer=0))(np.stack([k, k]))
        pool.check(pool.release(cache, slots))
