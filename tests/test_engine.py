"""The example's engines: text does not depend on scans, chunks, neighbours, stalls or preemption,
and memory is returned.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from llama.model import Llama, _lengths_after
from llama.sampling import Sampling
from llama_models import UNTIED, Outcome, cache_spec, generate, random_model

from jax_kvpage.serving.engine.verifying import VerifiedBatch

pytestmark = pytest.mark.usefixtures("shared_programs")

_GREEDY = Sampling()
_SAMPLED = Sampling(0.9, top_k=60, seed=5)
_DRIVERS = pytest.mark.parametrize("scan_steps", [0, 5], ids=["loop", "scan"])


@functools.cache
def _model() -> Llama:
    return random_model(UNTIED)


def _prompts(*lengths: int) -> list[list[int]]:
    return [
        np.random.default_rng(index).integers(0, 256, length).tolist()
        for index, length in enumerate(lengths)
    ]


@functools.cache
def _alone(length: int, index: int, new_tokens: int, how: Sampling = _GREEDY) -> list[int]:
    """Returns the output of one of `_prompts` when it has the pool to itself."""
    prompts = _prompts(*[length] * (index + 1))
    spec = cache_spec(UNTIED, max_slots=2, block_tokens=16)
    return generate(_model(), prompts, spec=spec, max_new_tokens=new_tokens, sampling=how).outputs[
        index
    ]


def test_scans_chunks_and_slots_do_not_change_the_text() -> None:
    prompts = _prompts(3, 50, 21, 9, 33)
    limits = [30, 7, 1, 24, 12]

    def run(max_slots: int, layout: str = "fused", **options: int) -> list[list[int]]:
        spec = cache_spec(UNTIED, max_slots=max_slots, layout=layout)
        outcome = generate(
            _model(), prompts, spec=spec, max_new_tokens=limits, sampling=_SAMPLED, **options
        )
        assert outcome.reasons == ["length"] * 5
        return outcome.outputs

    expected = run(5)
    assert [len(output) for output in expected] == limits
    assert run(5, "per_layer", scan_steps=8) == expected
    assert run(2, scan_steps=4) == expected
    assert run(3, "per_layer", prefill_chunk=16) == expected


def test_sampling_differs_from_greedy_and_by_sequence() -> None:
    prompt = _prompts(12)[0]
    spec = cache_spec(UNTIED, max_slots=3)
    sampled = generate(_model(), [prompt] * 3, spec=spec, sampling=_SAMPLED).outputs
    greedy = generate(_model(), [prompt] * 3, spec=spec).outputs
    assert greedy[0] == greedy[1] == greedy[2]
    assert len({tuple(output) for output in (*sampled, greedy[0])}) == 4


@_DRIVERS
def test_a_sequence_out_of_blocks_waits_and_goes_on_unchanged(scan_steps: int) -> None:
    # Each starts with one block of 16 tokens. Of five blocks, the first needs three in total and
    # the second four: at 33 tokens the second finds none left until the first has finished.
    spec = cache_spec(UNTIED, max_slots=2, block_tokens=16)
    outcome = generate(
        _model(),
        _prompts(15, 15),
        spec=spec,
        blocks=5,
        max_new_tokens=[20, 40],
        scan_steps=scan_steps,
        sampling=_SAMPLED,
    )
    assert outcome.engine.stalls > 0
    assert sum(request.preemptions for request in outcome.requests) == 0
    assert outcome.reasons == ["length", "length"]
    assert outcome.outputs[0] == _alone(15, 0, 20, _SAMPLED)
    assert outcome.outputs[1] == _alone(15, 1, 40, _SAMPLED)


@_DRIVERS
def test_when_all_are_out_of_blocks_the_last_is_recomputed(scan_steps: int) -> None:
    spec = cache_spec(UNTIED, max_slots=2, block_tokens=16)
    outcome = generate(
        _model(),
        _prompts(15, 15),
        spec=spec,
        blocks=5,
        max_new_tokens=40,
        scan_steps=scan_steps,
        sampling=_SAMPLED,
    )
    assert [request.preemptions for request in outcome.requests] == [0, 1]
    assert outcome.reasons == ["length", "length"]
    assert outcome.outputs == [_alone(15, 0, 40, _SAMPLED), _alone(15, 1, 40, _SAMPLED)]


@_DRIVERS
def test_what_can_never_fit_ends_with_a_reason(scan_steps: int) -> None:
    spec = cache_spec(UNTIED, max_slots=3, block_tokens=16)
    outcome = generate(
        _model(),
        _prompts(15, 60, 15),
        spec=spec,
        blocks=3,
        max_new_tokens=[60, 8, 8],
        scan_steps=scan_steps,
    )
    assert outcome.reasons == ["capacity", "capacity", "length"]
    # Three blocks hold 48 tokens, and the last sampled token needs no room.
    assert outcome.outputs[0] == _alone(15, 0, 60)[: 48 + 1 - 15]
    assert outcome.outputs[1] == []
    assert outcome.outputs[2] == _alone(15, 2, 8)


@_DRIVERS
def test_an_early_stop_frees_its_slot_while_the_others_go_on(scan_steps: int) -> None:
    prompts = _prompts(15, 15, 15)
    free = [_alone(15, index, 40) for index in range(3)]
    others = {*free[1], *free[2]}
    stop = next(token for token in free[0][2:] if token not in others)
    spec = cache_spec(UNTIED, max_slots=2, block_tokens=16)
    outcome = generate(
        _model(),
        prompts,
        spec=spec,
        max_new_tokens=40,
        stop_ids=(stop, 256),
        scan_steps=scan_steps,
    )
    assert outcome.reasons == ["stop", "length", "length"]
    assert outcome.outputs[0] == free[0][: free[0].index(stop) + 1]
    assert outcome.outputs[1:] == free[1:]
    # The third took the first one's slot while the second was still running.
    ends = [len(outcome.order) - outcome.order[::-1].index(index) for index in range(3)]
    assert ends[0] <= outcome.order.index(2) < ends[1] < ends[2]


def test_a_slot_that_is_full_ends_its_sequence() -> None:
    spec = cache_spec(UNTIED, max_slots=1, max_seq_len=32, block_tokens=16)
    outcome = generate(_model(), _prompts(20), spec=spec, max_new_tokens=100, scan_steps=7)
    assert outcome.reasons == ["length"]
    assert len(outcome.outputs[0]) == 12


def test_memory_follows_the_sequences() -> None:
    spec = cache_spec(UNTIED, max_slots=3, block_tokens=16)
    outcome: Outcome = generate(
        _model(), _prompts(4, 20, 40), spec=spec, max_new_tokens=[4, 20, 60]
    )
    blocks = [sample.occupied_bytes // spec.block_bytes for sample in outcome.engine.samples]
    # Nothing, then 5, 21 and 41 tokens; then fewer when one ends, and more as the last one grows.
    assert blocks[:2] == [0, 1 + 2 + 3]
    assert blocks[-2:] == [7, 0]
    assert max(blocks) <= 8
    assert outcome.stats.slots_occupied == 0


def test_dynamic_rope_asks_for_lengths_of_sequences_not_of_wanted_rows() -> None:
    """When an engine verifies guesses, `last_rows` has several rows per sequence."""
    batch = VerifiedBatch(
        jnp.asarray([0, 1]), jnp.asarray([0, 3, 4]), num_tokens=6, rows=jnp.asarray([2, 1, 0, 3])
    )
    after = _lengths_after(jnp.asarray([5, 6, 7, 9, 0, 0]), batch)
    np.testing.assert_array_equal(after[:4], [8, 8, 8, 10])
