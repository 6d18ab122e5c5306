"""The engine's estimate of its prefill speed, from steps of known durations."""

from __future__ import annotations

import pytest

from jax_kvpage.serving.engine import prefill_rate as module
from jax_kvpage.serving.engine.prefill_rate import PrefillRate


@pytest.fixture
def prefill_rate(monkeypatch: pytest.MonkeyPatch) -> PrefillRate:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    made = PrefillRate()

    def step(tokens: int, seconds: float) -> None:
        begun = clock[0]
        clock[0] += seconds
        made.read(tokens, begun)

    made.step = step  # type: ignore[attr-defined]
    return made


def test_steps_without_prompts_say_nothing(prefill_rate) -> None:
    assert prefill_rate.tokens_per_second == 0
    for _ in range(5):
        prefill_rate.step(0, 0.01)
    assert prefill_rate.tokens_per_second == 0


def test_what_every_step_takes_is_left_out(prefill_rate) -> None:
    """The step of a cached prompt computes one token, and must not count as a slow prefill."""
    for tokens in (512, 1, 0, 1, 64, 1, 1, 0, 512, 1):
        prefill_rate.step(tokens, 0.004 + tokens / 20_000)
    assert prefill_rate.tokens_per_second == pytest.approx(20_000)
    for _ in range(60):
        prefill_rate.step(1, 0.004 + 1 / 20_000)
    assert prefill_rate.tokens_per_second == pytest.approx(20_000, rel=0.01)


def test_steps_of_one_size_are_divided(prefill_rate) -> None:
    for _ in range(4):
        prefill_rate.step(256, 0.5)
    assert prefill_rate.tokens_per_second == pytest.approx(512)


def test_a_slow_first_step_counts_little(prefill_rate) -> None:
    prefill_rate.step(512, 30.0)  # includes compilation
    for tokens in (512, 128, 512, 0):
        prefill_rate.step(tokens, 0.004 + tokens / 20_000)
    assert prefill_rate.tokens_per_second == pytest.approx(20_000, rel=0.02)
