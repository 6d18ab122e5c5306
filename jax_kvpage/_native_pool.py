"""Calls into the compiled pool, and conversion of its failed statuses to exceptions.

The type of an exception follows from the reason of the status, or from its code if it has no
reason; statuses' messages are not parsed.
"""

import re
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Self

import jax
from jax.sharding import NamedSharding

from jax_kvpage import _native
from jax_kvpage._arrays import as_bool
from jax_kvpage._cuda import Place, memory_hint
from jax_kvpage._native import Code, Reason
from jax_kvpage.errors import DeviceFault, KVPageError, OutOfBlocks, OutOfSlots, PoolClosed
from jax_kvpage.sharding.over_axis import AxisSharding
from jax_kvpage.spec import CacheSpec

__all__ = ["NativePool", "PoolOptions", "checked", "exception"]

_BY_REASON: dict[Reason, type[Exception]] = {
    Reason.CLOSED: PoolClosed,
    Reason.FORKED: PoolClosed,
    Reason.OUT_OF_BLOCKS: OutOfBlocks,
    Reason.OUT_OF_SLOTS: OutOfSlots,
    Reason.OUT_OF_DEVICE_MEMORY: OutOfBlocks,
    Reason.DEVICE_FAULT: DeviceFault,
}
_BY_CODE: dict[Code, type[Exception]] = {
    Code.INVALID_ARGUMENT: ValueError,
    Code.OUT_OF_RANGE: ValueError,
    Code.RESOURCE_EXHAUSTED: OutOfBlocks,
}


# The beginning of nanobind's message for arguments that cannot be converted.
_SIGNATURE = re.compile(r"(\w+)\(\): incompatible function arguments")


def _numbers(value: Any) -> str:
    """The integers among a call's arguments that do not fit int32, for a message."""
    if isinstance(value, (list, tuple)):
        return "".join(_numbers(item) for item in value)
    fits = not isinstance(value, int) or -(2**31) <= value < 2**31
    return "" if fits else f"{value} does not fit, "


def exception(code: Code, reason: Reason, message: str) -> Exception:
    """The exception for the failed status of a host call."""
    if reason is Reason.DEVICE_FAULT:  # the form that JAX gives to errors of programs on CPU
        message = f"{code.name}: {message}"
    return _BY_REASON.get(reason, _BY_CODE.get(code, KVPageError))(message)


def checked(function: Any, *args: Any) -> Any:
    """Calls into C++ without a pool; a failed status becomes an exception."""
    try:
        return function(*args)
    except _native.StatusError as error:
        failed = error.args
    raise exception(*failed)


class PoolOptions(NamedTuple):
    """The modes of a pool, in the order of the parameters of `_native.Pool`."""

    allow_stale: bool
    poison: bool
    debug: bool

    @classmethod
    def checked(cls, on_stale: str, poison: bool, debug: bool) -> Self:
        """Checks the arguments of `KVPool` and converts them to options.

        Raises:
            ValueError: an invalid argument, or two that exclude each other.
        """
        if on_stale not in ("error", "allow"):
            raise ValueError(f"on_stale must be 'error' or 'allow', got {on_stale!r}")
        poison = as_bool("KVPool: poison", poison)
        debug = as_bool("KVPool: debug", debug)
        if debug and on_stale == "allow":
            raise ValueError(
                "KVPool: debug=True refuses to write a position twice, but steps repeated with "
                "on_stale='allow' do so: give one of the two"
            )
        return cls(on_stale == "allow", poison or debug, debug)


class NativePool:
    """The compiled pool of a `KVPool`.

    Attributes:
        pool: `_native.Pool`; its methods are called through `call` or `Queue.claim`.
        spec: the resolved spec.
        device: the device of the cache's arrays.
        placement: the placement of arrays for programs.
        place: where the compiled pool lives.
        sharding: how the pool is split over a mesh; None if it is on `device` alone.
        block_bytes: bytes of a block, summed over all devices.
        lock: held while a decision is made and its program queued, if several pools decide
            together.

    Raises:
        ValueError: a spec or capacity that cannot work.
        KVPageError: a call of the CUDA driver failed.
        OutOfBlocks: the capacity is larger than the available memory.
    """

    def __init__(
        self,
        spec: CacheSpec,
        capacity_bytes: int,
        device: jax.Device,
        place: Place,
        options: PoolOptions,
    ) -> None:
        self.spec = spec
        self.device = device
        self.placement: jax.Device | NamedSharding = device
        self.place = place
        self.sharding: AxisSharding | None = None
        self.block_bytes = spec.block_bytes
        self.lock: AbstractContextManager[Any] = nullcontext()
        ints, block_bytes = spec.as_ints(), spec.block_bytes
        self.pool: _native.Pool = self.call(
            _native.Pool,
            *(ints, block_bytes, capacity_bytes),
            *options,
            *(place.backend, place.ordinal),
        )

    def refuse_mesh(self, call: str) -> None:
        """Raises a ValueError for a call that pools over a mesh do not support yet."""
        if self.sharding is not None:
            raise ValueError(f"{call}: not supported yet on a pool over a mesh")

    def refuse_gpus(self, call: str, why: str) -> None:
        """Raises a ValueError for a call that pools over several GPUs do not support yet."""
        if self.sharding is not None and self.mirrored:
            raise ValueError(f"{call}: not supported yet on a pool over several GPUs: {why}")

    def decision(self) -> Any:
        """Makes an empty decision, to be filled by a call of the pool."""
        return _native.Decision()

    def swapped(self, store: Any) -> Any:
        """Makes an empty swapped sequence for a compiled store, to be filled by `swap_out`."""
        return _native.Swapped(store)

    def call(self, function: Any, *args: Any) -> Any:
        """Calls into C++; a failed status becomes an exception.

        Raises:
            ValueError: also for an integer that is too large for C++.
        """
        try:
            return function(*args)
        except TypeError as error:
            found = _SIGNATURE.match(str(error))
            if found is None or found[1] == "__init__":
                raise
            # Functions that serve several verbs get the verb's name as an argument.
            name = next((arg for arg in args if isinstance(arg, str)), found[1])
            raise ValueError(
                f"{name}: {_numbers(args)}wanted integers: slots are "
                f"0..{self.spec.max_slots - 1}, numbers of tokens at most {self.spec.max_seq_len}, "
                "token ids int32"
            ) from None
        except _native.StatusError as error:
            code, reason, message = error.args
        raise exception(code, reason, self._explained(reason, message))

    @property
    def mirrored(self) -> bool:
        """Whether programs run on a GPU and read a mirror of the host's tables."""
        return self.place.backend == "cuda"

    def raise_fault(self) -> None:
        """Raises the pending device fault, if any. On one CPU device there is none: JAX itself
        raises the errors of programs."""
        if self.mirrored and not self.pool.closed:
            self.warn()
            self.call(self.pool.take_fault)

    def warn_untold(self) -> None:
        """Warns about errors of programs that nothing has raised yet."""

    def warn(self) -> None:
        """Warns, once, about misuse by programs on this device that is not an error."""
        if text := self.pool.take_warning():
            warnings.warn(text, RuntimeWarning, stacklevel=4)

    def failed_claim(
        self, op: str, claim: _native.Claim, held: Sequence[int] = (), failed: Sequence[int] = ()
    ) -> Exception:
        """The exception for a failed claim; with numbers if slots or blocks were lacking.

        Args:
            op: the call's name.
            claim: the failed claim.
            held: released slots that views keep from draining, if nothing else is draining.
            failed: released slots whose release program failed, if nothing else is draining.
        """
        if claim.code is not Code.RESOURCE_EXHAUSTED:
            return exception(claim.code, claim.reason, claim.message)
        numbers = {
            "wanted": claim.wanted,
            "free": claim.free,
            "draining": claim.draining,
            "reclaimable": claim.reclaimable,
        }
        wait = " or wait for those that drain (acquire(..., wait=True))" if claim.draining else ""
        if held or failed:  # waiting would never end
            wait = ""
        if held:
            wait += (
                f", or drop the arrays from pool.view that hold the released slots {list(held)}: "
                "they drain when their arrays are gone"
            )
        if failed:
            wait += (
                f", or start a new generation with pool.cache(), which frees the slots "
                f"{list(failed)}: the program that was to release them failed"
            )
        if claim.reason is Reason.OUT_OF_SLOTS:
            return OutOfSlots(
                f"{op}: {claim.wanted} slots wanted, {claim.free} free, {claim.draining} draining, "
                f"{self.spec.max_slots} in all: release a request{wait}, or make the pool with a "
                "larger max_slots",
                **numbers,
            )
        live = [row for row in self.call(self.pool.rows) if not row.draining]
        largest = max(live, key=lambda row: row.blocks, default=None)
        hint = f" (slot {largest.slot} holds most, {largest.blocks} blocks)" if largest else ""
        # If the system has no memory left, more capacity would not help.
        more = claim.reason is Reason.OUT_OF_BLOCKS
        resize = "take more memory" if more else "make the pool smaller"
        message = (
            f"{op}: {claim.message}; a block is {self.block_bytes} bytes: release a request"
            f"{hint}{wait}, or {resize} with resize()"
        )
        return OutOfBlocks(self._explained(claim.reason, message), **numbers)

    def _explained(self, reason: Reason, message: str) -> str:
        """Adds the share of JAX's allocator to the message if the GPU's memory is full."""
        if self.place.backend == "cuda" and reason is Reason.OUT_OF_DEVICE_MEMORY:
            return f"{message}. {memory_hint(self.device)}"
        return message
