"""Scores too large for float32 to resolve differences: the kernels and the reference implementation
(`implementation="xla"`) against float64 NumPy, and overflow beyond float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray
from reference_numpy import Variant, attend, check_lse, check_output, is_quantized, rounded

import jax_kvpage as kvp

_HEADS, _GROUP, _DIM = 2, 2, 64
_CONTEXTS, _NEW = (5, 150, 600), (5, 40, 1)
_LARGEST = float.fromhex("0x1.e4p60")  # scores of 3e38, which overflow when multiplied by log2(e)

Step = tuple[NDArray[np.float64], NDArray[np.float64]]


def _signs() -> NDArray[np.float32]:
    return np.where(np.arange(_DIM) % 3 == 0, -1.0, 1.0).astype(np.float32)


def _run(
    storage: str,
    query: str,
    layout: str,
    size: float,
    factors: NDArray[np.float64],
    variant: Variant,
) -> tuple[dict[str, Step], Step]:
    """Attends with the last tokens of each context. Each query is `size` times a pattern of signs,
    and each key is the token's factor times that. Returns out and lse of each implementation, and
    those of float64."""
    rng = np.random.default_rng(1)
    spec = kvp.CacheSpec(
        1, _HEADS, _DIM, len(_CONTEXTS), max(_CONTEXTS), jnp.dtype(storage), layout
    )
    tokens = sum(_CONTEXTS)
    q = jnp.asarray(
        np.broadcast_to(np.float32(size) * _signs(), (sum(_NEW), _HEADS * _GROUP, _DIM)), query
    )
    # Round `size` alike in queries and keys, even if the dtypes differ.
    unit = np.asarray(q[0, 0], np.float32)
    rows = np.concatenate([factors[:n] for n in _CONTEXTS]).astype(np.float32)
    k = np.ascontiguousarray(
        np.broadcast_to(rows[:, None, None] * unit, (tokens, _HEADS, _DIM)), np.float32
    )
    v = rng.standard_normal(k.shape, np.float32)
    source = query if is_quantized(storage) else storage
    k, v = jnp.asarray(k, source), jnp.asarray(v, source)
    got = {}
    with kvp.KVPool(spec, "64MiB") as pool:
        cache = pool.cache()
        slots, cache = pool.acquire(cache, list(_CONTEXTS))
        cache = kvp.append_kv(cache, k, v, kvp.Batch.from_lengths(slots, list(_CONTEXTS)), layer=0)
        before = [n - new for n, new in zip(_CONTEXTS, _NEW, strict=True)]
        cache = kvp.advance(cache, kvp.Batch.from_lengths(slots, before))
        batch = kvp.Batch.from_lengths(slots, list(_NEW))
        for name in ("cpu", "xla"):
            out, lse = kvp.paged_attention(
                q,
                cache,
                batch,
                layer=0,
                scale=variant.scale,
                sliding_window=variant.sliding_window,
                logits_soft_cap=variant.logits_soft_cap,
                alibi_slopes=variant.alibi_slopes,
                return_lse=True,
                implementation=name,
            )
            got[name] = np.asarray(out, np.float64), np.asarray(lse, np.float64)
        jax.block_until_ready(cache)
    k64, v64 = rounded(k, storage), rounded(v, storage)
    outs, lses, begin, at = [], [], 0, 0
    for n, new in zip(_CONTEXTS, _NEW, strict=True):
        mine = slice(begin, begin + n)
        out, lse = attend(q[at : at + new], k64[mine], v64[mine], n - new, variant)
        outs.append(out)
        lses.append(lse)
        begin, at = begin + n, at + new
    return got, (np.concatenate(outs), np.concatenate(lses))


def _factors() -> NDArray[np.float64]:
    """Returns factors that start small, after which the largest recurs among smaller ones."""
    factors = np.resize([1, 0.5, 1, -1, 0.25, 1, 0.75], max(_CONTEXTS))
    factors[3:70] = 0.5
    factors[:3] = 0.25
    return factors


_STORAGE = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float32", "bfloat16"),
    ("int8", "float32"),
    ("float8_e4m3fn", "bfloat16"),
]
# Few significant bits, so that products are exact in float64 and equal keys have equal scores.
_SIZES = [1e2, 2496.0, 59904.0, 65504.0, 133120.0, 2.0**30, 2.0**50, _LARGEST]


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize(("storage", "query"), _STORAGE)
@pytest.mark.parametrize("size", _SIZES)
def test_large_scores_match_float64(storage: str, query: str, size: float, layout: str) -> None:
    """Sizes from 1e2 up to the largest float32 scores, or the largest float16 elements."""
    if "float16" in (storage, query):
        size = min(size, 65504.0)
    variant = Variant(scale=1.0) if size == _LARGEST else Variant()
    got, (want, want_lse) = _run(storage, query, layout, size, _factors(), variant)
    for name, (out, lse) in got.items():
        check_output(out, want, query, 6.0, name)
        check_lse(lse, want_lse, name)


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("option", ["window", "soft_cap", "alibi"])
def test_options_with_large_scores_match_float64(storage: str, option: str, layout: str) -> None:
    size = 133120.0
    largest = size * size * _DIM**0.5
    variant = {
        "window": Variant(sliding_window=90),
        "soft_cap": Variant(logits_soft_cap=0.7 * largest),
        "alibi": Variant(
            alibi_slopes=np.full(_HEADS * _GROUP, largest / 4096, np.float32),
        ),
    }[option]
    got, (want, want_lse) = _run(storage, storage, layout, size, _factors(), variant)
    for name, (out, lse) in got.items():
        check_output(out, want, storage, 6.0, name)
        check_lse(lse, want_lse, name)


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize(("storage", "query"), [s for s in _STORAGE if s[0] != "float16"])
def test_overflow_is_not_silent(storage: str, query: str, layout: str) -> None:
    """A row with a score beyond float32 is NaN and its lse is infinite, in both implementations;
    rows that do not see the key are unaffected."""
    factors = np.where(np.arange(max(_CONTEXTS)) % 5 == 0, -1.0, 1e-20)
    key = 130  # not seen by earlier rows of the second context
    factors[key] = 1.0
    got, _ = _run(storage, query, layout, 1e20, factors, Variant())
    first = [n - new for n, new in zip(_CONTEXTS, _NEW, strict=True)]
    positions = np.concatenate([f + np.arange(n) for f, n in zip(first, _NEW, strict=True)])
    # If a row sees only the first key, whose score is -inf, nothing is left.
    seen = positions > 0
    overflows = positions >= key
    assert overflows.any()
    assert not overflows[seen].all()
    for name, (out, lse) in got.items():
        assert np.isnan(out[overflows]).all(), name
        assert np.isposinf(lse[overflows]).all(), name
        assert np.isfinite(out[seen & ~overflows]).all(), name
        assert np.isfinite(lse[seen & ~overflows]).all(), name
    for ours, plain in zip(got["cpu"], got["xla"], strict=True):
        np.testing.assert_allclose(ours[seen], plain[seen], rtol=2e-2, atol=2e-2)
