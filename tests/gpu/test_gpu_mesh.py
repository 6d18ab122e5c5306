"""A pool over several GPUs of one process. Deselected if there are fewer than two."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import RUN_TIME_ERRORS
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_rig import append_in_layers, check_equal, keys_of, written
from subprocesses import run_python

import jax_kvpage as kvp

pytestmark = [pytest.mark.gpu, pytest.mark.gpus]

_LAYERS, _HEADS, _DIM = 2, 8, 64


@pytest.fixture(params=[2, 4])
def mesh(request: pytest.FixtureRequest, platform: str) -> Mesh:
    size, found = request.param, jax.devices(platform)
    if len(found) < size:
        size = 2  # a second run, over two
    return jax.make_mesh((size,), ("tp",), axis_types=(AxisType.Auto,), devices=found[:size])


def _spec(**options: Any) -> kvp.CacheSpec:
    options = {"dtype": jnp.float32, "block_tokens": 32} | options
    return kvp.CacheSpec(_LAYERS, _HEADS, _DIM, 6, 512, **options)


@functools.partial(jax.jit, static_argnames=("steps", "maps"), donate_argnums=0)
def _decode(cache: kvp.KVCache, ids: Any, start: Any, *, steps: int, maps: bool) -> Any:
    """Toy decode whose layers end with a sum over all heads, as in a tensor-parallel model."""

    def body(carry: Any, _: Any) -> Any:
        cache, x = carry
        ok = jnp.ones(ids.shape, bool)
        batch = kvp.Batch.decode(ids)
        if maps:
            cache, ok = kvp.grow(cache, batch)
            batch = batch.mask(ok)
        for layer in range(_LAYERS):
            out, cache = kvp.update_and_attend(x, x + layer, -x, cache, batch, layer=layer)
            x = jnp.tanh(x + out + 0.1 * jnp.sum(out, axis=1, keepdims=True)) + 0.01
        return (kvp.advance(cache, batch), x), (x, ok)

    (cache, _), rows = jax.lax.scan(body, (cache, start), None, length=steps)
    return cache, *rows


def _start(sequences: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((sequences, _HEADS, _DIM), np.float32)


def _alone(make_pool: Any, steps: int, **options: Any) -> np.ndarray:
    pool = make_pool(_spec(), **options)
    slots, cache = pool.acquire(pool.cache(), [steps, steps])
    start = jnp.asarray(_start(2))
    cache, rows, _ = _decode(cache, jnp.asarray(slots, jnp.int32), start, steps=steps, maps=False)
    pool.check(cache)
    return np.asarray(rows)


def _on_heads(mesh: Mesh, array: np.ndarray) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh, P(None, "tp", None)))


@pytest.mark.parametrize("maps", [False, True])
def test_decode_is_that_of_one_device(make_pool, mesh: Mesh, maps: bool) -> None:
    """Programs map what they need while they sum over the devices; all devices use equal blocks."""
    want = _alone(make_pool, 70)
    pool = make_pool(_spec(), "64MiB", poison=True, mesh=mesh, axis="tp")
    slots, cache = pool.acquire(pool.cache(), [1, 1] if maps else [70, 70])
    ids = jax.device_put(np.asarray(slots, np.int32), pool.placement)
    start = _on_heads(mesh, _start(2))
    cache, rows, ok = _decode(cache, ids, start, steps=70, maps=maps)
    pool.check(cache)
    assert bool(jnp.all(ok))
    np.testing.assert_allclose(np.asarray(rows), want, atol=1e-4)
    check_equal(pool)
    numbers = pool._pool.maps.numbers()
    assert (numbers.decisions, numbers.pending) == (70 if maps else 0, 0)
    assert numbers.fetched == numbers.decisions * (mesh.size - 1)
    assert [row.length for row in pool.slot_table(cache)] == [70, 70]


def test_blocks_run_out_alike(make_pool, mesh: Mesh) -> None:
    pool = make_pool(_spec(), "64MiB", mesh=mesh, axis="tp")
    pool.resize(3 * pool._native.block_bytes)
    slots, cache = pool.acquire(pool.cache(), [1, 1])
    tokens = pool.spec.block_tokens
    ids = jax.device_put(np.asarray(slots, np.int32), pool.placement)
    cache, ok = kvp.map_slots(cache, ids, np.asarray([tokens + 1, tokens + 1]))
    assert ok.tolist() == [True, False]
    pool.check(cache)
    check_equal(pool)


def test_replays(make_pool, mesh: Mesh) -> None:
    """Programs that run repeatedly are replayed as CUDA graphs, each device's with its own
    table.
    """
    want = _alone(make_pool, 16)
    pool = make_pool(_spec(), "64MiB", mesh=mesh, axis="tp")
    bits = None
    for round_ in range(12):
        slots, cache = pool.acquire(pool.cache(), [40, 40])
        ids = jax.device_put(np.asarray(slots, np.int32), pool.placement)
        start = _on_heads(mesh, _start(2))
        cache, rows, _ = _decode(cache, ids, start, steps=16, maps=False)
        np.testing.assert_allclose(np.asarray(rows), want, atol=1e-4)
        bits = bits or np.asarray(rows).tobytes()
        assert np.asarray(rows).tobytes() == bits, f"call {round_}"
        pool.check(pool.release(cache, slots))


def _write(pool: kvp.KVPool, cache: kvp.KVCache, slot: int, ids: Any) -> kvp.KVCache:
    assert pool.sharding is not None
    kv = _on_heads(pool.sharding.mesh, np.repeat(keys_of(cache, ids), _DIM // 32, axis=2))
    batch = kvp.Batch.from_lengths([slot], [len(ids)])
    cache = append_in_layers(cache, kv, batch)
    pool.commit(slot, list(ids))
    return cache


def test_host_calls(make_pool, mesh: Mesh, platform: str) -> None:
    """Forks, beams, truncation, prefixes and releases; every head holds what was written."""
    pool = make_pool(_spec(), "256MiB", mesh=mesh, axis="tp")
    ids = list(range(100, 170))
    slot, cache = pool.acquire(pool.cache(), 10)
    cache = _write(pool, cache, slot, ids[:10])
    pool.extend(slot, 70)
    cache = _write(pool, cache, slot, ids[10:])
    (one, two), cache = pool.fork(cache, slot, 2, 40)
    pool.extend([one, two], 50)
    cache = _write(pool, cache, one, [7, 8])
    beams, cache = pool.reorder(cache, [one, two], [0, 0])
    cache = pool.truncate(cache, slot, 20)
    cache = _write(pool, cache, slot, [1, 2, 3])
    for at, tokens in (
        (slot, [*ids[:20], 1, 2, 3]),
        *((beam, [*ids[:40], 7, 8]) for beam in beams),
    ):
        assert pool.committed(at) == tokens
        found = written(cache, at, len(tokens))
        np.testing.assert_array_equal(found, np.repeat([tokens], _HEADS, 0).T)
    check_equal(pool)
    found, num_found, cache = pool.acquire_prefix(cache, ids)
    assert num_found == 0
    cache = _write(pool, cache, found, ids)
    other, num_found, cache = pool.acquire_prefix(cache, [*ids[:64], 5])
    assert num_found == 64
    cache = _write(pool, cache, other, [5])
    found = written(cache, other, 65)
    np.testing.assert_array_equal(found, np.repeat([[*ids[:64], 5]], _HEADS, 0).T)
    if platform == "cuda":
        with pytest.raises(
            ValueError, match="drop_before: not supported yet on a pool over several GPUs"
        ):
            pool.drop_before(cache, slot, 10)
    table = [row.slot for row in pool.slot_table()]
    cache = pool.release(cache, table)
    pool.check(cache)
    check_equal(pool)
    again, cache = pool.acquire(cache, 500, wait=True)
    pool.check(pool.release(cache, again))
    pool.trim()
    assert pool.stats().slots_occupied == pool.stats().slots_draining == 0
    check_equal(pool)


def test_faults_and_generations(make_pool, mesh: Mesh) -> None:
    """A step without room is a fault on all devices, raised once; the pool stays usable."""
    pool = make_pool(_spec(), "64MiB", mesh=mesh, axis="tp")
    slot, cache = pool.acquire(pool.cache(), pool.spec.block_tokens)
    room = pool.spec.block_tokens
    kv = np.zeros((room + 1, _HEADS, _DIM), np.float32)
    batch = kvp.Batch.from_lengths([slot], [room + 1])
    bad = append_in_layers(cache, _on_heads(mesh, kv), batch)
    with pytest.raises((kvp.DeviceFault, *RUN_TIME_ERRORS), match="mapped"):
        pool.check(bad)
    cache = pool.cache()
    pool.extend(slot, room + 1)
    cache = append_in_layers(cache, _on_heads(mesh, kv), batch)
    pool.check(cache)
    assert [row.length for row in pool.slot_table(cache)] == [room + 1]
    check_equal(pool)


def test_a_capacity_is_split_over_the_cards(mesh: Mesh) -> None:
    with kvp.KVPool(_spec(block_tokens=None), "10%", mesh=mesh, axis="tp") as pool:
        total = pool.stats().capacity
        pool.resize("5%")
        assert pool.stats().capacity < total
        assert pool.stats().blocks_total == pool._pool.shards[-1].numbers().blocks_total


def test_the_model_says_what_it_says_on_one_card(platform: str) -> None:
    script = pathlib.Path(__file__).resolve().parents[2] / "examples" / "decode_llama.py"
    texts = []
    for more in ([], ["--mesh", "tp=2"], ["--mesh", "tp=2", "--scan", "8"]):
        options = ["--json", "--temperature", "0", "--dtype", "float32", "--max-new-tokens", "24"]
        done = run_python(
            "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')",
            str(script), *options, *more,
            env={"JAX_PLATFORMS": "cpu" if platform == "cpu" else "cuda,cpu",
                 "JAX_DEFAULT_MATMUL_PRECISION": "highest"},
            timeout=280,
        )  # fmt: skip
        texts.append([s["output_ids"] for s in json.loads(done.stdout)["sequences"]])
    assert texts[0] == texts[1] == texts[2]
