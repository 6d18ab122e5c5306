"""onnxruntime's GroupQueryAttention: a model with one node whose past and present share a buffer.

It has no bfloat16 on CPU: these columns are float16, which has the same size.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper
from shapes import Case

from peers.base import Data, Peer, Ready

__all__ = ["PEER"]


def _model(case: Case, kind: int) -> bytes:
    width = {"query": case.q_heads, "key": case.kv_heads, "value": case.kv_heads}
    inputs = [
        helper.make_tensor_value_info(name, kind, ["batch", "new", heads * case.dim])
        for name, heads in width.items()
    ]
    cache = ["batch", case.kv_heads, "room", case.dim]
    inputs += [
        helper.make_tensor_value_info(name, kind, cache) for name in ("past_key", "past_value")
    ]
    inputs.append(helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["batch"]))
    inputs.append(helper.make_tensor_value_info("total", TensorProto.INT32, [1]))
    outputs = [
        helper.make_tensor_value_info("out", kind, ["batch", "new", case.q_heads * case.dim])
    ]
    outputs += [
        helper.make_tensor_value_info(name, kind, cache)
        for name in ("present_key", "present_value")
    ]
    node = helper.make_node(
        "GroupQueryAttention",
        [x.name for x in inputs],
        [x.name for x in outputs],
        domain="com.microsoft",
        num_heads=case.q_heads,
        kv_num_heads=case.kv_heads,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "attention", inputs, outputs)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


class OrtGqa(Peer):
    """onnxruntime's CPU provider on all cores."""

    def __init__(self) -> None:
        self._sessions: dict[str, ort.InferenceSession] = {}

    def versions(self) -> dict[str, str]:
        """The version, and the type used instead of bfloat16."""
        return {"onnxruntime": ort.__version__, "bfloat16": "float16 instead"}

    def unsupported(self, case: Case, variant: str) -> str | None:
        """Supports decode and full prompts only."""
        del variant
        if case.section == "decode" or (len(case.new) == 1 and case.new == case.contexts):
            return None
        return "a batch is rectangular"

    def _session(self, case: Case) -> ort.InferenceSession:
        if case.dtype not in self._sessions:
            options = ort.SessionOptions()
            options.intra_op_num_threads = len(os.sched_getaffinity(0))
            options.log_severity_level = 3
            kind = TensorProto.FLOAT if case.dtype == "float32" else TensorProto.FLOAT16
            self._sessions[case.dtype] = ort.InferenceSession(
                _model(case, kind), options, providers=["CPUExecutionProvider"]
            )
        return self._sessions[case.dtype]

    def prepare(self, data: Data, variant: str) -> Ready:
        """Head-major caches `[batch, kv_heads, longest, dim]`; a call also writes its new token."""
        del variant
        case = data.case
        session = self._session(case)
        dtype = np.float32 if case.dtype == "float32" else np.float16
        batch, new = len(case.contexts), case.new[0]
        shape = (batch, case.kv_heads, max(case.contexts), case.dim)
        pair, fresh = [np.zeros(shape, dtype) for _ in range(2)], []
        for s, context in enumerate(case.contexts):
            for which, values in enumerate(data.kv(s)):
                pair[which][s, :, :context] = values.transpose(1, 0, 2)
        for which in range(2):
            last = [data.kv(s)[which][-new:] for s in range(batch)]
            fresh.append(np.stack(last).astype(dtype).reshape(batch, new, -1))
        fixed = {
            "query": data.q.astype(dtype).reshape(batch, new, -1),
            "key": fresh[0],
            "value": fresh[1],
            "seqlens_k": np.asarray(case.contexts, np.int32) - 1,
            "total": np.asarray([max(case.contexts)], np.int32),
        }
        inputs = {name: ort.OrtValue.ortvalue_from_numpy(x) for name, x in fixed.items()}
        out = ort.OrtValue.ortvalue_from_shape_and_type(list(fixed["query"].shape), dtype)
        bindings = [self._bind(session, inputs, out, pair) for _ in range(case.copies)]

        def cycle() -> None:
            for binding, _ in bindings:
                session.run_with_iobinding(binding)

        def output() -> np.ndarray:
            session.run_with_iobinding(bindings[0][0])
            return out.numpy().astype(np.float32).reshape(data.q.shape)

        return Ready(cycle=cycle, output=output, calls=case.copies)

    def _bind(
        self,
        session: ort.InferenceSession,
        values: dict[str, Any],
        out: Any,
        pair: list[np.ndarray],
    ) -> tuple[Any, list[Any]]:
        binding = session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("out", out)
        caches = [ort.OrtValue.ortvalue_from_numpy(x.copy()) for x in pair]
        for name, cache in zip(("key", "value"), caches, strict=True):
            binding.bind_ortvalue_input(f"past_{name}", cache)
            binding.bind_ortvalue_output(f"present_{name}", cache)
        return binding, caches


PEER = OrtGqa()
