"""torch's scaled_dot_product_attention over dense head-major batches, with a backend per variant.

For decode, the query heads of a group are the rows of one small matrix, which is the fastest way to
share keys and values among them. Batches with different lengths need a mask, which the flash and
cuDNN backends reject or run slowly, so they are only measured with equal lengths.
"""

from __future__ import annotations

import numpy as np
import torch
from cases import Case
from peers.base import Data
from timing import Ready
from torch.nn.attention import SDPBackend, sdpa_kernel

from contenders.base import is_full, queries
from contenders.torch_base import TorchContender

__all__ = ["CONTENDER"]

_sdpa = torch.nn.functional.scaled_dot_product_attention
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient, mask": SDPBackend.EFFICIENT_ATTENTION,
}


class TorchSdpa(TorchContender):
    """Variants: the backends."""

    variants = tuple(_BACKENDS)
    everywhere = ("cudnn",)

    def unsupported(self, case: Case, variant: str) -> str | None:
        """Supports dense batches; with a mask, also those with different lengths."""
        full = is_full(case)
        if case.section != "decode" and (case.new != case.contexts or not full):
            return "a batch is rectangular"
        if variant == "efficient, mask":
            ragged = case.section == "decode" and not full
            return None if ragged else "measured where a mask is needed"
        return None if full else "lengths differ"

    def prepare(self, case: Case, variant: str, data: Data | None) -> Ready:
        """Keys and values `[batch, kv_heads, longest, dim]`."""
        batch, longest = len(case.contexts), max(case.contexts)
        shape = (batch, case.kv_heads, longest, case.dim)
        layers = [(self.random(shape), self.random(shape)) for _ in range(case.copies)]
        if data is not None:
            pair = [np.zeros(shape, np.float32) for _ in range(2)]
            for s, context in enumerate(case.contexts):
                for which, values in enumerate(data.kv(s)):
                    pair[which][s, :, :context] = values.transpose(1, 0, 2)
            layers[0] = self.tensor(pair[0]), self.tensor(pair[1])
        q = self.tensor(queries(case, data))
        backend = _BACKENDS[variant]
        if case.section == "decode":
            rows = q.reshape(batch, case.kv_heads, case.group, case.dim)
            mask = None
            if variant == "efficient, mask":
                inside = (
                    torch.arange(longest, device=q.device) < self.integers(case.contexts)[:, None]
                )
                mask = inside[:, None, None].expand(batch, case.kv_heads, case.group, longest)

            def attend(copy: int) -> torch.Tensor:
                with sdpa_kernel(backend):
                    return _sdpa(rows, *layers[copy], attn_mask=mask)

            return self.ready(case, attend, lambda out: out.reshape(-1, case.q_heads, case.dim))

        prompt = q.reshape(batch, longest, case.q_heads, case.dim).transpose(1, 2).contiguous()

        def prefill(copy: int) -> torch.Tensor:
            with sdpa_kernel(backend):
                return _sdpa(prompt, *layers[copy], is_causal=True, enable_gqa=True)

        return self.ready(
            case, prefill, lambda out: out.transpose(1, 2).reshape(-1, case.q_heads, case.dim)
        )


CONTENDER = TorchSdpa
