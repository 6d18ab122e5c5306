"""The engine over pools whose sequences are split: programs of `test_mesh_sequence.py`."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import jax
import pytest
import serving_rig as rig
from mesh_sequence import make_mesh
from test_compile_count import compilations

import jax_kvpage as kvp
from jax_kvpage.serving import (
    BeamSearchParams,
    Engine,
    LastComeFirst,
    SamplingParams,
    Watermark,
)


@contextlib.contextmanager
def _engine(size: int, blocks: int, max_seq_len: int = 128, **options: Any) -> Iterator[Engine]:
    """An engine over `size` devices, with this many blocks on each."""
    spec = rig.spec(max_seq_len=max_seq_len)
    capacity = size * blocks * spec.num_ranges * spec.block_bytes
    options = rig.config(prefix_caching=False, **options)
    with kvp.KVPool(spec, capacity, mesh=make_mesh(size), sequence_axis="sp") as pool:
        weights = jax.device_put(rig.params(), pool.placement)
        with Engine(rig.step, weights, pool, options) as engine:
            yield engine
        rig.check_empty(pool)


def outputs() -> None:
    """Every request gets the same tokens as on one device, also under pressure and with guesses."""
    wanted = rig.alone()
    with _engine(2, 32) as engine:
        assert rig.tokens(engine.generate(rig.PROMPTS, rig.MIXED)) == wanted
        scored = SamplingParams(temperature=0, max_tokens=4, logprobs=2)
        assert engine.generate([rig.PROMPTS[1]], scored)[0].outputs[0].logprobs
    options = {"preemption": LastComeFirst(), "admission": Watermark(0.0)}
    with _engine(2, 4, num_speculative_tokens=2, prompt_lookup_min=1, **options) as engine:
        assert rig.tokens(engine.generate(rig.PROMPTS, rig.MIXED)) == wanted
        assert engine.stats.preemptions > 0


def longer_than_a_device() -> None:
    """A sequence too long for one device's memory runs to its end."""
    prompt = rig.prompt(300, 5)
    greedy = SamplingParams(temperature=0, max_tokens=60)
    with rig.pool(64, max_seq_len=384) as one:
        options = rig.config(prefix_caching=False)
        with Engine(rig.step, rig.params(), one, options) as engine:
            wanted = rig.tokens(engine.generate([prompt], greedy))
    # 8 blocks of 16 tokens on each of 4 devices.
    with _engine(4, 8, max_seq_len=384) as engine:
        added = engine.add_request(prompt, greedy)
        while len(added.outputs[0].token_ids) < 30:
            engine.step()
        (memory,) = engine.memory()
        assert memory.num_tokens > 320 > 8 * 16
        assert memory.num_reserved % 64 == 0
        while engine.has_unfinished:
            engine.step()
        assert rig.tokens([added]) == wanted


def cancellations() -> None:
    """Cancelled requests and failing steps leave nothing behind."""
    with _engine(2, 5, preemption=LastComeFirst()) as engine:
        rig.cancel_at_random(engine, random.Random(0), 12, cancels=0.1, fails=0.04)
        assert engine.stats.failures > 0


def compiled() -> None:
    """Nothing is compiled after `warm_up`."""
    with _engine(2, 16) as engine:
        engine.warm_up()
        with compilations() as found:
            engine.generate(rig.PROMPTS, rig.MIXED)
        assert found == []


def refusals() -> None:
    """Features that need forks or a prefix cache are refused."""
    with _engine(2, 16) as engine:
        for params in (SamplingParams(n=2), BeamSearchParams(beam_width=1, max_tokens=2)):
            with pytest.raises(ValueError, match=r"needs? forks"):
                engine.add_request([1, 2], params)
        with pytest.raises(ValueError, match=r"no prefix cache: give .*prefix_caching=False"):
            Engine(rig.step, rig.params(), engine._pool, rig.config())
