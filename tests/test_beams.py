"""Beams by `reorder` and samples by `fork` on the shipped Llama: compared with transformers' beam
search, with separate runs, and bit for bit with decoding without shared blocks. The rules of the
search are tested in test_serving_beams.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from llama.arguments import BUNDLED
from llama.checkpoint import load_model
from llama.config import LlamaConfig, load_config
from llama.engine_runner import EngineRunner
from llama.model import Llama
from llama.programs import Programs
from llama.sampling import Sampling
from llama.scan_runner import Request, ScanRunner
from llama.tokenizer import Tokenizer
from llama_models import cache_spec, random_model, served_step

import jax_kvpage as kvp
from jax_kvpage.serving import BeamSearchParams
from jax_kvpage.serving.beams import BeamSearch

pytestmark = pytest.mark.usefixtures("shared_programs")

_BLOCK = 16
_WIDTH = 4
_SAMPLES = 8
# Scores are means of float32 log probabilities, about -1 to -4, and the two sides round their sums
# differently. The largest difference seen is 1e-6.
_TOLERANCE = 1e-5
_TEXT = (
    "The function returns a list of all names that are defined in the module, in the order in "
    "which they were read from the file. If the file does not exist, an error is raised when"
)
_SAMPLING = Sampling(temperature=0.9, top_p=0.95, seed=11, num_samples=_SAMPLES)


@functools.cache
def _config() -> LlamaConfig:
    return load_config(BUNDLED)


@functools.cache
def _model() -> Llama:
    return load_model(BUNDLED, dtype=np.dtype("float32"))


@functools.cache
def _prompt(tokens: int) -> list[int]:
    ids = Tokenizer(BUNDLED, _config().vocab_size).encode(_TEXT)
    assert len(ids) >= tokens
    return ids[:tokens]


def _pool(layout: str, slots: int, blocks: int | None = None) -> kvp.KVPool:
    spec = cache_spec(_config(), max_slots=slots, layout=layout, block_tokens=_BLOCK)
    capacity = spec.virtual_bytes if blocks is None else blocks * spec.num_ranges * spec.block_bytes
    return kvp.KVPool(spec, capacity)


@functools.cache
def _reference() -> Any:
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    return transformers.LlamaForCausalLM.from_pretrained(BUNDLED, dtype="float32").eval()


@functools.cache
def _reference_beams(
    tokens: int, new: int, stop: int | None = None
) -> tuple[list[list[int]], list[float]]:
    """Returns all W sequences of transformers' beam search and their scores, best first."""
    torch = pytest.importorskip("torch", reason="the oracle is transformers on torch")
    prompt = torch.tensor([_prompt(tokens)])
    stop = _config().eos_token_ids[0] if stop is None else stop
    found = _reference().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new,
        num_beams=_WIDTH,
        num_return_sequences=_WIDTH,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = [row[tokens:].tolist() for row in found.sequences]
    outputs = [row[: row.index(stop) + 1] if stop in row else row for row in rows]
    return outputs, found.sequences_scores.tolist()


def _engine(
    pool: kvp.KVPool, model: Llama | None = None, stops: tuple[int, ...] = (), width: int = _WIDTH
) -> EngineRunner:
    step = served_step(model or _model())
    stops = stops or _config().eos_token_ids
    return EngineRunner(*step, pool, Sampling(), stops, num_beams=width)


def _assert_beams(found: list[dict[str, Any]], want: tuple[list[list[int]], list[float]]) -> None:
    assert [each["output_ids"] for each in found] == want[0]
    scores = [each["score"] for each in found]
    np.testing.assert_allclose(scores, want[1], rtol=0, atol=_TOLERANCE)


def test_beams_are_those_of_transformers(layout: str) -> None:
    """Prompts end before, at and after the end of a block; outputs span up to four blocks."""
    cases = [(5, 1), (15, 40), (16, 20), (17, 33), (31, 64)]
    with _pool(layout, 2 * _WIDTH) as pool:
        engine = _engine(pool)
        requests = [Request(i, _prompt(n), new) for i, (n, new) in enumerate(cases)]
        engine.run(requests)
        assert pool.stats().slots_occupied == 0
    for request, found, case in zip(requests, engine.hypotheses, cases, strict=True):
        _assert_beams(found, _reference_beams(*case))
        assert request.output_ids == found[0]["output_ids"]


def test_finished_beams_are_those_of_transformers(layout: str) -> None:
    """With a common end-of-sequence token, beams end at all lengths, and the search early."""
    best = _reference_beams(31, 64)[0][0]
    stop = max(set(best[8:]), key=best[8:].count)
    want = _reference_beams(31, 64, stop)
    assert any(len(output) < 64 for output in want[0])
    with _pool(layout, 2 * _WIDTH) as pool:
        engine = _engine(pool, stops=(stop,))
        engine.run([Request(0, _prompt(31), 64)])
    _assert_beams(engine.hypotheses[0], want)


def test_beams_share_memory(layout: str) -> None:
    with _pool(layout, 2 * _WIDTH) as pool:
        engine = _engine(pool)
        engine.run([Request(0, _prompt(35), 64), Request(1, _prompt(17), 40)])
        assert 0.38 < engine.sharing.saved < 0.75
        pool.trim()
        assert pool.stats().blocks_free == pool.stats().blocks_total


def test_beams_without_blocks_end_with_capacity(layout: str) -> None:
    with _pool(layout, 2 * _WIDTH, blocks=5) as pool:
        engine = _engine(pool)
        request, small = Request(0, _prompt(35), 64), Request(1, _prompt(5), 3)
        engine.run([request, small])
        assert (request.finish_reason, request.output_ids) == ("capacity", [])
        assert small.finish_reason == "length"
        assert len(small.output_ids) == 3


class _Recorded(Programs):
    """Records the log probabilities of the whole vocabulary after each beam's history."""

    def __init__(self, pool: kvp.KVPool) -> None:
        super().__init__(_model(), Sampling(), _config().eos_token_ids)
        self._pool = pool
        self.lanes: dict[tuple[int, ...], tuple[int, Any]] = {}

    def _choose(self, logits: jax.Array, sequence_ids: Any, positions: Any) -> Any:
        del sequence_ids, positions
        return jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), logits.shape[-1])

    def run(
        self, cache: kvp.KVCache, slots: Sequence[int], tokens: Sequence[int]
    ) -> tuple[list[np.ndarray], kvp.KVCache]:
        """Decodes and commits a token in each lane; slot -1 is an idle lane."""
        operands = (np.asarray(tokens, np.int32), np.asarray(slots, np.int32))
        zeros = np.zeros(len(slots), np.int32)
        likely, _, cache = self.decode(cache, *jax.device_put((*operands, zeros)))
        likely = [np.asarray(part) for part in jax.device_get(likely)]
        for lane, (token, slot) in enumerate(zip(tokens, slots, strict=True)):
            if slot >= 0:
                history = (*self._pool.committed(slot), token)
                self.lanes.setdefault(history, (lane, [part[lane] for part in likely]))
                self._pool.commit(slot, token)
        return likely, cache

    def start(self, cache: kvp.KVCache, prompt: list[int]) -> tuple[int, Any, kvp.KVCache]:
        """Acquires a slot and prefills it with a prompt."""
        slot, cache = self._pool.acquire(cache, len(prompt), wait=True)
        likely, cache = self.prefill(cache, [(slot, prompt, 0)], _WIDTH)
        self._pool.commit(slot, prompt)
        return slot, jax.device_get(likely), cache


def test_beams_are_bit_identical_to_decoding_alone(layout: str) -> None:
    """Decodes each final beam again, with the same programs, in a slot that shares nothing."""
    prompt, params = _prompt(29), BeamSearchParams(beam_width=_WIDTH, max_tokens=40)
    with _pool(layout, 2 * _WIDTH) as pool:
        programs = _Recorded(pool)
        search = BeamSearch(params, _config().eos_token_ids, 40)
        slot, likely, cache = programs.start(pool.cache(), prompt)
        slots, shared = [slot], 0
        while parents := search.take(*likely):
            slots, cache = pool.reorder(cache, slots, parents)
            shared = max(shared, pool.stats().blocks_shared)
            likely, cache = programs.run(cache, slots, [beam[-1] for beam in search.tokens])
        cache = pool.release(cache, slots)
        assert shared > 0
        recorded = dict(programs.lanes)
        longest = max(map(len, recorded))
        finals = [history for history in recorded if len(history) == longest]
        assert len(finals) == _WIDTH
        moved = 0
        for history in finals:
            slot, _, cache = programs.start(cache, prompt)
            before = None
            for end in range(len(prompt) + 1, longest + 1):
                lane, want = recorded[history[:end]]
                moved += before not in (None, lane)
                before = lane
                slots, tokens = [-1] * _WIDTH, [0] * _WIDTH
                slots[lane], tokens[lane] = slot, history[end - 1]
                found, cache = programs.run(cache, slots, tokens)
                assert pool.stats().blocks_shared == 0
                for part, wanted in zip(found, want, strict=True):
                    assert part[lane].tobytes() == wanted.tobytes(), end
            cache = pool.release(cache, slot)
        assert moved  # the order of beams has changed


class _Logits(Programs):
    """Programs that also return logits."""

    def _choose(self, logits: jax.Array, sequence_ids: Any, positions: Any) -> Any:
        return super()._choose(logits, sequence_ids, positions), logits


@functools.cache
def _logits_programs() -> _Logits:
    return _Logits(_model(), _SAMPLING, ())


def _decode(
    programs: _Logits, cache: kvp.KVCache, lanes: dict[int, int], token: int, steps: int
) -> tuple[np.ndarray, np.ndarray, kvp.KVCache]:
    """Decodes slots in given lanes; returns tokens `[steps, S]` and logits `[steps, S, vocab]`."""
    slots = np.full(_SAMPLES, -1, np.int32)
    for lane, slot in lanes.items():
        slots[lane] = slot
    slots = jax.device_put(slots)
    ids = jax.device_put(np.arange(_SAMPLES, dtype=np.int32))
    tokens = jax.device_put(np.full(_SAMPLES, token, np.int32))
    rows = []
    for _ in range(steps):
        (tokens, logits), _, cache = programs.decode(cache, tokens, slots, ids)
        rows.append(jax.device_get((tokens, logits)))
    return np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows]), cache


@pytest.mark.covering(1)
@pytest.mark.parametrize("tokens", [16, 38])
def test_samples_by_fork_are_bit_identical_to_separate_ones(layout: str, tokens: int) -> None:
    *prompt, last = _prompt(tokens)
    programs, steps = _logits_programs(), 20

    def prefill(cache: kvp.KVCache) -> tuple[int, kvp.KVCache]:
        slot, cache = pool.acquire(cache, len(prompt))
        width = 1 << (len(prompt) - 1).bit_length()
        padded = np.zeros(width, np.int32)
        padded[: len(prompt)] = prompt
        batch = kvp.Batch.from_lengths([slot], [len(prompt)], num_tokens=width)
        one = jax.device_put(np.zeros(1, np.int32))
        _, cache = programs.step(cache, jax.device_put(padded), batch, one, one)
        return slot, jax.block_until_ready(cache)

    with _pool(layout, _SAMPLES) as pool:
        slot, cache = prefill(pool.cache())
        pool.commit(slot, prompt)
        forks, cache = pool.fork(cache, slot, _SAMPLES - 1)
        whole = len(prompt) // _BLOCK * pool.spec.num_ranges
        assert pool.stats().blocks_shared == whole
        slots = [slot, *forks]
        found, logits, cache = _decode(programs, cache, dict(enumerate(slots)), last, steps)
        assert pool.stats().blocks_shared == whole
        assert len({tuple(column) for column in found.T}) == _SAMPLES
        cache = pool.release(cache, slots)
        for lane in range(_SAMPLES):
            slot, cache = prefill(cache)
            alone, alone_logits, cache = _decode(programs, cache, {lane: slot}, last, steps)
            assert alone[:, lane].tolist() == found[:, lane].tolist()
            assert alone_logits[:, lane].tobytes() == logits[:, lane].tobytes()
            cache = pool.release(cache, slot)


@functools.cache
def _sampled(stop_ids: tuple[int, ...]) -> Programs:
    return Programs(_model(), _SAMPLING, stop_ids)


def _samples(
    layout: str, requests: Sequence[Request], blocks: int | None = None, scan_steps: int = 0
) -> ScanRunner | EngineRunner:
    stop_ids = _config().eos_token_ids
    engine: ScanRunner | EngineRunner
    with _pool(layout, _SAMPLES, blocks) as pool:
        if scan_steps:
            engine = ScanRunner(_sampled(stop_ids), pool, stop_ids, scan_steps=scan_steps)
        else:
            engine = EngineRunner(*served_step(_model()), pool, _SAMPLING, stop_ids)
        engine.run(requests)
        pool.trim()
        assert pool.stats().blocks_free == pool.stats().blocks_total
    return engine


@functools.cache
def _separate(layout: str) -> list[list[int]]:
    requests = [Request(index, _prompt(35), 50) for index in range(_SAMPLES)]
    for request in requests:
        assert _samples(layout, [request], scan_steps=7).sharing.saved == 0
    return [request.output_ids for request in requests]


@pytest.mark.covering(1)
@pytest.mark.parametrize(("blocks", "scan_steps"), [(None, 0), (None, 7), (16, 7)])
def test_the_engine_s_samples_equal_separate_runs(
    layout: str, blocks: int | None, scan_steps: int
) -> None:
    """Also with so little memory that samples wait and are recomputed. (The library's engine
    schedules samples together: test_serving_engine.py.)
    """
    requests = [Request(index, _prompt(35), 50, group=0) for index in range(_SAMPLES)]
    engine = _samples(layout, requests, blocks, scan_steps=scan_steps)
    assert [request.output_ids for request in requests] == _separate(layout)
    assert engine.sharing.saved > 0.1
    assert (sum(request.preemptions for request in requests) > 0) == (blocks is not None)


def test_the_engine_computes_a_prompt_once(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts with three samples each, and a third prompt that shares nothing."""
    requests = [Request(i, _prompt(40 - i // 3), 9, group=i // 3) for i in range(6)]
    requests.append(Request(6, _prompt(11), 9))
    counts: list[list[int]] = []
    step = Programs.step

    def counted(self: Programs, cache: Any, tokens: Any, batch: kvp.Batch, *rest: Any) -> Any:
        counts.append([n for n in np.diff(np.asarray(batch.query_offsets)).tolist() if n])
        return step(self, cache, tokens, batch, *rest)

    monkeypatch.setattr(Programs, "step", counted)
    _samples(layout, requests, scan_steps=7)
    assert counts == [[40], [1, 1, 39], [1, 1, 11]]
    assert all(
        len(request.output_ids) == 9 or request.finish_reason == "stop" for request in requests
    )


def test_a_random_model_has_beams_too(layout: str) -> None:
    """Another shape, where a beam's candidates are the whole vocabulary: K is reduced to it."""
    model = random_model()
    spec = cache_spec(model.config, max_slots=6, layout=layout, block_tokens=32)
    with kvp.KVPool(spec, spec.virtual_bytes) as pool:
        engine = _engine(pool, model, tuple(range(0, 256, 2)), width=3)
        engine.run([Request(0, list(range(20)), 30)])
    (found,) = engine.hypotheses
    assert len(found) == 3
    assert found == sorted(found, key=lambda each: -each["score"])
