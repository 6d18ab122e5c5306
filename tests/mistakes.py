"""Helpers for tests of bad input: a small pool, calls that are valid but for one mistake, and the
assertion that a program fails with the right message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import RUN_TIME_ERRORS, Rig, settle

import jax_kvpage as kvp

LAYERS, KV_HEADS, DIM, SLOTS, MAX = 3, 2, 64, 4, 256


def make_spec(layout: str | None = None) -> kvp.CacheSpec:
    return kvp.CacheSpec(
        LAYERS, KV_HEADS, DIM, SLOTS, MAX, dtype=jnp.float32, layout=layout, block_tokens=32
    )


def two_sequences(pool: kvp.KVPool) -> Iterator[Rig]:
    """Yields a rig with two active sequences. Afterwards they must continue as if the test had not
    happened.
    """
    rig = Rig(pool, group=2)
    slots = [rig.acquire(60), rig.acquire(60)]
    rig.write({slots[0]: 20, slots[1]: 33})
    jax.block_until_ready(rig.cache)
    before = rig.pool.stats()
    yield rig
    rig.cache = rig.pool.cache()
    rig.check_lengths()
    after = rig.pool.stats()
    assert (after.blocks_mapped, after.blocks_free) == (before.blocks_mapped, before.blocks_free)
    out, _, want, _ = rig.step([(slots[0], 5), (slots[1], 2)])
    np.testing.assert_allclose(out, want, atol=1e-4)


def kv(tokens: int = 8) -> tuple[jax.Array, jax.Array]:
    x = jnp.full((tokens, KV_HEADS, DIM), jnp.nan)
    return x, x


def q(tokens: int = 8) -> jax.Array:
    return jnp.ones((tokens, 2 * KV_HEADS, DIM))


def live(rig: Rig) -> list[int]:
    return sorted(rig.model.lengths)


def fails(pattern: str, call: Callable[[], object]) -> None:
    """Asserts that the program fails at run time with this message (case-insensitive). If the
    device detects the error, the results must be NaN.
    """
    status = "(INVALID_ARGUMENT|FAILED_PRECONDITION|OUT_OF_RANGE): "

    def run() -> None:
        result = jax.block_until_ready(call())
        for leaf in jax.tree.leaves(result):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                assert bool(jnp.all(jnp.isnan(leaf)))
        settle(result)

    with pytest.raises(RUN_TIME_ERRORS, match=f"(?is){status}.*{pattern}"):
        run()


def append(cache: kvp.KVCache, batch: kvp.Batch, layer: object = 0, tokens: int = 8) -> kvp.KVCache:
    return kvp.append_kv(cache, *kv(tokens), batch, layer=layer)


def attend(cache: kvp.KVCache, batch: kvp.Batch, layer: object = 0, tokens: int = 8) -> jax.Array:
    return kvp.paged_attention(q(tokens), cache, batch, layer=layer)
