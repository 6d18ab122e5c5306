"""Decode steps over forks, for `test_mesh_attention.py`; run in a process with eight devices."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from mesh_rig import make_spec, random

import jax_kvpage as kvp

_HEADS, _KV_HEADS, _PROMPT, _FORKS, _STEPS = 8, 4, 200, 3, 3


def forks_with_a_dropped_beginning(dtype: Any, addressing: Literal["slots", "table"]) -> None:
    """Decode steps over forks, one of which has dropped its beginning, equal those of a pool on
    one device, bit for bit: with split heads and with replicas.
    """
    devices = np.asarray(jax.devices()[:4])
    auto = (AxisType.Auto,)
    heads = jax.sharding.Mesh(devices, ("tp",), axis_types=auto)
    replicas = jax.sharding.Mesh(devices[:2], ("dp",), axis_types=auto)
    wanted = _run(dtype, addressing)
    assert np.std(wanted[-1]) > 0.1
    for where in ({"mesh": heads, "axis": "tp"}, {"mesh": replicas, "data_axis": "dp"}):
        for got, alone in zip(_run(dtype, addressing, **where), wanted, strict=True):
            np.testing.assert_array_equal(got, alone)


def _run(dtype: Any, addressing: Literal["slots", "table"], **where: Any) -> list[np.ndarray]:
    """Returns the outputs of a prefill and of each decode step, [layers, tokens, heads, dim]."""

    @jax.jit
    def step(cache: kvp.KVCache, q: Any, k: Any, v: Any, batch: kvp.Batch) -> Any:
        outs = []
        for layer in range(2):
            out, cache = kvp.update_and_attend(
                q, k, v, cache, batch, layer=layer, addressing=addressing, sliding_window=64
            )
            outs.append(out)
        return jnp.stack(outs), kvp.advance(cache, batch)

    results = []
    spec = make_spec(_KV_HEADS, dtype=dtype, block_tokens=16, max_slots=8)
    with kvp.KVPool(spec, "16MiB", **where) as pool:

        def run(cache: kvp.KVCache, slots: list[int], lengths: list[int]) -> kvp.KVCache:
            seed, tokens = len(results), sum(lengths)
            operands = [random(seed, tokens, n, 32) for n in (_HEADS, _KV_HEADS, _KV_HEADS)]
            batch = kvp.Batch.from_lengths(slots, lengths)
            rows = np.arange(tokens)
            if "data_axis" in where:
                spread = kvp.spread(pool, slots, lengths)
                operands = [np.asarray(spread.scatter(x)) for x in operands]
                batch, rows = spread.batch, spread.rows
            out, cache = step(cache, *operands, batch)
            results.append(np.asarray(out)[:, rows])
            return cache

        (slot,), cache = pool.acquire(pool.cache(), [_PROMPT])
        cache = run(cache, [slot], [_PROMPT])
        pool.commit(slot, range(_PROMPT))
        forks, cache = pool.fork(cache, slot, _FORKS)
        slots = [slot, *forks]
        for each in slots:
            pool.extend(each, _PROMPT + _STEPS)
        cache = pool.drop_before(cache, slot, _PROMPT // 2)
        for _ in range(_STEPS):
            cache = run(cache, slots, [1] * len(slots))
        pool.check(pool.release(cache, slots))
    return results
