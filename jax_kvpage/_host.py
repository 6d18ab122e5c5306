"""Between Python's host calls and the compiled pool: sizes as text, statuses as exceptions."""

import re
from typing import Any

import numpy as np

from jax_kvpage import _native
from jax_kvpage.errors import DeviceFault, KVPageError, OutOfBlocks, OutOfSlots, PoolClosed
from jax_kvpage.spec import CacheSpec

__all__ = [
    "RESOURCE_EXHAUSTED",
    "as_list",
    "device_fault",
    "exception",
    "native_call",
    "out_of",
    "parse_bytes",
]

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}iB": 1024**_power, f"{_letter}B": 1000**_power}

# Numbers of the statuses that host calls answer with (absl's).
INVALID_ARGUMENT, RESOURCE_EXHAUSTED, FAILED_PRECONDITION, OUT_OF_RANGE = 3, 8, 9, 11
_NAMES = {
    INVALID_ARGUMENT: "INVALID_ARGUMENT",
    RESOURCE_EXHAUSTED: "RESOURCE_EXHAUSTED",
    FAILED_PRECONDITION: "FAILED_PRECONDITION",
    OUT_OF_RANGE: "OUT_OF_RANGE",
}


def parse_bytes(value: int | str) -> int:
    """Bytes from an int or from text such as "2GiB", "512 MiB", "1.5GB", "4096".

    Raises:
        ValueError: neither, or not positive.
    """
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value > 0:
        return int(value)
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if found and found[2] in _UNITS and float(found[1]) > 0:
            return int(float(found[1]) * _UNITS[found[2]])
    raise ValueError(
        "capacity must be a positive number of bytes or text such as '2GiB' or '512MB', "
        f"got {value!r}"
    )


def native_call(function: Any, *args: Any) -> Any:
    """Calls into C++ and turns a failed status into this package's exceptions."""
    try:
        return function(*args)
    except _native.StatusError as error:
        code, message = error.args
        raise exception(code, message) from None


def exception(code: int, message: str) -> Exception:
    if code == FAILED_PRECONDITION:
        gone = "is closed" in message or "was forked" in message
        return PoolClosed(message) if gone else KVPageError(message)
    if code in (INVALID_ARGUMENT, OUT_OF_RANGE):
        return ValueError(message)
    if code == RESOURCE_EXHAUSTED:
        return OutOfBlocks(message)
    return KVPageError(message)


def device_fault(native: Any) -> DeviceFault | None:
    """The first fault that a program left on the device since the last look.

    Args:
        native: the compiled pool; when it is closed, the caller's own call says so.

    Raises:
        PoolClosed: the pool belongs to a parent process.
    """
    if native.closed:
        return None
    try:
        native.take_fault()
    except _native.StatusError as error:
        code, message = error.args
        if "was forked" in message:
            raise PoolClosed(message) from None
        return DeviceFault(f"{_NAMES.get(code, 'INTERNAL')}: {message}")
    return None


def as_list(value: Any, name: str) -> tuple[list[int], bool]:
    """A host int, or a sequence of them, as a list; and whether it was one int."""
    array = np.asarray(value)
    if array.ndim > 1 or (array.size > 0 and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name} must be an int or a list of ints, got {value!r}")
    return [int(x) for x in array.reshape(-1)], array.ndim == 0


def out_of(op: str, claim: Any, rows: list[Any], spec: CacheSpec) -> OutOfBlocks:
    """The exception for a claim that could not be met: the numbers, and the ways out.

    Args:
        op: the call's name.
        claim: `_native.Claim`.
        rows: the valid slot table, to name who holds most.
        spec: of the pool.
    """
    numbers = {
        "wanted": claim.wanted,
        "free": claim.free,
        "draining": claim.draining,
        "reclaimable": claim.reclaimable,
    }
    wait = " or wait for those that drain (acquire(..., wait=True))" if claim.draining else ""
    if claim.out_of_slots:
        return OutOfSlots(
            f"{op}: {claim.wanted} slots wanted, {claim.free} free, {claim.draining} draining, "
            f"{spec.max_slots} in all: release a request{wait}, or make the pool with a larger "
            "max_slots",
            **numbers,
        )
    live = [row for row in rows if not row.draining]
    largest = max(live, key=lambda row: row.blocks, default=None)
    hint = f" (slot {largest.slot} holds most, {largest.blocks} blocks)" if largest else ""
    return OutOfBlocks(
        f"{op}: {claim.message}; a block is {spec.block_bytes} bytes: release a request{hint}{wait}"
        ", or take more memory with resize()",
        **numbers,
    )
