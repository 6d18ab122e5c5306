"""The engine over pools with replicas: programs of `test_replicas_engine.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import random
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import replica_rig
import serving_rig as rig
from covering import is_exhaustive, num_cases
from jax.sharding import PartitionSpec as P
from test_compile_count import compilations

import jax_kvpage as kvp
from jax_kvpage.serving import (
    BeamSearchParams,
    DraftModel,
    Engine,
    LastComeFirst,
    SamplingParams,
    Watermark,
)
from jax_kvpage.serving.engine.programs import Programs

_ROWS = 4  # per replica


def _pool(
    replicas: int, parts: int = 1, blocks: int = 32, store: Any = None, **options: Any
) -> kvp.KVPool:
    """Makes a pool with this many blocks per replica."""
    spec = rig.spec(2 * _ROWS * replicas, **options)
    mesh = replica_rig.make_mesh(replicas, parts)
    axis = "tp" if parts > 1 else None
    size = replicas * parts * blocks * spec.num_ranges * spec.block_bytes
    return kvp.KVPool(spec, size, mesh=mesh, axis=axis, data_axis="dp", store=store)


@functools.cache
def _mapped(sharding: Any) -> Any:
    """The model under `jax.shard_map`."""
    rows, split = sharding.rows, sharding.split
    specs = {"in_specs": (P(), split, rows, rows), "out_specs": (rows, split)}
    return jax.shard_map(rig.step, mesh=sharding.mesh, **specs)


@contextlib.contextmanager
def _engine(pool: kvp.KVPool, mapped: bool = True, **options: Any) -> Iterator[Engine]:
    """An engine whose model runs under `jax.shard_map`, or does not mention devices."""
    step = _mapped(pool.sharding) if mapped else rig.step
    weights = jax.device_put(rig.params(), pool.placement)
    with Engine(step, weights, pool, rig.config(**options)) as engine:
        yield engine
    rig.check_empty(pool)
    _check_accounts(pool)


def _check_accounts(pool: kvp.KVPool) -> None:
    """Asserts that no replica has lost a block or a slot."""
    for stats in pool.replica_stats():
        assert stats.blocks_free + stats.blocks_parked == stats.blocks_total
        assert (stats.slots_occupied, stats.slots_draining) == (0, 0)


def _replicas(engine: Engine) -> dict[object, set[int]]:
    """Returns the replicas on which each request runs."""
    found: dict[object, set[int]] = {}
    for state in engine._slots.occupied():
        assert engine._pool.replica_of(state.slot) == state.row // _ROWS
        found.setdefault(state.request.output.request_id, set()).add(state.row // _ROWS)
    return found


def _preemptions(engine: Engine) -> list[int]:
    return [planner.stats.preemptions for planner in engine.scheduler._planners]


def outputs() -> None:
    """Every request gets the same tokens as alone on one device."""
    wanted = rig.alone()
    shapes = [(2, 1, True), (4, 1, False), *([(2, 2, False)] if is_exhaustive() else [])]
    for replicas, parts, mapped in shapes:
        with _pool(replicas, parts) as pool, _engine(pool, mapped) as engine:
            done = engine.generate(rig.PROMPTS, rig.MIXED)
            assert rig.tokens(done) == wanted
            assert engine.stats.programs == 1
            streamed = {id(output): output for output in engine.stream(rig.PROMPTS, rig.MIXED)}
            assert sorted(rig.tokens(list(streamed.values()))) == sorted(wanted)


def explicit() -> None:
    """A mesh with explicit axes, for a model under `jax.shard_map`."""
    spec = rig.spec(4 * _ROWS)
    mesh = replica_rig.make_mesh(2, 1, "Explicit")
    size = 64 * spec.num_ranges * spec.block_bytes
    with kvp.KVPool(spec, size, mesh=mesh, data_axis="dp") as pool, _engine(pool) as engine:
        done = engine.generate(rig.PROMPTS[:3], rig.MIXED[:3])
        assert rig.tokens(done) == rig.alone()[:3]


def pressure() -> None:
    """A replica that runs out of blocks preempts its own requests; the other continues."""
    growing = SamplingParams(temperature=0, max_tokens=60)
    short = SamplingParams(temperature=0, max_tokens=24)
    requests = [(rig.prompt(16, 1), growing), (rig.prompt(100, 2), short)]
    requests += [(rig.prompt(16, seed), growing) for seed in (3, 4)]
    with rig.pool() as one, Engine(rig.step, rig.params(), one, rig.config()) as engine:
        wanted = rig.tokens(engine.generate(*map(list, zip(*requests, strict=True))))
    options = {"preemption": LastComeFirst(), "admission": Watermark(0.0)}
    with _pool(2, blocks=8) as pool, _engine(pool, **options) as engine:
        added = [engine.add_request(*each) for each in requests]
        engine.step()
        engine.step()
        where = _replicas(engine)
        assert where == {0: {0}, 1: {1}, 2: {0}, 3: {0}}
        while not added[1].finished:  # undisturbed: one token per step
            engine.step()
        steps = engine.stats.steps
        assert steps <= -(-100 // 32) + 24 + 2
        while engine.has_unfinished:
            engine.step()
        first, second = _preemptions(engine)
        assert first > 0
        assert second == 0
        assert engine.stats.preemptions == first
        assert added[1].metrics.num_preemptions == 0
        assert rig.tokens(added) == wanted

    # All requests under pressure. They are placed again rather than swapped to the store.
    with (
        tempfile.TemporaryDirectory() as folder,
        kvp.BlockStore(folder) as store,
        _pool(2, blocks=8, store=store) as pool,
        _engine(pool, **options) as engine,
    ):
        assert rig.tokens(engine.generate(rig.PROMPTS * 2, rig.MIXED * 2)) == rig.alone() * 2
        assert min(_preemptions(engine)) > 0
        assert engine.stats.swapped == 0


def prefixes() -> None:
    """Requests go to the replica that caches their tokens unless it is busier; followers wait."""
    prefix = rig.prompt(50, 1)
    prompts = [prefix + rig.prompt(6, seed) for seed in range(2, 5)]
    with rig.pool() as one, Engine(rig.step, rig.params(), one, rig.config()) as engine:
        wanted = rig.tokens(engine.generate(prompts, rig.GREEDY))
    with _pool(2, blocks=48) as pool, _engine(pool) as engine:
        done = engine.generate(prompts, rig.GREEDY)
        assert rig.tokens(done) == wanted
        computed = sum(output.metrics.num_computed_tokens for output in done)
        twice = [output for output in done if not output.metrics.num_cached_tokens]
        assert len(twice) <= 2, "each replica computes the prefix once at most"
        assert computed <= 50 * len(twice) + 3 * (6 + 20)
        # The idle replica, whose turn it is, gets the next request.
        turn = prompts[2] + done[2].outputs[0].token_ids + rig.prompt(3)
        (after,) = engine.generate([turn], rig.GREEDY)
        assert after.metrics.num_cached_tokens == len(turn) - 4


def siblings() -> None:
    """The samples and beams of a request share a replica; log probabilities are returned."""
    samples = SamplingParams(n=3, seed=5, max_tokens=12, logprobs=2)
    beams = BeamSearchParams(beam_width=2, max_tokens=10)
    requests = [(rig.prompt(20, 1), samples), (rig.prompt(33, 2), samples)]
    requests += [(rig.prompt(17, 3), beams), (rig.prompt(9, 4), beams)]
    prompts, params = map(list, zip(*requests, strict=True))
    options = {"max_num_seqs": _ROWS, "max_logprobs": 8, "prompt_logprobs": True}
    with rig.pool() as one, Engine(rig.step, rig.params(), one, rig.config(**options)) as engine:
        wanted = engine.generate(prompts, params)
        scored = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=2)
        (scores,) = engine.generate([rig.prompt(40, 6)], scored)
    with _pool(2) as pool, _engine(pool, **options) as engine:
        added = [engine.add_request(*each) for each in requests]
        seen: dict[object, set[int]] = {}
        while engine.has_unfinished:
            engine.step()
            for name, replicas in _replicas(engine).items():
                seen.setdefault(name, set()).update(replicas)
        assert all(len(replicas) == 1 for replicas in seen.values()), seen
        assert set().union(*seen.values()) == {0, 1}
        assert rig.tokens(added) == rig.tokens(wanted)
        for got, other in zip(added[:2], wanted[:2], strict=True):
            for a, b in zip(got.outputs, other.outputs, strict=True):
                assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-4)
                assert [list(row) for row in a.logprobs] == [list(row) for row in b.logprobs]
        # The second request runs on replica 1, beside the first.
        twice = [engine.add_request(rig.prompt(40, seed), scored) for seed in (5, 6)]
        while engine.has_unfinished:
            engine.step()
        assert twice[1].prompt_logprobs
        assert scores.prompt_logprobs
        for row, wanted_row in zip(
            twice[1].prompt_logprobs[1:], scores.prompt_logprobs[1:], strict=True
        ):
            assert row.keys() == wanted_row.keys()
            assert all(
                row[token].logprob == pytest.approx(wanted_row[token].logprob, abs=1e-4)
                for token in row
            )


def guesses() -> None:
    """Speculation by prompt lookup does not change tokens."""
    prompts = [ids * 6 for ids in (rig.prompt(4, 1), rig.prompt(5, 2), rig.prompt(7, 3))]
    plain = SamplingParams(temperature=0, max_tokens=30)
    with rig.pool() as one, Engine(rig.step, rig.params(), one, rig.config()) as engine:
        wanted = rig.tokens(engine.generate(prompts, plain))
    options = {"num_speculative_tokens": 3, "prompt_lookup_min": 1}
    with _pool(2) as pool, _engine(pool, **options) as engine:
        assert rig.tokens(engine.generate(prompts, plain)) == wanted
        assert engine.stats.accepted > 5


def cancellations() -> None:
    """Requests are cancelled at random under pressure: nothing leaks, and the others' tokens are
    kept.
    """
    for seed in range(num_cases(3, 20)):
        with _pool(2, blocks=10) as pool, _engine(pool, preemption=LastComeFirst()) as engine:
            assert rig.cancel_at_random(engine, random.Random(seed), 16, cancels=0.15, fails=0.03)


def failures() -> None:
    """A step that fails on one replica only is retried once on all."""
    wanted = rig.alone()
    for replica in (0, 1):
        with _pool(2) as pool, _engine(pool) as engine:
            added = [engine.add_request(*each) for each in zip(rig.PROMPTS, rig.MIXED, strict=True)]
            for _ in range(6):
                engine.step()
            # The engine's cache is now stale on this replica.
            pool._pool.replicas[replica].new_generation()
            while engine.has_unfinished:
                engine.step()
            assert engine.stats.failures >= 1
            assert rig.tokens(added) == wanted

    calls = itertools.count()
    run = Programs.run

    def fails(self: Programs, *args: Any) -> Any:
        if 8 <= next(calls) < 12:
            raise RuntimeError("no such step")
        return run(self, *args)

    with pytest.MonkeyPatch.context() as patch, _pool(2) as pool, _engine(pool) as engine:
        patch.setattr(Programs, "run", fails)
        added = [engine.add_request(*each) for each in zip(rig.PROMPTS, rig.MIXED, strict=True)]
        while engine.has_unfinished:
            engine.step()
        reasons = [output.outputs[0].finish_reason for output in added]
        assert set(reasons) <= {"length", "error"}
        assert "no such step" in next(o.error for o in added if o.error)
        assert rig.tokens(engine.generate(rig.PROMPTS, rig.MIXED)) == wanted


def faults() -> None:
    """A step fails on the device while requests wait, or at a block boundary: all calls of a pool
    over a mesh report that until a new generation.
    """
    wanted = rig.alone()
    run = Programs.run
    for at in range(2, 24, 3 if is_exhaustive() else 7):
        calls = itertools.count()

        def fails(
            self: Programs,
            packed: Any,
            *args: Any,
            calls: Iterator[int] = calls,
            at: int = at,
        ) -> Any:
            if next(calls) == at:
                operands = packed.operands.copy()
                operands[packed.shape[0] + 1 + packed.shape[1]] = 7  # a slot that nobody has
                packed = dataclasses.replace(packed, operands=operands)
            return run(self, packed, *args)

        with pytest.MonkeyPatch.context() as patch, _pool(2) as pool, _engine(pool) as engine:
            patch.setattr(Programs, "run", fails)
            added = [
                engine.add_request(*each)
                for each in zip(rig.PROMPTS * 2, rig.MIXED * 2, strict=True)
            ]
            while engine.has_unfinished:
                engine.step()
            assert engine.stats.generations >= 1
            assert [output.error for output in added if output.error] == []
            assert rig.tokens(added) == wanted * 2


def compiled() -> None:
    """Nothing is compiled after `warm_up`, wherever requests go."""
    buckets = ((4, 4), (32, 4))
    with _pool(2, blocks=24) as pool, _engine(pool, buckets=buckets) as engine:
        engine.warm_up()
        assert engine.stats.programs == len(buckets)
        with compilations() as found:
            engine.generate(rig.PROMPTS, rig.MIXED)
            engine.generate([rig.PROMPTS[1]] * 4, SamplingParams(n=3, logprobs=2))
            pool.cache()
            engine.generate([rig.PROMPTS[3]], rig.GREEDY)
            assert engine.stats.generations == 1
        assert found == []
        assert engine.stats.programs == len(buckets)


def local() -> None:
    """The engine's code around the model's step has no collectives."""
    with _pool(2) as pool, _engine(pool) as engine:
        engine.generate([rig.PROMPTS[0]], rig.PENALIZED)
        (program,) = engine._programs._compiled.values()
        text = program.as_text()
        for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
            assert word not in text


def refusals() -> None:
    """Unsupported features are refused before anything runs."""
    with _pool(2, blocks=8) as pool, rig.pool() as other:
        draft = DraftModel(step=rig.step, params=rig.params(), pool=other)
        options = rig.config(num_speculative_tokens=2)
        with pytest.raises(ValueError, match=r"data_axis\), here 2 and 1 of the draft's"):
            Engine(rig.step, rig.params(), pool, options, draft=draft)
        draft = DraftModel(step=rig.step, params=rig.params(), pool=pool)
        with pytest.raises(ValueError, match="here 1 and 2 of the draft's"):
            Engine(rig.step, rig.params(), other, options, draft=draft)
        with pytest.raises(ValueError, match="max_num_seqs is 9, but the pool has 8 slots"):
            Engine(rig.step, rig.params(), pool, rig.config(max_num_seqs=9))
        with _engine(pool) as engine:
            # The replicas' combined capacity does not help.
            with pytest.raises(ValueError, match="but there are 8 blocks in all"):
                engine.add_request(rig.prompt(100), SamplingParams(n=4))
            (output,) = engine.generate([rig.PROMPTS[0]], rig.GREEDY)
            assert rig.tokens([output]) == rig.alone()[:1]


def run(*names: str) -> None:
    """Runs some of the programs; their engines share compiled programs."""
    with pytest.MonkeyPatch.context() as patch:
        rig.share_programs(patch)
        for name in names:
            globals()[name]()


def placing() -> None:
    """`pool.on_replica` decides where requests go, in its thread."""
    with _pool(4) as pool:
        cache = pool.cache()
        with pool.on_replica(2):
            slot, cache = pool.acquire(cache, 20)
            ids = np.arange(20)
            other, found, cache = pool.acquire_prefix(cache, ids)
            with pool.on_replica(1):
                third, cache = pool.acquire(cache, 1)
        assert [pool.replica_of(one) for one in (slot, other, third)] == [2, 2, 1]
        assert found == 0
        fourth, cache = pool.acquire(cache, 1)
        assert pool.replica_of(fourth) == 0
        with pool.on_replica(3), pytest.raises(kvp.OutOfSlots):
            pool.acquire(cache, [1] * (2 * _ROWS + 1))
        with pytest.raises(ValueError, match="replica 4 does not exist"), pool.on_replica(4):
            pass
        pool.check(pool.release(cache, [slot, other, third, fourth]))
    with rig.pool() as one, one.on_replica(0):
        slot, cache = one.acquire(one.cache(), 1)
        one.check(one.release(cache, slot))
