"""torch's varlen_attn: FlashAttention over packed sequences, or over pages behind a block table."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from cases import Case
from peers.base import Data
from timing import Ready
from torch.nn.attention.varlen import varlen_attn

from contenders.base import queries
from contenders.torch_base import TorchContender

__all__ = ["CONTENDER"]

# FlashAttention 2 needs pages of a multiple of 256 tokens.
_PAGE = 256
# Parameters of the function, which differ between versions of torch.
_TAKES = frozenset(inspect.signature(varlen_attn).parameters)


class TorchVarlen(TorchContender):
    """Supports any ragged batch; the causal mask is aligned to the end of each sequence."""

    variants = ("packed", "paged")
    everywhere = ("paged",)

    def unsupported(self, case: Case, variant: str) -> str | None:
        """Cases that this version's function does not support."""
        if self.platform == "cpu":
            return "its kernels are for CUDA"
        if variant == "paged" and not {"block_table", "seqused_k"} <= _TAKES:
            return f"torch {torch.__version__} has no block tables here"
        if case.section == "mixed" and not {"window_size", "is_causal"} & _TAKES:
            return f"torch {torch.__version__} has no causal mask here"
        return None

    def prepare(self, case: Case, variant: str, data: Data | None) -> Ready:
        """Keys and values `[tokens, kv_heads, dim]` or `[pages, 256, kv_heads, dim]`."""
        paged = variant == "paged"
        options = self._options(case)
        ends = np.cumsum([0, *case.contexts])
        if paged:
            used = [-(-n // _PAGE) for n in case.contexts]
            order = np.random.default_rng(2).permutation(sum(used)).astype(np.int32)
            tables = np.zeros((len(used), max(used)), np.int32)
            starts = np.cumsum([0, *used])
            for s, count in enumerate(used):
                tables[s, :count] = order[starts[s] : starts[s + 1]]
            shape: tuple[int, ...] = (len(order), _PAGE, case.kv_heads, case.dim)
            options |= {
                "block_table": self.integers(tables.tolist()),
                "seqused_k": self.integers(case.contexts),
            }
        else:
            shape = (int(ends[-1]), case.kv_heads, case.dim)
        layers = [(self.random(shape), self.random(shape)) for _ in range(case.copies)]
        if data is not None:
            pair = [np.zeros(shape, np.float32) for _ in range(2)]
            for s, context in enumerate(case.contexts):
                for which, values in enumerate(data.kv(s)):
                    if paged:
                        pads = ((0, used[s] * _PAGE - context), (0, 0), (0, 0))
                        pages = np.pad(values, pads).reshape(used[s], *shape[1:])
                        pair[which][tables[s, : used[s]]] = pages
                    else:
                        pair[which][ends[s] : ends[s + 1]] = values
            layers[0] = self.tensor(pair[0]), self.tensor(pair[1])
        q = self.tensor(queries(case, data))
        cu_q, cu_k = self.integers(case.offsets), self.integers(ends.tolist())

        def attend(copy: int) -> torch.Tensor:
            k, v = layers[copy]
            return varlen_attn(q, k, v, cu_q, cu_k, max(case.new), max(case.contexts), **options)

        return self.ready(case, attend, lambda out: out)

    def _options(self, case: Case) -> dict[str, Any]:
        options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _TAKES else {}
        if max(case.new) > 1:
            causal = {"window_size": (-1, 0)} if "window_size" in _TAKES else {"is_causal": True}
            options |= causal
        return options


CONTENDER = TorchVarlen
