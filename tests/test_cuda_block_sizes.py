"""Default CUDA block sizes of common models: decode can copy blocks without a division per
token.
"""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import jax_kvpage as kvp

# Layers, key/value heads, head size.
_MODELS = {
    "Llama 3.2 1B": (16, 8, 64),
    "Llama 3.2 3B": (28, 8, 128),
    "Llama 3 8B": (32, 8, 128),
    "Llama 3 70B": (80, 8, 128),
    "Qwen3 8B": (36, 8, 128),
    "Qwen3 32B": (64, 8, 128),
    "Qwen3 30B-A3B": (48, 4, 128),
    "Mistral Small 24B": (40, 8, 128),
    "Gemma 3 4B": (34, 4, 256),
    "Gemma 3 12B": (48, 8, 256),
    "Gemma 3 27B": (62, 16, 128),
    "gpt-oss 20B": (24, 8, 64),
}
_THREADS = 128  # threads per thread block of the attention kernels


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("model", _MODELS)
def test_tiles_are_runs_of_tokens(model: str, layout: str) -> None:
    """bfloat16: a tile lies in one block, or consists of full blocks (tiles.cuh)."""
    layers, heads, dim = _MODELS[model]
    spec = kvp.CacheSpec(layers, heads, dim, 4, 8192, dtype=jnp.bfloat16, layout=layout)
    tokens = spec.resolve("cuda").block_tokens or 0
    tile, step = 32 if dim > 128 else 64, _THREADS // (dim // 8)
    assert tokens % tile == 0 or (tile % tokens == 0 and tokens % step == 0)


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("model", _MODELS)
def test_rows_of_a_thread_reach_the_next_block(model: str, layout: str) -> None:
    """int8: the rows of a thread are at most a block apart (quantized_tiles.cuh)."""
    layers, heads, dim = _MODELS[model]
    spec = kvp.CacheSpec(layers, heads, dim, 4, 8192, dtype=jnp.int8, layout=layout)
    assert (spec.resolve("cuda").block_tokens or 0) >= _THREADS // (dim // 16)
