"""Measures how fast the engine computes prompts."""

import collections
import time

import numpy as np

__all__ = ["PrefillRate"]

_STEPS = 64  # latest steps that are fitted


class PrefillRate:
    """Measures how fast prompts are computed.

    A step has a fixed cost, and the marginal cost of a token is what is saved if the token need not
    be computed. Both are fitted to the latest steps by least squares of relative errors, so that
    short steps count as much as long ones.
    """

    def __init__(self) -> None:
        self._steps: collections.deque[tuple[int, float]] = collections.deque(maxlen=_STEPS)
        self._last = 0.0
        self._rate: float | None = 0.0  # None if it must be fitted again

    @property
    def tokens_per_second(self) -> float:
        """Prompt tokens that lengthen a step by a second; 0 before the first one with any."""
        if self._rate is None:
            self._rate = self._fitted()
        return self._rate

    def read(self, num_prompt_tokens: int, launched: float) -> None:
        """Records a step that was read back.

        Args:
            num_prompt_tokens: tokens that it ran besides those of decoding sequences.
            launched: time at which it was dispatched, in seconds of `time.monotonic`.
        """
        now = time.monotonic()
        seconds, self._last = now - max(launched, self._last), now
        if seconds > 0:
            self._steps.append((num_prompt_tokens, seconds))
            self._rate = None

    def _fitted(self) -> float:
        tokens, seconds = np.asarray(self._steps, np.float64).T
        if not tokens.any():
            return 0.0
        rows = np.stack([np.ones_like(tokens), tokens]) / seconds
        ((ones, both), (_, squares)), (_, sums) = rows @ rows.T, rows.sum(1)
        determinant = ones * squares - both * both
        if determinant > 1e-6 * ones * squares:  # steps of several sizes
            token = (sums * ones - rows[0].sum() * both) / determinant
            fixed = (rows[0].sum() - both * token) / ones
            if token > 0 and fixed > 0:
                return float(1 / token)
        return float(squares / sums)
