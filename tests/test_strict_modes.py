"""JAX's strict modes: a short decode gives the same result in each as without it, with the library,
its pure JAX implementation and the example. Whatever runs in a mode is compiled in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama.sampling import Sampling
from llama_models import UNTIED, cache_spec, generate, random_model

import jax_kvpage as kvp
from jax_kvpage.quantize import dequantize, quantize

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 32

MODES: dict[str, Callable[[], Any]] = {
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "transfer_guard": lambda: jax.transfer_guard("disallow"),
    "disable_jit": jax.disable_jit,
    "x64": lambda: jax.enable_x64(True),
    "debug_nans": lambda: jax.debug_nans(True),
    "checking_leaks": jax.checking_leaks,
}
_modes = pytest.mark.parametrize("mode", MODES)


def _tokens(number: int, seed: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(seed)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return tuple(
        jax.device_put(rng.standard_normal((number, h, DIM)).astype(np.float32)) for h in heads
    )


def _decode(spec: kvp.CacheSpec, implementation: str | None, mode: Callable[[], Any]) -> list[Any]:
    """Runs prefill, three steps, a rollback and a release, all in the mode except for the
    inputs.
    """
    options: dict[str, Any] = {
        "sliding_window": 20,
        "logits_soft_cap": 5.0,
        "sinks": jax.device_put(np.linspace(0, 1, HEADS, dtype=np.float32)),
        "alibi_slopes": jax.device_put(np.linspace(0, 0.1, HEADS, dtype=np.float32)),
        "implementation": implementation,
    }
    inputs = [_tokens(8, 0), *[_tokens(2, i) for i in range(1, 4)]]

    def step(cache: kvp.KVCache, q: Any, k: Any, v: Any, batch: kvp.Batch) -> Any:
        positions = kvp.positions(cache, batch)
        room = jnp.where(batch.slots < 0, 0, cache.lengths[batch.slots] + 8)
        cache, ok = kvp.map_slots(cache, batch.slots, room)
        batch = batch.mask(ok)
        outs = []
        for layer in range(LAYERS):
            out, lse, cache = kvp.update_and_attend(
                q, k, v, cache, batch, layer=layer, return_lse=True, **options
            )
            plain = kvp.paged_attention(q, cache, batch, layer=layer, implementation=implementation)
            outs += [out, jnp.where(jnp.isfinite(lse), lse, 0.0), plain]
        return positions, outs, kvp.advance(kvp.after(cache, outs), batch)

    padded_inputs = [jnp.stack([x[:3], x[3:6]]) for x in inputs[0]]
    pages = [x[None] for x in inputs[0][1:]]
    lengths, tables = jax.device_put((np.int32([1, 2]), np.zeros((2, 1), np.int32)))
    results: list[Any] = []
    with kvp.KVPool(spec, "1MiB") as pool, mode():
        program = jax.jit(step, donate_argnames="cache")
        slots, cache = pool.acquire(pool.cache(), [1, 1])
        ragged = kvp.Batch.from_lengths(slots, [5, 2], num_tokens=8)
        decode = kvp.Batch.decode(slots)
        for i, (q, k, v) in enumerate(inputs):
            positions, outs, cache = program(cache, q, k, v, decode if i else ragged)
            results += [positions, *outs]
        pool.commit(slots[0], list(range(8)))
        for padded in (
            kvp.Batch.padded(slots, [1, 3], 3),
            kvp.Batch.from_mask(slots, np.tri(2, 3, dtype=bool)),
        ):
            positions, outs, cache = program(cache, *padded_inputs, padded)
            results += [positions, *outs, padded.last_rows, kvp.positions(cache, padded)]
        cache = kvp.set_lengths(cache, slots, [6, 5])
        pool.extend(slots, 20)
        kvp.positions(cache, kvp.Batch(decode.slots, decode.query_offsets))
        cache, ok = kvp.grow(cache, ragged)
        results += [ok, ragged.last_rows, *kvp.read_kv(cache, slots, 1)]
        assert [row.length for row in pool.slot_table(cache)] == [6, 5]
        cache = pool.release(cache, slots)
        pool.check(cache)
        out = kvp.paged_attention_with_tables(
            inputs[1][0],
            *pages,
            tables,
            lengths,
            implementation=implementation,
        )
        results.append(out)
        if mode is not MODES["transfer_guard"]:  # separate jax.numpy calls, not one program
            results.append(dequantize(*quantize(inputs[0][1], jnp.int8)))
    return [np.asarray(result) for result in results]


@pytest.mark.parametrize("implementation", [None, "xla"])
@_modes
def test_library(mode: str, implementation: str | None) -> None:
    spec = kvp.CacheSpec(LAYERS, KV_HEADS, DIM, 4, 64, jnp.float32, block_tokens=16)
    plain = _decode(spec, implementation, contextlib.nullcontext)
    strict = _decode(spec, implementation, MODES[mode])
    for got, want in zip(strict, plain, strict=False):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("scan_steps", [1, 3])
@_modes
def test_example(mode: str, scan_steps: int) -> None:
    model = random_model(UNTIED)
    spec = cache_spec(UNTIED, max_slots=2)

    def run(sampling: Sampling) -> list[list[int]]:
        prompts = [[5, 7, 11], [13, 2]]
        return generate(
            model,
            prompts,
            spec=spec,
            max_new_tokens=4,
            sampling=sampling,
            scan_steps=scan_steps,
        ).outputs

    for sampling in (Sampling(), Sampling(0.9, top_k=60, top_p=0.95, seed=5)):
        plain = run(sampling)
        with MODES[mode]():
            assert run(sampling) == plain


def test_integers_under_x64() -> None:
    """jax.numpy makes them int64 there; they are used as int32, and none wraps around."""
    spec = kvp.CacheSpec(LAYERS, KV_HEADS, DIM, 4, 64, jnp.float32, block_tokens=16)
    _, k, v = _tokens(2, 0)
    with jax.enable_x64(True), kvp.KVPool(spec, "1MiB") as pool:
        slots, cache = pool.acquire(pool.cache(), jnp.asarray([8, 8]))
        wide = jnp.asarray(slots)
        assert wide.dtype == jnp.int64

        def step(cache: kvp.KVCache, slots: jax.Array) -> Any:
            batch = kvp.Batch(slots, jnp.arange(3))
            cache, ok = kvp.map_slots(cache, slots, jnp.asarray([20, 20]))

            def body(cache: kvp.KVCache, layer: jax.Array) -> Any:
                return kvp.append_kv(cache, k, v, batch, layer=layer), None

            cache, _ = jax.lax.scan(body, cache, jnp.arange(LAYERS))
            return kvp.positions(cache, batch, num_tokens=2), ok, kvp.advance(cache, batch)

        for i in range(2):
            positions, ok, cache = jax.jit(step)(cache, wide)
            np.testing.assert_array_equal(positions, [i, i])
            assert bool(ok.all())
        assert [row.length for row in pool.slot_table(cache)] == [2, 2]
        assert kvp.Batch.from_lengths(wide, wide).query_offsets.dtype == jnp.int32
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="slot 2147483647"):
            jax.block_until_ready(kvp.set_lengths(cache, wide + 2**32, 0))
        cache = pool.cache()
        pool.release(cache, wide)


def test_eager_calls_without_implicit_transfers() -> None:
    """Every op under an eager vmap, and options that are host arrays."""
    spec = kvp.CacheSpec(LAYERS, KV_HEADS, DIM, 4, 64, dtype=jnp.float32)
    q, k, v = _tokens(2, 0)
    host = np.linspace(0.1, 1, HEADS)
    with kvp.KVPool(spec, "1MiB") as pool:
        slots, cache = pool.acquire(pool.cache(), [16, 16])
        each = jax.device_put(np.asarray(slots, np.int32)[:, None])
        pages = jax.device_put(np.zeros((2, 16, KV_HEADS, DIM), np.float32))
        tables, lengths = jax.device_put((np.zeros((2, 1, 1), np.int32), np.ones((2, 1), np.int32)))
        rows = [x[:, None] for x in (q, k, v)]
        with jax.transfer_guard("disallow"):
            axes: Any = (0, 0, 0, 0, None)

            def write(q: Any, k: Any, v: Any, slots: Any, cache: kvp.KVCache) -> Any:
                batch = kvp.Batch.decode(slots)
                cache, _ = kvp.grow(cache, batch)
                cache, _ = kvp.map_slots(cache, slots, 3)
                out, cache = kvp.update_and_attend(q, k, v, cache, batch, layer=0)
                cache = kvp.append_kv(cache, k, v, batch, layer=1)
                same = kvp.paged_attention(q, cache, batch, layer=1)
                return (out, same), kvp.advance(cache, batch)

            def read(slots: Any, cache: kvp.KVCache) -> Any:
                positions = kvp.positions(cache, kvp.Batch.decode(slots))
                return positions, kvp.read_kv(cache, slots, 0)

            (out, again), cache = jax.vmap(write, axes, (0, None))(*rows, each, cache)
            positions, _ = jax.vmap(read, (0, None))(each, cache)
            attend = kvp.paged_attention_with_tables
            jax.vmap(attend, (0, None, None, 0, 0))(rows[0], pages, pages, tables, lengths)
            batch = kvp.Batch.decode(slots)
            cache = kvp.append_kv(cache, k, v, batch, layer=0)
            options: Any = {"sinks": host, "alibi_slopes": host.tolist()}
            same = kvp.paged_attention(q, cache, batch, layer=0, **options)
        options = {name: jnp.asarray(host, jnp.float32) for name in options}
        wanted = kvp.paged_attention(q, cache, batch, layer=0, **options)
        np.testing.assert_array_equal(same, wanted)
        np.testing.assert_array_equal(out, again)
        np.testing.assert_array_equal(positions, [[1], [1]])
        assert [row.length for row in pool.slot_table(cache)] == [1, 1]
        pool.check(cache)
