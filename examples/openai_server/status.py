"""The page at `/` and the JSON that it polls. Neither shows the contents of prompts or answers."""

import pathlib
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from jax_kvpage.serving import Engine

from .service import Service

__all__ = ["status_routes"]

_PAGE = pathlib.Path(__file__).with_name("page.html")
_HEADERS = {
    # The page is one file, and gets its data from this server.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def status_routes(service: Service) -> list[Route]:
    """The routes of the page.

    Args:
      service: The service whose engine the page shows.
    """

    async def page(request: Request) -> Response:
        return FileResponse(_PAGE, headers=_HEADERS, media_type="text/html")

    async def status(request: Request) -> Response:
        snapshot = await service.snapshot()
        requests, total = await service.inspect(
            lambda engine, pool: (
                _requests(engine, pool.spec.block_tokens or 1),
                pool.stats().blocks_total,
            )
        )
        values = {
            "model": service.model.name,
            "seconds": time.monotonic(),
            "running": snapshot.running,
            "waiting": snapshot.waiting,
            "usage": snapshot.usage,
            "queries": snapshot.queries,
            "hits": snapshot.hits,
            "generated_tokens": service.metrics.num_generated,
            "blocks_total": total,
            "requests": requests,
        }
        return JSONResponse(values, headers={"Cache-Control": "no-store"})

    return [Route("/", page), Route("/status.json", status)]


def _requests(engine: Engine, block_tokens: int) -> list[dict[str, Any]]:
    """Tokens and blocks of each running request, summed over its sequences."""
    found: dict[object, dict[str, Any]] = {}
    for each in engine.memory():
        name = each.request_id
        entry = found.setdefault(name, {"id": name, "tokens": 0, "blocks": 0})
        entry["tokens"] += each.num_tokens
        entry["blocks"] += -(-each.num_reserved // block_tokens)
    return list(found.values())
