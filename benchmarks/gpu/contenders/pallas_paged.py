"""The paged attention that comes with JAX's Pallas for GPUs (Triton); deprecated."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from peers.base import Data
from timing import Ready

from contenders.base import JaxContender, queries

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

__all__ = ["CONTENDER"]

_PAGE = 16
_PAGES_AT_ONCE = 8
_SPLITS = {"16 splits": 16, "4 splits": 4, "1 split": 1}


@functools.partial(jax.jit, static_argnames=("splits", "interpret"))
def _attend(
    q: jax.Array,
    layers: Any,
    tables: jax.Array,
    lengths: jax.Array,
    *,
    splits: int,
    interpret: bool,
) -> jax.Array:
    for k, v in layers:
        q = paged_attention(
            q,
            k,
            v,
            tables,
            lengths,
            k_splits=splits,
            pages_per_compute_block=_PAGES_AT_ONCE,
            interpret=interpret,
        )
    return q


class PallasPaged(JaxContender):
    """Pages of 16 tokens. The variants are values of its most important setting, the number of
    splits; the first one is the default.
    """

    variants = tuple(_SPLITS)

    def unsupported(self, case: Case, variant: str) -> str | None:
        """Supports decode only."""
        del variant
        return None if case.section == "decode" else "it decodes only"

    def prepare(self, case: Case, variant: str, data: Data | None) -> Ready:
        """Pages `[kv_heads, pages, 16, dim]` in random order."""
        splits = _SPLITS[variant]
        # In every split, the width of the table is a multiple of the pages that one program reads.
        unit = splits * _PAGES_AT_ONCE
        width = -(-max(case.contexts) // (_PAGE * unit)) * unit
        used = [-(-n // _PAGE) for n in case.contexts]
        order = np.random.default_rng(2).permutation(sum(used)).astype(np.int32)
        tables = np.zeros((len(used), width), np.int32)
        ends = np.cumsum([0, *used])
        for s, count in enumerate(used):
            tables[s, :count] = order[ends[s] : ends[s + 1]]
        shape = (case.kv_heads, len(order), _PAGE, case.dim)
        layers = [
            tuple(self.random(2 * copy + i, shape) for i in (0, 1)) for copy in range(case.copies)
        ]
        if data is not None:
            pair = [np.zeros(shape, np.float32) for _ in range(2)]
            for s, count in enumerate(used):
                for which, values in enumerate(data.kv(s)):
                    pads = ((0, count * _PAGE - len(values)), (0, 0), (0, 0))
                    pages = np.pad(values, pads).reshape(count, _PAGE, case.kv_heads, case.dim)
                    pair[which][:, tables[s, :count]] = pages.transpose(2, 0, 1, 3)
            layers[0] = tuple(jnp.asarray(x, jnp.bfloat16) for x in pair)
        # The kernel does not scale.
        q = jnp.asarray(queries(case, data) * case.dim**-0.5, jnp.bfloat16)
        operands = jnp.asarray(tables), jnp.asarray(case.contexts, jnp.int32)
        interpret = self.platform == "cpu"

        def call(q: jax.Array, first: int, count: int) -> jax.Array:
            chosen = layers[first : first + count]
            return _attend(q, chosen, *operands, splits=splits, interpret=interpret)

        return self.ready(case, call, q, {"page_tokens": _PAGE})


CONTENDER = PallasPaged
