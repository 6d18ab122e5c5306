"""Exceptions of host calls, with numbers as attributes.

On CPU, JAX reports the errors of programs: an op that fails at run time (a stale cache, a position
that is not mapped) raises `jax.errors.JaxRuntimeError` where its results are waited for; a program
so small that JAX runs it during dispatch raises ValueError there, with the same text. On CUDA,
kernels run asynchronously and cannot report errors to JAX: the op's results are NaN, and
`KVPool.check` or the next call that changes the pool raises `DeviceFault`, which is also a
`jax.errors.JaxRuntimeError`. The same holds for CPU devices that share a pool
(`KVPool(..., mesh=mesh)` with `axis` or `data_axis`): if one device aborted its program, the others
would hang in the next collective.
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


# XLA prepends this for every program that was dispatched with the results of a failed one.
_REPEATED = re.compile(r"(Error dispatching computation: )\1+")


def shortened(error: BaseException) -> BaseException:
    """Removes repeated prefixes from the text of an error that JAX raised."""
    text = str(error)
    short = _REPEATED.sub(r"\1", text)
    if short == text:
        return error
    return type(error)(short).with_traceback(error.__traceback__)


def wait_for(value: Any) -> None:
    """Waits for arrays; raises the error of the programs that compute them."""
    try:
        jax.block_until_ready(value)
    except (RuntimeError, ValueError) as error:
        raise shortened(error) from None


class KVPageError(RuntimeError):
    """Base class of this package's errors."""


class PoolClosed(KVPageError):
    """A host call on a pool that is closed or belongs to a parent process."""


class DeviceFault(KVPageError, jax.errors.JaxRuntimeError):
    """An op of an earlier program could not run on the device and returned NaN.

    The text is the error that the op would raise on one CPU device. On CUDA it is raised once; over
    a mesh, every call raises it until `KVPool.cache` starts a new generation.
    """


class OutOfBlocks(KVPageError):
    """A request needs more physical blocks than the pool has now. Nothing was changed.

    Attributes:
        wanted: blocks that the request needs beyond what it has.
        free: blocks without an owner.
        draining: blocks of released slots that a program in flight may still access; they become
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
        """Takes the complete message: the caller knows what would help."""
        super().__init__(message)
        self.wanted = wanted
        self.free = free
        self.draining = draining
        self.reclaimable = reclaimable


class OutOfSlots(OutOfBlocks):
    """Every slot is occupied or draining; the attributes count slots, not blocks."""
