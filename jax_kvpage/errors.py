"""What can go wrong on the host side of a pool, as exceptions that carry their numbers.

On CPU, JAX reports errors inside programs: an op that fails at run time (a stale
cache, a position that is not mapped) raises `jax.errors.JaxRuntimeError` where its results are
waited for; a program so small that JAX runs it while dispatching it raises ValueError there, with
the same text. On CUDA nothing may wait for a kernel to fail, so JAX never hears of it: the op's
results are NaN, and `KVPool.check` or the next call that changes the pool raises `DeviceFault`,
which is a `jax.errors.JaxRuntimeError` too. The same holds for CPU devices that share a pool
(`KVPool(..., mesh=mesh)` with `axis` or `data_axis`): a device that left its program would leave
the others in the next sum.
"""

import re
from typing import Any

import jax

__all__ = [
    "DeviceFault",
    "KVPageError",
    "OutOfBlocks",
    "OutOfSlots",
    "PoolClosed",
    "shortened",
    "wait_for",
]


# XLA adds it for every program that was dispatched with the failed one's results.
_REPEATED = re.compile(r"(Error dispatching computation: )\1+")


def shortened(error: BaseException) -> BaseException:
    """An error that JAX raised, without the repeated prefixes of its text."""
    text = str(error)
    short = _REPEATED.sub(r"\1", text)
    if short == text:
        return error
    return type(error)(short).with_traceback(error.__traceback__)


def wait_for(value: Any) -> None:
    """Waits for arrays; raises what the programs that make them failed with."""
    try:
        jax.block_until_ready(value)
    except (RuntimeError, ValueError) as error:
        raise shortened(error) from None


class KVPageError(RuntimeError):
    """Base class of the errors that only this package raises."""


class PoolClosed(KVPageError):
    """A host call on a pool that was closed, or that the parent of this process owns."""


class DeviceFault(KVPageError, jax.errors.JaxRuntimeError):
    """An op of an earlier program found on the device that it must not run, and left NaN behind.

    The text is what the op would have failed with on one CPU device. On CUDA it is raised once,
    over a mesh by every call until then: `KVPool.cache` starts a new generation after it.
    """


class OutOfBlocks(KVPageError):
    """A request wants more physical blocks than the pool can give now. Nothing was changed.

    Attributes:
        wanted: blocks that the request needs beyond what it has.
        free: blocks without an owner.
        draining: blocks of released slots that a program in flight may still touch; they become
            available when those programs have run (`acquire(..., wait=True)` waits for them).
        reclaimable: parked blocks that could have been taken from released slots.
    """

    def __init__(
        self,
        message: str,
        *,
        wanted: int = 0,
        free: int = 0,
        draining: int = 0,
        reclaimable: int = 0,
    ) -> None:
        """Takes the whole message: whoever raises knows what would help."""
        super().__init__(message)
        self.wanted = wanted
        self.free = free
        self.draining = draining
        self.reclaimable = reclaimable


class OutOfSlots(OutOfBlocks):
    """Every slot is occupied or draining; the attributes count slots, not blocks."""
