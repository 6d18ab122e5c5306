"""The HTTP layer: routes, bodies, streams of server-sent events, and disconnected clients."""

import asyncio
import json
from collections.abc import Callable, Collection, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from jax_kvpage.serving import RequestOutput

from .answers import Answer
from .calls import Call, parse_chat, parse_completion
from .errors import ApiError
from .fields import parse_object
from .guards import CheckHost, RequireKey
from .limits import Limits
from .metrics import CONTENT_TYPE
from .service import Place, Service
from .status import status_routes

__all__ = ["make_app"]

_Parse = Callable[[dict[str, Any], Limits], Call]


def make_app(
    service: Service, api_key: str | None = None, hosts: Collection[str] | None = None
) -> Starlette:
    """Makes the application.

    Args:
      service: Runs the requests.
      api_key: The bearer token that clients of `/v1` must send; None for no key.
      hosts: Names allowed in the Host header; None for any.
    """

    async def models(request: Request) -> Response:
        model = service.model
        entry = {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "jax_kvpage",
            "max_model_len": model.max_seq_len,
        }
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [entry]})
        if request.path_params["name"] != model.name:
            raise ApiError("there is no such model", status=404, code="model_not_found")
        return JSONResponse(entry)

    async def health(request: Request) -> Response:
        await service.check_health()
        return Response()

    async def metrics(request: Request) -> Response:
        snapshot = await service.snapshot()
        return Response(service.metrics.render(snapshot), headers={"Content-Type": CONTENT_TYPE})

    routes = [
        Route("/v1/completions", _Generation(service, parse_completion), methods=["POST"]),
        Route("/v1/chat/completions", _Generation(service, parse_chat), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", models),
        Route("/health", health),
        Route("/metrics", metrics),
        *status_routes(service),
    ]
    middleware = []
    if hosts is not None:
        middleware.append(Middleware(CheckHost, hosts=hosts))
    if api_key is not None:
        middleware.append(Middleware(RequireKey, key=api_key))
    handlers: dict[Any, Any] = {
        ApiError: lambda request, error: error.response(),
        HTTPException: _http_error,
        Exception: lambda request, error: ApiError("internal error", status=500).response(),
    }
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


def _http_error(request: Request, error: HTTPException) -> Response:
    """Answers requests for unknown paths, or with a wrong method."""
    return ApiError(error.detail, status=error.status_code, headers=error.headers).response()


class _Generation:
    """An endpoint that runs requests on the engine."""

    def __init__(self, service: Service, parse: _Parse) -> None:
        self._service = service
        self._parse = parse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = _Reply(scope, send)
        try:
            async with self._service.limited() as place:
                async with self._service.receiving():
                    body = await self._read(Request(scope, receive))
                if body is not None:
                    await _unless_client_leaves(receive, self._answer(place, body, reply))
        except ApiError as error:
            await reply.fail(error)

    async def _read(self, request: Request) -> bytes | None:
        """Reads the body; returns None if the client has disconnected.

        Raises:
          ApiError: The body is too large, or not JSON. Requiring the JSON content type makes
            browsers send a preflight request before a cross-site request.
        """
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError("wanted Content-Type: application/json", status=415)
        most = self._service.limits.max_body_bytes
        large = ApiError(
            f"the body has more than {most} bytes", status=413, code="request_too_large"
        )
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise large
        body = bytearray()
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > most:
                raise large
            if not message.get("more_body", False):
                return bytes(body)

    async def _answer(self, place: Place, body: bytes, reply: "_Reply") -> None:
        service, model = self._service, self._service.model

        def prepare() -> tuple[Call, list[list[int]], list[str]]:
            call = self._parse(parse_object(body), service.limits)
            return call, model.encode(call), model.echoes(call)

        call, prompts, echoes = await service.in_thread(prepare)
        answer = Answer(call, model.tokenizer.decode, echoes)
        newest: dict[int, RequestOutput] = {}

        async def keep(number: int, output: RequestOutput) -> None:
            newest[number] = output
            if call.stream:
                await reply.events(answer.pieces(number, output))

        await service.run(place, call, prompts, keep)
        outputs = [newest[number] for number in range(len(prompts))]
        if not call.stream:
            await reply.whole(answer.whole(outputs))
            return
        if call.include_usage:
            await reply.events([answer.usage(outputs)])
        await reply.done()


class _Reply:
    """The response to one request. Nothing is sent before the first output or error."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._begun = self._streams = False

    async def whole(self, values: dict[str, Any]) -> None:
        """Sends a complete response."""
        self._begun = True
        await JSONResponse(values)(self._scope, _nothing, self._send)

    async def events(self, values: list[dict[str, Any]]) -> None:
        """Sends events of a stream."""
        if values:
            lines = [f"data: {json.dumps(each)}\n\n" for each in values]
            await self._stream("".join(lines).encode())

    async def done(self) -> None:
        """Sends the end of a stream."""
        await self._stream(b"data: [DONE]\n\n", last=True)

    async def fail(self, error: ApiError) -> None:
        """Sends an error: as the response, or as the last event of a stream that has begun."""
        if not self._begun:
            self._begun = True
            await error.response()(self._scope, _nothing, self._send)
        elif self._streams:
            event = f"data: {json.dumps(error.body)}\n\n"
            try:
                async with asyncio.timeout(1):  # the client may have stopped reading
                    await self._stream(event.encode(), last=True)
            except TimeoutError:
                return  # the response is incomplete, so the connection is closed

    async def _stream(self, body: bytes, last: bool = False) -> None:
        if not self._begun:
            self._begun = self._streams = True
            headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
            start: Message = {"type": "http.response.start", "status": 200, "headers": headers}
            await self._send(start)
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


async def _unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work`; cancels it if the client disconnects."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_departure(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
