"""Capacities as users write them."""

import re
from typing import Any

from jax_kvpage._arrays import host_int

__all__ = ["parse_bytes"]

_MAX_BYTES = 2**63 - 1
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}iB": 1024**_power, f"{_letter}B": 1000**_power}


def parse_bytes(value: Any) -> int:
    """Bytes from an int or from text such as "2GiB", "512 MiB", "1.5GB", "4096".

    Raises:
        ValueError: neither, not positive, or more than 64 bits can count.
    """
    wrong = ValueError(
        "capacity must be a positive number of bytes (less than 2**63) or text such as '2GiB' or "
        f"'512MB', got {value!r}"
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
