"""Steps that repeat the previous one have the operands that packing them again would give."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import serving_rig as rig

from jax_kvpage.serving import Engine
from jax_kvpage.serving.engine.flight import Flight
from jax_kvpage.serving.engine.packing import Operands, Packed, Packer
from jax_kvpage.serving.engine.runner import Runner

pytestmark = pytest.mark.usefixtures("shared_programs")


def _compared(
    runner: Runner, counts: dict[bool, int], different: list[Packed]
) -> Callable[[Flight], Packed | None]:
    repeated = runner._repetition.next

    def compare(flight: Flight) -> Packed | None:
        packed = repeated(flight)
        counts[packed is not None] += 1
        if packed is not None:
            anew = runner._pack(flight)
            # An exception here would count as a failed step, which is run again.
            if packed.shape != anew.shape or any(
                not np.array_equal(getattr(packed, name), getattr(anew, name))
                for name in ("operands", "sequences", "tokens")
            ):
                different.append(packed)
        return packed

    return compare


@pytest.mark.parametrize("blocks", [64, 10], ids=["enough memory", "preemptions"])
@pytest.mark.parametrize("guesses", [0, 2])
def test_repeated_steps_equal_packed_ones(
    blocks: int, guesses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sequences that come and go, steps that fail, cancellations and guesses."""
    chance, counts = random.Random(blocks), {False: 0, True: 0}
    different: list[Packed] = []
    settings = rig.config(num_speculative_tokens=guesses)
    with rig.pool(blocks) as pool, Engine(rig.step, rig.params(), pool, settings) as engine:
        compared = _compared(engine._runner, counts, different)
        monkeypatch.setattr(engine._runner._repetition, "next", compared)
        outputs = []
        for number in range(24):
            prompt, params = rig.PROMPTS[number % 8], rig.MIXED[number % 7]
            outputs.append(engine.add_request(prompt, params))
            for _ in range(chance.randrange(12)):
                engine.step()
            if chance.random() < 0.2:
                pool.cache()  # the steps in flight fail
            if chance.random() < 0.2:
                engine.cancel(chance.choice(outputs))
        while engine.has_unfinished:
            engine.step()
        preempted = sum(output.metrics.num_preemptions for output in outputs)
    assert different == []
    assert counts[False] > 20
    assert counts[True] > 20
    assert bool(preempted) == (blocks == 10)


@pytest.mark.parametrize("replicas", [1, 3])
def test_moved_operands_are_those_of_higher_positions(replicas: int) -> None:
    packer, rng = Packer(4, replicas, 8), np.random.default_rng(replicas)
    slots = np.asarray([5, 17, 1, 18, 9][: 2 + replicas], np.int32) % (8 * replicas)
    size = len(slots)
    step: dict[str, Any] = {
        "tokens": -1 - np.arange(size, dtype=np.int32) % 4,
        "counts": np.ones(size, np.int32),
        "slots": slots,
        "rows": slots // 8 * 4 + np.arange(size, dtype=np.int32) % 4,
        "positions": rng.integers(1000, 2000, size).astype(np.int32),
        "sampling": rng.integers(0, 9, (3, size)).astype(np.int32),
    }

    def pack() -> Packed:
        return packer.pack(lambda tokens, sequences: (8, 6), Operands(**step))

    moved = pack().moved()
    step["positions"] = step["positions"] + 1
    np.testing.assert_array_equal(moved.operands, pack().operands)
