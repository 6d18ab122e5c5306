"""Typed access to the JSON of a `config.json`: each function returns a checked value or raises
ConfigError with the name of the key, the value found and the value expected.

JSON written by Python may contain NaN and Infinity, and hand-edited files may have strings for
numbers and booleans. Python would accept most of these and fail, or generate garbage, much later.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = [
    "ConfigError",
    "boolean",
    "integer",
    "number",
    "read_object",
    "same",
    "shown",
    "token_ids",
]

_LARGEST = 2**31 - 1  # shapes, positions and token ids are int32


class ConfigError(ValueError):
    """A `config.json` that is missing, malformed, or describes an unsupported model."""


def read_object(file: pathlib.Path) -> dict[str, Any]:
    """Reads the JSON object in `file`."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds a JSON {type(values).__name__}, expected an object")
    return values


def integer(
    values: Mapping[str, Any],
    name: str,
    default: int | None = None,
    *,
    least: int = 1,
    most: int = _LARGEST,
) -> int:
    """Reads an integer, positive by default; null or a missing key gives the default, if any."""
    value = values.get(name)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer from {least} on"
        raise ConfigError(f"{name} is {shown(value)}, expected {wanted}")
    if value > most:
        raise ConfigError(f"{name} is {shown(value)}, expected at most {most}")
    return value


def number(values: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Reads a positive number; null or a missing key gives the default, if any."""
    value = values.get(name)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"{name} is missing")
    problem = f"{name} is {shown(value)}, expected a positive number"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(problem)
    # The model computes in float32, where larger values are infinite and smaller ones are zero.
    limits = np.finfo(np.float32)
    if not float(limits.smallest_subnormal) <= value <= float(limits.max):
        raise ConfigError(f"{problem} in the range of float32")
    return float(value)


def boolean(values: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """Reads true or false; null or a missing key gives the default."""
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{name} is {shown(value)}, expected true or false")
    return default if value is None else value


def token_ids(values: Mapping[str, Any], name: str, vocab_size: int) -> tuple[int, ...]:
    """Reads token ids: one integer, a list of integers, or null."""
    value = values.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for item in ids:
        if isinstance(item, bool) or not isinstance(item, int):
            raise ConfigError(f"{name} is {shown(value)}, expected a token id or a list of them")
        if not 0 <= item < vocab_size:
            raise ConfigError(
                f"{name} has {shown(item)}, expected ids from 0 to vocab_size - 1 = "
                f"{vocab_size - 1}"
            )
    return tuple(dict.fromkeys(ids))


def same(left: object, right: object) -> bool:
    """Whether two JSON values are equal; true is not equal to 1, but 1.0 is."""
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def shown(value: object) -> str:
    """A value in the form for error messages: one line, truncated if it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return f"an integer of about 10**{int(math.log10(abs(value)))}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
