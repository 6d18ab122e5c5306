"""Requests of HTTP on the engine: how many at a time, for how long, and what happens at the end."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable

import jax_kvpage
from jax_kvpage.serving import AsyncEngine, RequestOutput, RequestRefused, SamplingParams

from .calls import Call
from .errors import ApiError, busy, stopping
from .metrics import Metrics, Snapshot, Watch
from .model import ServedModel

__all__ = ["Limits", "OnOutput", "Service"]

# Called with the number of a prompt and its output so far.
OnOutput = Callable[[int, RequestOutput], Awaitable[None]]

_ANSWER_SECONDS = 10.0  # for the engine to say how it is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What clients may ask for.

    Attributes:
      max_body_bytes: Of a request's body.
      max_requests: Requests that run or wait; each prompt of a list counts.
      max_logprobs: Of a token.
      seconds: From the first byte of a request's body to the last of its answer.
    """

    max_body_bytes: int = 4 << 20
    max_requests: int = 256
    max_logprobs: int = 20
    seconds: float = 600.0


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
        self._active = 0  # requests of the engine
        self._scopes: set[asyncio.Timeout] = set()
        self._stopping = self._ending = False

    def stop(self) -> None:
        """Refuses requests from now on."""
        self._stopping = True

    def end(self) -> None:
        """Ends the requests that run."""
        self._stopping = self._ending = True
        for scope in self._scopes:
            scope.reschedule(asyncio.get_running_loop().time())

    @contextlib.asynccontextmanager
    async def limited(self) -> AsyncIterator[None]:
        """The time of one request.

        Raises:
          ApiError: The time is over, or the server is shutting down.
        """
        if self._stopping:
            raise stopping()
        scope = asyncio.timeout(self.limits.seconds)
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
            raise ApiError(
                f"the request took more than {self.limits.seconds:g} seconds",
                status=504,
                code="timeout",
            ) from error

    async def run(self, call: Call, prompts: list[list[int]], on_output: OnOutput) -> None:
        """Runs a request; each of its prompts is one of the engine's.

        Args:
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
        if self._active + count > most:
            raise busy(f"{self._active} requests run or wait, and at most {most} may")
        self._active += count
        try:
            async with asyncio.TaskGroup() as group:
                for number, (ids, each) in enumerate(zip(prompts, params, strict=True)):
                    group.create_task(self._follow(call, number, ids, each, on_output))
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        finally:
            self._active -= count

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
            raise ApiError(f"the engine has stopped: {error}", status=500) from error
        except BaseException:
            watch.close()
            raise

    async def snapshot(self) -> Snapshot:
        """How the engine is.

        Raises:
          ApiError: It does not answer.
        """
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await self._engine.inspect(lambda engine: Snapshot.of(engine, self._pool))
        except (TimeoutError, RuntimeError, jax_kvpage.PoolClosed) as error:
            reason = str(error) or "no answer"
            raise ApiError(f"the engine has stopped: {reason}", status=503) from error

    async def check_health(self) -> None:
        """Raises an ApiError if the server takes no requests."""
        if self._stopping:
            raise stopping()
        await self.snapshot()


def _check(output: RequestOutput) -> None:
    """Raises for a request that the engine ended before its time."""
    reasons = {each.finish_reason for each in output.outputs}
    if "error" in reasons:
        raise ApiError(f"the request has failed: {output.error}", status=500, code="engine_error")
    if "cancelled" in reasons:
        raise stopping()


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """One of the errors of a group; they are the same for all prompts, or follow from one."""
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
