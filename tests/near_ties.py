"""Equality of outputs except for near ties.

Programs of different shapes round differently, so a token that is nearly as likely as another may
differ. An output passes if it equals the reference's up to a position where the reference's choice
was close (`TIE`), and if each token from there on is what the reference chooses after the same
tokens (teacher forcing), or another close choice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_kvpage as kvp
from jax_kvpage.serving import SamplingParams
from jax_kvpage.serving.engine.verifying import VerifiedBatch

TIE = 1e-3

# Computes the logits [tokens, vocabulary] of a text.
Logits = Callable[[Sequence[int]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the reference chooses, and how close the choice was.

    Attributes:
        token: The chosen token.
        margin: Gap between the two best (perturbed) scores, or the distance of a token to a cutoff
            if that is smaller (top_p: in probability; top_k and min_p: in scores).
    """

    token: int
    margin: float


def choose(
    row: np.ndarray, seen: Sequence[int], prompt: int, p: SamplingParams, index: int
) -> Choice:
    """Chooses the next token in float64.

    Args:
        row: Logits [vocabulary].
        seen: Tokens so far.
        prompt: Number of prompt tokens among them.
        p: Sampling parameters; with a seed if it samples.
        index: Index of the continuation.
    """
    scores = row.astype(np.float64)
    for token in set(seen):
        scores[token] *= 1 / p.repetition_penalty if scores[token] > 0 else p.repetition_penalty
    for token in seen[prompt:]:
        scores[token] -= p.frequency_penalty
    for token in set(seen[prompt:]):
        scores[token] -= p.presence_penalty
    if len(seen) - prompt < p.min_tokens:
        scores[list(p.stop_token_ids)] = -np.inf
    margins = [np.inf]
    if p.temperature > 0:
        assert p.seed is not None
        scores, margins = _cut((scores - scores.max()) / p.temperature, p)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(p.seed), index), len(seen))
        scores = scores + np.asarray(jax.random.gumbel(key, scores.shape, jnp.float32), np.float64)
    second, best = np.sort(scores)[-2:]
    return Choice(int(np.argmax(scores)), float(min(best - second, *margins)))


def _cut(scores: np.ndarray, p: SamplingParams) -> tuple[np.ndarray, list[float]]:
    """Masks the scores that top_k, top_p and min_p exclude with -inf; also returns the margins."""
    order, margins = np.argsort(-scores, kind="stable"), [np.inf]
    kept = np.ones(len(scores), bool)
    if 0 < p.top_k < len(scores):
        kept[order[p.top_k :]] = False
        margins.append(scores[order[p.top_k - 1]] - scores[order[p.top_k]])
    if p.top_p < 1:
        likely = np.where(kept, np.exp(scores), 0.0)[order]
        before = np.cumsum(likely / likely.sum()) - likely / likely.sum()
        kept[order[1:]] &= before[1:] < p.top_p
        margins.append(np.abs(before[1:] - p.top_p).min())
    if p.min_p > 0:
        kept &= scores >= np.log(p.min_p)
        margins.append(np.abs(scores - np.log(p.min_p)).min())
    return np.where(kept, scores, -np.inf), margins


def check(
    got: Sequence[int],
    reference: Sequence[int],
    prompt: Sequence[int],
    params: SamplingParams,
    logits: Logits,
    index: int = 0,
) -> int:
    """Asserts that an output equals the reference's, except for near ties.

    Args:
        got: Output tokens; may have been cut short.
        reference: Output tokens of the request run alone.
        prompt: Prompt tokens.
        params: Sampling parameters of the request.
        logits: Computes the logits of a whole text.
        index: Index of the continuation.

    Returns:
        The number of tokens that differ from the reference's choice.
    """
    pairs = enumerate(zip(got, reference, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(got), len(reference)))
    if first == len(got):
        return 0
    assert first < len(reference), f"{len(got)} tokens, but the reference ends after {first}"
    ids, ties = [*prompt, *got], 0
    rows = logits(ids)
    for i in range(first, len(got)):
        end = len(prompt) + i
        choice = choose(rows[end - 1], ids[:end], len(prompt), params, index)
        if choice.token != got[i]:
            assert choice.margin < TIE, (
                f"token {i} is {got[i]}, not {choice.token}, which leads by {choice.margin:.2g}"
            )
            ties += 1
    return ties


def text_logits(step: Any, params: Any, pool: kvp.KVPool, most: int = 128) -> Logits:
    """Returns a function that runs the model on texts of at most `most` tokens, each in one step,
    on an unused pool.
    """

    @functools.partial(jax.jit, donate_argnums=1)
    def run(params: Any, cache: kvp.KVCache, tokens: jax.Array, slot: Any, count: Any) -> Any:
        slots, offsets = jnp.stack([slot]), jnp.stack([0, count])
        batch = VerifiedBatch(slots, offsets, num_tokens=most, rows=jnp.arange(most))
        logits, cache = step(params, cache, tokens, batch)
        return logits, kvp.advance(cache, batch)

    def logits(ids: Sequence[int]) -> np.ndarray:
        slot, cache = pool.acquire(pool.cache(), len(ids), wait=True)
        padded = np.zeros(most, np.int32)
        padded[: len(ids)] = ids
        rows, cache = run(params, cache, padded, np.int32(slot), np.int32(len(ids)))
        pool.release(cache, slot)
        return np.asarray(rows[: len(ids)])

    return logits
