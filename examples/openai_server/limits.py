"""What clients of the server may ask for."""

import dataclasses

__all__ = ["Limits"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the server.

    Attributes:
      max_body_bytes: Size of a request's body.
      max_requests: Requests in the server. One that is being received counts once, and each prompt
        of a list counts from then on.
      max_logprobs: Logprobs of a token.
      seconds: From the first byte of a request's body to the last of its answer.
      body_seconds: From the first byte of a request's body to its last.
      priorities: Whether requests may set their priority.
    """

    max_body_bytes: int = 4 << 20
    max_requests: int = 256
    max_logprobs: int = 20
    seconds: float = 600.0
    body_seconds: float = 30.0
    priorities: bool = False
