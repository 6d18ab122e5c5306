"""Limits for clients of the server."""

import dataclasses

__all__ = ["Limits"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the server.

    Attributes:
      max_body_bytes: The largest body of a request.
      max_requests: The most requests in the server. A request that is being received counts once;
        afterwards each prompt of a list counts.
      max_logprobs: The most logprobs of a token.
      seconds: Time from the start of receiving a request's body to the end of its response.
      body_seconds: Time for receiving a request's body.
      priorities: Whether requests may set their priority.
    """

    max_body_bytes: int = 4 << 20
    max_requests: int = 256
    max_logprobs: int = 20
    seconds: float = 600.0
    body_seconds: float = 30.0
    priorities: bool = False
