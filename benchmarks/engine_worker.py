"""Runs an engine: reads rounds from stdin and writes results to stdout, one JSON object per line.

    python benchmarks/engine_worker.py jax_kvpage|vllm CHECKPOINT MAX_SEQ_LEN

Both engines run in this process and its threads, with a prefix cache, and generate a fixed number
of greedy tokens, ignoring end-of-sequence tokens. A round is
`{"prompts": [[id, ...], ...], "max_tokens": n}`; all its requests arrive at the start. The answer
has their tokens, the seconds until all have ended and until each had its first token, and CPU
seconds.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

__all__ = ["main"]

# Add adds the prompts; Step runs a step and returns the tokens of each request so far, by number.
Add = Callable[[list[list[int]], int], None]
Step = Callable[[], dict[int, list[int]]]

_SLOTS = 32
_CACHE_GIB = 2


def _jax_kvpage(checkpoint: str, max_seq_len: int) -> tuple[Add, Step, str]:
    sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
    import jax
    import jax.numpy as jnp
    from llama.checkpoint import load_model
    from llama.serving import model_step

    import jax_kvpage as kvp
    from jax_kvpage.serving import Engine, EngineConfig, SamplingParams

    model = load_model(checkpoint, dtype=jnp.float32)
    shape = model.config
    spec = kvp.CacheSpec(
        shape.num_hidden_layers,
        shape.num_key_value_heads,
        shape.head_dim,
        _SLOTS,
        max_seq_len,
        dtype=jnp.float32,
    )
    pool = kvp.KVPool(spec, f"{_CACHE_GIB}GiB")
    step, weights = model_step(model)
    engine = Engine(step, weights, pool, EngineConfig(max_num_batched_tokens=2048))
    engine.warm_up()
    outputs: list[Any] = []

    def add(prompts: list[list[int]], max_tokens: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        outputs[:] = [engine.add_request(prompt, params) for prompt in prompts]

    def advance() -> dict[int, list[int]]:
        engine.step()
        return {i: output.outputs[0].token_ids for i, output in enumerate(outputs)}

    return add, advance, f"with jax {jax.__version__}"


def _vllm(checkpoint: str, max_seq_len: int) -> tuple[Add, Step, str]:
    # Use all cores: by default the engine reserves one.
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(len(cores)))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(_CACHE_GIB))
    import vllm

    engine = vllm.LLMEngine.from_engine_args(
        vllm.EngineArgs(
            model=checkpoint,
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=max_seq_len,
            max_num_seqs=_SLOTS,
            max_num_batched_tokens=2048,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
    )
    added = 0
    numbers: dict[str, int] = {}

    def add(prompts: list[list[int]], max_tokens: int) -> None:
        nonlocal added
        numbers.clear()
        params = vllm.SamplingParams(
            max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False
        )
        for i, prompt in enumerate(prompts):
            numbers[str(added)] = i
            engine.add_request(str(added), {"prompt_token_ids": prompt}, params)
            added += 1

    def advance() -> dict[int, list[int]]:
        return {
            numbers[output.request_id]: list(output.outputs[0].token_ids)
            for output in engine.step()
        }

    return add, advance, vllm.__version__


def _round(add: Add, step: Step, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    tokens: dict[int, list[int]] = {}
    first: dict[int, float] = {}
    begin, processor = time.perf_counter(), time.process_time()
    add(prompts, max_tokens)
    while len(tokens) < len(prompts) or min(map(len, tokens.values())) < max_tokens:
        tokens.update(step())
        now = time.perf_counter() - begin
        for number, ids in tokens.items():
            if ids:
                first.setdefault(number, now)
    return {
        "seconds": time.perf_counter() - begin,
        "processor_seconds": time.process_time() - processor,
        "first": [first[i] for i in range(len(prompts))],
        "tokens": [list(tokens[i]) for i in range(len(prompts))],
    }


def main() -> None:
    """Serves rounds until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout
    make = {"jax_kvpage": _jax_kvpage, "vllm": _vllm}[sys.argv[1]]
    add, step, version = make(sys.argv[2], int(sys.argv[3]))
    print(json.dumps({"version": version}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = _round(add, step, request["prompts"], request["max_tokens"])
        print(json.dumps(answer), file=answers, flush=True)
    # Exit without waiting for an engine's threads.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
