"""Capacities as users write them."""

import re

import numpy as np

__all__ = ["parse_bytes"]

# What the compiled pool counts bytes with.
_MOST = 2**63 - 1

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}iB": 1024**_power, f"{_letter}B": 1000**_power}


def parse_bytes(value: int | str) -> int:
    """Bytes from an int or from text such as "2GiB", "512 MiB", "1.5GB", "4096".

    Raises:
        ValueError: neither, not positive, or more than a 64-bit number of bytes.
    """
    size = 0
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        size = int(value)
    elif isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if found and found[2] in _UNITS:
            size = int(min(float(found[1]), 2.0**64) * _UNITS[found[2]])
    if 0 < size <= _MOST:
        return size
    if size > _MOST:
        raise ValueError(f"capacity is {value!r}, wanted at most {_MOST} bytes (a 64-bit number)")
    raise ValueError(
        "capacity must be a positive number of bytes or text such as '2GiB' or '512MB', "
        f"got {value!r}"
    )
