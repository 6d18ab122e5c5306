"""A request with a wrong argument is refused at once, with the reason, and disturbs no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import serving_rig as rig

from jax_kvpage.serving import (
    BeamSearchParams,
    Engine,
    EngineConfig,
    Request,
    SamplingParams,
    Scheduler,
)

pytestmark = pytest.mark.usefixtures("shared_programs")

_IDS = [1, 2, 3]
_NO_TEXT = "\ud800"  # UTF-8 cannot encode it


@pytest.fixture
def engine() -> Iterator[Engine]:
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as made:
        yield made


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda e: e.add_request(_IDS, priority="high"), "priority is 'high', wanted an int"),
        (lambda e: e.add_request(_IDS, priority=1.5), "priority is 1.5, wanted an int"),
        (lambda e: e.add_request(_IDS, priority=2**70), "wanted an int of 64 bits"),
        (lambda e: e.add_request(_IDS, deadline="soon"), "deadline is 'soon', wanted a number"),
        (lambda e: e.add_request(_IDS, deadline=float("nan")), "deadline is nan, wanted a number"),
        (lambda e: e.add_request(_IDS, namespace=_NO_TEXT), "namespace: wanted text that UTF-8"),
        (lambda e: e.add_request(_IDS, namespace=3), "namespace: wanted a str or None, got int 3"),
        (lambda e: e.add_request([1.9, 2]), "prompt.0.: wanted an int, got float 1.9"),
        (lambda e: e.add_request([5, True]), "prompt.1.: wanted an int, got bool True"),
        (lambda e: e.add_request(np.asarray([1.5])), "got float64.1."),
        (lambda e: e.add_request([_IDS]), "wanted the ids of one sequence"),
        (lambda e: e.add_request([2**31]), "from -2147483648 to 2147483647, got 2147483648"),
        (lambda e: e.generate(_IDS), "prompt: wanted a list, tuple or one-dimensional array"),
        (lambda e: e.add_request(_IDS, {"n": 2}), "wanted SamplingParams or BeamSearchParams"),
        (lambda e: e.add_request(_IDS, {}), "wanted SamplingParams or BeamSearchParams"),
    ],
)
def test_a_wrong_request_disturbs_no_other(
    engine: Engine, wrong: Callable[[Engine], Any], text: str
) -> None:
    alone = engine.generate([_IDS], rig.GREEDY)
    # With a priority and a deadline, so that those of the wrong request are compared with them.
    outputs = [engine.add_request(_IDS, rig.GREEDY, priority=1, deadline=1e30) for _ in range(2)]
    engine.step()
    with pytest.raises(ValueError, match=text):
        wrong(engine)
    while engine.has_unfinished:
        engine.step()
    assert rig.tokens(outputs) == rig.tokens(alone) * 2


@pytest.mark.parametrize("top_k", [2**31 - 1, 2**31, 10**30])
def test_a_large_top_k_means_all(engine: Engine, top_k: int) -> None:
    some = SamplingParams(seed=3, max_tokens=8)
    large = SamplingParams(seed=3, max_tokens=8, top_k=top_k)
    outputs = engine.generate([_IDS, _IDS], [some, large])
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


def test_min_tokens_may_be_any_number_up_to_max_tokens(engine: Engine) -> None:
    huge = SamplingParams(temperature=0, max_tokens=2**40, min_tokens=2**40)
    (output,) = engine.generate([_IDS], huge)
    assert output.outputs[0].finish_reason == "length"
    assert len(output.outputs[0].token_ids) == 128 - len(_IDS)


def test_numpy_numbers_are_numbers() -> None:
    plain = SamplingParams(temperature=0.5, top_k=5, seed=5, stop_token_ids=(7,), max_tokens=3)
    options: dict[str, Any] = {
        "temperature": np.float32(0.5),
        "top_k": np.int64(5),
        "seed": np.uint32(5),
        "stop_token_ids": (np.int32(7),),
        "max_tokens": np.int64(3),
    }
    numpy = SamplingParams(**options)
    assert plain == numpy
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        outputs = engine.generate([_IDS, _IDS], [plain, numpy])
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SamplingParams(stop=3), "stop is 3, wanted strings"),
        (lambda: SamplingParams(stop_token_ids=2), "stop_token_ids is 2, wanted token ids"),
        (lambda: SamplingParams(temperature=10**400), "temperature is 1"),
        (lambda: SamplingParams(temperature=float("nan")), "temperature is nan"),
        (lambda: SamplingParams(temperature=float("inf")), "temperature is inf"),
        (lambda: SamplingParams(seed=True), "seed is True"),
        (lambda: BeamSearchParams(beam_width=2, stop_token_ids=2), "stop_token_ids is 2"),
        (lambda: BeamSearchParams(beam_width=2, length_penalty=10**400), "length_penalty is 1"),
        (lambda: EngineConfig(prefix_caching="no"), "prefix_caching is 'no', wanted True or False"),
        (lambda: EngineConfig(prompt_logprobs=1), "prompt_logprobs is 1, wanted True or False"),
        (lambda: EngineConfig(namespace=_NO_TEXT), "that UTF-8 can encode"),
    ],
)
def test_wrong_parameters_are_named(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_none_means_no_stops() -> None:
    none: Any = None
    assert SamplingParams(stop=none, stop_token_ids=none) == SamplingParams()
    assert BeamSearchParams(beam_width=2, stop_token_ids=none).stop_token_ids == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_prompt_tokens": 3.5},
        {"num_prompt_tokens": True},
        {"max_tokens": 0},
        {"n": "2"},
        {"num_prefix_tokens": -1},
        {"num_prefix_tokens": 9},
        {"reserve_tokens": -5},
        {"num_slots": -1},
        {"priority": "high"},
        {"deadline": "soon"},
        {"prefix_key": []},
        {"prefix_key": ([],)},
    ],
)
def test_wrong_requests_of_the_scheduler_are_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"Request: .*{name} is"):
        Request(**({"request_id": 1, "num_prompt_tokens": 3, "max_tokens": 2} | wrong))


def test_requests_take_numpy_numbers() -> None:
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        scheduler = engine.scheduler
        assert isinstance(scheduler, Scheduler)
        output = engine.add_request(
            np.asarray(_IDS), rig.GREEDY, priority=np.int64(3), deadline=np.float32(1e30)
        )
        while engine.has_unfinished:
            engine.step()
    assert len(output.outputs[0].token_ids) == rig.GREEDY.max_tokens
