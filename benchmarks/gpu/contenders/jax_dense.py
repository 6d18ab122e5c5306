"""`jax.nn.dot_product_attention` over a static cache with room for the longest sequence."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from peers.base import Data
from timing import Ready

from contenders.base import JaxContender, is_full, queries

__all__ = ["CONTENDER"]


@functools.partial(jax.jit, static_argnames=("causal", "implementation"))
def _attend(
    q: jax.Array, layers: Any, lengths: Any, *, causal: bool, implementation: str
) -> jax.Array:
    for k, v in layers:
        q = jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=causal,
            key_value_seq_lengths=lengths,
            implementation=implementation,
        )
    return q


class JaxDense(JaxContender):
    """cuDNN's kernels, and XLA's own."""

    variants = ("cudnn", "xla")

    def unsupported(self, case: Case, variant: str) -> str | None:
        """Supports decode, and full prompts of equal length."""
        if case.section == "prefill" and variant == "xla" and case.tokens > 4096:
            return "it writes out all scores"
        if case.section == "decode" or (case.new == case.contexts and is_full(case)):
            return None
        return "a batch is rectangular"

    def prepare(self, case: Case, variant: str, data: Data | None) -> Ready:
        """`[batch, longest, kv_heads, dim]`; passes lengths only if they differ."""
        shape = (len(case.contexts), max(case.contexts), case.kv_heads, case.dim)
        layers = [
            tuple(self.random(2 * copy + i, shape) for i in (0, 1)) for copy in range(case.copies)
        ]
        if data is not None:
            pair = [np.zeros(shape, np.float32) for _ in range(2)]
            for s, context in enumerate(case.contexts):
                for which, values in enumerate(data.kv(s)):
                    pair[which][s, :context] = values
            layers[0] = tuple(jnp.asarray(x, jnp.bfloat16) for x in pair)
        rows = (shape[0], -1, case.q_heads, case.dim)
        q = jnp.asarray(queries(case, data).reshape(rows), jnp.bfloat16)
        lengths = None if is_full(case) else jnp.asarray(case.contexts, jnp.int32)
        causal = case.section != "decode"

        def call(q: jax.Array, first: int, count: int) -> jax.Array:
            chosen = layers[first : first + count]
            return _attend(q, chosen, lengths, causal=causal, implementation=variant)

        return self.ready(case, call, q)


CONTENDER = JaxDense
