"""Preempted requests are swapped to the pool's store and back: same tokens, nothing left behind."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import serving_rig as rig

import jax_kvpage as kvp
from jax_kvpage.serving import CostAware, Engine, SamplingParams
from jax_kvpage.serving.engine.prefill_rate import PrefillRate
from jax_kvpage.serving.engine.swapping import PoolSwap

pytestmark = pytest.mark.usefixtures("shared_programs")
PROMPTS = [rig.prompt(24, i) for i in range(6)]
LONG = SamplingParams(temperature=0, max_tokens=90)


@pytest.fixture(scope="module")
def alone() -> list[list[list[int]]]:
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        return [rig.tokens(engine.generate([prompt], LONG))[0] for prompt in PROMPTS]


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes swapping free, however slow the disk is."""
    monkeypatch.setattr(PoolSwap, "cost", lambda self, tokens: np.zeros_like(tokens))


def _pool(store: kvp.BlockStore, layout: str = "fused", blocks: int = 14) -> kvp.KVPool:
    spec = rig.spec(layout=layout)
    return kvp.KVPool(spec, blocks * spec.num_ranges * spec.block_bytes, store=store)


def _config(**options: Any) -> Any:
    return rig.config(preemption=CostAware(0), **options)


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_swapped_requests_have_the_same_tokens(
    store: kvp.BlockStore, alone: Any, layout: str, prefix_caching: bool
) -> None:
    with (
        _pool(store, layout) as pool,
        Engine(rig.step, rig.params(), pool, _config(prefix_caching=prefix_caching)) as engine,
    ):
        engine.warm_up()
        compiled = engine.stats.programs
        outputs = engine.generate(PROMPTS, LONG)
        assert rig.tokens(outputs) == alone
        stats = pool.stats()
        assert engine.stats.swapped > 0
        assert stats.swapped_in == stats.swapped_out > 0
        assert sum(output.metrics.num_recomputed_tokens for output in outputs) == 0
        assert engine.stats.programs == compiled
        engine.close()
        rig.check_empty(pool)
        assert pool.stats().sequences_swapped == 0
    assert store.stats().bytes_swapped == 0


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("name", ["swap_out", "prefetch", "swap_in"])
def test_what_the_store_refuses_is_computed_again(
    store: kvp.BlockStore, alone: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with (
        _pool(store) as pool,
        Engine(rig.step, rig.params(), pool, _config(prefix_caching=False)) as engine,
    ):
        refused = []

        def call(*args: Any, **options: Any) -> Any:
            refused.append(name)
            raise kvp.KVPageError("the disk is gone")

        monkeypatch.setattr(pool, name, call)
        outputs = engine.generate(PROMPTS, LONG)
        assert rig.tokens(outputs) == alone
        assert refused
        assert sum(output.metrics.num_recomputed_tokens for output in outputs) > 0
        engine.close()
        rig.check_empty(pool)
        assert pool.stats().sequences_swapped == 0


@pytest.mark.usefixtures("cheap")
def test_memory_that_a_fetched_request_does_not_get(
    store: kvp.BlockStore, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks run out between a plan and its calls: the request stays stored or is recomputed."""
    with _pool(store) as pool, Engine(rig.step, rig.params(), pool, _config()) as engine:
        real, calls = (
            {name: getattr(pool, name) for name in ("prefetch", "swap_in")},
            iter("abcdef"),
        )
        failed = []

        def failing(name: str) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                if next(calls, None) is not None:
                    failed.append(name)
                    raise kvp.OutOfBlocks("taken by others")
                return real[name](*args, **options)

            return call

        for name in real:
            monkeypatch.setattr(pool, name, failing(name))
        assert rig.tokens(engine.generate(PROMPTS, LONG)) == alone
        assert len(failed) == 6
        assert pool.stats().swapped_in > 0


@pytest.mark.usefixtures("cheap")
def test_requests_that_end_while_they_are_swapped(store: kvp.BlockStore) -> None:
    with _pool(store) as pool, Engine(rig.step, rig.params(), pool, _config()) as engine:
        outputs = [engine.add_request(prompt, LONG) for prompt in PROMPTS]
        while not pool.stats().sequences_swapped:
            engine.step()
        for output in outputs:
            engine.cancel(output)
        while engine.has_unfinished:
            engine.step()
        assert {output.outputs[0].finish_reason for output in outputs} == {"cancelled"}
        assert pool.stats().sequences_swapped == 0
        rig.check_empty(pool)
        for prompt in PROMPTS:
            engine.add_request(prompt, LONG)
        while not pool.stats().sequences_swapped:
            engine.step()
        engine.close()
        assert pool.stats().sequences_swapped == 0
        rig.check_empty(pool)


@pytest.mark.usefixtures("cheap")
def test_failing_steps_with_requests_in_the_store(store: kvp.BlockStore, alone: Any) -> None:
    """A new generation keeps swapped sequences."""
    calls = iter(range(1000))

    def step(params: Any, cache: kvp.KVCache, tokens: jax.Array, batch: kvp.Batch) -> Any:
        def look(_: Any) -> np.ndarray:
            if next(calls) in (60, 90, 120):
                raise RuntimeError("a transient fault")
            return np.zeros((), np.float32)

        logits, cache = rig.step(params, cache, tokens, batch)
        fault = jax.pure_callback(look, jax.ShapeDtypeStruct((), np.float32), tokens)
        return logits + fault, cache

    with _pool(store) as pool, Engine(step, rig.params(), pool, _config()) as engine:
        outputs = engine.generate(PROMPTS, LONG)
        assert rig.tokens(outputs) == alone
        assert engine.stats.failures == 3
        assert pool.stats().swapped_in > 0


def test_the_choice_follows_what_was_measured(
    store: kvp.BlockStore, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow store is not used, a fast one is."""
    for speed, swaps in ((1.0, False), (1e15, True)):
        monkeypatch.setattr("jax_kvpage.serving.engine.swapping._STORE_BYTES_PER_SECOND", speed)
        with _pool(store) as pool, Engine(rig.step, rig.params(), pool, _config()) as engine:
            assert rig.tokens(engine.generate(PROMPTS, LONG)) == alone
            assert engine.stats.preemptions > 0
            assert (engine.stats.swapped > 0) == swaps


def test_a_restart_finds_prompts_in_the_store(
    store: kvp.BlockStore, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine on a new pool reads what another engine has computed, while other requests run."""
    # Makes computing slower than the disk, however slow that is.
    monkeypatch.setattr(PrefillRate, "tokens_per_second", 1e-3)
    config = _config(namespace="restart", buckets=((32, 4),))
    prompts = [rig.prompt(70, i) for i in range(10, 14)]
    short = SamplingParams(temperature=0, max_tokens=8)
    with _pool(store, blocks=64) as pool, Engine(rig.step, rig.params(), pool, config) as engine:
        expected = rig.tokens(engine.generate(prompts, short))
        engine.close()
        pool.check(pool.cache())
        pool.save_prefixes()
    reads = []
    with _pool(store, blocks=64) as pool, Engine(rig.step, rig.params(), pool, config) as engine:
        real = pool.prefetch

        def prefetch(*args: Any, **options: Any) -> Any:
            reads.append(engine.stats.running)
            return real(*args, **options)

        stored = pool.stored_prefix
        faults = iter([kvp.DeviceFault("from an earlier step")])

        def stored_prefix(*args: Any) -> int:
            for fault in faults:  # reported once, as on CUDA
                raise fault
            return stored(*args)

        monkeypatch.setattr(pool, "prefetch", prefetch)
        monkeypatch.setattr(pool, "stored_prefix", stored_prefix)
        unknown = engine.add_request(PROMPTS[0], LONG)
        engine.step()
        outputs = [engine.add_request(prompt, short) for prompt in prompts]
        while engine.has_unfinished:
            engine.step()
        assert rig.tokens(outputs) == expected
        assert rig.tokens([unknown])[0] == alone[0]
        assert [output.metrics.num_cached_tokens for output in outputs] == [64] * 4
        assert len(reads) == 4
        assert reads[0] > 0
        assert pool.spill_stats().store_hits == 4 * 64
        engine.close()
        rig.check_empty(pool)
