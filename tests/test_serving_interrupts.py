"""Ctrl-C at any moment: the engine's records stay consistent, and requests continue."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest
from subprocesses import run_python

from jax_kvpage.serving.engine.interrupts import HeldInterrupts


@pytest.fixture(autouse=True)
def python_s_handler() -> Iterator[None]:
    """Restores Python's handler: shells make programs in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_at_any_moment_changes_no_token() -> None:
    """Real signals while requests are added, run and cancelled."""
    done = run_python(
        """
        import random, signal
        import serving_rig as rig
        from jax_kvpage.serving import Engine

        def ring(*args):
            signal.raise_signal(signal.SIGINT)

        signal.signal(signal.SIGALRM, ring)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        chance = random.Random(1)
        pool = rig.pool(24)
        engine = Engine(rig.step, rig.params(), pool, rig.config())
        expected = rig.tokens(engine.generate(rig.PROMPTS, rig.MIXED))
        interrupts, places = 0, set()
        for _ in range(120):
            outputs, doing = [], "adding"
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 0.02))
                for prompt, params in zip(rig.PROMPTS, rig.MIXED, strict=True):
                    outputs.append(engine.add_request(prompt, params))
                doing = "running"
                while engine.has_unfinished:
                    engine.step()
                    if chance.random() < 0.1:
                        doing = "cancelling"
                        engine.cancel(outputs[chance.randrange(len(outputs))])
                        doing = "running"
            except KeyboardInterrupt:
                interrupts += 1
                places.add(doing)
            signal.setitimer(signal.ITIMER_REAL, 0)
            while engine.has_unfinished:
                engine.step()
            for output, tokens in zip(outputs, expected):
                reason = output.outputs[0].finish_reason
                found = output.outputs[0].token_ids
                assert output.finished and reason in ("length", "cancelled"), output
                assert found == tokens[0][: len(found)], output
                assert reason == "cancelled" or found == tokens[0], output
        engine.close()
        rig.check_empty(pool)
        print(interrupts, sorted(places))
        """,
    )
    count, places = done.stdout.split(maxsplit=1)
    assert int(count) > 50
    assert "adding" in places
    assert "running" in places


def _interrupted(times: int, depth: int) -> bool:
    """Returns whether a block interrupted by Ctrl-C finished before the interrupt was raised."""
    ended = False

    def block(depth: int) -> None:
        with HeldInterrupts():
            if depth > 1:
                block(depth - 1)
                return
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    def outer() -> None:
        nonlocal ended
        with HeldInterrupts():
            block(depth)
            ended = True

    with pytest.raises(KeyboardInterrupt):
        outer()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return ended


@pytest.mark.parametrize("depth", [1, 2])
def test_an_interrupt_waits_for_the_end_of_the_outer_block(depth: int) -> None:
    assert _interrupted(1, depth)


def test_one_more_interrupt_does_not_wait() -> None:
    assert not _interrupted(3, 1)


def test_other_threads_and_ignored_signals_are_left_alone() -> None:
    seen = []

    def enter() -> None:
        with HeldInterrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        enter()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert seen == [signal.default_int_handler, signal.SIG_IGN]
