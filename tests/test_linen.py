"""The ops in a Flax linen module: they do not depend on a particular Flax API."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_kvpage as kvp


class _Attention(nn.Module):
    """One layer of grouped-query attention over the paged cache."""

    heads: int
    kv_heads: int
    head_dim: int
    layer: int

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: kvp.KVCache, batch: kvp.Batch
    ) -> tuple[jax.Array, kvp.KVCache]:
        def project(heads: int, name: str) -> jax.Array:
            return nn.DenseGeneral((heads, self.head_dim), name=name)(x)

        q = project(self.heads, "q")
        k, v = project(self.kv_heads, "k"), project(self.kv_heads, "v")
        out, cache = kvp.update_and_attend(q, k, v, cache, batch, layer=self.layer)
        return x + nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="o")(out), cache


class _Stack(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: kvp.KVCache, batch: kvp.Batch
    ) -> tuple[jax.Array, kvp.KVCache]:
        for layer in range(2):
            x, cache = _Attention(4, 2, 32, layer)(x, cache, batch)
        return x, kvp.advance(cache, batch)


def _dense(params: dict, x: jax.Array) -> jax.Array:
    """The same two layers over a whole sequence with `jax.nn.dot_product_attention`."""
    for layer in range(2):
        weights = params["params"][f"_Attention_{layer}"]

        def project(name: str, weights: dict = weights, x: jax.Array = x) -> jax.Array:
            return jnp.einsum("td,dhe->the", x, weights[name]["kernel"]) + weights[name]["bias"]

        out = jax.nn.dot_product_attention(project("q"), project("k"), project("v"), is_causal=True)
        x = x + jnp.einsum("the,hed->td", out, weights["o"]["kernel"]) + weights["o"]["bias"]
    return x


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_a_linen_module_decodes_as_the_dense_one(layout: str) -> None:
    spec = kvp.CacheSpec(2, 2, 32, 2, 64, dtype=jnp.float32, layout=layout)
    inputs = jax.random.normal(jax.random.key(0), (30, 48))
    module = _Stack()
    with kvp.KVPool(spec, "4MiB") as pool:
        slot, cache = pool.acquire(pool.cache(), 30)
        prefill = kvp.Batch.from_lengths([slot], [21])
        # Nobody uses the cache that init would return, so under jit its ops do not run.
        params = jax.jit(module.init)(jax.random.key(1), inputs[:21], cache, prefill)
        step = jax.jit(module.apply)
        first, cache = step(params, inputs[:21], cache, prefill)
        rest = []
        for token in range(21, 30):
            out, cache = step(params, inputs[token : token + 1], cache, kvp.Batch.decode([slot]))
            rest.append(out)
        found = np.asarray(jnp.concatenate([first, *rest]))
    np.testing.assert_allclose(found, _dense(params, inputs), rtol=2e-5, atol=2e-5)
