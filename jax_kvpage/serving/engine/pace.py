"""How fast the engine computes prompts."""

import time

__all__ = ["Pace"]

_NEWEST = 0.3  # weight of the newest measurement


class Pace:
    """How fast prompts are computed.

    Attributes:
        tokens_per_second: of steps that computed parts of prompts; 0 before the first.
    """

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        self._last = 0.0

    def read(self, num_prompt_tokens: int, launched: float) -> None:
        """Hears that a step was read back.

        Args:
            num_prompt_tokens: tokens that it ran beside those that decode.
            launched: when it was dispatched, in seconds of `time.monotonic`.
        """
        now = time.monotonic()
        seconds, self._last = now - max(launched, self._last), now
        if num_prompt_tokens and seconds > 0:
            measured, before = num_prompt_tokens / seconds, self.tokens_per_second
            self.tokens_per_second = before + _NEWEST * (measured - before) if before else measured
