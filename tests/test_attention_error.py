"""The kernels' numerical error against float64 is no worse than that of plain JAX attention
(`implementation="xla"`) over the same cache and queries."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_numpy import attend

import jax_kvpage as kvp

# Allowed ratio of our error to plain JAX's. A case has 10^4 elements or more, so both root mean
# squares are known to about a percent; in 16-bit dtypes both are nearly all rounding of the output.
# The largest error depends on a single element.
_RMS_FACTOR = 1.05
_MAX_FACTOR = 1.2


@dataclasses.dataclass(frozen=True)
class Shape:
    contexts: tuple[int, ...]
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 128

    def __str__(self) -> str:
        heads = f"{self.kv_heads * self.group}over{self.kv_heads}x{self.head_dim}"
        return f"{'-'.join(map(str, self.contexts))}-{heads}"


_SHAPES = [
    Shape((5, 37, 300, 64, 129, 90)),
    Shape((2000, 1111, 1500, 513)),
    Shape((700,) * 4, kv_heads=4, group=1, head_dim=64),
    Shape((333, 600), kv_heads=3, group=7, head_dim=80),
]


def _errors(
    shape: Shape, dtype: str, layout: str, seed: int, queries: int = 1
) -> dict[str, np.ndarray]:
    """Returns each implementation's error for a step with `queries` tokens per sequence, the last
    of its context: [sequences * queries, q_heads, head_dim]."""
    rng = np.random.default_rng(seed)
    count = len(shape.contexts)
    spec = kvp.CacheSpec(
        num_layers=1,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_slots=count,
        max_seq_len=max(shape.contexts),
        dtype=jnp.dtype(dtype),
        layout=layout,
    )
    k, v = (
        jnp.asarray(
            rng.standard_normal((sum(shape.contexts), shape.kv_heads, shape.head_dim)), dtype
        )
        for _ in range(2)
    )
    q = jnp.asarray(
        rng.standard_normal((count * queries, shape.kv_heads * shape.group, shape.head_dim)), dtype
    )
    with kvp.KVPool(spec, "64MiB", on_stale="allow") as pool:
        cache = pool.cache()
        slots, cache = pool.acquire(cache, list(shape.contexts))
        tokens = kvp.Batch.from_lengths(slots, list(shape.contexts))
        cache = kvp.append_kv(cache, k, v, tokens, layer=0)
        before = [n - queries for n in shape.contexts]
        cache = kvp.advance(cache, kvp.Batch.from_lengths(slots, before))
        batch = kvp.Batch.from_lengths(slots, [queries] * count)
        outs = {
            name: np.asarray(
                kvp.paged_attention(q, cache, batch, layer=0, implementation=name), np.float64
            )
            for name in ("cpu", "xla")
        }
        jax.block_until_ready(cache)
    expected = np.zeros(q.shape)
    begin = 0
    for s, n in enumerate(shape.contexts):
        rows, mine = slice(begin, begin + n), slice(s * queries, (s + 1) * queries)
        expected[mine], _ = attend(q[mine], k[rows], v[rows], n - queries)
        begin += n
    return {name: np.abs(out - expected) for name, out in outs.items()}


def _check(runs: list[dict[str, np.ndarray]], rms_factor: float = _RMS_FACTOR) -> None:
    ours, plain = (np.stack([run[name] for run in runs]) for name in ("cpu", "xla"))
    rms, plain_rms = (np.sqrt(np.mean(x**2)) for x in (ours, plain))
    assert rms <= rms_factor * plain_rms, f"rms {rms:.3e}, plain JAX {plain_rms:.3e}"
    assert ours.max() <= _MAX_FACTOR * plain.max(), f"{ours.max():.3e}, plain {plain.max():.3e}"


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_decoding_is_as_exact_as_plain_jax(shape: Shape, dtype: str, layout: str) -> None:
    _check([_errors(shape, dtype, layout, seed) for seed in range(2)])


_PREFILL = [
    Shape((300, 190, 640)),
    Shape((130, 257), kv_heads=1, group=7, head_dim=80),
]


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", _PREFILL, ids=str)
def test_exact_prefill_is_as_exact_as_plain_jax(shape: Shape, dtype: str) -> None:
    with jax.default_matmul_precision("highest"):
        _check([_errors(shape, dtype, "fused", 0, queries=100)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_prefill_loses_little_by_rounding_weights(dtype: str) -> None:
    _check([_errors(_PREFILL[0], dtype, "fused", 0, queries=100)], rms_factor=1.4)
