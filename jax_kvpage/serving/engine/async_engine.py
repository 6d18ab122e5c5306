"""The engine for asyncio. It runs in a thread; requests and tokens are passed as messages.

Only this thread touches the engine. All tokens of a step are passed to an event loop in one call; a
reader that is slower than the engine gets several tokens at once.
"""

import asyncio
import collections
import contextlib
import copy
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Self, TypeVar, cast

from jax_kvpage.errors import PoolClosed
from jax_kvpage.serving.beams import Params
from jax_kvpage.serving.engine.engine import Engine
from jax_kvpage.serving.outputs import RequestOutput
from jax_kvpage.serving.params import SamplingParams

__all__ = ["AsyncEngine"]

_T = TypeVar("_T")

_MOST_FAILURES = 8  # consecutive steps that raise before the engine stops


class AsyncEngine:
    """Serves requests of asyncio tasks. An asynchronous context manager.

    An exception in a step ends the requests of that step ("error"), and the engine continues. It
    stops when the pool is closed, or when several consecutive steps have raised.

    Args:
        engine: the engine; nobody else may use it from now on. `close` closes it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._condition = threading.Condition()
        self._jobs: list[Callable[[], None]] = []
        self._closing = False
        self._failure: BaseException | None = None
        self._num_failures = 0  # consecutive steps
        self._readers: dict[int, _Reader] = {}
        self._thread = threading.Thread(target=self._run, name="jax_kvpage engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def generate(
        self, prompt: Sequence[int], params: Params | None = None, **options: Any
    ) -> RequestOutput:
        """Runs a request to completion. Cancelling the task cancels the request.

        Args:
            prompt: token ids.
            params: as for `Engine.add_request`.
            **options: as for `Engine.add_request`.

        Raises:
            ValueError: the engine cannot serve the prompt or the parameters (`RequestRefused` if
                the request can never run or the queue is full).
            RuntimeError: the engine is closed, or has stopped because of an error.
        """
        last = None
        async for output in self.stream(prompt, params, **options):
            last = output
        assert last is not None
        return last

    async def stream(
        self, prompt: Sequence[int], params: Params | None = None, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        """Yields the request's output whenever it has more tokens; the last one is finished.

        Ending the iteration early, or cancelling the task, cancels the request. For arguments and
        errors see `generate`.
        """
        if isinstance(params, SamplingParams) and params.structured_outputs is not None:
            # Compiled here, so that the engine's thread finds it and other requests do not wait.
            await asyncio.to_thread(self._engine.compile_grammar, params.structured_outputs)
        reader = _Reader(asyncio.get_running_loop())

        def add() -> None:
            try:
                reader.output = self._engine.add_request(prompt, params, **options)
            except Exception as error:
                reader.post(error)
            else:
                self._readers[id(reader.output)] = reader

        self._submit(add)
        try:
            while True:
                output = await reader.get()
                yield output
                if output.finished:
                    return
        finally:
            if not reader.finished:
                self._cancel(reader)

    async def inspect(self, read: Callable[[Engine], _T]) -> _T:
        """Calls a function with the engine, in its thread, between two steps.

        Use it to read counters or the memory of running sequences. The function must be short,
        because no step runs meanwhile, and must not add requests, cancel them or run steps.

        Args:
            read: function to call.

        Returns:
            The function's result. Exceptions that it raises are propagated.

        Raises:
            RuntimeError: the engine is closed, or has stopped because of an error.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_T] = loop.create_future()

        def settle(value: _T | None, error: BaseException | None) -> None:
            if answer.done():  # cancelled
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(cast(_T, value))

        def job() -> None:
            try:
                value = read(self._engine)
            except BaseException as error:
                _call(loop, settle, None, error)
                if not isinstance(error, Exception):
                    raise
            else:
                _call(loop, settle, value, None)

        self._submit(job)
        return await answer

    async def close(self) -> None:
        """Ends all requests ("cancelled"), releases their memory and ends the thread.

        Raises:
            RuntimeError: the engine had stopped because of an error.
        """
        with self._condition:
            self._closing = True
            self._condition.notify()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
        self._check_failure()

    def _check_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"AsyncEngine: stopped: {self._failure}") from self._failure

    def _submit(self, job: Callable[[], None]) -> None:
        """Queues a function to be called in the engine's thread."""
        with self._condition:
            self._check_failure()
            if self._closing:
                raise RuntimeError("AsyncEngine: closed")
            self._jobs.append(job)
            self._condition.notify()

    def _cancel(self, reader: "_Reader") -> None:
        def cancel() -> None:
            if reader.output is not None:
                self._readers.pop(id(reader.output), None)
                self._engine.cancel(reader.output)

        with self._condition:
            self._jobs.append(cancel)
            self._condition.notify()

    def _run(self) -> None:
        try:
            while self._work():
                pass
        except BaseException as error:
            with self._condition:
                self._failure = error
                jobs, self._jobs = self._jobs, []
            with contextlib.suppress(BaseException):  # the first error is reported
                self._engine.close()
            for job in jobs:
                job()
            self._answer_all(RuntimeError(f"AsyncEngine: stopped: {error}"))

    def _work(self) -> bool:
        """Runs one iteration of the engine's thread; returns whether to continue."""
        with self._condition:
            while not (self._jobs or self._closing or self._engine.has_unfinished):
                self._condition.wait()
            jobs, self._jobs = collections.deque(self._jobs), []
            closing = self._closing
        try:
            while jobs:
                jobs.popleft()()
        finally:
            if jobs:  # one has raised: `_run` answers the others
                with self._condition:
                    self._jobs = [*jobs, *self._jobs]
        if closing:
            outputs = [reader.output for reader in self._readers.values()]
            self._engine.close()
            self._deliver([output for output in outputs if output is not None])
            return False
        if self._engine.has_unfinished:
            self._deliver(self._step())
        return True

    def _step(self) -> list[RequestOutput]:
        """Runs a step; returns the outputs that have changed."""
        try:
            outputs = self._engine.step()
        except Exception as error:
            self._num_failures += 1
            if isinstance(error, PoolClosed) or self._num_failures == _MOST_FAILURES:
                raise
            every = [reader.output for reader in self._readers.values()]
            return [output for output in every if output is not None and output.finished]
        self._num_failures = 0
        return outputs

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        """Delivers snapshots to the readers, with one call per event loop."""
        posts: dict[asyncio.AbstractEventLoop, list[tuple[_Reader, RequestOutput]]] = {}
        for output in outputs:
            reader = self._readers.get(id(output))
            if reader is None:
                continue
            if output.finished:
                del self._readers[id(output)]
            posts.setdefault(reader.loop, []).append((reader, _snapshot(output)))
        for loop, found in posts.items():
            _call(loop, _post_all, found)

    def _answer_all(self, error: BaseException) -> None:
        for reader in self._readers.values():
            reader.post(error)
        self._readers.clear()


class _Reader:
    """Holds the newest output of a request until its task reads it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.output: RequestOutput | None = None  # owned by the engine; only for its thread
        self.finished = False
        self._ready = asyncio.Event()
        self._newest: RequestOutput | BaseException | None = None

    def post(self, newest: RequestOutput | BaseException) -> None:
        """Called by the engine's thread."""
        _call(self.loop, self.put, newest)

    def put(self, newest: RequestOutput | BaseException) -> None:
        """Called by the event loop. An output contains everything so far, and replaces the last."""
        self._newest = newest
        self.finished = isinstance(newest, BaseException) or newest.finished
        self._ready.set()

    async def get(self) -> RequestOutput:
        """Waits for the next output."""
        await self._ready.wait()
        self._ready.clear()
        newest = self._newest
        assert newest is not None
        if isinstance(newest, BaseException):
            raise newest
        return newest


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:  # the loop is closed, and its tasks are gone
        return


def _post_all(found: list[tuple[_Reader, RequestOutput]]) -> None:
    for reader, output in found:
        reader.put(output)


def _snapshot(output: RequestOutput) -> RequestOutput:
    """Copies an output, so that the engine will not change it."""
    outputs = []
    for each in output.outputs:
        logprobs = None if each.logprobs is None else list(each.logprobs)
        outputs.append(dataclasses.replace(each, token_ids=list(each.token_ids), logprobs=logprobs))
    metrics = copy.copy(output.metrics)
    metrics.token_times = list(metrics.token_times)
    return dataclasses.replace(output, outputs=outputs, metrics=metrics)
