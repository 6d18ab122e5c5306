"""OpenVINO's PagedAttention on CPU: a model with one node over caches with blocks of 32 tokens.

The cache has the precision of the case (KV_CACHE_PRECISION; OpenVINO's default is u8). A call also
writes its new tokens, like `update_and_attend`. `_PagedAttentionExtension` is not a public
operator; its inputs below are those of the releases of 2026.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import openvino as ov
import openvino.op as ops
from openvino import opset13
from shapes import Case

from peers.base import Data, Peer, Ready

__all__ = ["PEER"]

_BLOCK = 32
_TYPES = {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16}


def _constant(kind: ov.Type, values: Any, shape: list[int]) -> Any:
    return opset13.constant(np.asarray(values).reshape(shape), dtype=kind)


def _model(case: Case) -> ov.Model:
    """Makes a model with queries, keys, values and caches as parameters, and all options off."""
    kind, i32, f32 = _TYPES[case.dtype], ov.Type.i32, ov.Type.f32

    def parameter(name: str, shape: list[int], dtype: ov.Type) -> Any:
        node = opset13.parameter(ov.PartialShape(shape), dtype, name=name)
        node.output(0).get_tensor().set_names({name})
        return node

    parameters = [
        parameter("q", [-1, case.q_heads * case.dim], kind),
        parameter("k", [-1, case.kv_heads * case.dim], kind),
        parameter("v", [-1, case.kv_heads * case.dim], kind),
        parameter("key_cache.0", [-1, case.kv_heads, _BLOCK, case.dim], kind),
        parameter("value_cache.0", [-1, case.kv_heads, _BLOCK, case.dim], kind),
        *(
            parameter(name, [-1], i32)
            for name in ("past_lens", "subsequence_begins", "blocks", "blocks_begins")
        ),
    ]
    longest = parameter("longest", [], i32)
    none = _constant(i32, [], [0])
    zero = _constant(i32, 0, [])
    options = [
        _constant(f32, case.dim**-0.5, []),  # scale
        zero,  # sliding window
        _constant(f32, [], [0]),  # ALiBi slopes
        longest,
        none,  # score aggregation window
        *(none, none, _constant(f32, [], [0])),  # rotation: blocks, deltas, table
        *(_constant(f32, [], [0]), _constant(i32, 64, []), _constant(i32, 8, [])),  # xattention
        _constant(kind, [], [0]),  # sinks
        *(zero, none, none, none),  # adaptive eviction
        none,  # token types
        *(_constant(ov.Type.u8, [], [0]), none),  # query-query bias
    ]
    inputs = [node.output(0) for node in (*parameters, *options)]
    node = ops._PagedAttentionExtension(inputs)
    info = node.get_rt_info()
    for name, value in (("k", case.kv_heads), ("v", case.kv_heads)):
        info[f"num_{name}_heads"] = value
        info[f"{name}_head_size"] = case.dim
    return ov.Model([node.output(0)], [*parameters, longest])


class OpenvinoPa(Peer):
    """OpenVINO's CPU plugin on all cores."""

    def __init__(self) -> None:
        self._requests: dict[str, Any] = {}

    def versions(self) -> dict[str, str]:
        """Version and block size."""
        return {"openvino": ov.__version__, "block": str(_BLOCK), "cache": "precision of the case"}

    def _request(self, case: Case) -> Any:
        if case.dtype not in self._requests:
            name = {"float32": "f32", "bfloat16": "bf16"}[case.dtype]
            config = {
                "INFERENCE_PRECISION_HINT": name,
                "KV_CACHE_PRECISION": name,
                "KEY_CACHE_PRECISION": name,
                "VALUE_CACHE_PRECISION": name,
                "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
                "PERFORMANCE_HINT": "LATENCY",
            }
            model = ov.Core().compile_model(_model(case), "CPU", config)
            self._requests[case.dtype] = model.create_infer_request()
        return self._requests[case.dtype]

    def _tensor(self, case: Case, values: np.ndarray) -> ov.Tensor:
        tensor = ov.Tensor(_TYPES[case.dtype], list(values.shape))
        if case.dtype == "float32":
            tensor.data[:] = values
        else:
            # The upper half of a float32, rounded to even, because NumPy has no bfloat16.
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            tensor.data.view(np.uint16)[:] = rounded.astype(np.uint16)
        return tensor

    def _caches(self, data: Data, order: np.ndarray, counts: list[int]) -> list[ov.Tensor]:
        """Keys and values of one copy, `[blocks, kv_heads, 32, dim]`."""
        case = data.case
        shape = (len(order), case.kv_heads, _BLOCK, case.dim)
        pair = [np.zeros(shape, np.float32) for _ in range(2)]
        begin = 0
        for s, count in enumerate(counts):
            mine = order[begin : begin + count]
            begin += count
            for which, values in enumerate(data.kv(s)):
                padding = ((0, count * _BLOCK - len(values)), (0, 0), (0, 0))
                blocks = np.pad(values, padding).reshape(count, _BLOCK, case.kv_heads, case.dim)
                pair[which][mine] = blocks.transpose(0, 2, 1, 3)
        return [self._tensor(case, values) for values in pair]

    def prepare(self, data: Data, variant: str) -> Ready:
        """Blocks in random order; the comparison with float64 verifies the layout inside them."""
        del variant
        case, request = data.case, self._request(data.case)
        counts = [-(-n // _BLOCK) for n in case.contexts]
        order = np.random.default_rng(1).permutation(sum(counts)).astype(np.int32)
        first = self._caches(data, order, counts)
        caches = [first]
        for _ in range(case.copies - 1):
            pair = [ov.Tensor(x.element_type, x.shape) for x in first]
            for tensor, source in zip(pair, first, strict=True):
                source.copy_to(tensor)
            caches.append(pair)
        past = [n - m for n, m in zip(case.contexts, case.new, strict=True)]
        indices = {
            "past_lens": past,
            "subsequence_begins": case.offsets,
            "blocks": order,
            "blocks_begins": np.cumsum([0, *counts]),
            # Work is split by this, so a larger value than needed costs time.
            "longest": max(case.contexts),
        }
        tensors = {name: ov.Tensor(np.asarray(x, np.int32)) for name, x in indices.items()}
        tensors["q"] = self._tensor(case, data.q.reshape(case.tokens, -1))
        pairs = [data.kv(s) for s in range(len(counts))]
        for which, name in enumerate(("k", "v")):
            new = [p[which][len(p[which]) - m :] for p, m in zip(pairs, case.new, strict=True)]
            flat = np.concatenate(new).reshape(case.tokens, -1)
            tensors[name] = self._tensor(case, flat)
        for name, tensor in tensors.items():
            request.set_tensor(name, tensor)

        def attend(copy: int) -> None:
            request.set_tensor("key_cache.0", caches[copy][0])
            request.set_tensor("value_cache.0", caches[copy][1])
            request.infer()

        def cycle() -> None:
            for copy in range(case.copies):
                attend(copy)

        def output() -> np.ndarray:
            attend(0)
            out = request.get_output_tensor(0)
            values = out.data
            if out.element_type == ov.Type.bf16:
                values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            return values.astype(np.float32).reshape(data.q.shape)

        return Ready(cycle=cycle, output=output, calls=case.copies)


PEER = OpenvinoPa()
