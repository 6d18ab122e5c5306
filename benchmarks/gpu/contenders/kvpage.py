"""This package: its attention under jit, over the layers of one pool, or over block tables."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from blocks import acquire, neighbouring_share
from cases import Case
from peers.base import Data
from timing import Ready

import jax_kvpage as kvp
from contenders.base import JaxContender, queries

__all__ = ["CONTENDER"]

# Quantized storage with bfloat16 queries. Bytes are counted as for bfloat16, so that speeds are
# comparable: twice the bandwidth is half the time.
_STORED = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
_PAGE = 64


@functools.cache
def _scalar(value: int) -> jax.Array:
    """A cached device scalar: a transfer in each call would take longer than small batches."""
    return jnp.int32(value)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attend(
    layers: int, addressing: Any, cache: kvp.KVCache, batch: kvp.Batch, q: jax.Array, first: Any
) -> Any:
    for i in range(layers):
        q = kvp.paged_attention(q, cache, batch, layer=first + i, addressing=addressing)
    return q


@functools.partial(jax.jit, static_argnums=0)
def _update(
    layers: int, cache: kvp.KVCache, batch: kvp.Batch, q: jax.Array, first: Any, kv: jax.Array
) -> Any:
    for i in range(layers):
        q, cache = kvp.update_and_attend(q, kv, kv, cache, batch, layer=first + i)
    return q


@jax.jit
def _through_tables(
    q: jax.Array,
    pages: list[tuple[jax.Array, jax.Array]],
    tables: jax.Array,
    lengths: jax.Array,
    offsets: jax.Array,
) -> jax.Array:
    for k, v in pages:
        q = kvp.paged_attention_with_tables(q, k, v, tables, lengths, query_offsets=offsets)
    return q


@functools.partial(jax.jit, donate_argnums=0)
def _append(cache: kvp.KVCache, k: jax.Array, v: jax.Array, batch: kvp.Batch) -> kvp.KVCache:
    def body(layer: jax.Array, cache: kvp.KVCache) -> kvp.KVCache:
        return kvp.append_kv(cache, k, v, batch, layer=layer)

    return jax.lax.fori_loop(0, cache.spec.num_layers, body, cache)


@functools.partial(jax.jit, donate_argnums=0)
def _advance(cache: kvp.KVCache, batch: kvp.Batch) -> kvp.KVCache:
    return kvp.advance(cache, batch)


class KVPage(JaxContender):
    """The variants differ in layout and addressing of blocks, in the ops called, and in storage.

    "table" and "table_per_layer" use the pool's block table, "tables" uses a block table over plain
    arrays of pages.
    """

    variants = (
        *("fused", "per_layer", "table", "table_per_layer", "tables", "update", "scattered"),
        *_STORED,
    )
    everywhere = ("per_layer",)

    def unsupported(self, case: Case, variant: str) -> str | None:
        """Some variants are for decode only."""
        if case.section != "decode" and variant in ("scattered", "update"):
            return "a variant of decoding"
        return None

    def prepare(self, case: Case, variant: str, data: Data | None) -> Ready:
        """One layer of a pool for each copy, or that many arrays of pages."""
        if variant == "tables":
            return self._tables(case, data)
        return self._slots(case, variant, data)

    def _kv(self, case: Case, data: Data | None, sequence: int, size: int) -> Any:
        if data is None:
            return tuple(
                self.random(2 * sequence + i, (size, case.kv_heads, case.dim)) for i in (0, 1)
            )
        pads = ((0, size - case.contexts[sequence]), (0, 0), (0, 0))
        return tuple(jnp.asarray(np.pad(x, pads), jnp.bfloat16) for x in data.kv(sequence))

    def _slots(self, case: Case, variant: str, data: Data | None) -> Ready:
        longest = max(case.contexts)
        spec = kvp.CacheSpec(
            num_layers=case.copies,
            num_kv_heads=case.kv_heads,
            head_dim=case.dim,
            max_slots=len(case.contexts) + 1,
            max_seq_len=longest,
            dtype=_STORED.get(variant, jnp.bfloat16),
            layout="per_layer" if variant.endswith("per_layer") else "fused",
        ).resolve(self.platform)
        room = (*case.contexts, *([longest] if variant == "scattered" else []))
        blocks = sum(-(-n // (spec.block_tokens or 1)) for n in room)
        pool = kvp.KVPool(spec, blocks * spec.block_bytes * spec.num_ranges, on_stale="allow")
        slots, cache = acquire(pool, case.contexts, variant == "scattered")
        for s, slot in enumerate(slots):
            k, v = self._kv(case, data, s, longest)
            whole = kvp.Batch.from_lengths([slot], [case.contexts[s]], num_tokens=longest)
            cache = _append(cache, k, v, whole)
        before = [n - m for n, m in zip(case.contexts, case.new, strict=True)]
        cache = _advance(cache, kvp.Batch.from_lengths(slots, before))
        batch = kvp.Batch.from_lengths(slots, list(case.new))
        pool.check(cache)
        q = jnp.asarray(queries(case, data), jnp.bfloat16)
        new = self._new(case, data) if variant == "update" else None

        def call(q: jax.Array, first: int, layers: int) -> jax.Array:
            if new is not None:
                return _update(layers, cache, batch, q, _scalar(first), new)
            addressing = "table" if variant.startswith("table") else "slots"
            return _attend(layers, addressing, cache, batch, q, _scalar(first))

        def close() -> None:
            pool.check(cache)  # a fault on the device must not count as a measurement
            pool.close()

        notes = {
            "block_tokens": spec.block_tokens or 0,
            "block_bytes": spec.block_bytes,
            "neighbouring_blocks": neighbouring_share(pool, slots),
        }
        return self.ready(case, call, q, notes, close)

    def _new(self, case: Case, data: Data | None) -> jax.Array:
        """Keys (and values) that `update` writes; its results are therefore those of other data."""
        del data
        return self.random(12345, (case.tokens, case.kv_heads, case.dim))

    def _tables(self, case: Case, data: Data | None) -> Ready:
        """Arrays of pages in random order, for kernels that take a block table."""
        counts = [-(-n // _PAGE) for n in case.contexts]
        order = np.random.default_rng(2).permutation(sum(counts)).astype(np.int32)
        tables = np.zeros((len(counts), max(counts)), np.int32)
        ends = np.cumsum([0, *counts])
        for s, count in enumerate(counts):
            tables[s, :count] = order[ends[s] : ends[s + 1]]
        shape = (len(order), _PAGE, case.kv_heads, case.dim)
        pages = []
        for copy in range(case.copies):
            if data is None or copy:
                pages.append((self.random(2 * copy, shape), self.random(2 * copy + 1, shape)))
                continue
            pair = [np.zeros(shape, np.float32) for _ in range(2)]
            for s, count in enumerate(counts):
                for which, values in enumerate(data.kv(s)):
                    pads = ((0, count * _PAGE - len(values)), (0, 0), (0, 0))
                    pair[which][tables[s, :count]] = np.pad(values, pads).reshape(-1, *shape[1:])
            pages.append(tuple(jnp.asarray(x, jnp.bfloat16) for x in pair))
        operands = [
            jnp.asarray(x, jnp.int32) for x in (tables, np.asarray(case.contexts), case.offsets)
        ]

        def call(q: jax.Array, first: int, layers: int) -> jax.Array:
            return _through_tables(q, pages[first : first + layers], *operands)

        q = jnp.asarray(queries(case, data), jnp.bfloat16)
        return self.ready(case, call, q, {"page_tokens": _PAGE})


CONTENDER = KVPage
