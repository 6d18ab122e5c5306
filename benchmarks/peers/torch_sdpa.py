"""torch's scaled_dot_product_attention, one call per sequence, head-major.

For decode, the query heads of a group are the rows of one small matrix, which is the fastest way to
share keys and values among them; prompts use the causal flag, chunks use a mask.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch

from peers.base import Data, Peer, Ready

__all__ = ["PEER"]

_sdpa = torch.nn.functional.scaled_dot_product_attention


class TorchSdpa(Peer):
    """torch on all cores."""

    def __init__(self) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))

    def versions(self) -> dict[str, str]:
        """Version and threads."""
        return {"torch": torch.__version__, "threads": str(torch.get_num_threads())}

    def prepare(self, data: Data, variant: str) -> Ready:
        """Keys and values of each sequence, head-major `[1, kv_heads, context, dim]`."""
        del variant
        case, dtype = data.case, getattr(torch, data.case.dtype)
        copies, calls = [], []
        for s, (context, new) in enumerate(zip(case.contexts, case.new, strict=True)):
            q = torch.from_numpy(data.q[case.offsets[s] : case.offsets[s + 1]]).to(dtype)
            kv = [torch.from_numpy(x.copy()).to(dtype).transpose(0, 1)[None] for x in data.kv(s)]
            calls.append(self._call(q, context, new, case.group))
            copies.append(
                [
                    tuple(x.clone(memory_format=torch.contiguous_format) for x in kv)
                    for _ in range(case.copies)
                ]
            )

        def attend(copy: int) -> list[torch.Tensor]:
            return [call(*copies[s][copy]) for s, call in enumerate(calls)]

        def cycle() -> None:
            with torch.inference_mode():
                for copy in range(case.copies):
                    attend(copy)

        def output() -> np.ndarray:
            outs = [
                # [1, kv_heads, group, dim] for decode, [1, heads, new, dim] otherwise
                out.reshape(1, -1, case.dim) if new == 1 else out[0].transpose(0, 1)
                for out, new in zip(attend(0), case.new, strict=True)
            ]
            return torch.cat(outs).float().numpy()

        return Ready(cycle=cycle, output=output, calls=case.copies)

    def _call(
        self, q: torch.Tensor, context: int, new: int, group: int
    ) -> Callable[..., torch.Tensor]:
        heads, dim = q.shape[1:]
        if new == 1:
            rows = q.reshape(1, heads // group, group, dim).contiguous()
            return lambda k, v: _sdpa(rows, k, v)
        rows = q.transpose(0, 1)[None].contiguous()
        if new == context:
            return lambda k, v: _sdpa(rows, k, v, is_causal=True, enable_gqa=True)
        mask = torch.ones(new, context, dtype=torch.bool).tril(context - new)
        return lambda k, v: _sdpa(rows, k, v, attn_mask=mask, enable_gqa=True)


PEER = TorchSdpa()
