"""The interface of a contender, and the base class of those written in JAX."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np
from cases import LAYERS_PER_PROGRAM, Case, is_core
from peers.base import Data
from timing import Ready, copy_bandwidth

__all__ = ["Contender", "JaxContender", "is_full", "queries"]

COPY_BYTES = 2**30


class Contender(abc.ABC):
    """A system under test. Importing its module fails if the system is not installed.

    Attributes:
        variants: the first one runs on all shapes that it supports, the others on core shapes.
        everywhere: other variants that run on all shapes.
    """

    variants: ClassVar[tuple[str, ...]] = ("",)
    everywhere: ClassVar[tuple[str, ...]] = ()

    def __init__(self, platform: str) -> None:
        self.platform = platform

    @abc.abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions and settings needed to repeat the measurement."""

    @abc.abstractmethod
    def copy_bandwidth(self) -> float:
        """Bytes read plus written per second by a large copy on the device."""

    def unsupported(self, case: Case, variant: str) -> str | None:
        """Why this case cannot be run, or None."""
        del case, variant
        return None

    def chosen(self, case: Case, variant: str) -> bool:
        """Whether this variant is timed on this case; some variants run on few shapes."""
        first = variant == self.variants[0] or variant in self.everywhere
        return first or is_core(case)

    @abc.abstractmethod
    def prepare(self, case: Case, variant: str, data: Data | None) -> Ready:
        """Sets up a case: fills `case.copies` caches and compiles the programs.

        Args:
            case: what to attend over.
            variant: one of `variants`.
            data: keys, values and queries; None: random ones, generated on the device.
        """


def is_full(case: Case) -> bool:
    """Whether all sequences are equally long, as a dense batch needs."""
    return len(set(case.contexts)) == 1 and len(set(case.new)) == 1


def queries(case: Case, data: Data | None) -> np.ndarray:
    """Queries `[tokens, q_heads, dim]` in float32."""
    if data is not None:
        return data.q
    shape = (case.tokens, case.q_heads, case.dim)
    return np.random.default_rng(1).standard_normal(shape, np.float32)


class JaxContender(Contender):
    """Runs several calls in one program, each on the output of the previous one."""

    def versions(self) -> dict[str, str]:
        """Versions of JAX and the XLA flags."""
        import os

        import jax
        import jaxlib

        device = jax.devices()[0]
        return {
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "device": device.device_kind,
            "flags": os.environ.get("XLA_FLAGS", ""),
        }

    def copy_bandwidth(self) -> float:
        """Measures a jitted copy of 1 GiB."""
        import jax
        import jax.numpy as jnp

        size = COPY_BYTES if self.platform == "cuda" else 2**22
        x = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
        copy = jax.jit(jnp.copy)
        last = [x]

        def run(times: int) -> None:
            for _ in range(times):
                last[0] = copy(x)

        return copy_bandwidth(run, lambda: jax.block_until_ready(last[0]), size)

    def random(self, key: int, shape: tuple[int, ...]) -> Any:
        """Normally distributed values in bfloat16, generated on the device."""
        import jax
        import jax.numpy as jnp

        return jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)

    def ready(
        self,
        case: Case,
        call: Callable[[Any, int, int], Any],
        q: Any,
        notes: dict[str, Any] | None = None,
        close: Callable[[], None] = lambda: None,
    ) -> Ready:
        """Makes a `Ready` for `call(q, first copy, copies)`, which returns an array like q."""
        import jax

        step = min(case.copies, LAYERS_PER_PROGRAM)
        last = [q]

        def run(times: int) -> None:
            for _ in range(times):
                out = q
                for first in range(0, case.copies, step):
                    out = call(out, first, min(step, case.copies - first))
                last[0] = out

        def output() -> np.ndarray:
            return np.asarray(call(q, 0, 1), np.float32).reshape(-1, case.q_heads, case.dim)

        wait = functools.partial(_wait, jax.block_until_ready, last)
        return Ready(run, wait, output, case.copies, close, notes or {})


def _wait(block: Callable[[Any], Any], last: Iterable[Any]) -> None:
    block(list(last))
