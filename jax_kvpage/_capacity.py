"""Capacities as users write them."""

import re

import numpy as np

__all__ = ["parse_bytes"]

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}iB": 1024**_power, f"{_letter}B": 1000**_power}


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
