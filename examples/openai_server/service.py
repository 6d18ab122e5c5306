"""Requests of HTTP on the engine: how many at a time, for how long, and what happens at the end."""

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

_ANSWER_SECONDS = 10.0  # for the engine to say how it is
_NUM_THREADS = 2  # that parse, render and tokenize


class Place:
    """A request's place in the server, which counts as one request of the engine or more.

    Attributes:
      count: As how many it counts.
    """

    def __init__(self) -> None:
        self.count = 1


class Service:
    """Runs requests on an engine.

    Args:
      engine: Warmed up; the caller closes it.
      pool: Its memory.
      model: What it runs.
      limits: For clients.

    Attributes:
      model: What it runs.
      limits: For clients.
      metrics: Of all requests.
    """

    def __init__(
        self, engine: AsyncEngine, pool: jax_kvpage.KVPool, model: ServedModel, limits: Limits
    ) -> None:
        self.model = model
        self.limits = limits
        self.metrics = Metrics(model.name)
        self._engine = engine
        self._pool = pool
        self._active = 0  # requests, as they count
        self._scopes: set[asyncio.Timeout] = set()
        self._stopping = self._ending = False
        self._threads = concurrent.futures.ThreadPoolExecutor(_NUM_THREADS, "requests")

    def stop(self) -> None:
        """Refuses requests from now on."""
        self._stopping = True

    def end(self) -> None:
        """Ends the requests that run."""
        self._stopping = self._ending = True
        for scope in self._scopes:
            scope.reschedule(asyncio.get_running_loop().time())

    @contextlib.asynccontextmanager
    async def limited(self) -> AsyncIterator[Place]:
        """The time of one request, and its place among the others.

        Raises:
          ApiError: There are too many requests, the time is over, or the server is shutting down.
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
        """The time in which a body has to arrive.

        Raises:
          ApiError: It is over.
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
        """Runs a part of a request that takes long on large bodies.

        Few threads do this; other requests wait for them, and the event loop does not.

        Args:
          work: What to call. What it raises is raised.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Ends the threads. No request may run any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run(
        self, place: Place, call: Call, prompts: list[list[int]], on_output: OnOutput
    ) -> None:
        """Runs a request; each of its prompts is one of the engine's.

        Args:
          place: From `limited`.
          call: The request.
          prompts: Token ids.
          on_output: Called with every output that has more tokens. While it runs, outputs of the
            same prompt are not kept: the next one has everything.

        Raises:
          ApiError: The request cannot run, or there are too many, or it has failed.
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
        """How the engine is.

        Raises:
          ApiError: It does not answer.
        """
        return await self.inspect(Snapshot.of)

    async def inspect(self, read: Callable[[Engine, jax_kvpage.KVPool], _T]) -> _T:
        """Calls a short function with the engine and its pool between two steps.

        Raises:
          ApiError: It does not answer.
        """
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await self._engine.inspect(lambda engine: read(engine, self._pool))
        except (TimeoutError, RuntimeError, jax_kvpage.PoolClosed) as error:
            _log.error("%s", error or "the engine does not answer")
            raise ApiError("the engine has stopped", status=503) from error

    async def check_health(self) -> None:
        """Raises an ApiError if the server takes no requests."""
        if self._stopping:
            raise stopping()
        await self.snapshot()


def _check(output: RequestOutput) -> None:
    """Raises for a request that the engine ended before its time."""
    reasons = {each.finish_reason for each in output.outputs}
    if "error" in reasons:
        _log.error("a request has failed: %s", output.error)  # for the operator, not for clients
        raise ApiError("the request has failed", status=500, code="engine_error")
    if "cancelled" in reasons:
        raise stopping()


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """One of the errors of a group; they are the same for all prompts, or follow from one."""
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
