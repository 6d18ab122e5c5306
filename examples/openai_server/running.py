"""Runs the server: uvicorn in an event loop, up to a graceful shutdown."""

import asyncio
import contextlib
import dataclasses
import signal
import socket
from collections.abc import AsyncIterator, Callable, Collection, Generator
from typing import TYPE_CHECKING, Optional

import uvicorn

from jax_kvpage.serving import AsyncEngine

from .app import make_app
from .guards import allowed_hosts
from .limits import Limits
from .loading import Loaded
from .service import Service

if TYPE_CHECKING:  # needs pyzmq, which is optional
    from .kv_events import EventPublisher

__all__ = ["Started", "bind", "run"]

_GRACE = 5.0  # seconds to send clients errors about the shutdown


@dataclasses.dataclass(frozen=True)
class Started:
    """A running server.

    Attributes:
      port: The port on which it listens.
      service: Runs the requests, in the server's event loop.
      stop: Ends the server; any thread may call it.
    """

    port: int
    service: Service
    stop: Callable[[], None]


def bind(host: str, port: int) -> socket.socket:
    """Binds a socket to an address, without listening yet.

    Args:
      host: Host name or numeric address.
      port: Port number; 0 for any.

    Raises:
      OSError: There is no such address, or the port is in use.
    """
    (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


async def run(
    loaded: Loaded,
    limits: Limits,
    listener: socket.socket,
    *,
    api_key: str | None = None,
    host_names: Collection[str] = (),
    publisher: Optional["EventPublisher"] = None,
    shutdown_seconds: float = 30.0,
    on_start: Callable[[Started], None],
) -> None:
    """Serves until SIGTERM, SIGINT or a call of `Started.stop`.

    Then new requests are refused; running ones have `shutdown_seconds` to finish and are ended
    after that. A second signal ends them immediately.

    Args:
      loaded: A model with a warmed-up engine.
      limits: Limits for clients.
      listener: From `bind`.
      api_key: The key for clients of `/v1`.
      host_names: Names allowed in the Host header, in addition to those of localhost. Without any,
        a server that is not on localhost does not check the header.
      publisher: Gets the events of the prefix cache; the caller closes it.
      shutdown_seconds: Time for running requests to finish at shutdown.
      on_start: Called when the server listens.
    """
    async with AsyncEngine(loaded.engine) as engine:
        service = Service(engine, loaded.pool, loaded.model, limits)
        config = uvicorn.Config(
            make_app(service, api_key, allowed_hosts(listener.getsockname()[0], host_names)),
            lifespan="off",
            http="h11",  # limits the size of headers
            ws="none",
            log_config=None,
            log_level="warning",
            server_header=False,
            # With more connections than this, uvicorn answers 503 itself.
            limit_concurrency=2 * limits.max_requests + 64,
            timeout_graceful_shutdown=int(shutdown_seconds + _GRACE) + 1,
        )
        server = _Server(config)
        loop = asyncio.get_running_loop()

        def stop() -> None:
            if server.should_exit:
                service.end()
                return
            service.stop()
            server.should_exit = True
            loop.call_later(shutdown_seconds, service.end)

        port = listener.getsockname()[1]
        server.on_start = lambda: on_start(Started(port, service, lambda: _call(loop, stop)))
        with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, stop)
        try:
            async with _publishing(engine, loaded, publisher):
                await server.serve([listener])
        finally:
            service.close()


@contextlib.asynccontextmanager
async def _publishing(
    engine: AsyncEngine, loaded: Loaded, publisher: Optional["EventPublisher"]
) -> AsyncIterator[None]:
    """Publishes events inside the `async with` block."""
    if publisher is None:
        yield
        return
    from .kv_events import publish_events

    task = asyncio.create_task(publish_events(engine, loaded.pool, publisher))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class _Server(uvicorn.Server):
    """Leaves signals to `run`, because uvicorn would exit with the signal instead of status 0."""

    on_start: Callable[[], None]

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Does not change signal handlers."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts listening, and calls `on_start`."""
        await super().startup(sockets)
        self.on_start()


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(function)
