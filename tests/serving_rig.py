"""A small random transformer and the engine around it, for tests of `jax_kvpage.serving`."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_kvpage as kvp
from jax_kvpage.serving import Engine, EngineConfig, RequestOutput, SamplingParams, Watermark
from jax_kvpage.serving.engine.programs import Programs

VOCABULARY = 64
LAYERS, HEADS, KV_HEADS, DIM = 2, 2, 1, 64
WIDTH = HEADS * DIM
BLOCK = 16


@functools.cache
def params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)

    return {
        "embed": weights(VOCABULARY, WIDTH) * 8,
        "qkv": weights(LAYERS, WIDTH, (HEADS + 2 * KV_HEADS) * DIM),
        "out": weights(LAYERS, WIDTH, WIDTH) * 2,
        "logits": weights(WIDTH, VOCABULARY) * 2,
        "places": weights(256, WIDTH) * 8,
    }


def step(
    params: dict[str, jax.Array], cache: kvp.KVCache, tokens: jax.Array, batch: kvp.Batch
) -> tuple[jax.Array, kvp.KVCache]:
    """The model: attention with residuals, without feed-forward layers."""
    place = kvp.positions(cache, batch)
    x = params["embed"][tokens] + params["places"][place % 256]
    for layer in range(LAYERS):
        qkv = (x @ params["qkv"][layer]).reshape(tokens.shape[0], -1, DIM)
        q, k, v = jnp.split(qkv, (HEADS, HEADS + KV_HEADS), axis=1)
        out, cache = kvp.update_and_attend(q, k, v, cache, batch, layer=layer)
        x = jnp.tanh(x + out.reshape(tokens.shape[0], -1) @ params["out"][layer])
    return x[batch.last_rows] @ params["logits"], cache


def spec(max_slots: int = 8, max_seq_len: int = 128, layout: str = "fused") -> kvp.CacheSpec:
    made = kvp.CacheSpec(
        LAYERS, KV_HEADS, DIM, max_slots, max_seq_len,
        dtype=jnp.float32, layout=layout, block_tokens=BLOCK,
    )  # fmt: skip
    return made.resolve("cpu")


def pool(blocks: int = 64, **options: Any) -> kvp.KVPool:
    made = spec(**options)
    return kvp.KVPool(made, blocks * made.num_ranges * made.block_bytes)


def config(**options: Any) -> EngineConfig:
    """Returns a config with one bucket, so that results are bit-identical with any neighbours.
    Requests are admitted without regard to their growth, so that little memory leads to
    preemptions.
    """
    options.setdefault("admission", Watermark())
    options.setdefault("max_num_batched_tokens", 32)
    rows = options.setdefault("max_num_seqs", 4)
    options.setdefault("buckets", ((options["max_num_batched_tokens"], rows),))
    return EngineConfig(**options)


def run_through(error: type[BaseException], engine: Engine) -> int:
    """Steps until all requests have ended; returns how many steps raised this error."""
    raised = 0
    while engine.has_unfinished:
        try:
            engine.step()
        except error:
            raised += 1
    return raised


_PROGRAMS: dict[Any, Any] = {}


def share_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of the same model and shape share compiled programs, to save time."""
    compile_one = Programs.compile

    def compile_once(
        self: Programs, shape: Any, num_guesses: int, cache: Any, state: Any, scores: bool = False
    ) -> Any:
        sizes = (self._num_rows, self._num_banned, self.num_words, self.max_logprobs)
        key = (self._step, sizes, shape, num_guesses, scores, cache.spec, cache.sharding)
        if key not in _PROGRAMS:
            _PROGRAMS[key] = compile_one(self, shape, num_guesses, cache, state, scores)
        self._compiled[shape, num_guesses, scores] = _PROGRAMS[key]
        return _PROGRAMS[key]

    monkeypatch.setattr(Programs, "compile", compile_once)


def check_empty(pool: kvp.KVPool) -> None:
    """Asserts that nothing is left of any request once all programs have run."""
    jax.block_until_ready(pool.cache())
    stats = pool.stats()
    assert (stats.blocks_mapped, stats.blocks_draining, stats.slots_occupied) == (0, 0, 0)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


def tokens(outputs: Sequence[RequestOutput]) -> list[list[list[int]]]:
    return [[each.token_ids for each in output.outputs] for output in outputs]


GREEDY = SamplingParams(temperature=0, max_tokens=20)
SAMPLED = SamplingParams(seed=7, max_tokens=20, top_k=20, top_p=0.9, min_p=0.01)
PENALIZED = SamplingParams(
    seed=8, max_tokens=20, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.3
)
PROMPTS = [prompt(n, n) for n in (5, 40, 17, 70, 1, 33, 20, 64)]
MIXED = [GREEDY, SAMPLED, PENALIZED, GREEDY, SAMPLED, PENALIZED, SAMPLED, GREEDY]


@functools.cache
def alone() -> list[list[list[int]]]:
    """Tokens of PROMPTS, each alone in an engine with enough memory."""
    options = config(prefix_caching=False)
    with pool() as memory, Engine(step, params(), memory, options) as engine:
        return [
            tokens(engine.generate([ids], each))[0]
            for ids, each in zip(PROMPTS, MIXED, strict=True)
        ]


def cancel_at_random(
    engine: Engine, rng: random.Random, count: int, cancels: float, fails: float
) -> int:
    """Adds requests, cancels some and makes steps fail; the others must have the tokens of `alone`.

    Args:
        engine: An engine with a pool that may be too small for all requests.
        rng: Source of the random choices.
        count: Number of requests.
        cancels: Probability of a cancellation before a step.
        fails: Probability that a step fails because the engine's cache is stale.

    Returns:
        The number of cancelled requests.
    """
    wanted = alone()
    picks = [rng.randrange(len(PROMPTS)) for _ in range(count)]
    added: list[tuple[int, RequestOutput]] = []
    cancelled: set[int] = set()
    while picks or engine.has_unfinished:
        while picks and rng.random() < 0.4:
            i = picks.pop()
            added.append((i, engine.add_request(PROMPTS[i], MIXED[i])))
        if added and rng.random() < cancels:
            place = rng.randrange(len(added))
            if not added[place][1].finished:
                engine.cancel(added[place][1])
                cancelled.add(place)
        if rng.random() < fails:
            engine._pool.cache()
        engine.step()
    for place, (i, output) in enumerate(added):
        got = tokens([output])[0]
        if place in cancelled:
            assert output.outputs[0].finish_reason == "cancelled"
            assert got[0] == wanted[i][0][: len(got[0])]
        else:
            assert got == wanted[i]
    return len(cancelled)
