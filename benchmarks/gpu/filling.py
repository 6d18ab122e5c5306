"""Fills pools and pages for measurements with random tokens, in a few large calls.

All contenders filled by these functions have the same tokens, so results can be compared.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import jax_kvpage as kvp

__all__ = ["HEAD_DIM", "KV_HEADS", "fill_pages", "fill_slots"]

# Llama-3-8B's.
KV_HEADS, HEAD_DIM = 8, 128
# The most tokens that one call writes in each layer.
_CALL_TOKENS = 65536


def _pieces(sequences: int, context: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yields (first token, number of tokens) of each call, the same for all sequences."""
    size = max(_CALL_TOKENS // sequences // multiple, 1) * multiple
    for first in range(0, context, size):
        yield first, min(size, context - first)


def _tokens(first: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values of all sequences from this token on, `[count, heads, dim]` in bfloat16."""
    key = jax.random.fold_in(jax.random.key(0), first)
    shape = (2, count, KV_HEADS, HEAD_DIM)
    k, v = jax.random.normal(key, shape, jnp.bfloat16)
    return k, v


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _append(
    cache: kvp.KVCache, batch: kvp.Batch, first: jax.Array, count: int, advanced: kvp.Batch
) -> kvp.KVCache:
    k, v = _tokens(first, count)

    def body(layer: jax.Array, cache: kvp.KVCache) -> kvp.KVCache:
        return kvp.append_kv(cache, k, v, batch, layer=layer)

    cache = jax.lax.fori_loop(0, cache.spec.num_layers, body, cache)
    return kvp.advance(cache, advanced)


def fill_slots(cache: kvp.KVCache, slots: Sequence[int], context: int) -> kvp.KVCache:
    """Writes `context` tokens of each slot in every layer; the last one is new (not advanced)."""
    for first, count in _pieces(len(slots), context):
        kept = count - (first + count == context)
        batch, advanced = (kvp.Batch.from_lengths(slots, [n] * len(slots)) for n in (count, kept))
        cache = _append(cache, batch, jnp.int32(first), count * len(slots), advanced)
    return cache


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _set_pages(
    pages: tuple[jax.Array, jax.Array], rows: jax.Array, first: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    k, v = (
        page.at[rows].set(x.reshape(-1, *page.shape[1:]))
        for page, x in zip(pages, _tokens(first, count), strict=True)
    )
    return k, v


def fill_pages(tables: np.ndarray, context: int, page_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Pages `[pages, page_tokens, heads, dim]` with the tokens that `fill_slots` writes.

    Args:
        tables: pages of each sequence, `[sequences, context / page_tokens]`.
        context: tokens of each sequence, a multiple of `page_tokens`.
        page_tokens: tokens of a page.
    """
    shape = (tables.size, page_tokens, KV_HEADS, HEAD_DIM)
    pages = (jnp.zeros(shape, jnp.bfloat16), jnp.zeros(shape, jnp.bfloat16))
    for first, count in _pieces(len(tables), context, page_tokens):
        columns = slice(first // page_tokens, (first + count) // page_tokens)
        rows = jnp.asarray(tables[:, columns].reshape(-1), jnp.int32)
        pages = _set_pages(pages, rows, jnp.int32(first), count * len(tables))
    return pages
