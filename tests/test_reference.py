"""The plain JAX attention behind implementation="xla" against float64 NumPy, with NaN at every
position that a token must not see.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from reference_numpy import Variant, attend_ragged, check_lse, check_output

from jax_kvpage import reference

_CONTEXT, _KV_HEADS, _DIM = 40, 2, 16
_SLOPES = np.asarray([0.5, 0.25, 0.1, 0.0, 0.3, 1.0], np.float32)
_SINKS = np.asarray([0.0, 1.0, -3.0, 2.5, 40.0, -40.0], np.float32)
_PLAIN = Variant()
_VARIANTS = {
    "plain": _PLAIN,
    "scale": Variant(scale=0.7),
    "window": Variant(sliding_window=5),
    "window-of-one": Variant(sliding_window=1),
    "soft-cap": Variant(scale=2.0, logits_soft_cap=3.0),
    "sinks": Variant(sinks=_SINKS),
    "alibi": Variant(alibi_slopes=_SLOPES),
    "all": Variant(0.5, 7, 4.0, _SINKS, _SLOPES),
}


def _attend(q, k, v, starts, offsets, active, variant: Variant = _PLAIN, return_lse: bool = True):
    none = jnp.zeros(0, jnp.float32)
    return reference.ragged_attention(
        jnp.asarray(q),
        jnp.asarray(k),
        jnp.asarray(v),
        jnp.asarray(starts, jnp.int32),
        jnp.asarray(offsets, jnp.int32),
        jnp.asarray(active),
        window=jnp.int32(variant.sliding_window or 0),
        sinks=none if variant.sinks is None else jnp.asarray(variant.sinks),
        alibi=none if variant.alibi_slopes is None else jnp.asarray(variant.alibi_slopes),
        scale=variant.scale or _DIM**-0.5,
        soft_cap=variant.logits_soft_cap or 0.0,
        return_lse=return_lse,
    )


@pytest.mark.parametrize("variant", _VARIANTS)
def test_equals_float64(variant: str) -> None:
    """Decode, prefill, chunked prefill, an empty sequence, a padding sequence, padding tokens."""
    rng = np.random.default_rng(1)
    starts, new, active = [19, 0, 11, 30, 4], [1, 9, 6, 0, 3], [True, True, True, True, False]
    offsets = np.cumsum([0, *new])
    tokens = int(offsets[-1]) + 2
    q = rng.standard_normal((tokens, 6, _DIM), np.float32)
    k, v = rng.standard_normal((2, len(new), _CONTEXT, _KV_HEADS, _DIM), np.float32)
    for s, (start, n) in enumerate(zip(starts, new, strict=True)):
        end = start + n if active[s] else 0
        k[s, end:] = v[s, end:] = np.nan
    got, lse = _attend(q, k, v, starts, offsets, active, _VARIANTS[variant])
    contexts = [(k[s], v[s]) if active[s] else None for s in range(len(new))]
    want, want_lse = attend_ragged(q, contexts, starts, list(offsets), _VARIANTS[variant])
    check_output(got, want, jnp.float32, np.nan_to_num(v), variant)
    check_lse(lse, want_lse, variant)


def test_sequences_of_no_tokens_own_none() -> None:
    offsets = jnp.asarray([0, 0, 2, 2, 5], jnp.int32)
    active = jnp.asarray([True, True, True, False])
    sequence, index, owned = reference.token_owners(offsets, active, 7)
    assert sequence.tolist()[:5] == [1, 1, 3, 3, 3]
    assert index.tolist()[:5] == [0, 1, 0, 1, 2]
    assert owned.tolist() == [True, True, False, False, False, False, False]


@pytest.mark.parametrize(("tokens", "sequences"), [(0, 2), (3, 0), (0, 0)])
def test_nothing_to_do(tokens: int, sequences: int) -> None:
    q = jnp.ones((tokens, 6, _DIM), jnp.bfloat16)
    k = jnp.ones((sequences, _CONTEXT, _KV_HEADS, _DIM))
    zeros = [0] * sequences
    out, lse = _attend(q, k, k, zeros, [0, *zeros], jnp.ones(sequences, bool))
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert not np.any(np.asarray(out, np.float32))
    assert lse.shape == (tokens, 6)
    assert np.all(np.isneginf(lse))


def test_lse_only_when_wanted() -> None:
    q, k = jnp.ones((3, 6, _DIM)), jnp.ones((1, _CONTEXT, _KV_HEADS, _DIM))
    out, lse = _attend(q, k, k, [0], [0, 3], [True], return_lse=False)
    assert lse.shape == (0, 6)
    np.testing.assert_allclose(out, 1.0, rtol=1e-6)
