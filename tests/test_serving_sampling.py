"""Sampling on the device against NumPy, and the engine's helpers for text and prefixes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_kvpage.serving import SamplingParams
from jax_kvpage.serving.engine import sampling
from jax_kvpage.serving.engine.sampling import NUM_FLOATS, NUM_INTS, RowParams, Sampled, sample
from jax_kvpage.serving.prefixes import PrefixKeys
from jax_kvpage.serving.text import TextBuilder

_V, _L = 50, 32
_sample = jax.jit(functools.partial(sample, max_logprobs=3))


def _run(
    logits: np.ndarray, rows: list[SamplingParams], positions: list[int], history: np.ndarray,
    prompt: int = 4,
) -> Sampled:  # fmt: skip
    """Samples a token for each row."""
    floats = [
        (p.temperature, p.top_p, p.min_p, p.presence_penalty, p.frequency_penalty,
         p.repetition_penalty)
        for p in rows
    ]  # fmt: skip
    ints = [(p.top_k, p.seed or 0, 0, prompt, prompt + p.min_tokens, 1) for p in rows]
    banned = np.full((2, len(rows)), -1, np.int32)
    for i, params in enumerate(rows):
        banned[: len(params.stop_token_ids), i] = params.stop_token_ids
    params = RowParams(
        jnp.asarray(floats, jnp.float32).T,
        jnp.asarray(ints, jnp.int32).T,
        jnp.asarray(banned),
        jnp.arange(len(rows)),
        jnp.asarray(positions, jnp.int32),
    )
    return _sample(jnp.asarray(logits, jnp.float32), params, jnp.asarray(history, jnp.int32))


def _distribution(row: np.ndarray, p: SamplingParams, seen: list[int], prompt: int) -> np.ndarray:
    """Returns the probabilities of the next token, in float64."""
    scores = row.astype(np.float64).copy()
    for token in set(seen):
        scores[token] *= 1 / p.repetition_penalty if scores[token] > 0 else p.repetition_penalty
    for token in seen[prompt:]:
        scores[token] -= p.frequency_penalty
    for token in set(seen[prompt:]):
        scores[token] -= p.presence_penalty
    if len(seen) - prompt < p.min_tokens:
        scores[list(p.stop_token_ids)] = -np.inf
    if p.temperature == 0:
        return np.eye(len(row))[np.argmax(scores)]
    scores = np.exp((scores - scores.max()) / p.temperature)
    order = np.argsort(-scores, kind="stable")
    keep = np.ones(len(row), bool)
    if p.top_k:
        keep[order[p.top_k :]] = False
    mass = np.where(keep, scores, 0)[order] / scores[keep].sum()
    keep[order[1:]] &= (np.cumsum(mass) - mass)[1:] < p.top_p
    keep &= scores >= p.min_p * scores.max()
    scores = np.where(keep, scores, 0)
    return scores / scores.sum()


_CASES = [
    {},
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 3.0, "frequency_penalty": 1.0},
    {"temperature": 0.5, "top_k": 5},
    {"temperature": 2.0, "top_p": 0.5},
    {"top_k": 12, "top_p": 0.7, "min_p": 0.05},
    {"min_p": 0.2},
    {"presence_penalty": 2.0, "frequency_penalty": -1.0},
    {"repetition_penalty": 0.3, "top_p": 0.9},
    {"min_tokens": 8, "stop_token_ids": [3, 7], "max_tokens": 20},
    {"temperature": 0, "min_tokens": 6, "max_tokens": 20},
    {"temperature": 1e-42},
]


def test_tokens_have_the_probabilities_that_numpy_says() -> None:
    """All cases in one batch, many times: rows do not affect each other."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(_CASES), _V)) * 2
    history = rng.integers(0, _V, (len(_CASES), _L))
    best = [int(np.argmax(row)) for row in logits]
    cases = [*_CASES[:10], {**_CASES[10], "stop_token_ids": [best[10]]}, *_CASES[11:]]
    history[:, 5] = best  # the output already contains the best token
    params = [SamplingParams(**case) for case in cases]  # type: ignore[arg-type]
    expected = np.asarray(
        [
            _distribution(row, p, seen[:10].tolist(), 4)
            for row, p, seen in zip(logits, params, history, strict=True)
        ]
    )
    tries = 2000
    counts = np.zeros((len(_CASES), _V))
    repeated = np.repeat(logits, 50, axis=0)
    histories = np.repeat(history, 50, axis=0)
    for seed in range(tries // 50):
        rows = [
            SamplingParams(**{**case, "seed": seed * 50 + i})  # type: ignore[arg-type]
            for case in cases
            for i in range(50)
        ]
        tokens = np.asarray(_run(repeated, rows, [10] * len(rows), histories).tokens)
        np.add.at(counts, (np.repeat(np.arange(len(_CASES)), 50), tokens), 1)
    assert (counts[expected == 0] == 0).all(), "a token outside of the kept ones"
    error = np.abs(counts / tries - expected)
    assert (error < 5 * np.sqrt(expected * (1 - expected) / tries) + 1e-6).all()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = np.random.default_rng(1)
    logits, history = rng.normal(size=(12, _V)), rng.integers(0, _V, (12, _L))
    rows = [SamplingParams(**{**case, "seed": 5}) for case in _CASES]  # type: ignore[arg-type]
    together = np.asarray(_run(logits, rows, [9] * 12, history).tokens)
    for i in range(12):
        place = [i] * 12
        same = _run(logits[place], [rows[i]] * 12, [9] * 12, history[place])
        assert set(np.asarray(same.tokens).tolist()) == {together[i]}


@pytest.mark.parametrize("penalty", ["presence", "frequency", "repetition", None])
def test_only_real_rows_cause_work_for_penalties(
    penalty: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step as `Programs` pads it: every parameter of a padding row is 0."""

    def penalize(scores: jax.Array, params: RowParams, history: jax.Array) -> jax.Array:
        return scores.at[:, 7].set(100.0)  # visible if it ran

    monkeypatch.setattr(sampling, "_penalize", penalize)
    floats, ints = np.zeros((NUM_FLOATS, 3), np.float32), np.zeros((NUM_INTS, 3), np.int32)
    floats[1, :2] = floats[5, :2] = 1.0
    if penalty is not None:
        floats[["presence", "frequency", "repetition"].index(penalty) + 3, 1] = 1.5
    params = RowParams(
        jnp.asarray(floats),
        jnp.asarray(ints),
        jnp.full((1, 3), -1),
        jnp.asarray([0, 1, 2]),  # for two rows
        jnp.asarray([5, 5, 0]),
    )
    sampled = sample(jnp.zeros((3, _V)), params, jnp.zeros((2, _L), jnp.int32), 1)
    assert np.asarray(sampled.tokens)[:2].tolist() == ([0, 0] if penalty is None else [7, 7])


def test_nan_is_told() -> None:
    logits = np.zeros((12, _V))
    logits[3, 7] = np.nan
    rows = [SamplingParams(temperature=i % 2) for i in range(12)]
    sampled = _run(logits, rows, [9] * 12, np.zeros((12, _L)))
    assert np.asarray(sampled.valid).tolist() == [i != 3 for i in range(12)]
    assert 0 <= int(sampled.tokens[3]) < _V


def _decode(ids: Any) -> str:
    return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["plain", "añb€c\N{GRINNING FACE}", "x\N{REPLACEMENT CHARACTER}"])
def test_text_comes_in_whole_characters(text: str) -> None:
    builder = TextBuilder(_decode, list("é".encode()), ())
    seen = [""]
    for byte in text.encode():
        builder.push(byte)
        assert text.startswith(builder.text)
        assert builder.text.startswith(seen[-1])
        seen.append(builder.text)
    builder.finish()
    assert builder.text == text
    assert len(set(seen)) >= len(text) - 1


def test_stop_strings_across_tokens() -> None:
    builder = TextBuilder(_decode, [], ("end", "nd of"))
    before = 0
    for i, byte in enumerate(b"the end of"):
        builder.push(byte)
        found = builder.find_stop(before)
        before = len(builder.text)
        assert (found is not None) == (i >= 6)
        if i < 6:
            assert "the ".startswith(builder.shown), "what may be a stop string is held back"
        if found is not None:
            assert found == ("end", 4)
            break


def test_prefix_keys() -> None:
    keys = PrefixKeys(4)
    assert keys.find([1, 2, 3]) == (None, 0)
    key, tokens = keys.find([1, 2, 3, 4, 5, 6])
    assert tokens == 6
    assert keys.find([1, 2, 3, 4, 5, 9, 9]) == (key, 5)
    other, tokens = keys.find([2, 2, 3, 4])
    assert other != key
    assert tokens == 4


@pytest.mark.parametrize("width", [1, 2, 127, 128, 129, 1000, 4096])
def test_argmax_is_the_first_of_the_largest(width: int) -> None:
    scores = np.random.default_rng(width).integers(-3, 3, (8, width)).astype(np.float32)
    scores[0], scores[1], scores[2, -1] = -np.inf, np.inf, 5
    found = jax.jit(sampling._argmax)(scores)
    np.testing.assert_array_equal(found, np.argmax(scores, axis=-1))


def test_draws_are_those_of_jax() -> None:
    scores = np.random.default_rng(0).standard_normal((300, _V)).astype(np.float32)
    seeds, index = np.arange(300, dtype=np.int32), jnp.zeros(300, jnp.int32)
    found = jax.vmap(sampling._categorical)(scores, jnp.asarray(seeds), index, index)
    for seed, row, token in zip(seeds.tolist(), scores, np.asarray(found).tolist(), strict=True):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), 0)
        assert token == int(jax.random.categorical(key, row))
