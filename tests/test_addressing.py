"""addressing="table" gives bit for bit the results of addressing="slots": over layouts, dtypes and
shapes, for sequences that share blocks, grow, shrink and move, and under JAX's transformations.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CONFIGS, Config
from harness import Rig, input_dtype, make_batch
from subprocesses import run_python

import jax_kvpage as kvp

_LAYERS, _TOKENS, _SEQUENCES = 2, 48, 5


@functools.partial(jax.jit, static_argnames=("soft_cap",))
def _both(
    caches: tuple[kvp.KVCache, kvp.KVCache],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    batch: kvp.Batch,
    options: dict[str, Any],
    soft_cap: float | None,
) -> tuple[list[Any], list[Any], list[Any], tuple[kvp.KVCache, ...]]:
    """Runs a step on each of two pools, the first through its slots, the second through its table;
    also returns the first pool's contents as its table shows them.
    """
    options = {**options, "logits_soft_cap": soft_cap, "return_lse": True}
    slots, tables, mixed = [], [], []
    first, second = caches
    for layer in range(_LAYERS):
        more = {**options, "layer": layer}
        *out, first = kvp.update_and_attend(q[layer], k[layer], v[layer], first, batch, **more)
        slots.append(out)
        *out, second = kvp.update_and_attend(
            q[layer], k[layer], v[layer], second, batch, addressing="table", **more
        )
        tables.append(out)
        mixed.append(kvp.paged_attention(q[layer], first, batch, addressing="table", **more))
    return slots, tables, mixed, (kvp.advance(first, batch), kvp.advance(second, batch))


def _bits(results: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(results)]


class _Twins:
    """Two pools with the same history, one accessed through slots, the other through tables."""

    def __init__(self, make_pool, config: Config) -> None:
        spec = kvp.CacheSpec(
            _LAYERS, config.num_kv_heads, config.head_dim, 8, 200,
            dtype=jnp.dtype(config.storage), layout=config.layout,
        )  # fmt: skip
        self.rigs = [
            Rig(make_pool(spec, "64MiB", poison=True), group=config.group, seed=1,
                query_dtype=jnp.dtype(config.query), max_tokens=_TOKENS, max_sequences=_SEQUENCES)
            for _ in range(2)
        ]  # fmt: skip
        heads = config.num_kv_heads * config.group
        rng = np.random.default_rng(2)
        self.variants: list[tuple[dict[str, Any], float | None]] = [
            ({}, None),
            (
                {
                    "sliding_window": jnp.int32(23),
                    "sinks": jnp.asarray(rng.normal(size=heads), jnp.float32),
                    "alibi_slopes": jnp.asarray(rng.uniform(0, 0.5, heads), jnp.float32),
                },
                5.0,
            ),
        ]

    def each(self, do: Any) -> Any:
        """Makes a host call on both pools; returns the result, which must be the same."""
        first, second = map(do, self.rigs)
        assert first == second
        return first

    def fork(self, slot: int, n: int) -> list[int]:
        def do(rig: Rig) -> list[int]:
            rig.pool.commit(slot, range(int(rig.cache.lengths[slot])))
            slots, rig.cache = rig.pool.fork(rig.cache, slot, n)
            return slots

        return self.each(do)

    def truncate(self, slot: int, num_tokens: int) -> None:
        for rig in self.rigs:
            rig.cache = rig.pool.truncate(rig.cache, slot, num_tokens)

    def reorder(self, slots: Sequence[int], parents: Sequence[int]) -> list[int]:
        def do(rig: Rig) -> list[int]:
            for slot in slots:
                length = int(rig.cache.lengths[slot])
                rig.pool.commit(slot, range(length - len(rig.pool.committed(slot))))
            new, rig.cache = rig.pool.reorder(rig.cache, slots, parents)
            return new

        return self.each(do)

    def step(self, sequences: Sequence[tuple[int, int]]) -> None:
        """Appends tokens to all sequences, in the plain variant and in the one with all options."""
        a, b = self.rigs
        dtype = input_dtype(a.spec)
        batch = make_batch(sequences, _SEQUENCES)
        for options, soft_cap in self.variants:
            for slot, n in sequences:
                for rig in self.rigs:
                    rig.pool.extend(slot, int(rig.cache.lengths[slot]) + n)
            q = jnp.asarray(a.random_q(_TOKENS), a.query_dtype)
            k, v = (jnp.asarray(x, dtype) for x in a.random_kv(_TOKENS))
            slots, tables, mixed, (a.cache, b.cache) = _both(
                (a.cache, b.cache), q, k, v, batch, options, soft_cap
            )
            assert all(np.isfinite(np.asarray(out, np.float32)).all() for out, _ in slots)
            assert _bits(slots) == _bits(tables) == _bits(mixed)

    def check_contents(self, slots: Sequence[int]) -> None:
        """Asserts that both pools have the same contents."""
        named = np.asarray(slots, np.int32)
        for layer in range(_LAYERS):
            a, b = (kvp.read_kv(rig.cache, named, layer) for rig in self.rigs)
            assert _bits(a) == _bits(b)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_table_equals_slots(make_pool, config: Config) -> None:
    twins = _Twins(make_pool, config)
    slots = twins.each(lambda rig: rig.acquire_scattered([70, 1, 33, 20]))
    twins.each(lambda rig: rig.write(dict(zip(slots, (65, 0, 16, 1), strict=True))))
    twins.step([(slots[0], 1), (slots[1], 17), (slots[2], 9), (slots[3], 1)])
    forks = twins.fork(slots[0], 2)
    twins.step([(slots[0], 1), (forks[0], 1), (forks[1], 20)])
    twins.truncate(forks[0], 19)  # inside a block that all three share
    twins.step([(forks[0], 9), (forks[1], 1), (slots[0], 1)])
    beams = twins.reorder([*forks, slots[2]], [1, 1, 2])
    twins.step([(slot, 1) for slot in beams])
    twins.each(lambda rig: rig.pool.release(rig.cache, slots[1]) and None)
    for rig in twins.rigs:
        rig.cache = rig.pool.cache()
    twins.check_contents([slots[0], *beams])


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_long_contexts(make_pool, layout: str) -> None:
    """Contexts split over several threads, longer than one span of a kernel."""
    spec = kvp.CacheSpec(1, 2, 64, 4, 4200, dtype=jnp.bfloat16, layout=layout)
    rig = Rig(make_pool(spec, "64MiB"), group=2, max_tokens=1024, max_sequences=4)
    slots = rig.acquire_scattered([4180, 1040, 600])
    rig.write(dict(zip(slots, (4100, 1030, 511), strict=True)))
    batch = make_batch([(slots[0], 1), (slots[1], 1), (slots[2], 60)])
    rig.append([(slots[0], 1), (slots[1], 1), (slots[2], 60)])
    q = jnp.asarray(rig.random_q(62)[0], jnp.bfloat16)
    results = [
        _bits(kvp.paged_attention(q, rig.cache, batch, layer=0, addressing=a, return_lse=True))
        for a in ("slots", "table")
    ]
    assert results[0] == results[1]


def _vmapped(make_pool, layout: str) -> tuple[kvp.KVPool, list[int], Any]:
    spec = kvp.CacheSpec(1, 2, 64, 6, 64, dtype=jnp.float32, layout=layout, block_tokens=16)
    pool = make_pool(spec)
    rig = Rig(pool, group=2)
    slots = rig.acquire_scattered([40] * 4)
    rig.write(dict.fromkeys(slots, 33))
    return pool, slots, rig.cache


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_vmap(make_pool, layout: str) -> None:
    pool, slots, cache = _vmapped(make_pool, layout)
    ids = jnp.asarray(slots, jnp.int32).reshape(2, 2)
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 2, 4, 64)), jnp.float32)
    kv = jnp.asarray(rng.standard_normal((2, 2, 2, 64)), jnp.float32)

    def update(q, kv, slots, cache, addressing):
        batch = kvp.Batch.decode(slots)
        return kvp.update_and_attend(q, kv, kv, cache, batch, layer=0, addressing=addressing)

    def read(q, slots, cache, addressing):
        batch = kvp.Batch.decode(slots)
        return kvp.paged_attention(q, cache, batch, layer=0, addressing=addressing)

    results = []
    for addressing in ("table", "slots"):
        call = functools.partial(update, addressing=addressing)
        out, new = jax.jit(jax.vmap(call, in_axes=(0, 0, 0, None), out_axes=(0, None)))(
            q, kv, ids, cache
        )
        again = functools.partial(read, addressing=addressing)
        seen = jax.jit(jax.vmap(again, in_axes=(0, 0, None)))(q, ids, new)
        results.append(_bits([out, seen]))
        assert results[-1][0] == results[-1][1]
        pool.check(new)
        cache = pool.cache()  # the same step again: its tokens were not advanced
    assert results[0] == results[1]


def test_shard_map() -> None:
    """A pool with a table on each of two devices."""
    run_python(
        """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import jax_kvpage as kvp

mesh = jax.make_mesh((2,), ("x",))
spec = kvp.CacheSpec(1, 1, 64, 2, 64, jnp.float32, layout="per_layer", block_tokens=16)
pools = [kvp.KVPool(spec, "1MiB", device=device) for device in jax.devices()]
spec = pools[0].spec
caches = []
for pool in pools:
    _, cache = pool.acquire(pool.cache(), 20)
    caches.append(cache)

def stacked(*parts):
    shape = (2 * parts[0].shape[0], *parts[0].shape[1:])
    return jax.make_array_from_single_device_arrays(
        shape, NamedSharding(mesh, P("x")), list(parts))

arrays = jax.tree.map(stacked, *caches)
x = np.random.default_rng(0).standard_normal((2 * 17, 1, 64)).astype(np.float32)
x = jax.device_put(x, NamedSharding(mesh, P("x")))

def step(cache, x, addressing):
    batch = kvp.Batch.from_lengths([0], [17])
    return kvp.update_and_attend(x, x, x, cache, batch, layer=0, addressing=addressing)

outs = []
for addressing in ("slots", "table"):
    mapped = jax.shard_map(functools.partial(step, addressing=addressing), mesh=mesh,
                           in_specs=(P("x"), P("x")), out_specs=P("x"))
    out, arrays = jax.jit(mapped)(arrays, x)
    outs.append(np.asarray(out))
assert outs[0].tobytes() == outs[1].tobytes()
assert not np.array_equal(outs[0][:17], outs[0][17:])
""",
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    )


def test_refusals(make_pool) -> None:
    """Each unsupported combination is one of the reasons in one error."""
    spec = kvp.CacheSpec(1, 2, 64, 2, 64, dtype=jnp.float32)
    pool = make_pool(spec)
    cache, batch, q = pool.cache(), kvp.Batch.decode([0]), jnp.ones((1, 2, 64))

    def refusal(op: Any, *arrays: Any, **options: Any) -> str:
        with pytest.raises(ValueError, match=r"\n  - ") as caught:
            op(*arrays, cache, batch, layer=0, **options)
        return str(caught.value)

    for op, arrays in ((kvp.paged_attention, (q,)), (kvp.update_and_attend, (q, q, q))):
        text = refusal(op, *arrays, addressing="table", implementation="xla", scale=-1.0)
        assert "implementation='xla' copies the context out of the slots" in text
        assert "scale: wanted a positive number" in text
        assert "wanted 'slots' or 'table', got 'pages'" in refusal(op, *arrays, addressing="pages")
        assert "got None" in refusal(op, *arrays, addressing=None)
