"""Runs HTTP requests on the engine, with limits on their number and time, and at shutdown."""

import asyncio
import concurrent.futures
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import jax_kvpage
from jax_kvpage.serving import AsyncEngine, Engine, RequestOutput, RequestRefused, SamplingParams

from .calls import Call
from .errors import ApiError, busy, stopping
from .limits import Limits
from .metrics import Metrics, Snapshot, Watch
from .model import ServedModel

__all__ = ["OnOutput", "Place", "Service"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# Called with the number of a prompt and its output so far.
OnOutput = Callable[[int, RequestOutput], Awaitable[None]]

_ANSWER_SECONDS = 10.0  # time for the engine to answer an inspection
_NUM_THREADS = 2  # threads that parse, render and tokenize


class Place:
    """A request's place in the server, which counts as one or more requests of the engine.

    Attributes:
      count: The number of requests that it counts as.
    """

    def __init__(self) -> None:
        self.count = 1


class Service:
    """Runs requests on an engine.

    Args:
      engine: The engine, warmed up; the caller closes it.
      pool: The engine's pool.
      model: The served model.
      limits: Limits for clients.

    Attributes:
      model: The served model.
      limits: Limits for clients.
      metrics: Metrics of all requests.
    """

    def __init__(
        self, engine: AsyncEngine, pool: jax_kvpage.KVPool, model: ServedModel, limits: Limits
    ) -> None:
        self.model = model
        self.limits = limits
        self.metrics = Metrics(model.name)
        self._engine = engine
        self._pool = pool
        self._active = 0  # sum of the counts of all places
        self._scopes: set[asyncio.Timeout] = set()
        self._stopping = self._ending = False
        self._threads = concurrent.futures.ThreadPoolExecutor(_NUM_THREADS, "requests")

    def stop(self) -> None:
        """Refuses requests from now on."""
        self._stopping = True

    def end(self) -> None:
        """Ends all running requests."""
        self._stopping = self._ending = True
        for scope in self._scopes:
            with contextlib.suppress(RuntimeError):  # its own time is up at this moment
                scope.reschedule(asyncio.get_running_loop().time())

    @contextlib.asynccontextmanager
    async def limited(self) -> AsyncIterator[Place]:
        """Limits the time of one request, and yields its place among the others.

        Raises:
          ApiError: There are too many requests, the time is up, or the server is shutting down.
        """
        if self._stopping:
            raise stopping()
        place = Place()
        self._count(place, 0, 1)
        try:
            async with self._timed(self.limits.seconds):
                yield place
        finally:
            self._active -= place.count

    @contextlib.asynccontextmanager
    async def receiving(self) -> AsyncIterator[None]:
        """Limits the time for receiving a body.

        Raises:
          ApiError: The time is up.
        """
        if self.limits.body_seconds >= self.limits.seconds:
            yield
            return
        async with self._timed(self.limits.body_seconds, "the body took", status=408):
            yield

    @contextlib.asynccontextmanager
    async def _timed(
        self, seconds: float, what: str = "the request took", status: int = 504
    ) -> AsyncIterator[None]:
        scope = asyncio.timeout(seconds)
        try:
            async with scope:
                self._scopes.add(scope)
                try:
                    yield
                finally:
                    self._scopes.discard(scope)
        except TimeoutError as error:
            if not scope.expired():
                raise
            if self._ending:
                raise stopping() from error
            reason = f"{what} more than {seconds:g} seconds"
            raise ApiError(reason, status=status, code="timeout") from error

    def _count(self, place: Place, old: int, new: int) -> None:
        others, most = self._active - old, self.limits.max_requests
        if others + new > most:
            raise busy(f"{others} other requests run or wait, and at most {most} may in all")
        self._active = others + new
        place.count = new

    async def in_thread(self, work: Callable[[], _T]) -> _T:
        """Runs a part of a request that is slow for large bodies, outside the event loop.

        There are few threads for this; other requests wait for them.

        Args:
          work: The function to call. Its exceptions are raised here.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Ends the threads. No requests may be running."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run(
        self, place: Place, call: Call, prompts: list[list[int]], on_output: OnOutput
    ) -> None:
        """Runs a request; each of its prompts is a request of the engine.

        Args:
          place: From `limited`.
          call: The request.
          prompts: Token ids of the prompts.
          on_output: Called when an output has more tokens. Outputs of the same prompt that arrive
            during a call are skipped: the next one includes them.

        Raises:
          ApiError: The request is invalid or has failed, or there are too many.
        """
        count, most = len(prompts), self.limits.max_requests
        if count > most:
            raise ApiError(
                f"there are {count} prompts, but at most {most} requests at a time",
                param="prompt",
                code="invalid_value",
            )
        params = [call.params(self.model.max_tokens(call, ids)) for ids in prompts]
        self._count(place, place.count, count)
        try:
            async with asyncio.TaskGroup() as group:
                for number, (ids, each) in enumerate(zip(prompts, params, strict=True)):
                    group.create_task(self._follow(call, number, ids, each, on_output))
        except BaseExceptionGroup as errors:
            raise _first(errors) from None

    async def _follow(
        self, call: Call, number: int, ids: list[int], params: SamplingParams, on_output: OnOutput
    ) -> None:
        """Runs one prompt."""
        watch = Watch(self.metrics)
        outputs = self._engine.stream(ids, params, namespace=call.namespace, priority=call.priority)
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    watch.see(output)
                    _check(output)
                    await on_output(number, output)
        except RequestRefused as error:
            raise ApiError(str(error), code="request_too_large") from error
        except ValueError as error:
            raise ApiError(str(error), code="invalid_value") from error
        except RuntimeError as error:
            watch.close()
            _log.error("%s", error)
            raise ApiError("the engine has stopped", status=500) from error
        except BaseException:
            watch.close()
            raise

    async def snapshot(self) -> Snapshot:
        """The state of the engine.

        Raises:
          ApiError: The engine does not answer.
        """
        return await self.inspect(Snapshot.of)

    async def inspect(self, read: Callable[[Engine, jax_kvpage.KVPool], _T]) -> _T:
        """Calls a short function with the engine and its pool between two steps.

        Raises:
          ApiError: The engine does not answer.
        """
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await self._engine.inspect(lambda engine: read(engine, self._pool))
        except (TimeoutError, RuntimeError, jax_kvpage.PoolClosed) as error:
            _log.error("%s", error or "the engine does not answer")
            raise ApiError("the engine has stopped", status=503) from error

    async def check_health(self) -> None:
        """Raises an ApiError if the server does not accept requests."""
        if self._stopping:
            raise stopping()
        await self.snapshot()


def _check(output: RequestOutput) -> None:
    """Raises an ApiError if the engine ended a request early."""
    reasons = {each.finish_reason for each in output.outputs}
    if "error" in reasons:
        _log.error("a request has failed: %s", output.error)  # for the operator, not for clients
        raise ApiError("the request has failed", status=500, code="engine_error")
    if "cancelled" in reasons:
        raise stopping()


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group: either all prompts have the same one, or it caused the others."""
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
