"""addressing="table" on a GPU: the CPU tests, and pools that are made after the program that uses
their tables was compiled.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Rig, make_batch
from test_addressing import test_long_contexts as test_long_contexts
from test_addressing import test_table_equals_slots as test_table_equals_slots
from test_addressing import test_vmap as test_vmap

import jax_kvpage as kvp

pytestmark = pytest.mark.gpu


@functools.partial(jax.jit, static_argnames="addressing")
def _attend(cache: kvp.KVCache, q: jax.Array, batch: kvp.Batch, addressing: str) -> jax.Array:
    return kvp.paged_attention(q, cache, batch, layer=1, addressing=addressing)


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_pools_made_later(make_pool, layout: str) -> None:
    """Runs one compiled program, perhaps a captured graph, on pools that it has never seen; each
    pool grows and takes more memory between runs.
    """
    spec = kvp.CacheSpec(2, 2, 128, 3, 6000, dtype=jnp.bfloat16, layout=layout)
    compiled = None
    for _ in range(3):
        pool = make_pool(spec, "256MiB")
        rig = Rig(pool, group=2, query_dtype=jnp.bfloat16, max_tokens=3500)
        slots = [rig.acquire(600), rig.acquire(40)]
        rig.write({slots[0]: 500, slots[1]: 20})
        batch = make_batch([(slot, 1) for slot in slots])
        for tokens in (600, 2500, 5900):
            pool.extend(slots[0], tokens)
            rig.write({slots[0]: tokens - int(rig.cache.lengths[slots[0]]) - 1})
            rig.append([(slot, 1) for slot in slots])
            q = jnp.asarray(rig.random_q(2)[1], jnp.bfloat16)
            slot_bits, table_bits = (
                np.asarray(_attend(rig.cache, q, batch, addressing), np.float32).tobytes()
                for addressing in ("slots", "table")
            )
            assert slot_bits == table_bits
            rig.cache = kvp.advance(rig.cache, batch)
            for slot in slots:
                rig.model.advance(slot, 1)
        pool.check(rig.cache)
        assert compiled in (None, _attend._cache_size())
        compiled = _attend._cache_size()
