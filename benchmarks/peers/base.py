"""The interface of a peer, and the data that all peers attend over."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from shapes import Case

__all__ = ["Data", "Peer", "Ready"]

_BLOCK = 1 << 22


@dataclasses.dataclass
class Ready:
    """A case that is set up.

    Attributes:
        cycle: runs attention once over every copy and waits for the results.
        output: returns the result for the first copy, float32 `[tokens, q_heads, dim]`.
        calls: number of attention calls in a cycle, and of copies.
        close: frees all memory.
        notes: additional facts about this setup.
    """

    cycle: Callable[[], object]
    output: Callable[[], np.ndarray]
    calls: int
    close: Callable[[], None] = lambda: None
    notes: dict[str, float] = dataclasses.field(default_factory=dict)


class Data:
    """Queries, keys and values of a case, the same in every process."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rng = np.random.default_rng(0)
        self._values = rng.standard_normal(_BLOCK, np.float32)
        self.q = rng.standard_normal((case.tokens, case.q_heads, case.dim), np.float32)

    def kv(self, sequence: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a sequence, float32 `[context, kv_heads, dim]`; read-only views."""
        shape = (self.case.contexts[sequence], self.case.kv_heads, self.case.dim)
        size = int(np.prod(shape))
        return self._take(7919 * sequence, size, shape), self._take(104729 + sequence, size, shape)

    def _take(self, start: int, size: int, shape: tuple[int, ...]) -> np.ndarray:
        start %= _BLOCK // 2
        if start + size <= _BLOCK:
            return self._values[start : start + size].reshape(shape)
        return np.resize(self._values[start:], size).reshape(shape)

    def expected(self) -> np.ndarray:
        """Attention in float64 `[tokens, q_heads, dim]`; for small cases."""
        case = self.case
        out = np.empty(self.q.shape, np.float64)
        for s, (context, new) in enumerate(zip(case.contexts, case.new, strict=True)):
            rows = slice(case.offsets[s], case.offsets[s + 1])
            k, v = (np.repeat(x, case.group, axis=1).astype(np.float64) for x in self.kv(s))
            scores = np.einsum("qhd,khd->hqk", self.q[rows], k) / case.dim**0.5
            visible = np.arange(context) <= np.arange(context - new, context)[:, None]
            scores = np.where(visible, scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[rows] = np.einsum("hqk,khd->qhd", weights, v)
        return out


class Peer(abc.ABC):
    """A system under test. Importing its module fails if the system is not installed."""

    variants: ClassVar[tuple[str, ...]] = ("",)

    @abc.abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions and settings needed to repeat the measurement."""

    def unsupported(self, case: Case, variant: str) -> str | None:
        """Why this case cannot be run, or None."""
        del case, variant
        return None

    @abc.abstractmethod
    def prepare(self, data: Data, variant: str) -> Ready:
        """Sets up a case: fills `case.copies` caches and compiles the programs."""
