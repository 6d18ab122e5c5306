"""Errors in the format that OpenAI's clients expect."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

__all__ = ["ApiError", "busy", "stopping"]

_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}


class ApiError(Exception):
    """A request that is refused or has failed.

    Args:
      message: A message for the user.
      status: The HTTP status.
      param: The invalid field of the body.
      code: A machine-readable code.
      headers: Additional headers of the response.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        """The error as a JSON object."""
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The error as a response."""
        # The message may quote text of the request, including lone surrogates, so encode as ASCII.
        return _AsciiResponse(self.body, self.status, self.headers)


class _AsciiResponse(JSONResponse):
    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode("ascii")


def busy(message: str) -> ApiError:
    """Too many requests; the client may try again."""
    return ApiError(message, status=429, code="rate_limit_exceeded", headers={"Retry-After": "1"})


def stopping() -> ApiError:
    """The server is shutting down."""
    return ApiError(
        "the server is shutting down",
        status=503,
        code="shutting_down",
        headers={"Retry-After": "10"},
    )
