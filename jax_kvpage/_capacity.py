"""Parses capacities: bytes, text, or a share of the memory that is available now."""

import re
from typing import Any

from jax_kvpage import _native
from jax_kvpage._arrays import host_int
from jax_kvpage._cuda import Place
from jax_kvpage._native_pool import checked
from jax_kvpage.spec import CacheSpec

__all__ = ["DEFAULT_PERCENT", "bytes_of", "capacity_bytes", "parse_bytes", "parse_percent"]

# The meaning of None. A GPU is usually dedicated to the model and its cache; host memory is shared
# with other programs, and the system kills processes when it runs out.
DEFAULT_PERCENT = {"cpu": 50.0, "cuda": 80.0}

_MAX_BYTES = 2**63 - 1
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}iB": 1024**_power, f"{_letter}B": 1000**_power}


def parse_bytes(value: Any) -> int:
    """Parses a number of bytes: an int, or text such as "2GiB", "512 MiB", "1.5GB", "4096".

    Raises:
        ValueError: neither of these, not positive, or 2**63 or more.
    """
    wrong = ValueError(
        "capacity must be a positive number of bytes (less than 2**63), text such as '2GiB' or "
        "'512MB', a share of what is available such as '80%', or None for the default share, "
        f"got {value!r}"
    )
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        size = float(found[1]) * _UNITS[found[2]] if found and found[2] in _UNITS else 0.0
        if not 1 <= size <= _MAX_BYTES:
            raise wrong
        value = int(size)
    try:
        return host_int("capacity", value, low=1, high=_MAX_BYTES)
    except ValueError:
        raise wrong from None


def bytes_of(name: str, value: Any) -> int:
    """Like `parse_bytes`, but errors name another argument than the capacity."""
    try:
        return parse_bytes(value)
    except ValueError:
        raise ValueError(
            f"{name}: wanted a positive number of bytes, or text such as '8GiB', got {value!r}"
        ) from None


def parse_percent(value: Any) -> float | None:
    """Parses text such as "80%" or "12.5 %"; returns None for anything else.

    Raises:
        ValueError: 0, or more than 100.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value) if isinstance(value, str) else None
    if found is None:
        return None
    percent = float(found[1])
    if not 0 < percent <= 100:
        raise ValueError(f"capacity must be more than 0% and at most 100%, got {value!r}")
    return percent


def _available(place: Place) -> tuple[int, str]:
    """Bytes of memory that a pool could allocate now, and the name of the owner for messages."""
    if place.backend == "cpu":
        what = "this machine (or this process's cgroup)"
        return _native.available_bytes(), what
    if place.backend == "fake":
        return _native.fake_driver.free_bytes(), "the fake device"
    free: int = checked(_native.free_device_bytes, place.ordinal)
    return free, f"CUDA device {place.ordinal}"


def _default(spec: CacheSpec, place: Place, size: int, blocks: int) -> int:
    """Limits `size` to what full slots take and to what there are memory mappings for.

    Args:
        spec: resolved.
        place: where the pool is.
        size: bytes.
        blocks: blocks for which the pool already has a promise of mappings.
    """
    size = min(size, spec.virtual_bytes)
    if place.backend != "cpu":
        return size

    def mappings(blocks: int) -> int:
        ranges = spec.max_slots * spec.num_ranges
        return _native.worst_mappings(blocks, ranges, spec.blocks_per_range)

    most = _native.mapping_share() + (mappings(blocks) if blocks else 0)
    low, high = spec.num_ranges, size // spec.block_bytes
    while low < high:  # finds the largest number of blocks for which the mappings suffice
        middle = (low + high + 1) // 2
        if mappings(middle) <= most:
            low = middle
        else:
            high = middle - 1
    return low * spec.block_bytes


def capacity_bytes(
    op: str, value: Any, spec: CacheSpec, place: Place, held: int = 0, blocks: int = 0
) -> int:
    """Computes the capacity of a pool in bytes.

    Args:
        op: the call's name, for messages.
        value: the caller's capacity: bytes, text, a share, or None.
        spec: the pool's spec, resolved or not.
        place: where the pool is, or will be.
        held: bytes that the pool holds already; they count as available.
        blocks: the pool's present capacity in blocks.

    Raises:
        ValueError: not a capacity, a share that is less than the smallest pool, or the available
            memory is not known.
        KVPageError: the CUDA driver refused.
    """
    percent = DEFAULT_PERCENT[place.platform] if value is None else parse_percent(value)
    if percent is None:
        return parse_bytes(value)
    available, owner = _available(place)
    if available < 0:
        raise ValueError(
            f"{op}: capacity={value!r}: the memory available on {owner} is not known here "
            "(/proc/meminfo cannot be read): give a number of bytes"
        )
    size = min(int((available + held) * (percent / 100)), _MAX_BYTES)
    resolved = spec.resolve(place.platform, capacity=max(size, 1))
    least = resolved.num_ranges * resolved.block_bytes
    if size < least:
        holds = f" and {held} that the pool holds" if held else ""
        raise ValueError(
            f"{op}: capacity={value!r} is {size} bytes, {percent:g}% of the {available} bytes "
            f"available now on {owner}{holds}, but the smallest pool has {resolved.num_ranges} "
            f"blocks of {resolved.block_bytes} bytes: free memory, or use smaller blocks"
        )
    return size if value is not None else _default(resolved, place, size, blocks)
