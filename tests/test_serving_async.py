"""Streaming from the engine, in one thread and through asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import jax
import pytest
import serving_rig as rig

import jax_kvpage as kvp
from jax_kvpage.serving import AsyncEngine, Engine, RequestRefused, SamplingParams

pytestmark = pytest.mark.usefixtures("shared_programs")

_PROMPTS = [rig.prompt(n, n) for n in (5, 40, 17, 33)]
_PARAMS = [SamplingParams(seed=i, max_tokens=6 + 3 * i) for i in range(4)]


@pytest.fixture(scope="module")
def expected() -> list[list[list[int]]]:
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        return rig.tokens(engine.generate(_PROMPTS, _PARAMS))


def test_a_stream_yields_every_token(expected) -> None:
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        seen: dict[object, list[list[int]]] = {}
        for output in engine.stream(_PROMPTS, _PARAMS):
            seen.setdefault(output.request_id, []).append(list(output.outputs[0].token_ids))
        for pieces, (whole,) in zip(seen.values(), expected, strict=True):
            assert pieces[-1] == whole
            assert all(piece == whole[: len(piece)] for piece in pieces)
            assert [len(piece) for piece in pieces] == list(range(1, len(whole) + 1))


def test_streams_are_read_in_turn_and_may_end_early(expected) -> None:
    with rig.pool() as pool, Engine(rig.step, rig.params(), pool, rig.config()) as engine:
        first = engine.stream([_PROMPTS[3]], _PARAMS[3])
        second = engine.stream([_PROMPTS[2]], _PARAMS[2])
        early = engine.stream([_PROMPTS[1]], _PARAMS[1])
        cut = next(early)
        next(first)
        early.close()
        assert cut.outputs[0].finish_reason == "cancelled"
        *_, last = second
        assert [last.outputs[0].token_ids] == expected[2]
        *_, last = first
        assert [last.outputs[0].token_ids] == expected[3]
        assert not engine.scheduler.num_running


def _serve(task: Callable[[AsyncEngine], Coroutine[Any, Any, None]], blocks: int = 64) -> None:
    """Runs a task with an engine, which must leave nothing behind."""

    async def main() -> None:
        async with AsyncEngine(Engine(rig.step, rig.params(), pool, rig.config())) as engine:
            await asyncio.wait_for(task(engine), 60)

    with rig.pool(blocks) as pool:
        asyncio.run(main())
        jax.block_until_ready(pool.cache())
        stats = pool.stats()
        assert (stats.blocks_mapped, stats.blocks_draining) == (0, 0)


def test_tasks_share_an_engine(expected) -> None:
    async def task(engine: AsyncEngine) -> None:
        outputs = await asyncio.gather(
            *(engine.generate(p, s) for p, s in zip(_PROMPTS, _PARAMS, strict=True))
        )
        assert rig.tokens(outputs) == expected
        seen = []
        async for output in engine.stream(_PROMPTS[3], _PARAMS[3]):
            seen.append(output)
        assert [seen[-1].outputs[0].token_ids] == expected[3]
        lengths = [len(output.outputs[0].token_ids) for output in seen]
        assert lengths == sorted(lengths), "snapshots do not change"
        assert [output.finished for output in seen] == [False] * (len(seen) - 1) + [True]

    _serve(task)


def test_refusals_reach_the_task(expected) -> None:
    async def task(engine: AsyncEngine) -> None:
        with pytest.raises(RequestRefused):
            await engine.generate(rig.prompt(128))
        with pytest.raises(ValueError, match="empty"):
            await engine.generate([])
        output = await engine.generate(_PROMPTS[0], _PARAMS[0])
        assert rig.tokens([output]) == [expected[0]]

    _serve(task)


def test_inspect_runs_between_steps() -> None:
    async def task(engine: AsyncEngine) -> None:
        outputs = engine.stream(_PROMPTS[0], SamplingParams(max_tokens=100))
        await anext(outputs)
        stats, memory = await engine.inspect(lambda each: (each.stats, each.memory()))
        assert (stats.running, stats.waiting) == (1, 0)
        assert [each.num_tokens >= len(_PROMPTS[0]) for each in memory] == [True]
        with pytest.raises(ZeroDivisionError):
            await engine.inspect(lambda each: 1 // 0)
        await outputs.aclose()
        assert (await engine.inspect(lambda each: each.stats)).running == 0
        await engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            await engine.inspect(lambda each: each.stats)

    _serve(task)


def test_a_cancelled_task_cancels_its_request() -> None:
    async def task(engine: AsyncEngine) -> None:
        long = SamplingParams(max_tokens=100)
        started = asyncio.Event()

        async def read() -> None:
            async for _ in engine.stream(_PROMPTS[0], long):
                started.set()

        reader = asyncio.create_task(read())
        await started.wait()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        # There is memory for one of the two requests, so the other one must have ended.
        output = await engine.generate(rig.prompt(40), SamplingParams(max_tokens=60))
        assert output.outputs[0].finish_reason == "length"
        assert output.metrics.num_preemptions == 0

    _serve(task, blocks=8)


def test_closing_ends_the_tasks() -> None:
    async def task(engine: AsyncEngine) -> None:
        running = asyncio.create_task(engine.generate(_PROMPTS[0], SamplingParams(max_tokens=100)))
        await asyncio.sleep(0.05)
        await engine.close()
        output = await running
        assert output.outputs[0].finish_reason in ("cancelled", "length")
        with pytest.raises(RuntimeError, match="closed"):
            await engine.generate(_PROMPTS[0])

    _serve(task)


def test_an_engine_that_stops_says_so() -> None:
    async def main() -> None:
        pool = rig.pool()
        engine = AsyncEngine(Engine(rig.step, rig.params(), pool, rig.config()))
        await engine.generate(_PROMPTS[0], _PARAMS[0])
        pool.close()
        with pytest.raises(RuntimeError, match="closed"):
            await asyncio.wait_for(engine.generate(_PROMPTS[0]), 60)
        with pytest.raises(RuntimeError, match="stopped"):
            await engine.generate(_PROMPTS[0])
        with pytest.raises(RuntimeError, match="stopped"):
            await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("times", [1, 7])
def test_an_exception_in_a_step(expected, monkeypatch, times: int) -> None:
    """The exception ends the requests of that step, and no others."""

    async def main(pool: kvp.KVPool) -> None:
        engine = AsyncEngine(Engine(rig.step, rig.params(), pool, rig.config()))
        real, left = pool.extend, iter(range(times))

        def extend(*args: Any) -> None:
            if next(left, None) is not None:
                raise MemoryError("mapping")
            real(*args)

        monkeypatch.setattr(pool, "extend", extend)
        for _ in range(times):  # extends the slot for its last token
            output = await asyncio.wait_for(
                engine.generate(_PROMPTS[1][:14], SamplingParams(max_tokens=9)), 60
            )
            assert output.outputs[0].finish_reason == "error"
            assert output.error == "MemoryError: mapping"
        outputs = [await engine.generate(_PROMPTS[0], _PARAMS[0])]
        assert rig.tokens(outputs) == expected[:1]
        await engine.close()

    with rig.pool() as pool:
        asyncio.run(main(pool))
        jax.block_until_ready(pool.cache())
        assert pool.stats().slots_occupied == 0


def test_an_engine_that_stops_gives_memory_back(monkeypatch) -> None:
    async def main(pool: kvp.KVPool) -> None:
        inner = Engine(rig.step, rig.params(), pool, rig.config())
        engine = AsyncEngine(inner)
        outputs = engine.stream(_PROMPTS[1], SamplingParams(max_tokens=80))
        await anext(outputs)

        real = inner.step

        def step() -> None:
            monkeypatch.setattr(inner, "step", real)
            raise SystemExit("not an Exception")

        monkeypatch.setattr(inner, "step", step)
        with pytest.raises(RuntimeError, match="stopped: not an Exception"):
            async for _ in outputs:
                pass
        assert inner.closed
        with pytest.raises(RuntimeError, match="stopped"):
            await engine.close()

    with rig.pool() as pool:
        asyncio.run(main(pool))
        jax.block_until_ready(pool.cache())
        assert pool.stats().slots_occupied == 0


class _Stop(BaseException):
    """Ends the engine's thread."""


def test_a_task_that_stops_the_thread_leaves_no_other_waiting() -> None:
    """All calls of one batch are answered, also those behind the one that raises."""

    async def main() -> None:
        core = Engine(rig.step, rig.params(), pool, rig.config())
        engine = AsyncEngine(core)
        started, go_on = threading.Event(), threading.Event()

        def wait(_: Engine) -> None:
            started.set()
            go_on.wait(30)

        def stop(_: Engine) -> None:
            raise _Stop

        first = asyncio.create_task(engine.inspect(wait))
        await asyncio.to_thread(started.wait, 30)
        # These arrive while the thread is busy, so it takes them together.
        others = [
            asyncio.create_task(engine.inspect(stop)),
            asyncio.create_task(engine.inspect(lambda _: 1)),
            asyncio.create_task(engine.generate(_PROMPTS[0], _PARAMS[0])),
        ]
        await asyncio.sleep(0)
        go_on.set()
        await first
        answers = await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), 30)
        assert isinstance(answers[0], _Stop)
        assert answers[1] == 1
        assert isinstance(answers[2], RuntimeError)

    with rig.pool() as pool:
        asyncio.run(main())
