"""The engine's estimate of its prefill speed, from steps of known durations."""

from __future__ import annotations

import pytest

from jax_kvpage.serving.engine import pace as pace_module
from jax_kvpage.serving.engine.pace import Pace


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> Pace:
    clock = [100.0]
    monkeypatch.setattr(pace_module.time, "monotonic", lambda: clock[0])
    made = Pace()

    def step(tokens: int, seconds: float) -> None:
        begun = clock[0]
        clock[0] += seconds
        made.read(tokens, begun)

    made.step = step  # type: ignore[attr-defined]
    return made


def test_steps_without_prompts_say_nothing(pace) -> None:
    assert pace.tokens_per_second == 0
    for _ in range(5):
        pace.step(0, 0.01)
    assert pace.tokens_per_second == 0


def test_what_every_step_takes_is_left_out(pace) -> None:
    """The step of a cached prompt computes one token, and must not count as a slow prefill."""
    for tokens in (512, 1, 0, 1, 64, 1, 1, 0, 512, 1):
        pace.step(tokens, 0.004 + tokens / 20_000)
    assert pace.tokens_per_second == pytest.approx(20_000)
    for _ in range(60):
        pace.step(1, 0.004 + 1 / 20_000)
    assert pace.tokens_per_second == pytest.approx(20_000, rel=0.01)


def test_steps_of_one_size_are_divided(pace) -> None:
    for _ in range(4):
        pace.step(256, 0.5)
    assert pace.tokens_per_second == pytest.approx(512)


def test_a_slow_first_step_counts_little(pace) -> None:
    pace.step(512, 30.0)  # includes compilation
    for tokens in (512, 128, 512, 0):
        pace.step(tokens, 0.004 + tokens / 20_000)
    assert pace.tokens_per_second == pytest.approx(20_000, rel=0.02)
