"""The compiled program on a GPU has as many custom calls as the traced one, for any operands.

XLA's dynamic-slice fusion wraps custom calls whose operands are slices or whose results go into a
dynamic-update-slice. jaxlib 0.11.2 also left the wrapped call in the program: a write would run
twice, the second time with a stale cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_kvpage as kvp

pytestmark = pytest.mark.gpu

# Slices of all operands are multiples of 128 bytes, which the fusion requires.
_LAYERS, _SLOTS, _SEQUENCES, _TOKENS, _KV_HEADS, _HEADS, _DIM = 3, 32, 32, 64, 2, 4, 64
_SPEC = kvp.CacheSpec(
    _LAYERS, _KV_HEADS, _DIM, _SLOTS, 64, dtype=jnp.float32, layout="fused", block_tokens=32
)


def _batch(slots: jax.Array, offsets: jax.Array) -> kvp.Batch:
    return kvp.Batch(slots=slots, query_offsets=offsets)


def _append(cache: kvp.KVCache, x: Any) -> tuple[kvp.KVCache, Any]:
    q, k, v, slots, offsets = x
    for layer in range(_LAYERS):
        cache = kvp.append_kv(cache, k[layer], v[layer], _batch(slots, offsets), layer=layer)
    return kvp.advance(cache, _batch(slots, offsets)), q


def _update(cache: kvp.KVCache, x: Any) -> tuple[kvp.KVCache, Any]:
    q, k, v, slots, offsets = x
    outs = []
    for layer in range(_LAYERS):
        out, cache = kvp.update_and_attend(
            q[layer], k[layer], v[layer], cache, _batch(slots, offsets), layer=layer
        )
        outs.append(out)
    return kvp.advance(cache, _batch(slots, offsets)), jnp.stack(outs)


def _scanned(cache: kvp.KVCache, x: Any) -> tuple[kvp.KVCache, Any]:
    """The output is stacked and also used, so its dynamic-update-slice is not its only user."""
    q, k, v, slots, offsets = x

    def body(carry: Any, xs: Any) -> tuple[Any, Any]:
        cache, total = carry
        q, k, v, layer = xs
        out, cache = kvp.update_and_attend(q, k, v, cache, _batch(slots, offsets), layer=layer)
        return (cache, total + out), out

    carry = (cache, jnp.zeros(q.shape[1:]))
    (cache, total), outs = jax.lax.scan(body, carry, (q, k, v, jnp.arange(_LAYERS)))
    return kvp.advance(cache, _batch(slots, offsets)), outs + 0 * total


def _operands(steps: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    slots = np.full((steps, _SEQUENCES), -1, np.int32)
    slots[:, :2] = 0, 1
    offsets = np.zeros((steps, _SEQUENCES + 1), np.int32)
    offsets[:, 1:] = _TOKENS // steps // 2
    offsets[:, 2:] = _TOKENS // steps
    tokens = _TOKENS // steps
    kv = (steps, _LAYERS, tokens, _KV_HEADS, _DIM)
    return (
        random(steps, _LAYERS, tokens, _HEADS, _DIM),
        random(*kv),
        random(*kv),
        jnp.asarray(slots),
        jnp.asarray(offsets),
    )


@pytest.mark.parametrize(("step", "calls"), [(_append, 3), (_update, 3), (_scanned, 1)])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("donated", [False, True])
def test_calls_are_neither_doubled_nor_dropped(
    make_pool, platform: str, step: Callable[..., Any], calls: int, steps: int, donated: bool
) -> None:
    """A scan's body sees slices of the operands, which are stacked over steps."""
    pool = make_pool(_SPEC, poison=True)
    _, cache = pool.acquire(pool.cache(), [64, 64])

    def run(cache: kvp.KVCache, *operands: jax.Array) -> Any:
        if steps == 1:
            return step(cache, tuple(operand[0] for operand in operands))
        return jax.lax.scan(step, cache, operands)

    operands = _operands(steps)
    compiled = (
        jax.jit(run, donate_argnums=(0,) if donated else ()).lower(cache, *operands).compile()
    )
    found = re.findall(r'custom_call_target="jax_kvpage_(\w+)"', compiled.as_text())
    plans, advances = found.count("plan_attention"), found.count("advance")
    # If XLA unrolls the loop, the program has the calls of each step.
    assert advances in (1, steps)
    assert len(found) - plans - advances == advances * calls
    if platform == "cuda":
        assert plans == (0 if step is _append else advances), "all layers of a step share one plan"
    epoch = int(cache.epoch[0])
    cache, outs = compiled(cache, *operands)
    assert int(cache.epoch[0]) == epoch + steps * (_LAYERS + 1), "each write counts once"
    assert cache.lengths.tolist()[:2] == [_TOKENS // 2] * 2
    assert bool(jnp.all(jnp.isfinite(outs)))
    pool.check(cache)
