"""Everything at once, with programs of several shapes: outputs equal those of each request
alone.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import near_ties
import numpy as np
import pytest
import serving_rig as rig

from jax_kvpage.serving import (
    DraftModel,
    Engine,
    LastComeFirst,
    RequestOutput,
    SamplingParams,
    Watermark,
)

pytestmark = pytest.mark.usefixtures("shared_programs")

_PROMPTS = [rig.prompt(n, n) for n in (5, 40, 17, 70, 1, 33)]
_SOME = SamplingParams(seed=7, max_tokens=20, top_k=20, top_p=0.9, min_p=0.01, n=2)
_MIXED = [
    SamplingParams(temperature=0, max_tokens=20),
    _SOME,
    SamplingParams(
        seed=8, max_tokens=20, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.3
    ),
    SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.2),
    dataclasses.replace(_SOME, temperature=0.4, top_k=0, stop_token_ids=[3], min_tokens=5),
    SamplingParams(seed=9, max_tokens=20, temperature=0.8),
]


@pytest.fixture(scope="module")
def alone() -> list[list[list[int]]]:
    options = rig.config(prefix_caching=False)
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, options) as engine:
        return [
            rig.tokens(engine.generate([prompt], params))[0]
            for prompt, params in zip(_PROMPTS, _MIXED, strict=True)
        ]


@pytest.fixture(scope="module")
def logits() -> Iterator[near_ties.Logits]:
    with rig.pool() as pool:
        yield near_ties.text_logits(rig.step, rig.params(), pool)


def test_the_reference_chooses_what_the_engine_does(alone, logits) -> None:
    """A control: away from near ties, the reference's choices are the engine's, token by token."""
    close = total = 0
    for prompt, params, outputs in zip(_PROMPTS, _MIXED, alone, strict=True):
        for index, tokens in enumerate(outputs):
            rows = logits([*prompt, *tokens])
            for i, token in enumerate(tokens):
                end = len(prompt) + i
                seen = [*prompt, *tokens[:i]]
                choice = near_ties.choose(rows[end - 1], seen, len(prompt), params, index)
                total += 1
                if choice.margin < near_ties.TIE:
                    close += 1
                else:
                    assert choice.token == token
    assert close < total / 5


def test_wrong_tokens_are_found(alone, logits) -> None:
    for which, (prompt, params) in enumerate(zip(_PROMPTS, _MIXED, strict=True)):
        (expected, *_), wrong = alone[which], list(alone[which][0])
        wrong[4] = (wrong[4] + 1) % rig.VOCABULARY
        rows = logits([*prompt, *wrong])
        seen = [*prompt, *wrong[:4]]
        choice = near_ties.choose(rows[len(seen) - 1], seen, len(prompt), params, 0)
        if choice.margin >= near_ties.TIE:
            with pytest.raises(AssertionError, match="token 4 is"):
                near_ties.check(wrong, expected, prompt, params, logits)


@pytest.mark.parametrize("gap", [0.5 * near_ties.TIE, 2 * near_ties.TIE])
@pytest.mark.parametrize("kind", ["greedy", "sampled", "top_p"])
def test_what_counts_as_a_tie(kind: str, gap: float) -> None:
    row, seen = np.full(8, -5.0), [1, 2]
    params = SamplingParams(temperature=0)
    if kind == "greedy":
        row[3], row[4] = 1.0 + gap, 1.0
    elif kind == "sampled":
        params = SamplingParams(seed=5)
        noise = near_ties.choose(row, seen, 2, params, 0)
        best = noise.token
        row[(best + 1) % 8] = -5.0
        # Lower the best score until it leads the second one by the gap.
        row[best] -= noise.margin - gap
    else:
        row = np.log(np.asarray([0.5 + gap, 0.3 - gap, 0.2]))
        params = SamplingParams(seed=5, top_p=0.5)
    choice = near_ties.choose(row, seen, 2, params, 0)
    assert (choice.margin < near_ties.TIE) == (gap < near_ties.TIE)
    assert choice.margin == pytest.approx(gap, rel=1e-3)


@pytest.mark.parametrize("drafted", [False, True], ids=["lookup", "draft"])
def test_everything_at_once(alone, logits, drafted: bool) -> None:
    """Pressure, failures, cancellation, prefixes, samples, speculation, steps of two sizes."""
    rng = random.Random(drafted)
    options = rig.config(
        num_speculative_tokens=2,
        prompt_lookup_min=1,
        buckets=((8, 4), (32, 4)),
        preemption=LastComeFirst(),
        admission=Watermark(0.0),
    )
    with rig.pool(9) as pool, rig.pool(12) as own:
        draft = DraftModel(step=rig.step, params=rig.params(), pool=own) if drafted else None
        with Engine(rig.step, rig.params(), pool, options, draft=draft) as engine:
            outputs: list[tuple[int, RequestOutput]] = []
            while len(outputs) < 24 or engine.has_unfinished:
                while len(outputs) < 24 and rng.random() < 0.8:
                    which = rng.randrange(len(_PROMPTS))
                    added = engine.add_request(_PROMPTS[which], _MIXED[which])
                    outputs.append((which, added))
                engine.step()
                if rng.random() < 0.04:
                    pool.cache()
                if drafted and rng.random() < 0.02:
                    own.cache()
                if rng.random() < 0.03:
                    engine.cancel(rng.choice(outputs)[1])
            stats = engine.stats
    assert stats.generations > 0
    assert stats.preemptions > 0
    assert stats.accepted > 0
    assert any(output.metrics.num_cached_tokens for _, output in outputs)
    reasons, ties = set(), 0
    for which, output in outputs:
        prompt, params = _PROMPTS[which], _MIXED[which]
        for each, expected in zip(output.outputs, alone[which], strict=True):
            reasons.add(each.finish_reason)
            found = near_ties.check(each.token_ids, expected, prompt, params, logits, each.index)
            ties += found
            if not found and each.finish_reason != "cancelled":
                assert each.token_ids == expected
    assert reasons <= {"length", "stop", "cancelled"}
    assert {"length", "cancelled"} <= reasons
    assert ties <= 3
