"""gather_context: copies sequences from the arena into dense arrays, for `read_kv` and "xla"."""

from typing import Any

import jax.numpy as jnp

from jax_kvpage.ops import _batching, _lowering, _scratch, _tokens
from jax_kvpage.ops._checks import pool_checker, results
from jax_kvpage.spec import CacheSpec

__all__ = ["gather_context_abstract", "gather_context_p"]

# `read_kv` computes lengths that differ between elements; if the cache's own lengths differ, its
# handle is batched too.
_NAMES = ("cache.handle", "cache.epoch", "lengths", "slots", "query_offsets", "layer")


def gather_context_abstract(
    *avals: Any, spec: CacheSpec, problems: tuple[str, ...] = ()
) -> list[Any]:
    """Abstract evaluation of the primitive."""
    check = pool_checker("read_kv", spec, problems)
    _tokens.check_header(check, avals)
    check.done()
    shape = (avals[3].shape[0], spec.max_seq_len, spec.num_kv_heads, spec.head_dim)
    dtype = jnp.float32 if spec.quantized else spec.dtype
    return results(avals, (shape, dtype), (shape, dtype))


# Operands as in `_NAMES`. Results: k and v, [S, max_seq_len, Hkv, D], in the cache's dtype, or
# float32 if that is quantized: positions 0 to lengths + new tokens of each sequence, then zeros.
gather_context_p = _lowering.make_primitive("gather_context", gather_context_abstract)

# Messages use the names of the ops that use it, like those of the handlers.
_lowering.register_lowerings(
    gather_context_p, name="read_kv / paged_attention (xla)", scratch=_scratch.checked
)

# paged_attention has its own rule.
_batching.register(gather_context_p, _batching.map_reader("read_kv", _NAMES, gather_context_p.bind))
