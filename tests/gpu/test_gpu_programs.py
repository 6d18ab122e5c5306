"""Programs on a GPU: loops, CUDA graphs, mapping while programs run, and a model end to end."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Rig, busy, make_batch
from test_mapped_programs import test_shard_map_keeps_types as test_shard_map_keeps_types
from test_mapped_programs import (
    test_vmap_folds_into_sequences as test_vmap_folds_into_sequences,
)
from test_transforms import pool as pool
from test_transforms import (
    test_after_orders_a_read_before_a_destruction as test_after_orders_a_read,
)
from test_transforms import (
    test_cond_writes_only_where_it_went as test_cond_writes_only_where_it_went,
)
from test_transforms import test_decode as test_decode
from test_transforms import test_dropped_cache_means_no_write as test_dropped_cache_means_no_write
from test_transforms import test_masked_sequences_do_not_move as test_masked_sequences_do_not_move
from test_transforms import test_padding_is_silent as test_padding_is_silent
from test_transforms import test_positions as test_positions
from test_transforms import test_traced_window_can_be_scanned as test_traced_window_can_be_scanned

import jax_kvpage as kvp

__all__ = ["test_after_orders_a_read"]

pytestmark = pytest.mark.gpu

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_LAYERS, _KV_HEADS, _DIM = 2, 2, 64


def _spec(**options: object) -> kvp.CacheSpec:
    options = {"dtype": jnp.float32, "layout": "fused", "block_tokens": 32} | options
    return kvp.CacheSpec(_LAYERS, _KV_HEADS, _DIM, 4, 512, **options)


@functools.partial(jax.jit, static_argnames=("steps", "maps"), donate_argnums=0)
def _scan(cache: kvp.KVCache, ids: jax.Array, start: jax.Array, *, steps: int, maps: bool):
    """Toy decode: the attention output determines the next token's vector."""

    def body(carry, _):
        cache, x = carry
        ok = jnp.ones(ids.shape, bool)
        if maps:
            cache, ok = kvp.map_slots(cache, ids, cache.lengths[ids] + 1)
        batch = kvp.Batch.decode(ids).mask(ok)
        for layer in range(_LAYERS):
            k = x[:, :_KV_HEADS] * (layer + 1)
            out, cache = kvp.update_and_attend(x, k, -k, cache, batch, layer=layer)
            x = jnp.tanh(x + out) + 0.01
        return (kvp.advance(cache, batch), x), (x, ok)

    (cache, _), rows = jax.lax.scan(body, (cache, start), None, length=steps)
    return cache, *rows


def _start(sequences: int) -> jax.Array:
    rng = np.random.default_rng(3)
    return jnp.asarray(rng.standard_normal((sequences, 2 * _KV_HEADS, _DIM), np.float32))


def test_map_slots_in_a_scan(make_pool, platform: str) -> None:
    """Every step maps what it needs; on a GPU each mapping waits once, and nothing else waits."""
    pool = make_pool(_spec(), poison=True)
    slots, cache = pool.acquire(pool.cache(), [1, 1])
    ids = jnp.asarray(slots, jnp.int32)
    before = pool.stats()
    cache, rows, ok = _scan(cache, ids, _start(2), steps=70, maps=True)
    assert bool(jnp.all(ok))
    assert bool(jnp.all(jnp.isfinite(rows)))
    after = pool.stats()
    assert after.waits - before.waits == (70 if platform == "cuda" else 0)
    assert after.blocks_mapped == 2 * 3
    assert [int(cache.lengths[slot]) for slot in slots] == [70, 70]
    ahead = make_pool(_spec(), poison=True)
    slots, cache = ahead.acquire(ahead.cache(), [70, 70])
    start = ahead.stats().waits
    _, want, _ = _scan(cache, jnp.asarray(slots, jnp.int32), _start(2), steps=70, maps=False)
    np.testing.assert_array_equal(np.asarray(rows), np.asarray(want))
    assert ahead.stats().waits == start, "steps whose blocks were mapped ahead never wait"


def test_map_slots_runs_out_in_a_scan(make_pool, platform: str) -> None:
    spec = _spec().resolve(platform)
    pool = make_pool(spec, 3 * spec.block_bytes)
    slots, cache = pool.acquire(pool.cache(), [1, 1])
    ids = jnp.asarray(slots, jnp.int32)
    cache, _, ok = _scan(cache, ids, _start(2), steps=40, maps=True)
    # Both need a second block and one is left: the first in the list gets it.
    np.testing.assert_array_equal(np.asarray(ok)[:, 0], True)
    np.testing.assert_array_equal(np.asarray(ok)[:, 1], np.arange(40) < 32)
    assert [int(cache.lengths[slot]) for slot in slots] == [40, 32]
    pool.check(cache)


def test_replays_of_one_program(make_pool) -> None:
    """A program that is called again is replayed as a CUDA graph, with other operands and another
    pool's handle in the same or other buffers: its results match those of the first calls.
    """
    first, second = (make_pool(_spec(), on_stale="allow") for _ in range(2))
    want = None
    for round_ in range(12):
        pool = (first, second)[round_ % 2]
        slots, cache = pool.acquire(pool.cache(), [40, 40])
        cache, rows, _ = _scan(
            cache, jnp.asarray(slots, jnp.int32), _start(2), steps=16, maps=False
        )
        bits = np.asarray(rows).tobytes()
        want = want or bits
        assert bits == want, f"call {round_}"
        cache = pool.release(cache, slots)
        pool.check(cache)


def test_release_drains_without_waiting(make_pool, platform: str) -> None:
    """Nothing synchronizes with the device: the slot drains while programs run, then parks."""
    pool = make_pool(_spec())
    # The first run of a program waits for the device while XLA loads it, so run each once
    # beforehand.
    slot, cache = pool.acquire(pool.cache(), 100)
    cache = jax.block_until_ready(pool.release(kvp.after(cache, jnp.zeros(())), slot))
    slot, cache = pool.acquire(cache, 100)
    waits = pool.stats().waits
    held = busy(1)
    cache = pool.release(kvp.after(cache, held), slot)
    assert not held.is_ready(), "release must not wait"
    stats = pool.stats()
    assert (stats.blocks_draining, stats.blocks_parked) == (4, 0)
    other, cache = pool.acquire(cache, 30)
    assert other != slot
    jax.block_until_ready(cache)
    stats = pool.stats()
    assert (stats.blocks_draining, stats.blocks_parked) == (0, 4)
    assert stats.waits == waits
    again, cache = pool.acquire(cache, 100)
    assert again == slot
    pool.check(cache)


def test_extend_beside_running_programs(make_pool) -> None:
    """The pool maps and returns memory while a long program reads and writes other slots."""
    pool = make_pool(_spec(), "256MiB", poison=True)
    rig = Rig(pool, group=2)
    slots, rig.cache = pool.acquire(rig.cache, [300, 300])
    for slot in slots:
        rig.model.acquire(slot)
    spare, rig.cache = pool.acquire(rig.cache, [1, 1])
    rig.write({slots[0]: 200, slots[1]: 99})
    k, v = rig.random_kv(6)
    q = rig.random_q(6)
    batch = make_batch([(slots[0], 5), (slots[1], 1)])

    def attend(value: jax.Array) -> list[jax.Array]:
        rig.cache = kvp.after(rig.cache, value)
        for layer in range(_LAYERS):
            rig.cache = kvp.append_kv(
                rig.cache, jnp.asarray(k[layer]), jnp.asarray(v[layer]), batch, layer=layer
            )
        return [kvp.paged_attention(jnp.asarray(q[i]), rig.cache, batch, layer=i) for i in range(2)]

    # The first run of a program waits for the device while XLA loads it, so run it once beforehand.
    jax.block_until_ready(attend(jnp.zeros(())))
    outs = attend(busy(1))
    for tokens in range(32, 513, 32):
        pool.extend(spare, tokens)
        pool.trim()
    assert not outs[1].is_ready(), "this test maps beside a running program"
    rig._model_append([(slots[0], 5), (slots[1], 1)], k, v)
    want, _ = rig.reference([(slots[0], 5), (slots[1], 1)], q)
    np.testing.assert_allclose(np.stack([np.asarray(out) for out in outs]), want, atol=1e-4)
    pool.check(rig.cache)


def test_many_pools_come_and_go(make_pool) -> None:
    """Entries of the device's table are reused, and no pool answers for another."""
    spec = _spec()
    kept = make_pool(spec)
    slots, cache = kept.acquire(kept.cache(), [40])
    ids = jnp.asarray(slots, jnp.int32)
    cache, first, _ = _scan(cache, ids, _start(1), steps=8, maps=False)
    for _ in range(20):
        pool = make_pool(spec)
        others, theirs = pool.acquire(pool.cache(), [40])
        theirs, rows, _ = _scan(
            theirs, jnp.asarray(others, jnp.int32), _start(1), steps=8, maps=False
        )
        np.testing.assert_array_equal(rows, first)
        pool.check(theirs)
        pool.close()
    assert int(cache.lengths[slots[0]]) == 8
    kept.check(cache)


def test_a_cpu_pool_beside_a_gpu_pool(make_pool) -> None:
    cpu = jax.devices("cpu")[0]
    here = make_pool(_spec())
    slots, cache = here.acquire(here.cache(), [40])
    _, rows, _ = _scan(cache, jnp.asarray(slots, jnp.int32), _start(1), steps=8, maps=False)
    with jax.default_device(cpu), kvp.KVPool(_spec(), "4MiB", device=cpu) as pool:
        slots, cache = pool.acquire(pool.cache(), [40])
        ids = jnp.asarray(slots, jnp.int32)
        _, want, _ = _scan(cache, ids, jnp.asarray(np.asarray(_start(1))), steps=8, maps=False)
        want = np.asarray(want)
    np.testing.assert_allclose(np.asarray(rows), want, atol=1e-4)


def test_more_than_the_card_has_is_refused() -> None:
    with pytest.raises(kvp.OutOfBlocks, match="bytes"):
        kvp.KVPool(kvp.CacheSpec(2, 2, 64, 4, 256), "900TiB")


def test_views_are_refused(make_pool, platform: str) -> None:
    if platform == "cpu":
        pytest.skip("host memory has views")
    pool = make_pool(_spec(layout="per_layer", block_tokens=None))
    with pytest.raises(ValueError, match=r"device memory.*paged_attention"):
        pool.view(0)


def _run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=_ROOT / "tests",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_model_says_what_it_says_on_cpu(platform: str) -> None:
    """Greedy text of the bundled Llama, by a loop and by a scan."""
    script = str(_ROOT / "examples" / "decode_llama.py")
    options = ["--json", "--temperature", "0", "--dtype", "float32", "--max-new-tokens", "32"]
    texts = []
    for where, more in (("cpu", []), (platform, []), (platform, ["--scan", "8"])):
        platforms = "cpu" if where == "cpu" else "cuda,cpu"
        output = _run(
            [script, *options, *more],
            JAX_PLATFORMS=platforms,
            JAX_DEFAULT_MATMUL_PRECISION="highest",
        )
        texts.append([s["output_ids"] for s in json.loads(output)["sequences"]])
    assert texts[0] == texts[1] == texts[2]


def test_graphs_change_no_logit(platform: str) -> None:
    """The same decode without CUDA graphs, with them, and with loops as graphs too.

    XLA may choose different matrix products in each, so logits are equal up to float32 rounding.
    """
    script = str(_ROOT / "benchmarks" / "gpu" / "llama_graphs.py")
    output = _run([script, "--platform", platform, "--dry-run", "--limit", "270"])
    result = json.loads(output.splitlines()[-1])
    assert result["left_out"] == {}
    assert len(result["differences"]) == 9
    assert max(result["differences"].values()) < 1e-4, result["differences"]


def test_doctor() -> None:
    assert "All well" in _run(["-m", "jax_kvpage"])
