"""This package: its attention ops under jit, over the layers of one pool."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from blocks import acquire, neighbouring_share
from shapes import LAYERS_PER_PROGRAM, Case

import jax_kvpage as kvp
from jax_kvpage import _native
from peers.base import Data, Peer, Ready

__all__ = ["PEER"]

# Quantized storage with bfloat16 queries. Bytes are counted as for bfloat16, so that speeds are
# comparable: twice the fraction of the floor is half the time.
_STORED = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


@functools.partial(jax.jit, static_argnums=0)
def _attend(layers: int, cache: kvp.KVCache, batch: kvp.Batch, q: jax.Array, first: Any) -> Any:
    """The attention of a step: each layer's queries are the output of the previous layer."""
    for i in range(layers):
        q = kvp.paged_attention(q, cache, batch, layer=first + i)
    return q


@functools.partial(jax.jit, static_argnums=0)
def _update(
    layers: int,
    cache: kvp.KVCache,
    batch: kvp.Batch,
    q: jax.Array,
    first: Any,
    k: jax.Array,
    v: jax.Array,
) -> Any:
    for i in range(layers):
        q, cache = kvp.update_and_attend(q, k, v, cache, batch, layer=first + i)
    return q


@functools.partial(jax.jit, donate_argnums=0)
def _append(cache: kvp.KVCache, k: jax.Array, v: jax.Array, batch: kvp.Batch) -> kvp.KVCache:
    def body(layer: jax.Array, cache: kvp.KVCache) -> kvp.KVCache:
        return kvp.append_kv(cache, k, v, batch, layer=layer)

    return jax.lax.fori_loop(0, cache.spec.num_layers, body, cache)


class KVPage(Peer):
    """The variants differ in the layout of blocks and in the ops that a program calls."""

    variants = ("fused", "per_layer", "scattered", "update", "single call", "exact", *_STORED)

    def versions(self) -> dict[str, str]:
        """Versions and the instruction set in use."""
        return {
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "instruction set": _native.instruction_set(),
        }

    def unsupported(self, case: Case, variant: str) -> str | None:
        """Some variants are for decode only."""
        if variant in _STORED and case.dtype != "bfloat16":
            return "compared with bfloat16"
        if case.section != "decode" and variant in ("scattered", "single call"):
            return "a variant of decoding"
        if variant == "exact" and (case.section == "decode" or case.dtype != "bfloat16"):
            return "the same kernels"
        return None

    def prepare(self, data: Data, variant: str) -> Ready:
        """One layer of a pool for each copy."""
        case = data.case
        dtype = jnp.dtype(case.dtype)
        spec = kvp.CacheSpec(
            num_layers=case.copies,
            num_kv_heads=case.kv_heads,
            head_dim=case.dim,
            max_slots=len(case.contexts) + 1,
            max_seq_len=max(case.contexts),
            dtype=_STORED.get(variant, dtype),
            layout="per_layer" if variant == "per_layer" else "fused",
        ).resolve("cpu")
        blocks = sum(
            -(-n // (spec.block_tokens or 1)) for n in (*case.contexts, max(case.contexts))
        )
        pool = kvp.KVPool(spec, blocks * spec.block_bytes * spec.num_ranges, on_stale="allow")
        slots, cache = acquire(pool, case.contexts, variant == "scattered")
        for s, slot in enumerate(slots):
            k, v = (self._padded(x, max(case.contexts), dtype) for x in data.kv(s))
            cache = _append(
                cache, k, v, kvp.Batch.from_lengths([slot], [case.contexts[s]], num_tokens=len(k))
            )
        before = [n - m for n, m in zip(case.contexts, case.new, strict=True)]
        past = kvp.Batch.from_lengths(slots, before)
        cache = jax.jit(kvp.advance)(cache, past)
        batch = kvp.Batch.from_lengths(slots, list(case.new))
        pool.check(cache)
        q = jnp.asarray(data.q, dtype)
        cycle = self._cycle(data, variant, cache, batch, q)
        return Ready(
            cycle=lambda: jax.block_until_ready(cycle(case.copies)),
            output=lambda: np.asarray(cycle(1), np.float32),
            calls=case.copies,
            close=pool.close,
            notes={
                "block_tokens": spec.block_tokens or 0,
                "neighbouring_blocks": neighbouring_share(pool, slots),
            },
        )

    def _padded(self, x: np.ndarray, size: int, dtype: jnp.dtype) -> jax.Array:
        return jnp.asarray(np.pad(x, ((0, size - len(x)), (0, 0), (0, 0))), dtype)

    def _cycle(
        self, data: Data, variant: str, cache: kvp.KVCache, batch: kvp.Batch, q: jax.Array
    ) -> Callable[[int], jax.Array]:
        case = data.case
        call: Callable[..., jax.Array] = _attend
        extra: tuple[jax.Array, ...] = ()
        if variant == "update":
            call = _update
            rows = [slice(n - m, n) for n, m in zip(case.contexts, case.new, strict=True)]
            pairs = [data.kv(s) for s in range(len(rows))]
            extra = tuple(
                jnp.asarray(
                    np.concatenate([p[i][r] for p, r in zip(pairs, rows, strict=True)]), q.dtype
                )
                for i in (0, 1)
            )
        most = 1 if variant == "single call" else LAYERS_PER_PROGRAM
        firsts = [jnp.int32(i) for i in range(case.copies)]

        def cycle(copies: int) -> jax.Array:
            layers, out = min(copies, most), q
            for first in range(0, copies, layers):
                out = call(layers, cache, batch, out, firsts[first], *extra)
            return out

        return jax.default_matmul_precision("highest")(cycle) if variant == "exact" else cycle


PEER = KVPage()
