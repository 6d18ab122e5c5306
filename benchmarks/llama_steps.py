"""Decode steps of a Llama from end to end, compared with static JAX caches, with a time split.

    python benchmarks/llama_steps.py [--quick] [--json]

The model of `examples/llama` with random weights in float32: 56M parameters at contexts up to 1.8k,
and 1.1B (TinyLlama's shape). All caches run the same layers and sampling; the static ones have room
for the entire run and attend over all of it, as fixed shapes require. A Python loop runs the steps
and passes tokens on without reading them.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import script
from flax import nnx
from timesplit import split

import jax_kvpage as kvp

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

from llama.config import LlamaConfig
from llama.model import Llama

__all__ = ["measure"]

_BATCH = 8
# vocabulary, hidden, inner, layers, heads, key/value heads, head size
_MODELS = {
    "56M": LlamaConfig(32000, 512, 1408, 8, 8, 4, 64),
    "1.1B": LlamaConfig(32000, 2048, 5632, 22, 32, 4, 64),
}
# model, context at the first step, steps in a round, rounds
_RUNS = [("56M", 1792, 16, 4), ("56M", 64, 16, 4), ("1.1B", 192, 4, 3)]
_QUICK = [("56M", 192, 4, 1)]


@dataclasses.dataclass
class Runner:
    """A way to decode: `advance(steps)` runs this many steps and waits for them."""

    name: str
    advance: Callable[[int], None]
    hlo: str


def _weights(config: LlamaConfig) -> tuple[Any, Any, list[jax.Array]]:
    """Graph, tree and weights of a model; the values repeat one block of random numbers."""
    model = nnx.eval_shape(lambda: Llama(config, rngs=None))
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    block = (0.02 * np.random.default_rng(0).standard_normal(1 << 20)).astype(np.float32)
    weights = [jnp.asarray(np.resize(block, leaf.size).reshape(leaf.shape)) for leaf in leaves]
    return graph, tree, weights


def _paged(
    config: LlamaConfig, graph: Any, tree: Any, weights: Any, context: int, room: int
) -> tuple[Runner, kvp.KVPool]:
    """Decodes with `update_and_attend`; the step maps blocks itself."""
    spec = kvp.CacheSpec(
        config.num_hidden_layers,
        config.num_key_value_heads,
        config.head_dim,
        max_slots=_BATCH,
        max_seq_len=room,
        dtype=jnp.float32,
    ).resolve("cpu")
    blocks = _BATCH * spec.blocks_per_range
    pool = kvp.KVPool(spec, blocks * spec.block_bytes)
    slots, cache = pool.acquire(pool.cache(), [context] * _BATCH)
    zeros = jnp.zeros((context, spec.num_kv_heads, spec.head_dim))

    @functools.partial(jax.jit, donate_argnums=0)
    def fill(cache: kvp.KVCache, batch: kvp.Batch) -> kvp.KVCache:
        for layer in range(spec.num_layers):
            cache = kvp.append_kv(cache, zeros, zeros, batch, layer=layer)
        return kvp.advance(cache, batch)

    for slot in slots:
        cache = fill(cache, kvp.Batch.from_lengths([slot], [context]))

    @functools.partial(jax.jit, donate_argnums=1)
    def step(weights: Any, cache: kvp.KVCache, tokens: jax.Array, batch: kvp.Batch) -> Any:
        model = nnx.merge(graph, jax.tree.unflatten(tree, weights))
        cache, ok = kvp.map_slots(cache, batch.slots, cache.lengths[batch.slots] + 1)
        batch = batch.mask(ok)
        logits, cache = model(tokens, cache, batch)
        return jnp.argmax(logits, -1).astype(jnp.int32), kvp.advance(cache, batch)

    batch = kvp.Batch.decode(slots)
    state = [jnp.zeros(_BATCH, jnp.int32), cache]
    compiled = step.lower(weights, cache, state[0], batch).compile()

    def advance(steps: int) -> None:
        tokens, cache = state
        for _ in range(steps):
            tokens, cache = compiled(weights, cache, tokens, batch)
        state[:] = jax.block_until_ready((tokens, cache))

    return Runner("jax_kvpage", advance, compiled.as_text() or ""), pool


def _static(
    config: LlamaConfig, graph: Any, tree: Any, weights: Any, context: int, room: int, einsum: bool
) -> Runner:
    """Decodes with arrays `[batch, room, kv_heads, dim]`, or with head-major ones and einsum."""
    heads, dim = config.num_key_value_heads, config.head_dim
    shape = (_BATCH, heads, room, dim) if einsum else (_BATCH, room, heads, dim)
    axis = 2 if einsum else 1
    caches = [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.num_hidden_layers)]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, state: Any, layer: int) -> Any:
        caches, length = state
        pair = []
        for cache, new in zip(caches[layer], (k, v), strict=True):
            new = jnp.expand_dims(new, axis)
            pair.append(jax.lax.dynamic_update_slice_in_dim(cache, new, length, axis))
        lengths = jnp.full(_BATCH, length + 1)
        if not einsum:
            out = jax.nn.dot_product_attention(q[:, None], *pair, key_value_seq_lengths=lengths)[
                :, 0
            ]
        else:
            grouped = q.reshape(_BATCH, heads, -1, dim) * dim**-0.5
            scores = jnp.einsum("bhgd,bhkd->bhgk", grouped, pair[0])
            scores = jnp.where(jnp.arange(room) <= length, scores, -jnp.inf)
            out = jnp.einsum("bhgk,bhkd->bhgd", jax.nn.softmax(scores), pair[1])
        return out.reshape(q.shape), ([*caches[:layer], tuple(pair), *caches[layer + 1 :]], length)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(weights: Any, caches: Any, length: jax.Array, tokens: jax.Array) -> Any:
        model = nnx.merge(graph, jax.tree.unflatten(tree, weights))
        frequencies = config.rope.inverse_frequencies(dim)
        angles = jnp.full(_BATCH, length).astype(jnp.float32)[:, None, None] * frequencies
        rotation = jnp.cos(angles), jnp.sin(angles)
        x, state = model.embed_tokens[...][tokens], (caches, length)
        for index, layer in enumerate(model.layers):
            x, state = layer(x, rotation, attend, state, index)
        logits = model.logits(model.norm(x))
        return jnp.argmax(logits, -1).astype(jnp.int32), state[0], length + 1

    state = [jnp.zeros(_BATCH, jnp.int32), caches, jnp.int32(context)]
    compiled = step.lower(weights, state[1], state[2], state[0]).compile()

    def advance(steps: int) -> None:
        tokens, caches, length = state
        for _ in range(steps):
            tokens, caches, length = compiled(weights, caches, length, tokens)
        state[:] = jax.block_until_ready((tokens, caches, length))

    name = "JAX static cache, einsum head-major" if einsum else "JAX static, dot_product_attention"
    return Runner(name, advance, compiled.as_text() or "")


def _run(name: str, context: int, steps: int, rounds: int) -> tuple[list[Any], list[Any]]:
    config = _MODELS[name]
    graph, tree, weights = _weights(config)
    # One warm-up step, the timed rounds, and one round under the profiler.
    room = -(-(context + 1 + steps * (rounds + 1)) // 64) * 64
    shared = (config, graph, tree, weights, context, room)
    ours, pool = _paged(*shared)
    runners = [ours, *(_static(*shared, einsum=einsum) for einsum in (False, True))]
    times: dict[str, list[float]] = {runner.name: [] for runner in runners}
    for runner in runners:
        runner.advance(1)
    for _ in range(rounds):
        for runner in runners:
            begin = time.perf_counter()
            runner.advance(steps)
            times[runner.name].append((time.perf_counter() - begin) / steps)
    speeds, splits = [], []
    for runner in runners:
        median = statistics.median(times[runner.name])
        about = {"model": name, "context": context, "cache": runner.name}
        speeds.append(
            about
            | {
                "ms a step": median * 1e3,
                "lowest": min(times[runner.name]) * 1e3,
                "highest": max(times[runner.name]) * 1e3,
                "tokens/s": _BATCH / median,
            }
        )
        splits.append(about | split(functools.partial(runner.advance, steps), steps, runner.hlo))
    pool.close()
    return speeds, splits


def measure(quick: bool) -> dict[str, Any]:
    """Measures speeds, and the time split of each from a run under the profiler."""
    speeds: list[Any] = []
    splits: list[Any] = []
    for run in _QUICK if quick else _RUNS:
        more = _run(*run)
        speeds += more[0]
        splits += more[1]
    return {
        "tables": {
            f"decode steps of a Llama, float32, batch {_BATCH}": speeds,
            "where their time goes (traced runs)": splits,
        }
    }


if __name__ == "__main__":
    script.run(__doc__, measure)
