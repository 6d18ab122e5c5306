"""Ragged attention in pure JAX: the reference implementation behind implementation="xla".

Written for correctness and low memory use, not for speed: tokens are processed a few at a time,
each over the full dense context of its sequence, in float32 at the highest precision.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["ragged_attention", "token_owners"]

# Tokens processed at the same time; each needs a float32 copy of its context.
_TOKENS_AT_ONCE = 8


def token_owners(
    query_offsets: jax.Array, active: jax.Array, num_tokens: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the sequence of each token of a ragged batch.

    Args:
        query_offsets: int32[S+1], S at least 1.
        active: bool[S], False for sequences that are padding.
        num_tokens: T.

    Returns:
        sequence int32[T], the token's index among the new tokens of its sequence int32[T], and
        owned bool[T], False for padding tokens and tokens of padding sequences.
    """
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    # The index of a token's sequence is the number of sequences that end at or before it.
    sequence = jnp.searchsorted(query_offsets[1:], token, side="right").astype(jnp.int32)
    owned = sequence < active.shape[0]
    sequence = jnp.minimum(sequence, active.shape[0] - 1)
    return sequence, token - query_offsets[sequence], owned & active[sequence]


def ragged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array,
    query_offsets: jax.Array,
    active: jax.Array,
    window: jax.Array,
    sinks: jax.Array,
    alibi: jax.Array,
    *,
    scale: float,
    soft_cap: float,
    return_lse: bool,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of a ragged batch over dense contexts.

    Keys and values at positions that a token does not attend to may be arbitrary, including NaN.

    Args:
        q: [T, Hq, D].
        k: [S, C, Hkv, D], the context of each sequence from position 0, including its new tokens.
        v: like k.
        starts: int32[S], position of each sequence's first new token.
        query_offsets: int32[S+1].
        active: bool[S], False for sequences that are padding.
        window: int32[]; a token attends to itself and the window - 1 tokens before it; 0 or less:
            to all tokens before it.
        sinks: float32[Hq], logits added to the softmax denominator, or float32[0].
        alibi: float32[Hq], slopes, or float32[0].
        scale: factor of the scores.
        soft_cap: c in c * tanh(score / c); 0 is off.
        return_lse: whether to return the log-sum-exp.

    Returns:
        out [T, Hq, D] in q's dtype and lse float32 [T, Hq] ([0, Hq] without `return_lse`); 0 and
        -inf for tokens that attend to nothing.
    """
    tokens, heads, _ = q.shape
    if tokens == 0 or k.shape[0] == 0 or k.shape[1] == 0:
        lse = jnp.full((tokens if return_lse else 0, heads), -jnp.inf, jnp.float32)
        return jnp.zeros(q.shape, q.dtype), lse
    sequence, index, owned = token_owners(query_offsets, active, tokens)
    options = (window, sinks, alibi)
    attend = functools.partial(_attend_one, k, v, options, scale, soft_cap)
    # Tokens without a sequence get position -1 and attend to nothing.
    position = jnp.where(owned, starts[sequence] + index, -1)
    out, lse = jax.lax.map(attend, (q, sequence, position), batch_size=min(_TOKENS_AT_ONCE, tokens))
    return out, lse if return_lse else lse[:0]


def _attend_one(
    k: Any, v: Any, options: Any, scale: float, soft_cap: float, token: Any
) -> tuple[jax.Array, jax.Array]:
    window, sinks, alibi = options
    q, sequence, position = token
    heads, dim = q.shape
    context, kv_heads = k.shape[1:3]
    key_position = jnp.arange(context, dtype=jnp.int32)
    # All ranks are made equal explicitly, for `jax.numpy_rank_promotion("raise")`.
    visible = key_position <= position
    visible &= (window <= 0) | (key_position > position - window)
    # A weight of 0 is not enough for masked values: 0 * NaN is NaN.
    values = jnp.where(visible[:, None, None], v[sequence].astype(jnp.float32), 0.0)
    grouped = q.astype(jnp.float32).reshape(kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum(
        "hgd,chd->hgc",
        grouped,
        k[sequence].astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    ).reshape(heads, context)
    scores = scores * scale
    if soft_cap > 0:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if alibi.size:
        scores = scores + alibi[:, None] * (key_position - position)[None].astype(jnp.float32)
    scores = jnp.where(visible[None], scores, -jnp.inf)
    largest = scores.max(axis=-1)
    if sinks.size:
        largest = jnp.maximum(largest, sinks)
    # A row that attends to nothing has no finite maximum to subtract.
    shift = jnp.where(jnp.isfinite(largest), largest, 0.0)
    weights = jnp.exp(scores - shift[:, None])
    total = weights.sum(axis=-1)
    if sinks.size:
        total = total + jnp.exp(sinks - shift)
    sees = position >= 0
    out = jnp.einsum(
        "hgc,chd->hgd",
        weights.reshape(kv_heads, -1, context),
        values,
        precision=jax.lax.Precision.HIGHEST,
    ).reshape(heads, dim)
    out = jnp.where(sees, out / jnp.where(total > 0, total, 1.0)[:, None], 0.0)
    return out.astype(q.dtype), jnp.where(sees, jnp.log(total) + shift, -jnp.inf)
