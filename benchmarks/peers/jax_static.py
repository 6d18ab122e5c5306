"""`jax.nn.dot_product_attention` over a static cache with room for the longest sequence."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from shapes import LAYERS_PER_PROGRAM, Case

from peers.base import Data, Peer, Ready

__all__ = ["PEER"]


@jax.jit
def _decode(
    q: jax.Array, layers: Sequence[tuple[jax.Array, jax.Array]], lengths: jax.Array
) -> jax.Array:
    for k, v in layers:
        q = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)
    return q


@jax.jit
def _causal(
    q: jax.Array, layers: Sequence[tuple[jax.Array, jax.Array]], lengths: jax.Array
) -> jax.Array:
    for k, v in layers:
        q = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths
        )
    return q


class JaxStatic(Peer):
    """The cache that Flax and most JAX examples use."""

    def versions(self) -> dict[str, str]:
        """Versions of JAX."""
        return {"jax": jax.__version__, "jaxlib": jaxlib.__version__}

    def unsupported(self, case: Case, variant: str) -> str | None:
        """Supports decode and full prompts only."""
        del variant
        if case.section == "decode" or (len(case.new) == 1 and case.new == case.contexts):
            return None
        return "a batch is rectangular"

    def prepare(self, data: Data, variant: str) -> Ready:
        """`[batch, longest, kv_heads, dim]`, padded with zeros."""
        del variant
        case, dtype = data.case, jnp.dtype(data.case.dtype)
        shape = (len(case.contexts), max(case.contexts), case.kv_heads, case.dim)
        pair = [np.zeros(shape, dtype) for _ in range(2)]
        for s, context in enumerate(case.contexts):
            for which, values in enumerate(data.kv(s)):
                pair[which][s, :context] = values
        layers = [tuple(jnp.array(x, copy=True) for x in pair) for _ in range(case.copies)]
        q = jnp.asarray(data.q.reshape(shape[0], -1, case.q_heads, case.dim), dtype)
        lengths = jnp.asarray(case.contexts, jnp.int32)
        call = _decode if case.section == "decode" else _causal
        step = min(case.copies, LAYERS_PER_PROGRAM)

        def cycle() -> jax.Array:
            out = q
            for first in range(0, case.copies, step):
                out = call(out, layers[first : first + step], lengths)
            return jax.block_until_ready(out)

        return Ready(
            cycle=cycle,
            output=lambda: np.asarray(call(q, layers[:1], lengths), np.float32).reshape(
                data.q.shape
            ),
            calls=case.copies,
        )


PEER = JaxStatic()
