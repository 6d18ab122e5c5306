"""Calls into the compiled pool, and its failed statuses as this package's exceptions.

The type of an exception follows from the status's reason, or from its code where there is none;
nothing here looks into a message.
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


# How nanobind begins to say that a call's arguments do not convert.
_SIGNATURE = re.compile(r"(\w+)\(\): incompatible function arguments")


def _numbers(value: Any) -> str:
    """The integers in a call's arguments that do not fit, for the beginning of a message."""
    if isinstance(value, (list, tuple)):
        return "".join(_numbers(item) for item in value)
    fits = not isinstance(value, int) or -(2**31) <= value < 2**31
    return "" if fits else f"{value} does not fit, "


def exception(code: Code, reason: Reason, message: str) -> Exception:
    """The exception that a failed status of a host call becomes."""
    if reason is Reason.DEVICE_FAULT:  # as JAX writes what a program fails with on CPU
        message = f"{code.name}: {message}"
    return _BY_REASON.get(reason, _BY_CODE.get(code, KVPageError))(message)


def checked(function: Any, *args: Any) -> Any:
    """Calls into C++ apart from any pool; a failed status becomes an exception."""
    try:
        return function(*args)
    except _native.StatusError as error:
        failed = error.args
    raise exception(*failed)


class PoolOptions(NamedTuple):
    """The modes of a pool, in the order in which `_native.Pool` takes them."""

    allow_stale: bool
    poison: bool
    debug: bool

    @classmethod
    def checked(cls, on_stale: str, poison: bool, debug: bool) -> Self:
        """The options that the arguments of `KVPool` ask for.

        Raises:
            ValueError: an argument that is no option, or two that exclude each other.
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
        pool: `_native.Pool`; its methods are called through `call` or `claim`.
        spec: resolved.
        device: where the cache's arrays live.
        placement: where arrays for programs are put.
        place: the same for the compiled side.
        sharding: over which devices of a mesh; None: on `device` alone.
        block_bytes: bytes of a block, on all devices together.
        lock: of a decision with the program that is queued for it, where pools decide together.

    Raises:
        ValueError: a spec or capacity that cannot work.
        KVPageError: the CUDA driver refused.
        OutOfBlocks: more capacity than there is memory.
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
        """Raises a ValueError for calls that a pool over a mesh does not have so far."""
        if self.sharding is not None:
            raise ValueError(f"{call}: not on a pool over a mesh so far, which has a pool a device")

    def refuse_gpus(self, call: str, why: str) -> None:
        """Raises a ValueError for calls that a pool over several GPUs does not have so far."""
        if self.sharding is not None and self.mirrored:
            raise ValueError(f"{call}: not on a pool over several GPUs so far: {why}")

    def decision(self) -> Any:
        """An empty decision, for a call of the pool to fill."""
        return _native.Decision()

    def swapped(self, store: Any) -> Any:
        """What `swap_out` fills with a sequence, for a compiled store."""
        return _native.Swapped(store)

    def call(self, function: Any, *args: Any) -> Any:
        """Calls into C++; a failed status becomes an exception.

        Raises:
            ValueError: also for an integer that C++ has no room for.
        """
        try:
            return function(*args)
        except TypeError as error:
            found = _SIGNATURE.match(str(error))
            if found is None or found[1] == "__init__":
                raise
            # What queues edits for a verb is called with the verb's name.
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
        """Whether programs run on a GPU, apart from the host's table."""
        return self.place.backend == "cuda"

    def raise_fault(self) -> None:
        """Raises the pending device fault, if any. On one CPU device JAX raises what a program
        fails with."""
        if self.mirrored and not self.pool.closed:
            self.warn()
            self.call(self.pool.take_fault)

    def warn_untold(self) -> None:
        """Warns of what programs have failed with that neither they nor a call have raised."""

    def warn(self) -> None:
        """Warns, once, of what programs on this device do wrong without failing."""
        if text := self.pool.take_warning():
            warnings.warn(text, RuntimeWarning, stacklevel=4)

    def failed_claim(
        self, op: str, claim: _native.Claim, held: Sequence[int] = (), failed: Sequence[int] = ()
    ) -> Exception:
        """The exception for a claim that failed; for one that could not be met, with numbers.

        Args:
            op: the call's name.
            claim: not ok.
            held: released slots that views keep from draining, if nothing else drains.
            failed: released slots whose release program failed, likewise.
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
        if held or failed:  # waiting would not end
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
        # Where the system has no memory, more capacity would not help.
        more = claim.reason is Reason.OUT_OF_BLOCKS
        resize = "take more memory" if more else "make the pool smaller"
        message = (
            f"{op}: {claim.message}; a block is {self.block_bytes} bytes: release a request"
            f"{hint}{wait}, or {resize} with resize()"
        )
        return OutOfBlocks(self._explained(claim.reason, message), **numbers)

    def _explained(self, reason: Reason, message: str) -> str:
        """The message, with JAX's share of the card where the card is full."""
        if self.place.backend == "cuda" and reason is Reason.OUT_OF_DEVICE_MEMORY:
            return f"{message}. {memory_hint(self.device)}"
        return message
