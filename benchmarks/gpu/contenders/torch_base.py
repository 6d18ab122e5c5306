"""Base of the contenders written in torch: a cycle is captured once as a CUDA graph and replayed,
so that times do not include Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from cases import Case
from timing import Ready, copy_bandwidth

from contenders.base import COPY_BYTES, Contender

__all__ = ["TorchContender"]


class TorchContender(Contender):
    """One attention call for each copy of a case."""

    def versions(self) -> dict[str, str]:
        """Versions of torch, CUDA and cuDNN."""
        cuda = self.platform == "cuda"
        return {
            "torch": torch.__version__,
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
        }

    def wait(self) -> None:
        """Waits until the device is idle."""
        if self.platform == "cuda":
            torch.cuda.synchronize()

    def copy_bandwidth(self) -> float:
        """Measures a device-to-device copy of 1 GiB."""
        size = COPY_BYTES if self.platform == "cuda" else 2**22
        source = torch.randint(-100, 100, (size,), dtype=torch.int8, device=self.platform)
        target = torch.empty_like(source)

        def run(times: int) -> None:
            for _ in range(times):
                target.copy_(source)

        return copy_bandwidth(run, self.wait, size)

    def random(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Normally distributed values in bfloat16, generated on the device."""
        return torch.randn(shape, dtype=torch.bfloat16, device=self.platform)

    def tensor(self, x: np.ndarray) -> torch.Tensor:
        """Values in bfloat16 on the device."""
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.platform, torch.bfloat16)

    def integers(self, x: Any) -> torch.Tensor:
        """int32 on the device."""
        return torch.tensor(x, dtype=torch.int32, device=self.platform)

    def ready(
        self,
        case: Case,
        attend: Callable[[int], torch.Tensor],
        output: Callable[[torch.Tensor], torch.Tensor],
        notes: dict[str, Any] | None = None,
    ) -> Ready:
        """Makes a `Ready` for `attend(copy)`; `output` converts to `[tokens, q_heads, dim]`."""

        def cycle() -> None:
            with torch.inference_mode():
                for copy in range(case.copies):
                    attend(copy)

        def result() -> np.ndarray:
            with torch.inference_mode():
                return output(attend(0)).float().cpu().numpy()

        play, captured = cycle, False
        if self.platform == "cuda":
            for _ in range(2):
                cycle()
            self.wait()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    cycle()
            except RuntimeError as error:
                # A kernel that cannot be captured is timed as a plain call.
                notes = (notes or {}) | {"not captured": str(error).splitlines()[0]}
                self.wait()
            else:
                play, captured = graph.replay, True

        def run(times: int) -> None:
            for _ in range(times):
                play()

        notes = (notes or {}) | {"cuda_graph": captured}
        return Ready(run, self.wait, result, case.copies, notes=notes)
