"""Paged attention in plain JAX: gathers pages through a block table, then runs dense attention."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from shapes import LAYERS_PER_PROGRAM, Case

from peers.base import Data, Peer, Ready

__all__ = ["PEER"]

_PAGE = 64


@jax.jit
def _attend(
    q: jax.Array,
    layers: Sequence[tuple[jax.Array, jax.Array]],
    table: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """Attention of the last tokens `[batch, new, heads, dim]` over pages `[pages, page, ...]`."""
    batch, new, heads, dim = q.shape
    for k_pages, v_pages in layers:
        kv_heads = k_pages.shape[2]
        k = jnp.take(k_pages, table, axis=0).reshape(batch, -1, kv_heads, dim)
        v = jnp.take(v_pages, table, axis=0).reshape(batch, -1, kv_heads, dim)
        grouped = q.reshape(batch, new, kv_heads, heads // kv_heads, dim)
        scores = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, k, preferred_element_type=jnp.float32)
        last = lengths[:, None] - new + jnp.arange(new)
        visible = jnp.arange(k.shape[1]) <= last[:, :, None]
        scores = jnp.where(visible[:, None, None], scores / dim**0.5, -jnp.inf)
        weights = jax.nn.softmax(scores).astype(v.dtype)
        q = jnp.einsum("bhgqk,bkhd->bqhgd", weights, v).reshape(q.shape)
    return q


class JaxGather(Peer):
    """The usual code without a kernel: one gather per layer, then einsum and softmax."""

    def versions(self) -> dict[str, str]:
        """Versions of JAX, and the page size."""
        return {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "page": str(_PAGE)}

    def unsupported(self, case: Case, variant: str) -> str | None:
        """Supports rectangular batches only."""
        del variant
        return "a batch is rectangular" if len(set(case.new)) > 1 else None

    def prepare(self, data: Data, variant: str) -> Ready:
        """Pages in random order, as in a server's block table after a while."""
        del variant
        case, dtype = data.case, jnp.dtype(data.case.dtype)
        counts = [-(-n // _PAGE) for n in case.contexts]
        order = np.random.default_rng(1).permutation(sum(counts)).astype(np.int32)
        table = np.zeros((len(counts), max(counts)), np.int32)
        pages = [np.zeros((sum(counts), _PAGE, case.kv_heads, case.dim), dtype) for _ in range(2)]
        begin = 0
        for s, count in enumerate(counts):
            mine = order[begin : begin + count]
            table[s, :count] = mine
            begin += count
            for which, values in enumerate(data.kv(s)):
                padding = ((0, count * _PAGE - len(values)), (0, 0), (0, 0))
                pages[which][mine] = np.pad(values, padding).reshape(count, *pages[0].shape[1:])
        layers = [tuple(jnp.array(page, copy=True) for page in pages) for _ in range(case.copies)]
        q = jnp.asarray(data.q.reshape(len(counts), -1, case.q_heads, case.dim), dtype)
        lengths = jnp.asarray(case.contexts, jnp.int32)
        cycle = functools.partial(_cycle, q, layers, jnp.asarray(table), lengths)
        return Ready(
            cycle=lambda: jax.block_until_ready(cycle(case.copies)),
            output=lambda: np.asarray(cycle(1), np.float32).reshape(data.q.shape),
            calls=case.copies,
        )


def _cycle(
    q: jax.Array, layers: list[Any], table: jax.Array, lengths: jax.Array, copies: int
) -> jax.Array:
    step = min(copies, LAYERS_PER_PROGRAM)
    for first in range(0, copies, step):
        q = _attend(q, layers[first : first + step], table, lengths)
    return q


PEER = JaxGather()
