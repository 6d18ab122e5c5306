"""Decoding a Llama from end to end with and without CUDA graphs (XLA's command buffers).

    python benchmarks/gpu/llama_graphs.py [--platform cuda] [--dry-run]

A quarter of Llama-3-8B (8 of its 32 layers) with random bfloat16 weights, 8 sequences. Each mode
runs in a separate process, because XLA reads its flags only once. The floor is the time to read
weights, keys and values once at the copy bandwidth.

XLA may choose different matrix products in each process and program, which can change a token in
bfloat16: whether tokens agree is reported, but not required. A dry run compares logits instead, in
float32 at the highest precision and for a fixed sequence of tokens.
"""

from __future__ import annotations

import argparse
import base64
import functools
import hashlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scripts import print_tables

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_FLAG = "--xla_gpu_enable_command_buffer"
_ALL = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
MODES = {
    "no graphs": f"{_FLAG}=",
    "graphs, XLA's default": "",
    "graphs, loops too": f"{_FLAG}={_ALL} --xla_gpu_graph_min_graph_size=1",
}
_SCAN = 16


def _measure(platform: str, dry: bool) -> dict[str, Any]:
    """Measures one mode in this process."""
    import jax

    jax.config.update("jax_platforms", "cpu" if platform == "cpu" else "cuda,cpu")
    import jax.numpy as jnp
    from flax import nnx

    import jax_kvpage as kvp

    sys.path.append(str(_ROOT / "examples"))
    from llama.config import LlamaConfig
    from llama.model import Llama

    batch, context, rounds = (2, 40, 2) if dry else (8, 2048, 7)
    dtype = jnp.float32 if dry else jnp.bfloat16
    if dry:
        jax.config.update("jax_default_matmul_precision", "highest")
    # vocabulary, hidden, inner, layers, heads, key/value heads, head size
    shape = (256, 64, 128, 2, 4, 2, 32) if dry else (32000, 4096, 14336, 8, 32, 8, 128)
    config = LlamaConfig(*shape)
    model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=None))
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    weights = [
        0.02 * jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    steps = _SCAN * (rounds + 1)
    room = context + 3 * steps + 1
    spec = kvp.CacheSpec(shape[3], shape[5], shape[6], batch, room, dtype=dtype).resolve(platform)
    blocks = batch * spec.blocks_per_range
    pool = kvp.KVPool(spec, blocks * spec.block_bytes)
    # Map everything in advance, so that no step maps blocks or waits.
    slots, cache = pool.acquire(pool.cache(), [room] * batch)

    @functools.partial(jax.jit, donate_argnums=0)
    def fill(cache: kvp.KVCache, k: jax.Array, new: kvp.Batch) -> kvp.KVCache:
        for layer in range(spec.num_layers):
            cache = kvp.append_kv(cache, k, k, new, layer=layer)
        return kvp.advance(cache, new)

    k = jax.random.normal(jax.random.key(99), (context, spec.num_kv_heads, spec.head_dim), dtype)
    for slot in slots:
        cache = fill(cache, k, kvp.Batch.from_lengths([slot], [context]))
    decode = kvp.Batch.decode(slots)
    ids = jnp.asarray(slots, jnp.int32)

    # A step returns the next tokens, the row to keep, and the cache.
    def one(weights: Any, cache: kvp.KVCache, tokens: jax.Array, maps: bool) -> Any:
        model = nnx.merge(graph, jax.tree.unflatten(tree, weights))
        if maps:
            cache, _ = kvp.map_slots(cache, ids, cache.lengths[ids] + 1)
        logits, cache = model(tokens, cache, decode)
        cache = kvp.advance(cache, decode)
        if dry:
            return (5 * tokens + 3) % config.vocab_size, logits, cache
        newest = jnp.argmax(logits, -1).astype(jnp.int32)
        return newest, newest, cache

    @functools.partial(jax.jit, donate_argnums=1, static_argnums=3)
    def step(weights: Any, cache: kvp.KVCache, tokens: jax.Array, maps: bool) -> Any:
        return one(weights, cache, tokens, maps)

    @functools.partial(jax.jit, donate_argnums=1)
    def scan(weights: Any, cache: kvp.KVCache, tokens: jax.Array) -> Any:
        def body(carry: Any, _: None) -> Any:
            tokens, row, cache = one(weights, *carry, False)
            return (cache, tokens), row

        (cache, tokens), rows = jax.lax.scan(body, (cache, tokens), None, _SCAN)
        return tokens, cache, rows

    def loop(tokens: jax.Array, cache: kvp.KVCache, maps: bool) -> Any:
        rows = []
        for _ in range(_SCAN):
            tokens, row, cache = step(weights, cache, tokens, maps)
            rows.append(row)
        return tokens, cache, jnp.stack(rows)

    ways: dict[str, Callable[[Any, Any], Any]] = {
        "Python loop": lambda tokens, cache: loop(tokens, cache, False),
        "scan of 16 steps": lambda tokens, cache: scan(weights, cache, tokens),
        "Python loop that maps": lambda tokens, cache: loop(tokens, cache, True),
    }
    # Put it on the pool's device, like the tokens of later rounds; otherwise there would be another
    # compilation.
    start = jax.device_put(jnp.arange(batch, dtype=jnp.int32), pool.device)
    lowered = functools.partial(kvp.set_lengths, slots=ids)
    result: dict[str, Any] = {}
    for way, run in ways.items():
        cache = jax.jit(lowered)(cache, lengths=jnp.full(batch, context, jnp.int32))
        tokens, produced, times, before = start, [], [], pool.stats().waits
        for _ in range(rounds + 1):
            begin = time.perf_counter()
            tokens, cache, rows = run(tokens, cache)
            jax.block_until_ready(tokens)
            times.append((time.perf_counter() - begin) / _SCAN)
            produced.append(np.asarray(rows))
        bits = np.concatenate(produced).tobytes()
        result[way] = {
            "seconds": statistics.median(times[1:]),
            "seconds_low": min(times[1:]),
            "seconds_high": max(times[1:]),
            "waits": pool.stats().waits - before,
            "tokens": hashlib.sha256(bits).hexdigest()[:16],
        }
        if dry:
            result[way]["logits"] = base64.b64encode(bits).decode()
    pool.check(cache)
    pool.close()
    kv = batch * (context + steps // 2) * spec.token_bytes
    return {
        "ways": result,
        "bytes": sum(w.nbytes for w in weights) - weights[0].nbytes + kv,
        "batch": batch,
        "context": context,
        "layers": spec.num_layers,
    }


def measure(platform: str, dry: bool, limit: float) -> dict[str, Any]:
    """Measures all modes, each in a child process."""
    rows, digests, logits, left_out = [], {}, {}, {}
    about: dict[str, Any] = {}
    deadline = time.monotonic() + limit
    for mode, flags in MODES.items():
        options = ["--platform", platform, "--mode", mode] + (["--dry-run"] if dry else [])
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        try:
            run = subprocess.run(
                [sys.executable, __file__, *options],
                env=os.environ | {"XLA_FLAGS": flags},
                capture_output=True,
                text=True,
                timeout=max(deadline - time.monotonic(), 1),
                check=False,
            )
        except subprocess.TimeoutExpired:
            left_out[mode] = "out of time"
            continue
        if run.returncode:
            left_out[mode] = run.stderr[-2000:]
            continue
        about = json.loads(run.stdout.splitlines()[-1])
        for way, figures in about.pop("ways").items():
            digests[f"{mode}, {way}"] = figures["tokens"]
            if dry:
                bits = base64.b64decode(figures["logits"])
                logits[f"{mode}, {way}"] = np.frombuffer(bits, np.float32)
            seconds = figures["seconds"]
            rows.append(
                {
                    "mode": mode,
                    "way": way,
                    "ms a step": seconds * 1e3,
                    "lowest": figures["seconds_low"] * 1e3,
                    "highest": figures["seconds_high"] * 1e3,
                    "tokens/s": about["batch"] / seconds,
                    "GB/s": about["bytes"] / seconds / 1e9,
                    "waits": figures["waits"],
                }
            )
    return {
        "tables": {"decode of a quarter of Llama-3-8B, bfloat16, batch 8": rows},
        "left_out": left_out,
        "same_tokens": len(set(digests.values())) == 1,
        "digests": digests,
        **_differences(logits),
        **about,
    }


def _differences(logits: dict[str, np.ndarray]) -> dict[str, Any]:
    """Differences of each mode and method's logits from the first's, relative to the largest."""
    if not logits:
        return {}
    first = next(iter(logits.values()))
    scale = np.abs(first).max()
    return {"differences": {k: float(np.abs(x - first).max() / scale) for k, x in logits.items()}}


def main() -> int:
    """Prints one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes; compares logits")
    parser.add_argument("--limit", type=float, default=120, help="seconds for all modes")
    parser.add_argument("--mode", choices=tuple(MODES), help="one mode, in this process")
    arguments = parser.parse_args()
    if arguments.mode:
        print(json.dumps(_measure(arguments.platform, arguments.dry_run)))
        return 0
    result = measure(arguments.platform, arguments.dry_run, arguments.limit)
    print_tables(result["tables"])
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
