"""Beam search in the engine: the results of transformers, unchanged by other requests, memory
pressure and faults.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import serving_rig as rig
from llama.arguments import BUNDLED
from llama.checkpoint import load_model
from llama.config import load_config
from llama.serving import model_step
from llama.tokenizer import Tokenizer
from llama_models import cache_spec
from test_compile_count import compilations

import jax_kvpage as kvp
from jax_kvpage.errors import OutOfSlots
from jax_kvpage.serving import (
    AsyncEngine,
    BeamSearchParams,
    Engine,
    EngineConfig,
    LastComeFirst,
    RequestOutput,
    RequestRefused,
    SamplingParams,
    Watermark,
)

pytestmark = pytest.mark.usefixtures("shared_programs")

_TOLERANCE = 1e-4  # for scores, from float32 logits that both sides round differently
_WIDE = BeamSearchParams(beam_width=3, max_tokens=24)
_NARROW = BeamSearchParams(beam_width=2, max_tokens=30, length_penalty=0.5)
_GREEDY = SamplingParams(temperature=0, max_tokens=20)
_SAMPLED = SamplingParams(seed=7, n=2, max_tokens=20, top_k=20)
_PROMPTS = [rig.prompt(n, n) for n in (5, 40, 17, 16, 1, 33)]
# Requests are admitted without regard to their growth, so blocks run short later.
_TIGHT = {"preemption": LastComeFirst(), "admission": Watermark(0.0)}
_MIXED = [_WIDE, _GREEDY, _NARROW, _WIDE, _NARROW, _SAMPLED]
_TEXT = (
    "The function returns a list of all names that are defined in the module, in the order in "
    "which they were read from the file. If the file does not exist, an error is raised when"
)

Results = list[list[tuple[list[int], float | None]]]


def _pool(blocks: int = 64) -> kvp.KVPool:
    return rig.pool(blocks, max_slots=24)


def _results(outputs: Sequence[RequestOutput]) -> Results:
    return [[(each.token_ids, each.score) for each in output.outputs] for output in outputs]


def _engine(pool: kvp.KVPool, step: Any = rig.step, **options: Any) -> Engine:
    return Engine(step, rig.params(), pool, rig.config(**{"max_num_seqs": 8, **options}))


def _check_same(outputs: Sequence[RequestOutput], alone: Results, exact: bool = True) -> None:
    """Same tokens and scores; after a preemption, scores are computed in different parts."""
    found = _results(outputs)
    assert [[ids for ids, _ in one] for one in found] == [[ids for ids, _ in one] for one in alone]
    for one, other in zip(found, alone, strict=True):
        for (_, score), (_, wanted) in zip(one, other, strict=True):
            assert score == (wanted if exact or wanted is None else pytest.approx(wanted, abs=1e-4))


@pytest.fixture(scope="module")
def alone() -> Results:
    """Runs each request alone in an engine with memory for everything."""
    with _pool() as pool, _engine(pool, prefix_caching=False) as engine:
        pairs = zip(_PROMPTS, _MIXED, strict=True)
        return [_results(engine.generate([prompt], params))[0] for prompt, params in pairs]


def test_continuations_are_ranked_and_their_scores_are_those_of_the_model(alone) -> None:
    for prompt, params, found in zip(_PROMPTS, _MIXED, alone, strict=True):
        if isinstance(params, BeamSearchParams):
            assert len({tuple(ids) for ids, _ in found}) == len(found) == params.beam_width
            assert [score for _, score in found] == sorted((s for _, s in found), reverse=True)
            # Recompute the log probabilities, each token with everything before it.
            ids, score = found[0]
            with _pool() as pool, _engine(pool, prefix_caching=False) as engine:
                texts = [[*prompt, *ids[:i]] for i in range(len(ids))]
                one = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
                tables = [output.outputs[0].logprobs for output in engine.generate(texts, one)]
            total = sum(table[0][token].logprob for table, token in zip(tables, ids, strict=True))
            assert score == pytest.approx(total / len(ids) ** params.length_penalty, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_caching": False},
        {},
        {"num_speculative_tokens": 3, "prompt_lookup_min": 1},
        {"blocks": 10, "prefix_caching": False, **_TIGHT},
        {"blocks": 10, "num_speculative_tokens": 2, **_TIGHT},
    ],
    ids=["batched", "prefixes", "guesses", "pressure", "pressure-guesses"],
)
def test_beams_do_not_depend_on_what_else_runs(alone, options: dict[str, Any]) -> None:
    with _pool(options.pop("blocks", 64)) as pool:
        with _engine(pool, **options) as engine:
            outputs = engine.generate(_PROMPTS, _MIXED)
        rig.check_empty(pool)
    _check_same(outputs, alone, exact="preemption" not in options)
    preempted = [output.metrics.num_preemptions for output in outputs]
    beams = [i for i, params in enumerate(_MIXED) if isinstance(params, BeamSearchParams)]
    assert any(preempted[i] for i in beams) == ("preemption" in options)


def test_beams_without_spare_slots_or_blocks(alone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots of discarded beams drain before other beams can use them."""
    with _pool() as pool, _engine(pool) as engine:
        reorder, refused = pool.reorder, 0

        def reorder_without_slots(cache: Any, slots: Sequence[int], parents: Sequence[int]) -> Any:
            nonlocal refused
            if set(range(len(slots))) - set(parents):
                refused += 1
                raise OutOfSlots("no slots", wanted=1, free=0, draining=1)
            return reorder(cache, slots, parents)

        monkeypatch.setattr(pool, "reorder", reorder_without_slots)
        _check_same(engine.generate(_PROMPTS, _MIXED), alone)
        assert refused > 10
        engine.close()
        rig.check_empty(pool)


def test_failed_steps_are_run_again(alone) -> None:
    with _pool() as pool, _engine(pool) as engine:
        pairs = zip(_PROMPTS, _MIXED, strict=True)
        outputs = [engine.add_request(prompt, params) for prompt, params in pairs]
        steps = 0
        while engine.has_unfinished:
            if steps % 5 == 3:
                pool.cache()  # the engine's cache is stale: the next step fails
            engine.step()
            steps += 1
        assert engine.stats.failures >= 5
        _check_same(outputs, alone)
        engine.close()
        rig.check_empty(pool)


@pytest.mark.parametrize("what", ["cancel", "interrupt", "closed"])
def test_an_end_at_any_step(alone, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Ends one of two searches at any step; the other one continues."""
    for when in range(0, 26, 5):
        with _pool() as pool, _engine(pool) as engine:
            gone = engine.add_request(_PROMPTS[0], _WIDE)
            for _ in range(when):
                engine.step()
            other = None if what == "interrupt" else engine.add_request(_PROMPTS[2], _NARROW)
            if what == "cancel":
                engine.cancel(gone)
            elif what == "interrupt":
                with monkeypatch.context() as patch:
                    patch.setattr(pool, "reorder", _interrupt)
                    patch.setattr(pool, "commit", _interrupt)
                    try:
                        while engine.has_unfinished:
                            engine.step()
                    except KeyboardInterrupt:
                        pass
                other = engine.add_request(_PROMPTS[2], _NARROW)
            else:
                engine.close()
            while engine.has_unfinished:
                engine.step()
            if what != "closed":
                assert other is not None
                _check_same([other], alone[2:3])
            reasons = {each.finish_reason for each in gone.outputs}
            assert gone.finished
            wanted = {"cancel": "cancelled", "interrupt": "error", "closed": "cancelled"}[what]
            assert reasons == {"length"} if when == 25 else reasons == {wanted}
            engine.close()
            rig.check_empty(pool)


def _interrupt(*args: Any) -> Any:
    raise KeyboardInterrupt


def test_a_model_that_always_fails_ends_its_searches() -> None:
    def step(*args: Any) -> Any:
        raise KeyError("layer")

    with _pool() as pool, _engine(pool, step) as engine:
        (output,) = engine.generate(_PROMPTS[:1], _WIDE)
        assert [each.finish_reason for each in output.outputs] == ["error"] * 3
        assert "KeyError: 'layer'" in str(output.error)
        engine.close()
        rig.check_empty(pool)


def test_memory_that_holds_no_more_ends_the_search() -> None:
    with _pool(6) as pool, _engine(pool) as engine:
        params = BeamSearchParams(beam_width=3, max_tokens=100)
        (output,) = engine.generate([rig.prompt(20)], params)
        assert [each.finish_reason for each in output.outputs] == ["capacity"] * 3
        assert all(len(each.token_ids) > 10 for each in output.outputs)
        engine.close()
        rig.check_empty(pool)


def test_nothing_is_compiled_after_warm_up() -> None:
    with _pool() as pool, _engine(pool, buckets=((8, 8), (32, 8))) as engine:
        engine.warm_up()
        with compilations() as compiled:
            widest = BeamSearchParams(beam_width=4, max_tokens=40)
            engine.generate([*_PROMPTS, *_PROMPTS[:2]], [*_MIXED, widest, widest])
        assert compiled == []


def test_asyncio_tasks(alone) -> None:
    async def run(pool: kvp.KVPool) -> list[RequestOutput]:
        async with AsyncEngine(_engine(pool)) as engine:
            pairs = zip(_PROMPTS, _MIXED, strict=True)
            return await asyncio.gather(*(engine.generate(*pair) for pair in pairs))

    with _pool() as pool:
        _check_same(asyncio.run(run(pool)), alone)
        rig.check_empty(pool)


def test_text_and_stops() -> None:
    stops = tuple(range(0, rig.VOCABULARY, 3))
    options = rig.config(max_num_seqs=8, eos_token_ids=(1, 2, 7), max_logprobs=200)
    with _pool() as pool:
        text = " ".join
        with Engine(
            rig.step, rig.params(), pool, options, detokenize=lambda ids: text(map(str, ids)) + " "
        ) as engine:
            params = BeamSearchParams(beam_width=4, max_tokens=30, stop_token_ids=stops)
            (output,) = engine.generate(_PROMPTS[:1], params)
            free = BeamSearchParams(beam_width=4, max_tokens=30, ignore_eos=True)
            (longest,) = engine.generate(_PROMPTS[:1], free)
        rig.check_empty(pool)
    assert {each.finish_reason for each in output.outputs} == {"stop"}
    for each in output.outputs:
        last = each.token_ids[-1]
        assert not {1, 2, 7, *stops} & {*each.token_ids[:-1]}
        assert each.stop_reason == (last if last in stops else None)
        assert each.text.split() == list(map(str, each.token_ids))
        assert each.cumulative_logprob == pytest.approx(each.score * len(each.token_ids))
    assert all(len(each.token_ids) == 30 for each in longest.outputs)
    assert len(output.metrics.token_times) == len(output.outputs[0].token_ids)


def test_refusals() -> None:
    with _pool() as pool, _engine(pool, eos_token_ids=(1, 2)) as engine:
        with pytest.raises(ValueError, match=r"beam_width 7 looks at 21 candidates .* is 20"):
            engine.add_request([1], BeamSearchParams(beam_width=7))
        with pytest.raises(RequestRefused, match="takes 10 slots, but max_num_seqs is 8"):
            engine.add_request([1], BeamSearchParams(beam_width=5))
        assert not engine.has_unfinished
    with pytest.raises(ValueError, match="BeamSearchParams") as error:
        BeamSearchParams(
            beam_width=0, max_tokens=True, ignore_eos=1, stop_token_ids=(-1,),
            length_penalty=float("inf"), early_stopping="always",
        )  # fmt: skip
    for field in BeamSearchParams.__dataclass_fields__:
        assert f"{field} is" in str(error.value)


@functools.cache
def _llama() -> tuple[Any, Any, Any]:
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    reference = transformers.LlamaForCausalLM.from_pretrained(BUNDLED, dtype="float32").eval()
    return reference, *model_step(load_model(BUNDLED, dtype=np.dtype("float32")))


@functools.cache
def _prompt(tokens: int) -> list[int]:
    ids = Tokenizer(BUNDLED, load_config(BUNDLED).vocab_size).encode(_TEXT)
    assert len(ids) >= tokens
    return ids[:tokens]


def _reference(
    prompt: list[int], params: BeamSearchParams, eos: tuple[int, ...]
) -> tuple[list[list[int]], list[float]]:
    """Returns transformers' beam search: all W sequences and their scores, best first."""
    torch = pytest.importorskip("torch", reason="the oracle is transformers on torch")
    stops = [*params.stop_token_ids, *(() if params.ignore_eos else eos)]
    ids = torch.tensor([prompt])
    found = _llama()[0].generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=params.max_tokens,
        num_beams=params.beam_width,
        num_return_sequences=params.beam_width,
        do_sample=False,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        eos_token_id=stops,
        pad_token_id=stops[0],
        return_dict_in_generate=True,
        output_scores=True,
    )
    outputs = []
    for row in found.sequences[:, len(prompt) :].tolist():
        ends = [place for place, token in enumerate(row) if token in stops]
        outputs.append(row[: ends[0] + 1] if ends else row)
    return outputs, found.sequences_scores.tolist()


@functools.cache
def _common() -> tuple[int, ...]:
    """Tokens of a long output, most common first: as stop tokens they end beams at all lengths."""
    params = BeamSearchParams(beam_width=4, max_tokens=64)
    best = _reference(_prompt(31), params, load_config(BUNDLED).eos_token_ids)[0][0][8:]
    return tuple(sorted(set(best), key=lambda token: -best.count(token)))


def test_results_are_those_of_transformers() -> None:
    """Searches of several lengths and rules, with and without early ends, in one batch."""
    _, step, weights = _llama()
    config = load_config(BUNDLED)
    stops = _common()
    # Prompts end before, at and after the end of a block; outputs span up to four blocks.
    cases: list[tuple[int, dict[str, Any]]] = [
        (5, {"max_tokens": 1}),
        (16, {"max_tokens": 20, "length_penalty": 0.0}),
        (17, {"max_tokens": 33, "length_penalty": 2.0, "early_stopping": "never"}),
        (31, {"max_tokens": 64}),
        (31, {"max_tokens": 64, "stop_token_ids": stops[:1]}),
        (31, {"max_tokens": 64, "stop_token_ids": stops[:1], "early_stopping": True}),
        (31, {"max_tokens": 64, "stop_token_ids": stops[1:3], "length_penalty": -1.0}),
    ]
    prompts = [_prompt(tokens) for tokens, _ in cases]
    params = [BeamSearchParams(beam_width=4, **options) for _, options in cases]
    spec = cache_spec(config, max_slots=16, block_tokens=16)
    options = EngineConfig(
        max_num_batched_tokens=64, buckets=((64, 16),), eos_token_ids=config.eos_token_ids
    )
    with kvp.KVPool(spec, spec.virtual_bytes) as pool:
        with Engine(step, weights, pool, options) as engine:
            outputs = engine.generate(prompts, params)
        rig.check_empty(pool)
    early = 0
    for prompt, each, output in zip(prompts, params, outputs, strict=True):
        sequences, scores = _reference(prompt, each, config.eos_token_ids)
        assert [found.token_ids for found in output.outputs] == sequences, each
        found = [one.score for one in output.outputs]
        # A negative power multiplies sums instead of dividing them.
        np.testing.assert_allclose(found, scores, rtol=2e-6, atol=_TOLERANCE)
        early += any(len(ids) < each.max_tokens for ids in sequences)
    assert early >= 2
