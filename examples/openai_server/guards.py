"""Checks the host and the API key in a request's headers before anything else is read."""

import hmac
import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError

__all__ = ["CheckHost", "RequireKey", "allowed_hosts"]

_LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})


def allowed_hosts(address: str, further: Collection[str] = ()) -> frozenset[str] | None:
    """The host names that requests to a server may use.

    Args:
      address: The numeric address on which it listens.
      further: Additional names.

    Returns:
      Names for `CheckHost`; None to skip the check, on a public address without additional names.
    """
    number = ipaddress.ip_address(address.partition("%")[0])
    if not further and not number.is_loopback:
        return None
    own = f"[{number}]" if number.version == 6 else str(number)
    return _LOCAL | {own} | {name.lower() for name in further}


class CheckHost:
    """Refuses requests for other hosts.

    A page of another site can make its name resolve to this machine (DNS rebinding). The browser
    then treats its requests as same-origin, but their Host header still has that site's name.

    Args:
      app: The next application.
      hosts: From `allowed_hosts`.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses the request, or passes it on."""
        if scope["type"] == "http" and _host_name(Headers(scope=scope)) not in self._hosts:
            error = ApiError(
                "the Host header does not name this server; --allowed-host adds names",
                status=421,
                code="invalid_host",
            )
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _host_name(headers: Headers) -> str:
    """The host in the Host header, without the port; empty if there is none."""
    host = headers.get("host", "").lower()
    if host.startswith("["):
        return host[: host.find("]") + 1]
    return host.partition(":")[0]


class RequireKey:
    """Refuses requests to `/v1` without the key.

    Args:
      app: The next application.
      key: The bearer token that clients must send.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._wanted = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses the request, or passes it on."""
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._wanted):
                error = ApiError(
                    "wrong API key, or none",
                    status=401,
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)
