"""cuDNN's paged attention through JAX's wrapper. The wrapper is private (`jax._src`), so this
contender is absent in versions of JAX that have moved it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from jax._src.cudnn.fused_attention_stablehlo import MaskType, paged_attention
from peers.base import Data
from timing import Ready

from contenders.base import JaxContender, queries

__all__ = ["CONTENDER"]

_PAGE = 64


@functools.partial(jax.jit, static_argnames="scale")
def _attend(
    q: jax.Array, layers: Any, tables: jax.Array, lengths: jax.Array, *, scale: float
) -> jax.Array:
    ones = jnp.ones_like(lengths)
    for k, v in layers:
        q = paged_attention(
            q, k, v, ones, lengths, tables, tables, scale=scale, mask_type=MaskType.PADDING
        )
    return q


class JaxCudnnPaged(JaxContender):
    """Pages of 64 tokens, for decode. The wrapper needs the same number of pages for every
    sequence, that of the longest one.
    """

    def unsupported(self, case: Case, variant: str) -> str | None:
        """Supports decode only: its causal mask counts from the first token."""
        del variant
        return None if case.section == "decode" else "measured for decoding"

    def prepare(self, case: Case, variant: str, data: Data | None) -> Ready:
        """Pages `[pages, 64, kv_heads, dim]` in random order."""
        del variant
        batch, width = len(case.contexts), -(-max(case.contexts) // _PAGE)
        shape = (batch * width, _PAGE, case.kv_heads, case.dim)
        order = np.random.default_rng(2).permutation(batch * width).astype(np.int32)
        tables = order.reshape(batch, width)
        layers = [
            tuple(self.random(2 * copy + i, shape) for i in (0, 1)) for copy in range(case.copies)
        ]
        if data is not None:
            pair = [np.zeros(shape, np.float32) for _ in range(2)]
            for s, context in enumerate(case.contexts):
                for which, values in enumerate(data.kv(s)):
                    pads = ((0, width * _PAGE - context), (0, 0), (0, 0))
                    pair[which][tables[s]] = np.pad(values, pads).reshape(width, *shape[1:])
            layers[0] = tuple(jnp.asarray(x, jnp.bfloat16) for x in pair)
        q = jnp.asarray(queries(case, data)[:, None], jnp.bfloat16)
        operands = jnp.asarray(tables[:, None, :, None]), jnp.asarray(case.contexts, jnp.int32)

        def call(q: jax.Array, first: int, count: int) -> jax.Array:
            return _attend(q, layers[first : first + count], *operands, scale=case.dim**-0.5)

        return self.ready(case, call, q, {"page_tokens": _PAGE})


CONTENDER = JaxCudnnPaged
